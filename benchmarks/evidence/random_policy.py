"""Measure the return of a uniform random policy on a Control Suite task, without rendering.

python benchmarks/evidence/random_policy.py cartpole balance --episodes 10
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "shared"))

import numpy as np
from results_file import RESULTS, write_results

from w2f_torchrl.utils.seeding import derive_seed  # isort: split

# After w2f_torchrl, which imports triton: see the package's docstring.
from dm_control import suite


def random_return(domain: str, task: str, seed: int, action_repeat: int) -> float:
    """Play one episode.

    Args:
        domain: Control Suite domain.
        task: Task of the domain.
        seed: Seed of the episode: the task's and the policy's.
        action_repeat: Control steps for which an action is held.

    Returns:
        Sum of the rewards of all control steps.
    """
    env = suite.load(domain, task, task_kwargs={"random": derive_seed(seed, "task")})
    generator = np.random.default_rng(derive_seed(seed, "policy"))
    spec = env.action_spec()
    total, step = 0.0, env.reset()
    while not step.last():
        action = generator.uniform(spec.minimum, spec.maximum, spec.shape)
        for _ in range(action_repeat):
            step = env.step(action)
            total += step.reward
            if step.last():
                break
    return total


def main() -> None:
    """Measure and write ``benchmarks/results/random_policy_<domain>_<task>.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("domain")
    parser.add_argument("task")
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--action-repeat", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if (args.domain, args.task) not in suite.ALL_TASKS:
        parser.error(f"{args.domain} {args.task} is not a Control Suite task.")
    returns = [
        random_return(args.domain, args.task, derive_seed(args.seed, "env", i), args.action_repeat)
        for i in range(args.episodes)
    ]
    name = f"{args.domain}_{args.task}"
    path = args.json or RESULTS / f"random_policy_{name}.json"
    results = {
        "task": name,
        "action_repeat": args.action_repeat,
        "episodes": args.episodes,
        "return_mean": float(np.mean(returns)),
        "return_sd": float(np.std(returns, ddof=1)) if len(returns) > 1 else 0.0,
        "returns": returns,
    }
    write_results(path, results)
    sys.stdout.write(
        f"{name}: {results['return_mean']:.1f} +- {results['return_sd']:.1f} "
        f"over {args.episodes} episodes\n"
    )


if __name__ == "__main__":
    main()

"""Measure the return of a uniform random policy on a task, without rendering.

python benchmarks/evidence/random_policy.py cartpole balance --episodes 10
python benchmarks/evidence/random_policy.py gym Ant-v5 --still  # all actions are zero
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "shared"))

import numpy as np
from omegaconf import OmegaConf
from results_file import RESULTS, write_results

from w2f_torchrl.utils.seeding import derive_seed  # isort: split

# After w2f_torchrl, which imports triton: see the package's docstring.
from dm_control import suite

Step = Callable[[Any], tuple[float, bool]]
"""A control step with an action: the reward, and whether the episode has ended."""


def on_suite(domain: str, task: str, seed: int, *, still: bool) -> tuple[Callable[[], Any], Step]:
    """Begin an episode of the Control Suite.

    Args:
        domain: Control Suite domain.
        task: Task of the domain.
        seed: Seed of the episode: the task's and the policy's.
        still: Whether all actions are zero.

    Returns:
        What draws an action, and what makes a control step.
    """
    env = suite.load(domain, task, task_kwargs={"random": derive_seed(seed, "task")})
    generator = np.random.default_rng(derive_seed(seed, "policy"))
    spec = env.action_spec()
    env.reset()

    def act() -> Any:
        drawn = generator.uniform(spec.minimum, spec.maximum, spec.shape)
        return np.zeros(spec.shape) if still else drawn

    def step(action: Any) -> tuple[float, bool]:
        result = env.step(action)
        return result.reward, result.last()

    return act, step


def on_gymnasium(
    task: str, seed: int, *, still: bool, kwargs: Mapping[str, Any] | None = None
) -> tuple[Callable[[], Any], Step]:
    """Begin an episode of a Gymnasium env made with ``kwargs``; see :func:`on_suite`."""
    import gymnasium

    env = gymnasium.make(task, **(kwargs or {}))
    env.action_space.seed(derive_seed(seed, "policy"))
    env.reset(seed=derive_seed(seed, "task"))

    def act() -> Any:
        drawn = env.action_space.sample()
        return np.zeros_like(drawn) if still else drawn

    def step(action: Any) -> tuple[float, bool]:
        _, reward, terminated, truncated, _ = env.step(action)
        return float(reward), terminated or truncated

    return act, step


def episode_return(act: Callable[[], Any], step: Step, action_repeat: int) -> float:
    """Return the sum of the rewards of all control steps of an episode.

    Args:
        act: Draws an action.
        step: Makes a control step.
        action_repeat: Control steps for which an action is held.
    """
    total, over = 0.0, False
    while not over:
        action = act()
        for _ in range(action_repeat):
            reward, over = step(action)
            total += reward
            if over:
                break
    return total


def main() -> None:
    """Measure and write ``benchmarks/results/random_policy_<domain>_<task>.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("domain", help="of the Control Suite, or gym")
    parser.add_argument("task", help="of the domain, or an id of Gymnasium")
    parser.add_argument("--kwargs", nargs="+", default=[], metavar="NAME=VALUE", help="of the id")
    parser.add_argument("--still", action="store_true", help="all actions are zero")
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--action-repeat", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.domain != "gym" and (args.domain, args.task) not in suite.ALL_TASKS:
        parser.error(f"{args.domain} {args.task} is not a Control Suite task.")
    returns = []
    for i in range(args.episodes):
        seed = derive_seed(args.seed, "env", i)
        if args.domain == "gym":
            kwargs = {str(k): v for k, v in OmegaConf.from_dotlist(args.kwargs).items()}
            act, step = on_gymnasium(args.task, seed, still=args.still, kwargs=kwargs)
        else:
            act, step = on_suite(args.domain, args.task, seed, still=args.still)
        returns.append(episode_return(act, step, args.action_repeat))
    name = f"{args.domain}_{args.task}"
    kind = "still" if args.still else "random"
    path = args.json or RESULTS / f"{kind}_policy_{name}.json"
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

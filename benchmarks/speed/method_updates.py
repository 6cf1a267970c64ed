"""Time an update of every method in one run, with the default networks and the same records.

    python benchmarks/speed/method_updates.py
    python benchmarks/speed/method_updates.py --model size12m --batch-size 8 --batch-length 32

The batch of ``experiment=cpu`` is the default. Every round times one update of each method in turn,
so that a drift of the machine's speed hits all: CPU time of the process on one thread. Kept are
medians, the median over the rounds of each ratio to ``dreamer_v3``, parameters, and the cost of an
action of four envs. Masks are not part of an update: a simulator's come with the picture, and
``benchmarks/evidence/student.py`` measures a student's.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "shared"))

import torch
from learner import ACTION_SIZE, make_sample, measure, summarise
from results_file import RESULTS, write_results
from tensordict import TensorDict

from w2f_torchrl.config import METHODS
from w2f_torchrl.modules import PRESETS, latent_sizes
from w2f_torchrl.trainers import Learner
from w2f_torchrl.utils.memory import keep_freed_memory

BASELINE = "dreamer_v3"
ACTING_ENVS = 4


def contenders(model: str) -> dict[str, Learner]:
    """A learner of each method, and of each latent of World2Filter, from the same seed."""
    wanted = {name: (name, method.latent) for name, method in METHODS.items()}
    wanted |= {latent: ("world2filter", latent) for latent in ("foreground", "shared", "split")}
    made = {}
    for name, (algorithm, latent) in wanted.items():
        torch.manual_seed(0)
        made[name] = Learner(
            PRESETS[model], action_size=ACTION_SIZE, latent=latent, algorithm=algorithm
        )
    return made


def observation(model: str) -> TensorDict:
    """What a policy reads of four envs."""
    sizes = latent_sizes(PRESETS[model], ACTION_SIZE)
    seen = make_sample(ACTING_ENVS, 1)["next"][:, 0]
    carried = {key: torch.zeros(ACTING_ENVS, size) for key, size in sizes.items()}
    is_init = torch.zeros(ACTING_ENVS, 1, dtype=torch.bool)
    read = {key: seen[key] for key in ("pixels", "foreground_mask")}
    return TensorDict({**read, **carried, "is_init": is_init}, [ACTING_ENVS])


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Time updates and actions."""
    learners = contenders(args.model)
    sample, seen = make_sample(args.batch_size, args.batch_length), observation(args.model)

    def acting(learner: Learner) -> Any:
        def act(observed: TensorDict) -> None:
            with torch.no_grad():
                learner.policy(observed.clone())

        return act

    updates = {name: (learner.update, sample) for name, learner in learners.items()}
    actions = {name: (acting(learner), seen) for name, learner in learners.items()}
    return {
        "model": args.model,
        "batch": [args.batch_size, args.batch_length],
        "rounds": args.rounds,
        "update": summarise(measure(updates, args.rounds, "cpu")[0], (BASELINE,)),
        "action": summarise(measure(actions, args.rounds, "cpu")[0], (BASELINE,)),
        "parameters": {
            name: sum(p.numel() for p in learner.parameters_trained)
            for name, learner in learners.items()
        },
    }


def table(found: dict[str, Any]) -> str:
    """The figures in Markdown, the cheapest first."""
    lines = ["| method | update, ms | ratio | action, ms | parameters |", "|---|---|---|---|---|"]
    rows = found["update"]
    ratio = f"ratio_to_{BASELINE}"
    for name in sorted(rows, key=lambda each: rows[each][ratio]):
        milliseconds = [1e3 * found[kind][name]["median_seconds"] for kind in ("update", "action")]
        lines.append(
            f"| `{name}` | {milliseconds[0]:.0f} | {rows[name][ratio]:.2f} | "
            f"{milliseconds[1]:.1f} | {found['parameters'][name] / 1e6:.2f} M |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=PRESETS, default="size1m")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batch-length", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, default=RESULTS / "method_updates.json")
    args = parser.parse_args()
    logging.getLogger("torchrl").setLevel(logging.ERROR)
    keep_freed_memory()
    torch.set_num_threads(1)
    found = run(args)
    print(table(found))
    write_results(args.json, found)


if __name__ == "__main__":
    main()

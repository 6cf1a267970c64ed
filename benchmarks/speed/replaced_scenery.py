"""Time the replacement of scenery (augmentation.scenery), compared with an update.

    python benchmarks/speed/replaced_scenery.py

For the batches of ``experiment=cpu`` (size1m, 8 x 16) and of the paper (size12m, 16 x 64): CPU time
on one thread of an update of ``split``, and of the replacement in half and in all of the sequences,
in turn in one run. Kept are medians and the median ratio to the update.
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

from w2f_torchrl.envs.scenery.backgrounds import load_clips
from w2f_torchrl.modules import PRESETS
from w2f_torchrl.trainers import Learner
from w2f_torchrl.transforms import ReplacedSceneryTransform
from w2f_torchrl.utils.memory import keep_freed_memory

CASES = {"size1m": (8, 16), "size12m": (16, 64)}
SHARES = (0.5, 1.0)
SIZE = 64


def run(model: str, rounds: int) -> dict[str, Any]:
    """Time updates of a model, and replacements in their batch."""
    learner = Learner(PRESETS[model], action_size=ACTION_SIZE, latent="split")
    sample = make_sample(*CASES[model])
    clips = load_clips(None, "train", None, SIZE)

    def replacing(share: float) -> Any:
        transform = ReplacedSceneryTransform(clips, share)
        return lambda data: transform(data.copy())

    timed: dict[str, tuple[Any, TensorDict]] = {"update": (learner.update, sample)}
    timed |= {f"share {share}": (replacing(share), sample) for share in SHARES}
    found = summarise(measure(timed, rounds, "cpu")[0], ("update",))
    return {"batch": list(CASES[model]), "rounds": rounds, "cases": found}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, default=RESULTS / "replaced_scenery.json")
    args = parser.parse_args()
    logging.getLogger("torchrl").setLevel(logging.ERROR)
    keep_freed_memory()
    torch.set_num_threads(1)
    found = {model: run(model, args.rounds) for model in args.models}
    for model, row in found.items():
        for name, case in row["cases"].items():
            print(model, name, f"{1e3 * case['median_seconds']:.1f} ms", case["ratio_to_update"])
    write_results(args.json, {"models": found})


if __name__ == "__main__":
    main()

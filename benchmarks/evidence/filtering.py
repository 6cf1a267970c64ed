"""Probe what the latents of checkpoints know about the agent and about the scenery.

python benchmarks/evidence/filtering.py runs/a/checkpoints/checkpoint_000000001000.pt runs/b \
    --set train_videos_easy --json benchmarks/results/filtering.json

Takes checkpoints or run directories (their newest checkpoint). Every model of a task and a set
sees the same episodes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "shared"))

import torch
from find_checkpoint import find_checkpoint
from results_file import write_results

from w2f_torchrl.algorithms.masked_input import student_of
from w2f_torchrl.envs import evaluation_sets
from w2f_torchrl.evaluation import Score
from w2f_torchrl.evaluation.policy import load_learner
from w2f_torchrl.evaluation.run_filtering import FilteringMeter
from w2f_torchrl.learner.learner import Learner
from w2f_torchrl.utils.seeding import derive_seed

COLUMNS = (
    ("clip, linear", "leakage", "clip", "linear"),
    ("clip, neighbours", "leakage", "clip", "neighbours"),
    ("clip, mlp", "leakage", "clip", "mlp"),
    ("chance", "leakage", "clip", "chance"),
    ("camera R2", "leakage", "camera", "linear"),
    ("colour R2", "leakage", "color", "linear"),
    ("pose R2", "content", "pose", "linear"),
    ("velocity R2", "content", "velocity", "linear"),
)
PICTURES = ("foreground_psnr", "background_psnr", "mask_iou")
CHANGES = ("action_change", "action_change_relative", "value_change", "value_change_relative")


def measure(path: Path, set_name: str | None, episodes: int, seed: int) -> dict[str, Any]:
    """Measure one checkpoint, and an untrained model of the same sizes."""
    checkpoint = find_checkpoint(path)
    config, learner, action_size = load_learner(checkpoint)
    chosen = None if set_name is None else evaluation_sets()[set_name]
    meter = FilteringMeter(config.environment, episodes, seed, chosen)
    environment = config.environment
    torch.manual_seed(derive_seed(seed, "untrained"))
    untrained = Learner.from_config(config, action_size).world_model
    return {
        "run": checkpoint.parent.parent.name,
        "checkpoint": checkpoint.name,
        "algo": config.algo.name,
        "latent": config.latent,
        "task": f"{environment.domain} {environment.task}",
        "set": set_name or f"the run's own ({environment.distraction})",
        "model": config.model.preset,
        "run_seed": config.seed,
        "episodes": len(meter.episodes),
        "frames": sum(map(len, meter.episodes)),
        "measures": plain(
            meter.measure(learner.loss, untrained=untrained, segment=student_of(learner.policy))
        ),
    }


def plain(value: Any) -> Any:
    """Scores as mean and std, for JSON."""
    if isinstance(value, Score):
        return {"mean": value.mean, "std": value.std}
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    return value


def tables(results: list[dict[str, Any]]) -> str:
    """Return two tables in Markdown: the probes' scores, and pictures and changes."""
    head = ["run", "latent", *(name for name, *_ in COLUMNS)]
    rows = []
    for each in results:
        for latent in each["measures"]["leakage"]:
            found = [
                each["measures"][kind][latent].get(key, {}).get(probe)
                for _, kind, key, probe in COLUMNS
            ]
            cells = ["-" if f is None else f"{f['mean']:.2f} ± {f['std']:.2f}" for f in found]
            rows.append([each["run"], latent, *cells])
    drawn = []
    for each in results:
        measures = each["measures"]
        values = [measures["reconstruction"][name] for name in PICTURES]
        values += [measures.get("replacement", {}).get(name) for name in CHANGES]
        drawn.append([each["run"], *("-" if v is None else f"{v:.3g}" for v in values)])
    return markdown(head, rows) + "\n" + markdown(["run", *PICTURES, *CHANGES], drawn)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """One table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Measure, print the tables, and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--set", choices=evaluation_sets(), help="default: as the run was trained")
    parser.add_argument("--episodes", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = [measure(path, args.set, args.episodes, args.seed) for path in args.checkpoints]
    print(tables(results))
    if args.json is not None:
        print(write_results(args.json, {"results": results}))


if __name__ == "__main__":
    main()

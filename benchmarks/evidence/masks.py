r"""Measure IoU, boundary error and cost of segmenters against the simulator's masks.

python benchmarks/evidence/masks.py --segmenter student=runs/demo/student.pt --segmenter median
python benchmarks/evidence/masks.py --segmenter sam3=checkpoints/sam3.pt --prompts robot figure
python benchmarks/evidence/masks.py --choose-prompts checkpoints/sam3.pt --prompts robot "a leg"

A segmenter is ``median``, ``student=PATH`` or ``sam3=PATH``. Frames come from a random policy on
the distraction's validation backgrounds; the median learns each env's background from other frames.
Cost is CPU time (wall-clock time on CUDA) in batches of 64. ``--choose-prompts`` ranks prompts,
each by itself, by IoU on 50 frames of every task.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "shared"))

import numpy as np
import torch
from matplotlib.figure import Figure
from results_file import RESULTS, write_results
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from w2f_torchrl.envs import make_env
from w2f_torchrl.logging.pictures.contact_sheet import overlay
from w2f_torchrl.logging.pictures.plotting import save_figure
from w2f_torchrl.masks.prepare import collect_frames
from w2f_torchrl.segmenters import (
    MedianSegmenter,
    Sam3Segmenter,
    Segmenter,
    StudentSegmenter,
    boundary_error,
    mask_iou,
)

TASKS = (
    "walker walk",
    "cheetah run",
    "cartpole swingup",
    "ball_in_cup catch",
    "reacher easy",
    "finger turn_easy",
)


def frames_of(
    name: str,
    distraction: str,
    count: int,
    seed: int,
    split: str = "val",
    every: int = 3,
    source: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Frames uint8 [N, 3, 64, 64] and the simulator's masks, of a random policy."""
    domain, task = name.split()
    make = partial(make_env, domain, task, distraction=distraction, seed=seed)
    videos = {"background_split": split, "background_source": source}
    env = make() if distraction == "none" else make(**videos)
    data = collect_frames(env, count, seed, every)
    return data["pixels"], data["foreground_mask"]


def make_segmenter(spec: str, prompts: list[str], resolution: int | None) -> Segmenter:
    """Make a segmenter from its name on the command line."""
    kind, _, path = spec.partition("=")
    if kind == "median":
        return MedianSegmenter()
    if kind == "student":
        return StudentSegmenter.load(path)
    if kind == "sam3":
        return Sam3Segmenter(prompts, checkpoint=path or None, resolution=resolution)
    sys.exit(f"--segmenter {spec!r}: must be median, student=PATH or sam3=PATH.")


def network_of(segmenter: Segmenter) -> nn.Module | None:
    """The network that computes, if one does."""
    return getattr(segmenter, "network", getattr(segmenter, "model", None))


def cost(segmenter: Segmenter, pixels: Tensor, rounds: int = 5) -> dict[str, float]:
    """Milliseconds, and GFLOP (a multiplication and an addition are two), of a frame."""
    network, batch = network_of(segmenter), pixels[:64]
    on_cuda = network is not None and next(network.parameters()).is_cuda
    clock = time.perf_counter if on_cuda else time.process_time
    segmenter(batch)
    times = []
    for _ in range(rounds):
        start = clock()
        segmenter(batch)  # ends with a copy to the host, so CUDA has finished
        times.append((clock() - start) / len(batch) * 1e3)
    with FlopCounterMode(display=False) as counter:
        segmenter(batch[:1])
    return {
        "milliseconds": round(float(np.median(times)), 4),
        "gflop": round(counter.get_total_flops() / 1e9, 5),
    }


def score(segmenter: Segmenter, pixels: Tensor, masks: Tensor) -> dict[str, float]:
    """Mean IoU and boundary error (pixels) against the simulator's masks."""
    found = segmenter(pixels)
    return {
        "iou": round(float(mask_iou(found, masks).mean()), 4),
        "boundary_error": round(float(boundary_error(found, masks).mean()), 3),
    }


def rank_prompts(
    checkpoint: str, prompts: list[str], resolution: int | None, data: dict[str, Any]
) -> dict[str, dict[str, float]]:
    """IoU of each prompt by itself, best first, for every task."""
    ranking: dict[str, dict[str, float]] = {name: {} for name in data}
    for prompt in prompts:
        segmenter = Sam3Segmenter([prompt], checkpoint=checkpoint, resolution=resolution)
        for name, (pixels, masks) in data.items():
            ranking[name][prompt] = score(segmenter, pixels[:50], masks[:50])["iou"]
    return {
        name: dict(sorted(ious.items(), key=lambda item: -item[1]))
        for name, ious in ranking.items()
    }


def draw(data: dict[str, Any], segmenters: dict[str, Segmenter], path: Path) -> Path:
    """A row for each task: the frame, the simulator's mask over it, and each segmenter's."""
    figure = Figure(figsize=(2 * (2 + len(segmenters)), 2 * len(data)), layout="constrained")
    grid = figure.subplots(len(data), 2 + len(segmenters), squeeze=False)
    for row, (name, (pixels, masks)) in zip(grid, data.items(), strict=True):
        frame = pixels[len(pixels) // 2]
        pictures = {"frame": frame, "simulator": overlay(frame, masks[len(pixels) // 2])}
        for label, segmenter in segmenters.items():
            pictures[label] = overlay(frame, segmenter(frame.unsqueeze(0))[0])
        for axes, (label, picture) in zip(row, pictures.items(), strict=True):
            axes.imshow(picture.permute(1, 2, 0).numpy())
            axes.set_title(f"{name}\n{label}" if label == "frame" else label, fontsize=8)
            axes.axis("off")
    return save_figure(figure, path)


def main() -> None:
    """Measure, and write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--segmenter", action="append", default=[], help="see above; repeatable")
    parser.add_argument("--choose-prompts", metavar="CHECKPOINT")
    parser.add_argument("--prompts", nargs="+", default=["robot"])
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), metavar='"DOMAIN TASK"')
    parser.add_argument("--distractions", nargs="+", default=["none", "easy"])
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--json", type=Path, default=RESULTS / "masks.json")
    parser.add_argument("--picture", type=Path, help="of overlays, with the last distraction")
    args = parser.parse_args()
    if args.choose_prompts and not Path(args.choose_prompts).is_file():
        parser.error(f"--choose-prompts {args.choose_prompts} does not exist.")
    torch.set_num_threads(1)
    table: dict[str, Any] = {}
    segmenters = {
        spec: make_segmenter(spec, args.prompts, args.resolution) for spec in args.segmenter
    }
    data: dict[str, Any] = {}
    for distraction in args.distractions:
        data = {name: frames_of(name, distraction, args.frames, seed=7) for name in args.tasks}
        for spec, segmenter in segmenters.items():
            rows = table.setdefault(spec, {}).setdefault(distraction, {})
            for name, (pixels, masks) in data.items():
                if isinstance(segmenter, MedianSegmenter):
                    segmenter.fit(frames_of(name, distraction, 200, seed=8)[0])
                rows[name] = score(segmenter, pixels, masks)
                print(f"{spec} {distraction} {name}: {rows[name]}", file=sys.stderr)
    pixels = next(iter(data.values()))[0]
    results = {
        "settings": {"frames": args.frames, "prompts": args.prompts, "policy": "random"},
        "against_the_simulator": table,
        "cost_per_frame": {name: cost(each, pixels) for name, each in segmenters.items()},
    }
    if args.choose_prompts:
        results["prompts_by_iou"] = rank_prompts(
            args.choose_prompts, args.prompts, args.resolution, data
        )
    if args.picture:
        print(draw(data, segmenters, args.picture))
    print(write_results(args.json, results))


if __name__ == "__main__":
    main()

"""Draw the distractions: one row per task, one column per distraction, each with its mask.

python benchmarks/pictures/distraction_gallery.py --out docs/images/distractions.png
python benchmarks/pictures/distraction_gallery.py --columns scenery --out docs/images/scenery.png

The second draws scenery that reacts, each kind of corruption, and the stand-ins for DMControl-GB.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from still import Picture, frame_and_mask

from w2f_torchrl.envs import CorruptionConfig, DistractionConfig, PixelDMControlEnv, evaluation_sets
from w2f_torchrl.envs.scenery.distractions import CORRUPTIONS
from w2f_torchrl.logging.pictures.plotting import save_figure

TASKS = (
    "ball_in_cup catch",
    "cartpole swingup",
    "cheetah run",
    "finger spin",
    "reacher easy",
    "walker walk",
)
LARGE = DistractionConfig.of_difficulty
COLUMNS = {
    "none": ("none", "fast"),
    "background": (LARGE("medium", camera=False, color=False), "fast"),
    "camera": (LARGE("hard", background=False, color=False), "fast"),
    "colour": (LARGE("hard", background=False, camera=False), "fast"),
    "easy": ("easy", "fast"),
    "medium": ("medium", "fast"),
    "easy, reference": ("easy", "reference"),
    "medium, reference": ("medium", "reference"),
}


def always(kind: str) -> DistractionConfig:
    """Return a corruption of one kind in nearly every frame, in front of a video."""
    others = dict.fromkeys(set(CORRUPTIONS) - {kind}, 0.0)
    corruption = CorruptionConfig(**others, start=1.0, stop=0.01)
    return replace(LARGE("medium", camera=False, color=False), corruption=corruption)


def stand_in(mode: str) -> DistractionConfig:
    """Return the distraction of a stand-in for one of DMControl-GB's test sets."""
    distraction = evaluation_sets()[f"dmcgb_{mode}_stand_in"].distraction
    assert distraction is not None, "only the clean set has none"
    return distraction


SCENERY = {
    "reactive": ("reactive_action", "fast"),
    "reactive, reference": ("reactive_action", "reference"),
    **{kind: (always(kind), "fast") for kind in CORRUPTIONS},
    "color_hard stand-in": (stand_in("color_hard"), "fast"),
    "video_easy stand-in": (stand_in("video_easy"), "fast"),
    "video_hard stand-in": (stand_in("video_hard"), "fast"),
}


def frame_beside_mask(
    name: str, distraction: str | DistractionConfig, render: str, image_size: int, seed: int
) -> Picture:
    """Return a frame after a few random steps, next to its mask.

    Returns:
        uint8 [H, 2 W, 3].
    """
    domain, task = name.split()
    env = PixelDMControlEnv(
        domain,
        task,
        image_size=image_size,
        render=render,  # type: ignore[arg-type]
        distraction=distraction,
        seed=seed,
    )
    frame, mask = frame_and_mask(env)
    return np.concatenate([frame, np.repeat(mask * np.uint8(255), 3, axis=2)], axis=1)


def main() -> None:
    """Draw the gallery."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/images/distractions.png"))
    parser.add_argument("--columns", choices=("suite", "scenery"), default="suite")
    parser.add_argument("--image-size", type=int, default=84)
    args = parser.parse_args()
    columns = COLUMNS if args.columns == "suite" else SCENERY
    figure = Figure(figsize=(2.4 * len(columns), 1.28 * len(TASKS)), layout="constrained")
    for row, name in zip(figure.subplots(len(TASKS), len(columns)), TASKS, strict=True):
        for axes, (title, setting) in zip(row, columns.items(), strict=True):
            seed = 3 + TASKS.index(name)
            axes.imshow(frame_beside_mask(name, *setting, image_size=args.image_size, seed=seed))
            axes.set(xticks=[], yticks=[])
            if name == TASKS[0]:
                axes.set_title(title, fontsize=11)
            if title == next(iter(columns)):
                axes.set_ylabel(name.replace(" ", "\n"), fontsize=9)
    print(save_figure(figure, args.out))


if __name__ == "__main__":
    main()

"""Draw the distractions: one row per task, one column per distraction, each with its mask.

python benchmarks/pictures/distraction_gallery.py --out docs/images/distractions.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from still import Picture, frame_and_mask

from w2f_torchrl.envs import DistractionConfig, PixelDMControlEnv
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
    parser.add_argument("--image-size", type=int, default=84)
    args = parser.parse_args()
    figure = Figure(figsize=(2.4 * len(COLUMNS), 1.28 * len(TASKS)), layout="constrained")
    for row, name in zip(figure.subplots(len(TASKS), len(COLUMNS)), TASKS, strict=True):
        for axes, (title, setting) in zip(row, COLUMNS.items(), strict=True):
            seed = 3 + TASKS.index(name)
            axes.imshow(frame_beside_mask(name, *setting, image_size=args.image_size, seed=seed))
            axes.set(xticks=[], yticks=[])
            if name == TASKS[0]:
                axes.set_title(title, fontsize=11)
            if title == "none":
                axes.set_ylabel(name.replace(" ", "\n"), fontsize=9)
    print(save_figure(figure, args.out))


if __name__ == "__main__":
    main()

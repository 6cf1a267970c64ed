r"""Draw the simulator's masks: frames, and the same frames with the background dimmed.

python benchmarks/pictures/mask_gallery.py --out docs/images/masks.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from still import Picture, frame_and_mask

from w2f_torchrl.envs import PixelDMControlEnv
from w2f_torchrl.logging.pictures.plotting import save_figure

TASKS = (
    "walker walk",
    "cheetah run",
    "hopper hop",
    "quadruped walk",
    "cartpole swingup",
    "reacher easy",
    "finger turn_easy",
    "ball_in_cup catch",
    "manipulator bring_ball",
    "fish swim",
    "dog walk",
    "humanoid walk",
)
COLUMNS = 6
BACKGROUND = np.array([30, 120, 90])


def frame_and_overlay(domain: str, task: str, image_size: int) -> Picture:
    """A frame after a few random steps, above the same frame with its background tinted.

    Returns:
        uint8 [2H, W, 3].
    """
    env = PixelDMControlEnv(domain, task, image_size=image_size, seed=3)
    frame, mask = frame_and_mask(env)
    tinted = (0.2 * frame + 0.5 * BACKGROUND).astype(np.uint8)
    return np.concatenate([frame, np.where(mask, frame, tinted)])


def main() -> None:
    """Draw the gallery."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/images/masks.png"))
    parser.add_argument("--image-size", type=int, default=192)
    args = parser.parse_args()
    rows = -(-len(TASKS) // COLUMNS)
    figure = Figure(figsize=(2.0 * COLUMNS, 4.3 * rows), layout="constrained")
    for axes, name in zip(figure.subplots(rows, COLUMNS).flat, TASKS, strict=True):
        axes.imshow(frame_and_overlay(*name.split(), image_size=args.image_size))
        axes.set_title(name, fontsize=10)
        axes.axis("off")
    print(save_figure(figure, args.out))


if __name__ == "__main__":
    main()

r"""Draw MuJoCo envs of other packages: a frame, its mask, and frames with distractions.

python benchmarks/pictures/mujoco_anywhere.py --out docs/images/mujoco_anywhere.png

Meta-World's rows need it (docs/howto/mujoco.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from w2f_torchrl.envs import make_env
from w2f_torchrl.logging.pictures.plotting import save_figure

METAWORLD = "w2f_torchrl.envs.gym.metaworld:Meta-World/MT1"
ROWS: dict[str, dict[str, Any]] = {
    "Ant-v5": {"task": "Ant-v5", "camera_id": "track"},
    "HalfCheetah-v5": {"task": "HalfCheetah-v5", "camera_id": "track"},
    "Pusher-v5": {"task": "Pusher-v5"},
    "drawer-open-v3": {"task": METAWORLD, "kwargs": {"env_name": "drawer-open-v3"}},
}
VIDEO = {"num_videos": 1}
COLUMNS: dict[str, Any] = {
    "frame": "none",
    "mask": None,
    "video": {"background": VIDEO},
    "video for the sky": {"background": {**VIDEO, "replaces": "sky"}},
    "video, camera, colours": {
        "background": VIDEO,
        "camera": {"scale": 0.2},
        "color": {"scale": 0.3},
    },
    "reacts to the action": "reactive_action",
}
STEPS = 15


def frame_and_mask(distraction: Any, image_size: int, task: str, **settings: Any) -> Any:
    """Play random actions, the same for all distractions.

    Returns:
        The last frame, uint8 ``[H, W, 3]``, and its mask ``[H, W]``.
    """
    np.random.seed(0)  # noqa: NPY002  # Meta-World draws its goals from it
    env = make_env("gym", task, image_size=image_size, seed=1, distraction=distraction, **settings)
    generator = torch.Generator().manual_seed(0)
    data = env.reset()
    for _ in range(STEPS):
        data["action"] = torch.rand(env.action_spec.shape, generator=generator) * 2 - 1
        data = env.step(data)["next"]
    env.close()
    return data["pixels"].permute(1, 2, 0).numpy(), data["foreground_mask"][0].numpy()


def main() -> None:
    """Draw the gallery."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/images/mujoco_anywhere.png"))
    parser.add_argument("--image-size", type=int, default=112)
    args = parser.parse_args()
    figure = Figure(figsize=(1.3 * len(COLUMNS), 1.35 * len(ROWS)), layout="constrained")
    grid = figure.subplots(len(ROWS), len(COLUMNS))
    for axes, title in zip(grid[0], COLUMNS, strict=True):
        axes.set_title(title, fontsize=7)
    for row, (name, settings) in zip(grid, ROWS.items(), strict=True):
        mask = None
        for axes, distraction in zip(row, COLUMNS.values(), strict=True):
            if distraction is None:
                axes.imshow(mask, cmap="gray")
            else:
                frame, found = frame_and_mask(distraction, args.image_size, **settings)
                mask = found if mask is None else mask
                axes.imshow(frame)
            axes.set_xticks([])
            axes.set_yticks([])
        row[0].set_ylabel(name, fontsize=8)
    print(save_figure(figure, args.out))


if __name__ == "__main__":
    main()

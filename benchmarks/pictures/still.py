"""A frame for the galleries: an env after a few random steps."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from w2f_torchrl.envs import PixelDMControlEnv

STEPS = 12

Picture = npt.NDArray[np.uint8]


def frame_and_mask(env: PixelDMControlEnv) -> tuple[Picture, npt.NDArray[np.bool_]]:
    """Play random actions, the same for all envs of a task, and close the env.

    Returns:
        The last frame, uint8 ``[H, W, 3]``, and its mask ``[H, W, 1]``.
    """
    generator = torch.Generator().manual_seed(0)
    env.reset()
    data = env.reset()
    for _ in range(STEPS):
        data["action"] = torch.rand(env.action_spec.shape, generator=generator) * 2 - 1
        data = env.step(data)["next"]
    env.close()
    frame, mask = (data[key].permute(1, 2, 0).numpy() for key in ("pixels", "foreground_mask"))
    return frame, mask

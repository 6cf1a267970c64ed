"""Other colours for pictures of scenery: order of channels, brightness, contrast, saturation."""

from __future__ import annotations

import torch
from torch import Tensor

GAIN = (0.5, 1.6)
"""Range of the factor of all colours."""
SATURATION = (0.3, 3.0)
"""Range of the factor of a colour's distance from its grey."""
OFFSET = 60.0
"""Maximum change of a channel, in colour levels."""


def draw_recoloring(generator: torch.Generator) -> Tensor:
    """Draw a matrix ``[3, 4]`` from colours in [0, 255], and 1, to other colours."""
    gain, saturation = (
        low * (high / low) ** torch.rand((), generator=generator)
        for low, high in (GAIN, SATURATION)
    )
    order = torch.randperm(3, generator=generator)
    grey = torch.full((3, 3), 1 / 3)
    linear = gain * (grey + saturation * (torch.eye(3)[order] - grey))
    # Contrast changes around the middle grey.
    offset = 128 * (1 - gain) + OFFSET * (2 * torch.rand(3, generator=generator) - 1)
    return torch.cat([linear, offset.unsqueeze(-1)], -1)


def recolored(frames: Tensor, matrices: Tensor) -> Tensor:
    """Change the colours of pictures.

    Args:
        frames: uint8 ``[N, T, 3, H, W]``.
        matrices: float32 ``[N, 3, 4]``.

    Returns:
        uint8 ``[N, T, 3, H, W]``.
    """
    linear, offset = matrices[:, :, :3], matrices[:, :, 3]
    changed = torch.einsum("ncd,ntdhw->ntchw", linear, frames.float())
    changed = changed + offset[:, None, :, None, None]
    return changed.round_().clamp_(0, 255).to(torch.uint8)

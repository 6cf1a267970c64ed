"""Contact sheets of masks: frames whose unmasked pixels are tinted."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from w2f_torchrl.logging.pictures.video import write_image

TINT = torch.tensor([30.0, 120.0, 90.0]).view(3, 1, 1)


def overlay(pixels: Tensor, masks: Tensor) -> Tensor:
    """Tint the pixels outside the masks.

    Args:
        pixels: uint8 ``[..., 3, H, W]``.
        masks: bool ``[..., 1, H, W]``.

    Returns:
        uint8 ``[..., 3, H, W]``.
    """
    return torch.where(masks, pixels, (0.25 * pixels + 0.5 * TINT).to(torch.uint8))


def draw_contact_sheet(pixels: Tensor, masks: Tensor, path: str | Path, columns: int = 8) -> Path:
    """Write an image of frames, each above its :func:`overlay`, row by row.

    Args:
        pixels: uint8 ``[N, 3, H, W]``, N at least 1.
        masks: bool ``[N, 1, H, W]``.
        path: A .png file; directories are created.
        columns: Frames per row.

    Returns:
        The path.
    """
    pairs = torch.cat([pixels, overlay(pixels, masks)], -2)  # [N, 3, 2H, W]
    blank = pairs.new_zeros((-len(pairs) % columns, *pairs.shape[1:]))
    grid = torch.cat([pairs, blank]).unflatten(0, (-1, columns))  # [R, columns, 3, 2H, W]
    sheet = grid.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)  # [3, R * 2H, columns * W]
    return write_image(path, sheet)

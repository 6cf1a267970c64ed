"""What every segmenter is, and how masks are compared."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Segmenter(Protocol):
    """Anything that finds the foreground: uint8 ``[N, 3, H, W]`` to bool ``[N, 1, H, W]``.

    A confidence in [0, 1], float, is as good as a bool mask.
    """

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the masks of a batch of pictures."""
        ...


def mask_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of masks, picture by picture.

    Args:
        a: bool ``[..., 1, H, W]``.
        b: bool ``[..., 1, H, W]``.

    Returns:
        float32 ``[...]`` in [0, 1]; 1 where both masks are empty.

    Raises:
        TypeError: If a mask is not bool.
        ValueError: If the shapes differ.
    """
    if a.dtype is not torch.bool or b.dtype is not torch.bool:
        raise TypeError(f"masks must be bool, got {a.dtype} and {b.dtype}.")
    if a.shape != b.shape:
        raise ValueError(f"masks must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}.")
    intersection = (a & b).sum((-1, -2, -3))
    union = (a | b).sum((-1, -2, -3))
    return torch.where(union > 0, intersection / union.clamp_min(1), 1.0)

"""The protocol of segmenters, checks of their input and output, and comparisons of masks."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from w2f_torchrl.utils.tensors import check_tensor, check_unit_interval


@runtime_checkable
class Segmenter(Protocol):
    """Any callable that finds the foreground: uint8 ``[N, 3, H, W]`` to bool ``[N, 1, H, W]``.

    A segmenter may return float confidences in [0, 1] instead of bool masks. It then has an
    attribute ``confidence = True``, which
    :class:`~w2f_torchrl.transforms.ForegroundMaskTransform` reads to put the right dtype in the
    spec. Masks are on the device of the images.
    """

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the masks of a batch of images."""
        ...


def check_pixels(pixels: Tensor) -> None:
    """Refuse anything that is not a batch of images.

    Raises:
        TypeError: If the dtype is not uint8: the range of values is never guessed.
        ValueError: If the shape is not ``[N, 3, H, W]``.
    """
    if not isinstance(pixels, Tensor) or pixels.dtype is not torch.uint8:
        got = pixels.dtype if isinstance(pixels, Tensor) else type(pixels).__name__
        raise TypeError(f"pixels must be uint8 in [0, 255], got {got}.")
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.shape[2:].numel():
        raise ValueError(f"pixels must have the shape [N, 3, H, W], got {tuple(pixels.shape)}.")


def check_masks(masks: Tensor, pixels: Tensor) -> None:
    """Refuse masks that do not match the images.

    Raises:
        TypeError: If the masks are neither bool nor floating point.
        ValueError: If their shape is not the images' ``[N, 1, H, W]``, or a confidence is not in
            [0, 1].
    """
    check_tensor("masks", masks, None, ("...",), empty=True)
    wanted = (pixels.shape[0], 1, *pixels.shape[2:])
    if tuple(masks.shape) != wanted:
        raise ValueError(
            f"masks of pixels {tuple(pixels.shape)} must have the shape {wanted}, got "
            f"{tuple(masks.shape)}."
        )
    check_unit_interval("masks", masks)


def mask_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the intersection over union of masks, image by image.

    Args:
        a: bool ``[..., 1, H, W]``.
        b: bool ``[..., 1, H, W]``.

    Returns:
        float32 ``[...]`` in [0, 1]; 1 if both masks are empty.

    Raises:
        TypeError: If a mask is not bool.
        ValueError: If the shapes differ, or are not those of masks.
    """
    _check_pair(a, b)
    intersection = (a & b).sum((-1, -2, -3))
    union = (a | b).sum((-1, -2, -3))
    return torch.where(union > 0, intersection / union.clamp_min(1), 1.0)


def boundary_error(a: Tensor, b: Tensor) -> Tensor:
    """Return the distance between the outlines of two masks, image by image.

    This is the mean over both outlines' pixels of the distance to the nearest pixel of the other
    outline (average symmetric surface distance), in pixels, with the chessboard metric. An outline
    consists of the mask's pixels that touch the outside, diagonals included.

    Args:
        a: bool ``[N, 1, H, W]``.
        b: bool ``[N, 1, H, W]``.

    Returns:
        float32 ``[N]``; 0 if both masks are empty, the longer side if only one is.

    Raises:
        TypeError: If a mask is not bool.
        ValueError: If the shapes differ.
    """
    _check_pair(a, b)
    check_tensor("masks", a, torch.bool, ("N", 1, "H", "W"), empty=True)
    longest = max(a.shape[-2:])
    outlines = torch.stack([_outline(a), _outline(b)])  # [2, N, 1, H, W]
    reached = outlines.flip(0).float()
    distance = torch.where(reached.bool(), 0.0, float(longest))
    for radius in range(1, longest):
        grown = max_pool2d(reached.flatten(0, 1), 3, 1, 1).view_as(reached)
        distance = torch.where((grown > 0) & (reached == 0), float(radius), distance)
        if torch.equal(grown, reached):
            break
        reached = grown
    count = outlines.sum((0, -1, -2, -3))
    total = (distance * outlines).sum((0, -1, -2, -3))
    return torch.where(count > 0, total / count.clamp_min(1), 0.0)


def _outline(mask: Tensor) -> Tensor:
    outside = torch.nn.functional.pad((~mask).float(), (1, 1, 1, 1), value=1.0)
    return mask & (max_pool2d(outside, 3, 1) > 0)


def _check_pair(a: Tensor, b: Tensor) -> None:
    for masks in (a, b):
        check_tensor("masks", masks, None, ("...", 1, "H", "W"), empty=True)
    if a.dtype is not torch.bool or b.dtype is not torch.bool:
        raise TypeError(f"masks must be bool, got {a.dtype} and {b.dtype}.")
    if a.shape != b.shape:
        raise ValueError(f"masks must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}.")

"""Reconstruction losses of pictures, with and without masks.

Every loss is a sum over the pixels and channels of a picture and a mean over pictures, the scale
that DreamerV3's other loss weights assume.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

ForegroundTarget = Literal["inside", "zero_outside"]
FOREGROUND_TARGETS = ("inside", "zero_outside")


def picture_target(pixels: Tensor) -> Tensor:
    """Map uint8 pixels to the targets in [0, 1].

    Raises:
        TypeError: If the pixels are not uint8; a range is never guessed.
    """
    if pixels.dtype is not torch.uint8:
        raise TypeError(f"pixels must be uint8, got {pixels.dtype}.")
    return pixels.float() / 255


def _check_mask(mask: Tensor, pixels: Tensor) -> Tensor:
    expected = (*pixels.shape[:-3], 1, *pixels.shape[-2:])
    if mask.shape != expected:
        raise ValueError(f"foreground_mask must have shape {expected}, got {tuple(mask.shape)}.")
    return mask.float()


def _sum(error: Tensor) -> Tensor:
    return error.sum((-1, -2, -3)).mean()


def image_loss(prediction: Tensor, pixels: Tensor) -> Tensor:
    """Squared error of the whole picture, DreamerV3's loss.

    Args:
        prediction: Colours ``[..., 3, H, W]``.
        pixels: uint8 ``[..., 3, H, W]``.
    """
    return _sum((prediction - picture_target(pixels)).square())


def foreground_loss(
    prediction: Tensor,
    pixels: Tensor,
    mask: Tensor,
    target: ForegroundTarget = "inside",
) -> Tensor:
    """Squared error of the foreground's colours, linear in the mask.

    Args:
        prediction: Colours ``[..., 3, H, W]``.
        pixels: uint8 ``[..., 3, H, W]``.
        mask: bool, or confidence in [0, 1], ``[..., 1, H, W]``.
        target: ``"zero_outside"`` also asks for black outside the mask, so that the colours alone
            teach the pose (for a bool mask this is the squared error to image x mask);
            ``"inside"`` asks for nothing there and needs :func:`mask_loss` beside it, or a
            one-coloured agent could be painted everywhere.
    """
    weight = _check_mask(mask, pixels)
    # A value outside must not even be multiplied by zero: a NaN there would pass through.
    image = torch.where(weight > 0, picture_target(pixels), 0.0)
    error = weight * (prediction - image).square()
    if target == "zero_outside":
        error = error + (1 - weight) * prediction.square()
    return _sum(error)


def mask_loss(mask_logits: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of the predicted mask in nats a picture, linear in the mask.

    Args:
        mask_logits: ``[..., 1, H, W]``.
        mask: bool, or confidence in [0, 1], ``[..., 1, H, W]``.
    """
    target = _check_mask(mask, mask_logits)
    return _sum(F.binary_cross_entropy_with_logits(mask_logits, target, reduction="none"))


def background_loss(prediction: Tensor, pixels: Tensor, mask: Tensor) -> Tensor:
    """Squared error of the background's colours, outside the mask only.

    Args:
        prediction: Colours ``[..., 3, H, W]``.
        pixels: uint8 ``[..., 3, H, W]``.
        mask: bool, or confidence in [0, 1], ``[..., 1, H, W]``.
    """
    weight = 1 - _check_mask(mask, pixels)
    image = torch.where(weight > 0, picture_target(pixels), 0.0)
    return _sum(weight * (prediction - image).square())

"""Reconstruction losses of images, with and without masks.

Every loss is a sum over the pixels and channels of an image and a mean over images, the scale that
DreamerV3's other loss weights assume.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from w2f_torchrl.config.loss import ForegroundScale, ForegroundTarget
from w2f_torchrl.utils.tensors import check_images, check_mask


class _SquaredError(torch.autograd.Function):
    """Sum of ``weight * (prediction - pixels / 255)^2``, averaged over images.

    The gradient is computed in the forward pass, so that only one buffer is written and kept, where
    autograd would keep five.
    """

    @staticmethod
    def forward(ctx: Any, prediction: Tensor, pixels: Tensor, weight: Tensor | None) -> Tensor:
        residual = torch.sub(prediction, pixels.to(prediction.dtype), alpha=1 / 255)
        # Sum each image separately: a single float32 sum over a whole batch would lose digits.
        if weight is None:
            weighted = residual
            errors: Tensor = torch.linalg.vector_norm(residual, dim=(-3, -2, -1)).square()
        else:
            weighted = residual * weight
            errors = residual.mul_(weighted).sum((-3, -2, -1))
        ctx.save_for_backward(weighted)
        return errors.sum() / _num_images(prediction)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weighted,) = ctx.saved_tensors
        return weighted * (2 * grad / _num_images(weighted)), None, None


def _num_images(images: Tensor) -> int:
    return images.shape[:-3].numel()


def image_loss(prediction: Tensor, pixels: Tensor) -> Tensor:
    """Return the squared error of the whole image, DreamerV3's loss.

    Args:
        prediction: Colours ``[..., 3, H, W]``.
        pixels: uint8 ``[..., 3, H, W]``.
    """
    check_images(prediction, pixels)
    loss: Tensor = _SquaredError.apply(prediction, pixels, None)
    return loss


def foreground_loss(
    prediction: Tensor,
    pixels: Tensor,
    mask: Tensor,
    target: ForegroundTarget = "inside",
    *,
    scale: ForegroundScale = "none",
    dropped: Tensor | None = None,
) -> Tensor:
    """Return the squared error of the foreground's colours, linear in the mask.

    Args:
        prediction: Colours ``[..., 3, H, W]``.
        pixels: uint8 ``[..., 3, H, W]``.
        mask: bool, or confidence in [0, 1], ``[..., 1, H, W]``.
        target: ``"zero_outside"`` also penalises any colour but black outside the mask, so that the
            colours alone teach the pose (for a bool mask this is the squared error to image x
            mask). ``"inside"`` ignores pixels outside the mask and needs :func:`mask_loss` as well;
            otherwise an agent of a single colour could be painted everywhere.
        scale: ``"area"`` divides the error inside the mask by the share of the images that the
            masks cover. It is the share of the whole batch, so that an image with a corner of the
            agent weighs less than one with all of it.
        dropped: bool ``[..., 1, H, W]``, from :func:`confident_foreground`: pixels where black is
            not required.
    """
    check_images(prediction, pixels, mask)
    weight = mask.to(prediction.dtype)
    loss: Tensor = _SquaredError.apply(prediction, pixels, weight)
    if scale == "area":
        loss = loss / weight.mean().clamp(min=1 / weight.numel())
    if target == "zero_outside":
        outside = _outside(weight, dropped)
        loss = loss + _SquaredError.apply(prediction, torch.zeros_like(pixels), outside)
    return loss


def _outside(mask: Tensor, dropped: Tensor | None) -> Tensor:
    return 1 - mask if dropped is None else (1 - mask).masked_fill(dropped, 0)


def confident_foreground(mask_logits: Tensor, mask: Tensor, threshold: float) -> Tensor:
    """Return where the model is confident of foreground although the given mask says background.

    A segmenter may lose the agent for a few frames, but the model has seen it in the others. There
    the model's own mask is the better one, and the pixels are not background (the selective loss of
    Segmentation Dreamer). No gradient passes through.

    Args:
        mask_logits: The model's mask ``[..., 1, H, W]``.
        mask: bool, or confidence in [0, 1], ``[..., 1, H, W]``.
        threshold: Probability above which the model counts as confident.

    Returns:
        bool ``[..., 1, H, W]``.
    """
    check_mask(mask_logits, mask)
    says_background = ~mask if mask.dtype is torch.bool else mask < 0.5
    return (mask_logits.detach().sigmoid() > threshold) & says_background


def mask_loss(mask_logits: Tensor, mask: Tensor) -> Tensor:
    """Return the cross-entropy of the predicted mask in nats per image, linear in the mask.

    Args:
        mask_logits: ``[..., 1, H, W]``.
        mask: bool, or confidence in [0, 1], ``[..., 1, H, W]``.
    """
    check_mask(mask_logits, mask)
    # -m log p - (1 - m) log (1 - p) = softplus(l) - m l
    own = mask_logits * mask.to(mask_logits.dtype)
    return (F.softplus(mask_logits) - own).sum() / _num_images(mask_logits)


def background_loss(
    prediction: Tensor, pixels: Tensor, mask: Tensor, *, dropped: Tensor | None = None
) -> Tensor:
    """Return the squared error of the background's colours, outside the mask only.

    Args:
        prediction: Colours ``[..., 3, H, W]``.
        pixels: uint8 ``[..., 3, H, W]``.
        mask: bool, or confidence in [0, 1], ``[..., 1, H, W]``.
        dropped: bool ``[..., 1, H, W]``, from :func:`confident_foreground`: pixels whose error is
            not counted.
    """
    check_images(prediction, pixels, mask)
    weight = _outside(mask.to(prediction.dtype), dropped)
    loss: Tensor = _SquaredError.apply(prediction, pixels, weight)
    return loss

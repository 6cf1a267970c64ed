"""Checks of tensors passed to public functions: dtype, shape, range, not empty."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = "floating point"


def check_tensor(
    name: str,
    tensor: object,
    dtype: torch.dtype | str | None,
    shape: Sequence[int | str],
    *,
    empty: bool = False,
) -> None:
    """Check a tensor passed by a caller.

    Args:
        name: Name of the tensor, for the message.
        tensor: The tensor.
        dtype: Required dtype; ``"floating point"`` for any such, None for any dtype.
        shape: Required sizes; a letter stands for any size of at least 1, a leading ``"..."`` for
            any number of dimensions.
        empty: Whether the tensor may be empty; H and W must still be at least 1.

    Raises:
        TypeError: If it is not a tensor, or has another dtype.
        ValueError: If it has another shape, or is empty.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}.")
    if dtype == FLOATING:
        right = tensor.is_floating_point()
    else:
        right = dtype is None or tensor.dtype is dtype
    if not right:
        raise TypeError(f"{name} must be {_name(dtype)}, got {_name(tensor.dtype)}.")
    last = [size for size in shape if size != "..."]
    leading = len(last) < len(shape)
    fits = tensor.ndim >= len(last) if leading else tensor.ndim == len(last)
    sizes = tensor.shape[tensor.ndim - len(last) :] if fits else ()
    if not fits or not all(map(_fits, sizes, last)):
        shown = ", ".join(map(str, shape))
        raise ValueError(f"{name} must have the shape [{shown}], got {list(tensor.shape)}.")
    if not empty and not tensor.numel():
        raise ValueError(f"{name} must not be empty, got the shape {list(tensor.shape)}.")


def check_unit_interval(name: str, values: Tensor) -> None:
    """Check that floating-point values lie in [0, 1]; bool values always pass.

    Values on an accelerator are not checked, since the host would have to wait for them, and none
    are checked while a compiler traces.

    Args:
        name: Name of the values, for the message.
        values: bool or floating point, any shape.

    Raises:
        TypeError: If they have another dtype.
        ValueError: If one is nan or outside the range.
    """
    if values.dtype is torch.bool:
        return
    if not values.is_floating_point():
        raise TypeError(
            f"{name} must be bool or confidences in [0, 1], got {_name(values.dtype)}: if it holds "
            f"0 and 255, for example, pass {name} > 127."
        )
    on_host = values.device.type == "cpu"
    if not values.numel() or not on_host or torch.compiler.is_compiling():
        return
    low, high = (float(end) for end in values.detach().aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"{name} must lie in [0, 1], got values from {low:g} to {high:g}.")


def check_images(prediction: object, pixels: Tensor, mask: Tensor | None = None) -> None:
    """Check decoded images, their target and its mask.

    Args:
        prediction: Colours ``[..., 3, H, W]``.
        pixels: uint8 ``[..., 3, H, W]``; the range of values is never guessed from the data.
        mask: bool, or confidence in [0, 1], ``[..., 1, H, W]``.

    Raises:
        TypeError: If one has another dtype.
        ValueError: If one has another shape, or a confidence is outside its range.
    """
    check_tensor("pixels", pixels, torch.uint8, ("...", 3, "H", "W"))
    check_tensor("the prediction", prediction, FLOATING, ("...",))
    assert isinstance(prediction, Tensor), "checked"
    if prediction.shape != pixels.shape:
        raise ValueError(
            f"the prediction must have the pixels' shape {tuple(pixels.shape)}, got "
            f"{tuple(prediction.shape)}."
        )
    if mask is not None:
        _check_mask_of(pixels, mask)


def check_mask(mask_logits: Tensor, mask: Tensor) -> None:
    """Check a predicted mask and its target.

    Args:
        mask_logits: ``[..., 1, H, W]``.
        mask: bool, or confidence in [0, 1], ``[..., 1, H, W]``.

    Raises:
        TypeError: If one has another dtype.
        ValueError: If one has another shape, or a confidence is outside its range.
    """
    check_tensor("mask_logits", mask_logits, FLOATING, ("...", 1, "H", "W"))
    _check_mask_of(mask_logits, mask)


def _check_mask_of(images: Tensor, mask: Tensor) -> None:
    expected = (*images.shape[:-3], 1, *images.shape[-2:])
    if mask.shape != expected:
        raise ValueError(f"foreground_mask must have shape {expected}, got {tuple(mask.shape)}.")
    check_unit_interval("foreground_mask", mask)


def _fits(size: int, wanted: int | str) -> bool:
    return size == wanted if isinstance(wanted, int) else size > 0 or wanted not in ("H", "W")


def _name(dtype: torch.dtype | str | None) -> str:
    return str(dtype).removeprefix("torch.")

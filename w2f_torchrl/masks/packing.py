"""Eight mask pixels in one byte, for storage."""

from __future__ import annotations

import torch
from torch import Tensor

# Row b holds the eight bits of byte b, most significant first (numpy.packbits' order). Unpacking
# gathers these rows as eight-byte words, which is far cheaper than eight shifts per byte.
_BITS = ((torch.arange(256).unsqueeze(-1) >> torch.arange(7, -1, -1)) & 1).bool()  # [256, 8]


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a mask, eight pixels of a row in one byte.

    Args:
        mask: bool ``[..., 1, H, W]``; W must be a multiple of 8.

    Returns:
        uint8 ``[..., 1, H, W // 8]``; the leftmost pixel is the most significant bit.

    Raises:
        TypeError: If the mask is not bool.
        ValueError: If it has no channel dimension or W is not a multiple of 8.

    Examples:
        >>> mask = torch.tensor([1, 0, 0, 0, 0, 0, 1, 1], dtype=torch.bool).view(1, 1, 8)
        >>> pack_mask(mask)
        tensor([[[131]]], dtype=torch.uint8)
        >>> unpack_mask(pack_mask(mask)).equal(mask)
        True
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"pack_mask expects a bool mask, got {mask.dtype}.")
    if mask.ndim < 3 or mask.shape[-3] != 1:
        raise ValueError(f"pack_mask expects the shape [..., 1, H, W], got {tuple(mask.shape)}.")
    if mask.shape[-1] % 8:
        raise ValueError(
            f"Masks are stored with one bit per pixel, so their width must be a multiple of 8: got "
            f"W={mask.shape[-1]} in {tuple(mask.shape)}. Change the image size."
        )
    octets = mask.reshape(*mask.shape[:-1], mask.shape[-1] // 8, 8).byte()  # [..., 1, H, W // 8, 8]
    weights = 1 << torch.arange(7, -1, -1, dtype=torch.uint8, device=mask.device)
    packed: Tensor = (octets * weights).sum(-1, dtype=torch.uint8)
    return packed


def unpack_mask(packed: Tensor, *, pin_memory: bool = False) -> Tensor:
    """Undo :func:`pack_mask`.

    Args:
        packed: uint8 ``[..., 1, H, W // 8]``.
        pin_memory: Whether the mask lies in page-locked memory.

    Returns:
        bool ``[..., 1, H, W]``.

    Raises:
        TypeError: If the packed mask is not uint8.
        ValueError: If it has no channel dimension.
    """
    if packed.dtype != torch.uint8:
        raise TypeError(f"unpack_mask expects uint8, got {packed.dtype}.")
    if packed.ndim < 3 or packed.shape[-3] != 1:
        raise ValueError(
            f"unpack_mask expects the shape [..., 1, H, W // 8], got {tuple(packed.shape)}."
        )
    words = _BITS.to(packed.device).view(torch.int64).squeeze(-1)  # [256], eight bools per word
    flat = words.new_empty(packed.numel(), pin_memory=pin_memory)
    torch.index_select(words, 0, packed.reshape(-1).int(), out=flat)
    return flat.view(torch.bool).view(*packed.shape[:-1], packed.shape[-1] * 8)

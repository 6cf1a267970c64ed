"""Latents in the replay's compact form: 16-bit beliefs, states as class numbers.

Keys in records, samples and updates are the world model's: ``state``, ``belief`` and, with latent
``split``, ``background_state`` and ``background_belief``.
"""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor

INITIAL = "initial"
"""Key of a sample's packed latents ``[B, T]``: the slice's start, equal in all T rows."""
LATENTS = "latents"
"""Key of the packed posterior latents ``[B, T]`` that an update returns."""

MAX_UINT8_CLASSES = 255


def initial_keys(sample: TensorDictBase) -> tuple[str, ...]:
    """Return the key of the initial latents of slices, if the sample has them."""
    return (INITIAL,) if INITIAL in sample.keys() else ()


def packed_state_dtype(classes: int) -> torch.dtype:
    """Return the dtype of packed states: uint8, or int16 for more than 255 classes."""
    return torch.uint8 if classes <= MAX_UINT8_CLASSES else torch.int16


def pack_state(state: Tensor, classes: int) -> Tensor:
    """Replace each one-hot categorical by the number of its class, counted from 1.

    Args:
        state: One-hot ``[..., K * classes]``, with or without straight-through rounding errors;
            zeros mean "no state".
        classes: Classes of each categorical.

    Returns:
        uint8 or int16 ``[..., K]``; 0 for "no state".
    """
    grouped = state.detach().unflatten(-1, (-1, classes))  # [..., K, classes]
    numbers = torch.where(grouped.amax(-1) > 0, grouped.argmax(-1) + 1, 0)  # [..., K]
    return numbers.to(packed_state_dtype(classes))


def unpack_state(packed: Tensor, classes: int) -> Tensor:
    """Invert :func:`pack_state`: ``[..., K]`` to float32 ``[..., K * classes]``."""
    numbers = torch.arange(1, classes + 1, dtype=packed.dtype, device=packed.device)
    return (packed.unsqueeze(-1) == numbers).flatten(-2).float()


def pack_belief(belief: Tensor) -> Tensor:
    """Round beliefs to float16.

    The gated update keeps them in [-1, 1], where float16 is exact to 2^-12 and bfloat16, which has
    three bits fewer, to 2^-9.
    """
    return belief.detach().to(torch.float16)


def unpack_belief(packed: Tensor) -> Tensor:
    """Return packed beliefs in float32."""
    return packed.float()

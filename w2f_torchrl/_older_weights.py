"""Weights from before the decoder's mask had a separate last layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def split_joint_head(module: Any, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Load weights that were saved when mask and colours had one last layer.

    Args:
        module: The image decoder, whose hook before loading this is.
        state_dict: Changed in place.
        prefix: Of the module's names in it.
    """
    for name, dim in (("weight", 1), ("bias", 0)):
        key = f"{prefix}layers.{len(module.layers) - 1}.{name}"
        joint, mask = state_dict.get(key), f"{prefix}mask_head.{name}"
        if joint is not None and mask not in state_dict:
            state_dict[key], state_dict[mask] = split_mask(joint, dim)


def split_mask(joint: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Cut a last layer's parameter into the colours' and the mask's, which is its last output."""
    colours = joint.shape[dim] - 1
    return joint.narrow(dim, 0, colours).clone(), joint.narrow(dim, colours, 1).clone()

"""The reference's image decoder: a path each for belief and state, and colours in (0, 1)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from w2f_torchrl.modules.convolution import ImageDecoder
from w2f_torchrl.modules.layers import MLP


class ReferenceImageDecoder(ImageDecoder):
    """DreamerV3's decoder as its authors' code has it.

    The belief goes through a block-linear layer, of which each block makes some of the channels;
    the state through a layer of 2 x ``units`` with norm and SiLU and a linear one, so that it
    reaches all channels. Their sum is the smallest feature map, and the colours end in a sigmoid.

    Args:
        state_features: S.
        belief_features: D, a multiple of ``num_blocks``.
        image_shape: ``(C, H, W)``.
        units: Half the width of the state's hidden layer.
        **settings: Of :class:`~w2f_torchrl.modules.convolution.ImageDecoder`.
    """

    shift = 0.0

    def __init__(
        self,
        state_features: int,
        belief_features: int,
        image_shape: tuple[int, int, int] = (3, 64, 64),
        *,
        units: int,
        **settings: Any,
    ):
        super().__init__(belief_features, image_shape, **settings)
        outputs = math.prod(self.initial_shape)
        self.state_projection = MLP(state_features, outputs, depth=1, num_cells=2 * units)

    def _project(self, *inputs: Tensor) -> Tensor:
        """Map state ``[N, S]`` and belief ``[N, D]`` to the smallest feature map."""
        state, belief = inputs
        hidden: Tensor = self.projection(belief) + self.state_projection(state)
        return hidden

    def _colours(self, image: Tensor) -> Tensor:
        return torch.sigmoid(image.to(torch.promote_types(image.dtype, torch.float32)))


def build_image_decoder(
    decoder: str,
    features: tuple[int, int],
    image_shape: tuple[int, int, int],
    *,
    units: int,
    **settings: Any,
) -> ImageDecoder:
    """Build a decoder that is called with state and belief.

    Args:
        decoder: ``reference`` or ``torchrl``.
        features: S and D, of state and belief.
        image_shape: ``(C, H, W)``.
        units: Of the state's path (``reference`` only).
        **settings: Of :class:`~w2f_torchrl.modules.convolution.ImageDecoder`.
    """
    if decoder == "reference":
        return ReferenceImageDecoder(*features, image_shape, units=units, **settings)
    return ImageDecoder(sum(features), image_shape, **settings)

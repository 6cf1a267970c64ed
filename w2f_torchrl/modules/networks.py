"""Building blocks: the multilayer perceptron and the image encoder.

Shape letters: C channels, H, W height, width, I inputs, O outputs, E embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchrl.modules import DreamerV3ImageEncoder, DreamerV3MLP

from w2f_torchrl.kernels.convolution import centre, halve, norm_activation
from w2f_torchrl.kernels.dense import run_layers


class MLP(DreamerV3MLP):
    """:class:`~torchrl.modules.DreamerV3MLP`: linear maps, each but the last with norm and SiLU."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """Map ``[..., I]``, given in parts, to ``[..., O]``."""
        value = inputs[0] if len(inputs) == 1 else torch.cat(inputs, -1)  # [..., I]
        return run_layers(self.model, value)  # [..., O]


class ImageEncoder(DreamerV3ImageEncoder):
    """:class:`~torchrl.modules.DreamerV3ImageEncoder`: convolutions that halve, norm and SiLU.

    Args:
        in_channels: Of the picture.
        depth: Base channels.
        mults: Factors of the base channels, one per stage that halves the picture.
        kernel_size: Odd.
        pooled: Halve as the reference does: convolutions of stride 1, then the maximum of each
            square of four pixels, norm and activation. Four times the multiplications.
    """

    def __init__(
        self,
        in_channels: int = 3,
        depth: int = 64,
        mults: tuple[int, ...] = (2, 3, 4, 4),
        kernel_size: int = 5,
        *,
        pooled: bool = False,
    ):
        super().__init__(in_channels, depth, mults, kernel_size)
        if pooled:
            for convolution in self.layers[::3]:
                convolution.stride = (1, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Encode uint8 ``[..., C, H, W]``, or floats in [0, 1], to features ``[..., E]``."""
        batch_shape = image.shape[:-3]
        hidden = image.reshape(-1, *image.shape[-3:])  # [N, C, H, W]
        if hidden.is_floating_point():
            hidden = hidden - 0.5
        else:
            hidden = centre(hidden, self.layers[0].weight.dtype)  # in [-0.5, 0.5]
        for convolution, norm in zip(self.layers[::3], self.layers[1::3], strict=True):
            hidden = halve(hidden, convolution)  # [N, channels, side / 2, side / 2]
            hidden = norm_activation(hidden, norm)
        return hidden.contiguous().reshape(*batch_shape, -1)  # [..., E]

"""Image decoders: from state and belief to colours and, optionally, the logits of a mask.

Shape letters: F features, S state, D belief, C channels, H, W height, width.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchrl.modules import DreamerV3ImageDecoder

from w2f_torchrl._older_weights import split_joint_head
from w2f_torchrl.kernels.convolution import double, nearest_kernel, norm_activation
from w2f_torchrl.modules.networks import MLP


class ImageDecoder(DreamerV3ImageDecoder):
    """:class:`~torchrl.modules.DreamerV3ImageDecoder`, with a mask if asked for.

    A block-linear layer makes the smallest feature map; convolutions double it, each but the last
    followed by norm and SiLU.

    Args:
        in_features: F.
        image_shape: ``(C, H, W)``.
        depth: Base channels.
        mults: Factors of the base channels, one per stage that doubles the picture.
        kernel_size: Odd.
        num_blocks: Blocks of the first layer.
        nearest: Double as the reference does: nearest neighbours, then a convolution of stride 1.
            The parameters are those of the transposed convolutions, whose kernels
            :func:`~w2f_torchrl.kernels.convolution.nearest_kernel` turns into those that do so.
        mask: Also make the logit of a mask. Its kernel and bias in the last convolution are
            separate parameters: adaptive gradient clipping takes the norm of each tensor, and in
            one tensor the mask and the colours would share it.
    """

    shift = 0.5
    """Added to every output, the mask's logit included."""

    def __init__(
        self,
        in_features: int,
        image_shape: tuple[int, int, int] = (3, 64, 64),
        depth: int = 64,
        mults: tuple[int, ...] = (2, 3, 4, 4),
        kernel_size: int = 5,
        num_blocks: int = 8,
        *,
        nearest: bool = False,
        mask: bool = False,
    ):
        colours, height, width = image_shape
        shape = (colours + int(mask), height, width)
        super().__init__(in_features, shape, depth, mults, kernel_size, num_blocks)
        self.nearest = nearest
        self.mask_head: nn.ConvTranspose2d | None = None
        if mask:
            self.layers[-1], self.mask_head = _split_last(self.layers[-1])
            self.register_load_state_dict_pre_hook(split_joint_head)

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Decode features ``[..., F]``, given in parts.

        Returns:
            Pictures ``[..., C, H, W]``; with ``mask`` also the mask's logits ``[..., 1, H, W]``.
        """
        batch_shape = inputs[0].shape[:-1]
        hidden = self._project(*(part.reshape(-1, part.shape[-1]) for part in inputs))
        hidden = hidden.reshape(-1, *self.initial_shape)  # [N, channels, side, side]
        hidden = hidden.contiguous(memory_format=torch.channels_last)
        hidden = norm_activation(hidden, self.projection_norm)
        *stages, last = self.layers
        for layer, norm in zip(stages[::3], stages[1::3], strict=True):
            hidden = double(hidden, self._kernel(layer.weight), layer.bias)  # the sides double
            hidden = norm_activation(hidden, norm)
        weight, bias = last.weight, last.bias
        if self.mask_head is not None:  # one product for both: [channels, C + 1, k, k]
            weight = torch.cat((weight, self.mask_head.weight), 1)
            bias = torch.cat((bias, cast(Tensor, self.mask_head.bias)))
        bias = bias + self.shift if self.shift else bias
        # One picture after the other, the layout of the losses and the masks.
        image = double(hidden, self._kernel(weight), bias, channels_last=False).contiguous()
        image = image.reshape(*batch_shape, *image.shape[-3:])  # [..., C (+ 1), H, W]
        if self.mask_head is None:
            return self._colours(image)
        colours, mask = image.split((last.weight.shape[1], 1), -3)
        return self._colours(colours), mask

    def _project(self, *inputs: Tensor) -> Tensor:
        """Map features ``[N, F]`` to the smallest feature map ``[N, C H W]``."""
        hidden: Tensor = self.projection(inputs[0] if len(inputs) == 1 else torch.cat(inputs, -1))
        return hidden

    def _kernel(self, weight: Tensor) -> Tensor:
        return nearest_kernel(weight) if self.nearest else weight

    def _colours(self, image: Tensor) -> Tensor:
        return image


class ReferenceImageDecoder(ImageDecoder):
    """DreamerV3's decoder as in its authors' code.

    The belief passes a block-linear layer, each block of which makes some of the channels. The
    state passes a layer of 2 x ``units`` with norm and SiLU and a linear one, so it reaches all
    channels. Their sum is the smallest feature map, and the colours end in a sigmoid.

    Args:
        state_features: S.
        belief_features: D, a multiple of ``num_blocks``.
        image_shape: ``(C, H, W)``.
        units: Half the width of the state's hidden layer.
        **settings: Of :class:`ImageDecoder`.
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
        hidden: Tensor = self.projection(belief) + self.state_projection(state)  # [N, C H W]
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
        **settings: Of :class:`ImageDecoder`.
    """
    if decoder == "reference":
        return ReferenceImageDecoder(*features, image_shape, units=units, **settings)
    return ImageDecoder(sum(features), image_shape, **settings)


def _split_last(joint: nn.ConvTranspose2d) -> tuple[nn.ConvTranspose2d, nn.ConvTranspose2d]:
    """Split a layer into one for all outputs but the last and one for the last, same weights."""
    size = joint.kernel_size[0]
    outputs, bias = (joint.out_channels - 1, 1), cast(Tensor, joint.bias)
    heads = [
        nn.utils.skip_init(
            nn.ConvTranspose2d,
            joint.in_channels,
            out,
            size,
            stride=2,
            padding=size // 2,
            output_padding=1,
            device=joint.weight.device,
            dtype=joint.weight.dtype,
        )
        for out in outputs
    ]
    with torch.no_grad():
        parts = joint.weight.split(outputs, 1), bias.split(outputs)
        for head, own_weight, own_bias in zip(heads, *parts, strict=True):
            head.weight.copy_(own_weight)
            head.bias.copy_(own_bias)
    return heads[0], heads[1]

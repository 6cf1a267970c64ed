"""TorchRL's image encoder and decoder with fewer passes over memory.

The same parameters and results. Feature maps stay in the channels-last layout from end to end,
and three things that are slow on a CPU are done otherwise there: normalisation with its
activation, the gradient of a convolution's bias, and narrow transposed convolutions. On other
devices, under autocast and in a compiled graph, whose compiler fuses by itself, only the layout
differs. ``benchmarks/learner.py`` measures both.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchrl.modules import DreamerV3ImageDecoder, DreamerV3ImageEncoder

from w2f_torchrl.modules.layers import by_hand, constant

#: Widest output for which a transposed convolution, or the gradient of a convolution's input, is
#: faster as a plain convolution on subpixels (CPU).
SUBPIXEL_CHANNELS = 24
#: Largest kernel that a 3 x 3 kernel on subpixels covers at stride 2.
SUBPIXEL_KERNEL = 5


class _Convolution(torch.autograd.Function):
    """A convolution of stride 2 with a cheap gradient of its bias, and of a narrow input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, transposed: bool, channels_last: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.transposed = transposed
        if transposed and _is_narrow(weight):
            return subpixel_convolution(x, weight, bias, channels_last=channels_last)
        return torch.convolution(x, weight, bias, **_geometry(weight, transposed))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        geometry = _geometry(weight, ctx.transposed)
        wants_x = ctx.needs_input_grad[0]
        # A convolution's input gets its gradient by the transposed convolution.
        narrow = wants_x and not ctx.transposed and _is_narrow(weight)
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, *geometry.values(), [wants_x and not narrow, True, False]
        )
        if narrow:
            grad_x = subpixel_convolution(grad, weight)
        return grad_x, grad_weight, grad.sum((0, 2, 3)), None, None


def _is_narrow(weight: Tensor) -> bool:
    return weight.shape[1] <= SUBPIXEL_CHANNELS and weight.shape[-1] <= SUBPIXEL_KERNEL


def _geometry(weight: Tensor, transposed: bool) -> dict[str, Any]:
    return {
        "stride": [2, 2],
        "padding": [weight.shape[-1] // 2] * 2,
        "dilation": [1, 1],
        "transposed": transposed,
        "output_padding": [int(transposed)] * 2,
        "groups": 1,
    }


def subpixel_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, channels_last: bool = True
) -> Tensor:
    """A transposed convolution of stride 2 as a plain one that makes the four subpixels.

    Row 2 q + p of the output takes the inputs q + d, d in {-1, 0, 1}, with the kernel's row
    2 + p - 2 d (of a kernel of 5, zero beyond it): a 3 x 3 kernel for each of the four
    subpixels (Shi et al. 2016, "Is the deconvolution layer the same as a convolutional layer?").

    Args:
        x: ``[N, C, H, W]``.
        weight: ``[C, O, k, k]``, k odd and at most 5.
        bias: ``[O]``.
        channels_last: The result's layout: else one picture plane after the other.

    Returns:
        ``[N, O, 2 H, 2 W]``.
    """
    channels, out = weight.shape[:2]
    margin = (SUBPIXEL_KERNEL - weight.shape[-1]) // 2
    weight = F.pad(weight, (margin, margin + 1) * 2).view(channels, out, 3, 2, 3, 2)
    # The channels of a pixel are its subpixels row by row, so that runs of memory stay together.
    weight = weight.flip(2, 4).permute(3, 5, 1, 0, 2, 4).reshape(4 * out, channels, 3, 3)
    result = F.conv2d(x, weight, None if bias is None else bias.repeat(4), padding=1)
    subpixels = result.permute(0, 2, 3, 1).unflatten(-1, (2, 2, out))  # [N, H, W, 2, 2, O]
    height, width = 2 * x.shape[2], 2 * x.shape[3]
    if not channels_last:
        planes: Tensor = subpixels.permute(0, 5, 1, 3, 2, 4)
        return planes.reshape(len(x), out, height, width)
    rows: Tensor = subpixels.permute(0, 1, 3, 2, 4, 5)
    return rows.reshape(len(x), height, width, out).permute(0, 3, 1, 2)


class _NormActivation(torch.autograd.Function):
    """``silu(weight * x / rms(x))`` over channels, dimension 1 of ``[N, C, H, W]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = _over_channels(x.square(), torch.full_like(weight, 1 / len(weight)))
        scale = scale.add_(eps).rsqrt_()
        normed = x * scale
        scaled = _times_channels(normed, weight)
        ctx.save_for_backward(normed, scaled, scale, weight)
        return F.silu(scaled)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, scaled, scale, weight = ctx.saved_tensors
        grad = torch.ops.aten.silu_backward(grad, scaled)
        product = grad * normed
        # The part along x itself is the norm's own derivative.
        share = _over_channels(product, weight / len(weight))
        grad_weight = product.sum((0, 2, 3))
        grad = _times_channels(grad, weight).addcmul_(normed, share, value=-1).mul_(scale)
        return grad, grad_weight, None


def _over_channels(x: Tensor, weight: Tensor) -> Tensor:
    """Weighted sum over the channels of ``[N, C, H, W]``, channels last: ``[N, 1, H, W]``."""
    rows = x.permute(0, 2, 3, 1)
    return torch.mv(rows.reshape(-1, len(weight)), weight).view(rows.shape[:3]).unsqueeze(1)


def _times_channels(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply ``[N, C, H, W]``, channels last, by ``[C]``, a whole picture at once."""
    _, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).flatten(1) * weight.repeat(height * width)
    return rows.view(len(x), height, width, channels).permute(0, 3, 1, 2)


def _convolve(
    x: Tensor,
    layer: nn.Conv2d | nn.ConvTranspose2d,
    bias: Tensor | None = None,
    *,
    channels_last: bool = True,
) -> Tensor:
    bias = layer.bias if bias is None else bias
    transposed = isinstance(layer, nn.ConvTranspose2d)
    if by_hand(x):
        return cast(Tensor, _Convolution.apply(x, layer.weight, bias, transposed, channels_last))
    padding = layer.weight.shape[-1] // 2
    if transposed:
        return F.conv_transpose2d(x, layer.weight, bias, 2, padding, output_padding=1)
    return F.conv2d(x, layer.weight, bias, 2, padding)


def _norm_activation(x: Tensor, norm: nn.Module) -> Tensor:
    if by_hand(x):
        return cast(Tensor, _NormActivation.apply(x, norm.weight, norm.eps))
    return F.silu(norm(x))


def _centred(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 ``[N, C, H, W]`` to floats in [-0.5, 0.5], channels last."""
    if not by_hand(pixels):
        return pixels.to(dtype, memory_format=torch.channels_last).div_(255).sub_(0.5)
    values = pixels.to(dtype)  # turning and converting at once is slower than one after the other
    torch.add(constant(-0.5, dtype), values, alpha=1 / 255, out=values)
    return values.contiguous(memory_format=torch.channels_last)


class ImageEncoder(DreamerV3ImageEncoder):
    """:class:`~torchrl.modules.DreamerV3ImageEncoder`, faster: same parameters and results."""

    def forward(self, image: Tensor) -> Tensor:
        """Encode uint8 ``[..., C, H, W]``, or floats in [0, 1], to features ``[..., E]``."""
        batch_shape = image.shape[:-3]
        hidden = image.reshape(-1, *image.shape[-3:])
        if hidden.is_floating_point():
            hidden = hidden - 0.5
        else:
            hidden = _centred(hidden, self.layers[0].weight.dtype)
        for convolution, norm in zip(self.layers[::3], self.layers[1::3], strict=True):
            hidden = _norm_activation(_convolve(hidden, convolution), norm)
        return hidden.contiguous().reshape(*batch_shape, -1)


class ImageDecoder(DreamerV3ImageDecoder):
    """:class:`~torchrl.modules.DreamerV3ImageDecoder`, faster: same parameters and results."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """Decode features ``[..., F]``, given in parts, to pictures ``[..., C, H, W]``."""
        value = inputs[0] if len(inputs) == 1 else torch.cat(inputs, -1)
        batch_shape = value.shape[:-1]
        hidden = self.projection(value.reshape(-1, value.shape[-1]))
        hidden = hidden.reshape(-1, *self.initial_shape)
        hidden = hidden.contiguous(memory_format=torch.channels_last)
        hidden = _norm_activation(hidden, self.projection_norm)
        *stages, last = self.layers
        for convolution, norm in zip(stages[::3], stages[1::3], strict=True):
            hidden = _norm_activation(_convolve(hidden, convolution), norm)
        # One picture after the other, as the losses and the masks have them.
        image = _convolve(hidden, last, last.bias + 0.5, channels_last=False).contiguous()
        return image.reshape(*batch_shape, *image.shape[-3:])

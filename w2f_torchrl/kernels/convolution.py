"""Convolutions that halve and double images, with fewer passes over memory.

Feature maps stay in the channels-last layout throughout. On a CPU three slow operations are
replaced: normalisation with its activation, the gradient of a convolution's bias, and narrow
transposed convolutions. On a GPU transposed convolutions are computed as plain ones on subpixels.
Otherwise, under autocast and in compiled graphs, where the compiler fuses by itself, these are
torch's plain operations. ``benchmarks/speed/learner.py`` measures both.

Shape letters: N images, C channels in, O channels out, H, W height, width, k side of a kernel.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from w2f_torchrl.kernels import switch
from w2f_torchrl.kernels.dense import constant

#: Maximum number of output channels for which a transposed convolution, or the gradient of a
#: convolution's input, is faster as a plain convolution on subpixels (CPU).
SUBPIXEL_CHANNELS = 24
#: Maximum side of a kernel of stride 2 that a 3 x 3 kernel on subpixels covers.
SUBPIXEL_KERNEL = 6


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


def _geometry(weight: Tensor, transposed: bool, stride: int = 2) -> dict[str, Any]:
    """Return the settings of a convolution that exactly halves or doubles the sides.

    With stride 1 it keeps them.
    """
    size = weight.shape[-1]
    return {
        "stride": [stride] * 2,
        "padding": [(size - 1) // 2] * 2,
        "dilation": [1, 1],
        "transposed": transposed,
        "output_padding": [size % 2 if transposed else 0] * 2,
        "groups": 1,
    }


def subpixel_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, channels_last: bool = True
) -> Tensor:
    """Compute a transposed convolution of stride 2 as a plain one that makes the four subpixels.

    Row 2 q + p of the output takes the inputs q + d, d in {-1, 0, 1}, with the kernel's row
    2 + p - 2 d (of a kernel of 5 or 6, zero beyond it): a 3 x 3 kernel for each of the four
    subpixels (Shi et al. 2016, "Is the deconvolution layer the same as a convolutional layer?").

    Args:
        x: ``[N, C, H, W]``.
        weight: ``[C, O, k, k]``, k at most :data:`SUBPIXEL_KERNEL`.
        bias: ``[O]``.
        channels_last: Layout of the result; False stores one channel after the other.

    Returns:
        ``[N, O, 2 H, 2 W]``.
    """
    channels, out = weight.shape[:2]
    size = weight.shape[-1]
    margin = 2 - (size - 1) // 2
    weight = F.pad(weight, (margin, SUBPIXEL_KERNEL - size - margin) * 2)
    weight = weight.reshape(channels, out, 3, 2, 3, 2)
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


def nearest_kernel(weight: Tensor) -> Tensor:
    """Return the transposed kernel that doubles by nearest neighbours and convolves with stride 1.

    Doubling repeats each pixel along both sides, and the kernel meets the two copies one after the
    other. So a transposed convolution of stride 2, whose kernel is the sum of the kernel and its
    copies moved by one pixel, gives the same from the small image, with the same padding by
    zeros. A kernel of 5 then takes 9 multiplications per pixel of the large image instead of 25,
    and the large copy is never made.

    Args:
        weight: The convolution's ``[C, O, k, k]``, in the layout of a transposed convolution, so
            turned by 180 degrees.

    Returns:
        ``[C, O, k + 1, k + 1]``.
    """
    return F.avg_pool2d(weight, 2, stride=1, padding=1, divisor_override=1)


class _PooledConvolution(torch.autograd.Function):
    """A convolution of stride 1 and max-pooling, with a cheap gradient of the bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        large = torch.convolution(x, weight, bias, **_geometry(weight, False, stride=1))
        pooled, places = torch.ops.aten.max_pool2d_with_indices(large, [2, 2], [2, 2])
        ctx.save_for_backward(x, weight, large, places)
        return cast(Tensor, pooled)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight, large, places = ctx.saved_tensors
        grad_large = torch.ops.aten.max_pool2d_with_indices_backward(
            grad, large, [2, 2], [2, 2], [0, 0], [1, 1], False, places
        )
        geometry = _geometry(weight, False, stride=1)
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad_large, x, weight, None, *geometry.values(), [ctx.needs_input_grad[0], True, False]
        )
        return grad_x, grad_weight, grad.sum((0, 2, 3))


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
    """Sum over channels, weighted: ``[N, C, H, W]``, channels last, to ``[N, 1, H, W]``."""
    rows = x.permute(0, 2, 3, 1)
    return torch.mv(rows.reshape(-1, len(weight)), weight).view(rows.shape[:3]).unsqueeze(1)


def _times_channels(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply ``[N, C, H, W]``, channels last, by ``[C]``, a whole image at once."""
    _, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).flatten(1) * weight.repeat(height * width)
    return rows.view(len(x), height, width, channels).permute(0, 3, 1, 2)


def halve(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """Convolve and halve ``[N, C, H, W]`` to ``[N, O, H / 2, W / 2]``.

    Args:
        x: ``[N, C, H, W]``.
        layer: A layer of stride 2, or of stride 1, which is followed by 2 x 2 max-pooling.
    """
    weight, bias = layer.weight, cast(Tensor, layer.bias)
    if layer.stride == (1, 1):
        if switch.use_cpu_kernels(x):
            return cast(Tensor, _PooledConvolution.apply(x, weight, bias))
        return F.max_pool2d(F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2), 2)
    if switch.use_cpu_kernels(x):
        return cast(Tensor, _Convolution.apply(x, weight, bias, False, True))
    return F.conv2d(x, weight, bias, 2, weight.shape[-1] // 2)


def double(x: Tensor, weight: Tensor, bias: Tensor, *, channels_last: bool = True) -> Tensor:
    """Double ``[N, C, H, W]`` to ``[N, O, 2 H, 2 W]`` by a transposed convolution of stride 2.

    Args:
        x: ``[N, C, H, W]``.
        weight: ``[C, O, k, k]``.
        bias: ``[O]``.
        channels_last: Layout of the result; False stores one channel after the other.
    """
    if switch.use_cpu_kernels(x):
        return cast(Tensor, _Convolution.apply(x, weight, bias, True, channels_last))
    size = weight.shape[-1]
    if x.is_cuda and size <= SUBPIXEL_KERNEL:
        # At most half of cuDNN's time, even with many channels (docs/performance.md).
        return subpixel_convolution(x, weight, bias, channels_last=channels_last)
    return F.conv_transpose2d(x, weight, bias, 2, (size - 1) // 2, output_padding=size % 2)


def norm_activation(x: Tensor, norm: nn.Module) -> Tensor:
    """Apply TorchRL's norm over channels, then SiLU: ``[N, C, H, W]``."""
    if switch.use_cpu_kernels(x):
        return cast(Tensor, _NormActivation.apply(x, norm.weight, norm.eps))
    return F.silu(norm(x))


def centre(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale uint8 ``[N, C, H, W]`` to floats in [-0.5, 0.5], channels last."""
    if not switch.use_cpu_kernels(pixels):
        return pixels.to(dtype, memory_format=torch.channels_last).div_(255).sub_(0.5)
    values = pixels.to(dtype)  # converting and then changing the layout is faster than both at once
    torch.add(constant(-0.5, dtype), values, alpha=1 / 255, out=values)
    return values.contiguous(memory_format=torch.channels_last)

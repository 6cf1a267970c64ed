"""TorchRL's image encoder and decoder with fewer passes over memory.

The same parameters and results, unless they resample as the reference does. Feature maps stay in
the channels-last layout from end to end, and three things that are slow on a CPU are done otherwise
there: normalisation with its activation, the gradient of a convolution's bias, and narrow
transposed convolutions. On other devices, under autocast and in a compiled graph, whose compiler
fuses by itself, only the layout differs. ``benchmarks/learner.py`` measures both.
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
    """Of a convolution that exactly halves or doubles the sides (or keeps them: stride 1)."""
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
    """A transposed convolution of stride 2 as a plain one that makes the four subpixels.

    Row 2 q + p of the output takes the inputs q + d, d in {-1, 0, 1}, with the kernel's row
    2 + p - 2 d (of a kernel of 5 or 6, zero beyond it): a 3 x 3 kernel for each of the four
    subpixels (Shi et al. 2016, "Is the deconvolution layer the same as a convolutional layer?").

    Args:
        x: ``[N, C, H, W]``.
        weight: ``[C, O, k, k]``, k at most 6.
        bias: ``[O]``.
        channels_last: The result's layout: else one picture plane after the other.

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
    """The transposed kernel of doubling by nearest neighbours and then convolving with stride 1.

    Each pixel has two copies a side, which the kernel meets one after the other: so the transposed
    convolution of stride 2 whose kernel is the sum of the kernel and its copies moved by one gives
    the same from the small picture, with the same padding by zeros. For a kernel of 5 that takes 9
    multiplications for each pixel of the large picture in place of 25, and the large copy is never
    made.

    Args:
        weight: ``[C, O, k, k]``: the convolution's, in the layout of a transposed one, so turned by
            180 degrees.

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
    """Weighted sum over the channels of ``[N, C, H, W]``, channels last: ``[N, 1, H, W]``."""
    rows = x.permute(0, 2, 3, 1)
    return torch.mv(rows.reshape(-1, len(weight)), weight).view(rows.shape[:3]).unsqueeze(1)


def _times_channels(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply ``[N, C, H, W]``, channels last, by ``[C]``, a whole picture at once."""
    _, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).flatten(1) * weight.repeat(height * width)
    return rows.view(len(x), height, width, channels).permute(0, 3, 1, 2)


def _halve(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """Strided, or pooled where the layer's own stride is 1."""
    weight, bias = layer.weight, cast(Tensor, layer.bias)
    if layer.stride == (1, 1):
        if by_hand(x):
            return cast(Tensor, _PooledConvolution.apply(x, weight, bias))
        return F.max_pool2d(F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2), 2)
    if by_hand(x):
        return cast(Tensor, _Convolution.apply(x, weight, bias, False, True))
    return F.conv2d(x, weight, bias, 2, weight.shape[-1] // 2)


def _double(x: Tensor, weight: Tensor, bias: Tensor, *, channels_last: bool = True) -> Tensor:
    if by_hand(x):
        return cast(Tensor, _Convolution.apply(x, weight, bias, True, channels_last))
    size = weight.shape[-1]
    if x.is_cuda and size <= SUBPIXEL_KERNEL:
        # Half of cuDNN's time, or less, also for wide ones (docs/performance.md).
        return subpixel_convolution(x, weight, bias, channels_last=channels_last)
    return F.conv_transpose2d(x, weight, bias, 2, (size - 1) // 2, output_padding=size % 2)


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
    """:class:`~torchrl.modules.DreamerV3ImageEncoder`, faster: same parameters and results.

    Args:
        in_channels: Of the picture.
        depth: Base channels.
        mults: Factors of the base channels, one for each stage that halves the picture.
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
        hidden = image.reshape(-1, *image.shape[-3:])
        if hidden.is_floating_point():
            hidden = hidden - 0.5
        else:
            hidden = _centred(hidden, self.layers[0].weight.dtype)
        for convolution, norm in zip(self.layers[::3], self.layers[1::3], strict=True):
            hidden = _norm_activation(_halve(hidden, convolution), norm)
        return hidden.contiguous().reshape(*batch_shape, -1)


class ImageDecoder(DreamerV3ImageDecoder):
    """:class:`~torchrl.modules.DreamerV3ImageDecoder`, faster: same parameters and results.

    Args:
        in_features: F.
        image_shape: ``(C, H, W)``.
        depth: Base channels.
        mults: Factors of the base channels, one for each stage that doubles the picture.
        kernel_size: Odd.
        num_blocks: Blocks of the first layer.
        nearest: Double as the reference does: nearest neighbours, then a convolution of stride 1.
            The parameters are those of the transposed convolutions: see :func:`nearest_kernel`.
        mask: Make the logit of a mask too, with a kernel and a bias of its own beside those of the
            colours in the last convolution: adaptive gradient clipping takes the norm of each
            tensor, and in one tensor the mask and the colours would share it.
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
            self.register_load_state_dict_pre_hook(_split_joint_head)

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Decode features ``[..., F]``, given in parts.

        Returns:
            Pictures ``[..., C, H, W]``; with ``mask`` also the mask's logits ``[..., 1, H, W]``.
        """
        batch_shape = inputs[0].shape[:-1]
        hidden = self._project(*(part.reshape(-1, part.shape[-1]) for part in inputs))
        hidden = hidden.reshape(-1, *self.initial_shape)
        hidden = hidden.contiguous(memory_format=torch.channels_last)
        hidden = _norm_activation(hidden, self.projection_norm)
        *stages, last = self.layers
        for layer, norm in zip(stages[::3], stages[1::3], strict=True):
            hidden = _norm_activation(_double(hidden, self._kernel(layer.weight), layer.bias), norm)
        weight, bias = last.weight, last.bias
        if self.mask_head is not None:  # one product for both
            weight = torch.cat((weight, self.mask_head.weight), 1)
            bias = torch.cat((bias, cast(Tensor, self.mask_head.bias)))
        # One picture after the other, as the losses and the masks have them.
        bias = bias + self.shift if self.shift else bias
        image = _double(hidden, self._kernel(weight), bias, channels_last=False).contiguous()
        image = image.reshape(*batch_shape, *image.shape[-3:])
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


def _split_last(joint: nn.ConvTranspose2d) -> tuple[nn.ConvTranspose2d, nn.ConvTranspose2d]:
    """Two layers for a layer's outputs: all but the last, and the last; the same weights."""
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


def _split_joint_head(
    module: ImageDecoder, state_dict: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    """Load weights that were saved when mask and colours had one last layer."""
    for name, dim in (("weight", 1), ("bias", 0)):
        key = f"{prefix}layers.{len(module.layers) - 1}.{name}"
        joint, mask = state_dict.get(key), f"{prefix}mask_head.{name}"
        if joint is not None and mask not in state_dict:
            state_dict[key], state_dict[mask] = split_mask(joint, dim)


def split_mask(joint: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Cut a last layer's parameter into the colours' and the mask's, which is its last output."""
    colours = joint.shape[dim] - 1
    return joint.narrow(dim, 0, colours).clone(), joint.narrow(dim, colours, 1).clone()

"""Dense layers with fewer passes over memory.

On a CPU a layer of linear map, norm and activation is one node of the graph, with its backward pass
written out. On other devices, under autocast and in compiled graphs these are torch's plain
operations.

Shape letters: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from w2f_torchrl.kernels import switch
from w2f_torchrl.kernels.products import product


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        return grad_x, product(grad.t(), x.t()), grad.sum(0) if ctx.has_bias else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute :func:`torch.nn.functional.linear`: ``[..., I]`` to ``[..., O]``."""
    if not switch.use_cpu_kernels(x):
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return product(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)
    rows: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return rows.view(*x.shape[:-1], len(weight))


class Normed(NamedTuple):
    """Intermediates that the backward pass of :func:`norm` reads."""

    normed: Tensor
    scaled: Tensor
    scale: Tensor


def norm(x: Tensor, gain: Tensor, eps: float) -> tuple[Normed, Tensor]:
    """Compute ``silu(gain * x / rms(x))`` over the last dimension ``[..., I]``.

    Returns:
        The intermediates for :func:`norm_backward`, and the result ``[..., I]``.
    """
    if x.dtype is not gain.dtype:  # from an autocast product
        x = x.to(gain.dtype)
    scale = inverse_rms(x, eps)  # [..., 1]
    normed = x * scale
    scaled = normed * gain
    return Normed(normed, scaled, scale), F.silu(scaled)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """Compute ``1 / sqrt(mean(x^2) + eps)`` of the last dimension, ``[..., I]`` to ``[..., 1]``."""
    if not switch.use_cpu_kernels(x):
        return x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(constant(eps, x.dtype), length, length, value=1 / x.shape[-1]).rsqrt_()


@cache
def constant(value: float, dtype: torch.dtype) -> Tensor:
    """Return a number as a CPU scalar, for operations that are fused only for tensors."""
    with torch.inference_mode(False):  # the mode of the first call must not apply to later ones
        return torch.tensor(value, dtype=dtype, device="cpu")


def activate(x: Tensor, normalise: Any) -> Tensor:
    """Apply TorchRL's norm, then SiLU, ``[..., I]``, without a gradient; may overwrite ``x``."""
    if not switch.use_cpu_kernels(x):
        return F.silu(cast(Tensor, normalise(x)))
    x.mul_(inverse_rms(x, normalise.eps)).mul_(normalise.weight)
    return F.silu(x, inplace=True)


def norm_backward(grad: Tensor, saved: Normed, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients ``[..., I]`` of the norm's input and of its scaled output."""
    if grad.dtype is not gain.dtype:
        grad = grad.to(gain.dtype)
    scaled: Tensor = torch.ops.aten.silu_backward(grad, saved.scaled)
    normed = scaled * gain
    share = (normed * saved.normed).mean(-1, keepdim=True)
    return torch.addcmul(normed, saved.normed, share, value=-1).mul_(saved.scale), scaled


class _Layer(torch.autograd.Function):
    """Linear map, norm and activation."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, gain: Tensor, eps: float
    ) -> Tensor:
        saved, out = norm(product(x, weight, bias), gain, eps)
        ctx.save_for_backward(x, weight, gain, *saved)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gain, *saved = ctx.saved_tensors
        grad, scaled = norm_backward(grad, Normed(*saved), gain)
        grad_x = product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        grad_gain = (scaled * saved[0]).sum(0)
        return grad_x, product(grad.t(), x.t()), grad.sum(0), grad_gain, None


def run_layers(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Apply layers one after the other: ``[..., I]`` to ``[..., O]``.

    Args:
        layers: TorchRL's ``Linear, norm, SiLU`` repeated, optionally followed by a ``Linear``.
        x: ``[..., I]``.
    """
    if not switch.use_cpu_kernels(x):
        for layer in layers:
            x = layer(x)
        return x
    value = x.reshape(-1, x.shape[-1])  # [N, I]
    modules: list[Any] = list(layers)  # a slice of a Sequential would build another one
    hidden = len(modules) // 3 * 3
    for map_, normalise in zip(modules[:hidden:3], modules[1:hidden:3], strict=True):
        if torch.is_grad_enabled():
            value = _Layer.apply(value, map_.weight, map_.bias, normalise.weight, normalise.eps)
        else:
            value = activate(product(value, map_.weight, map_.bias), normalise)
    for map_ in modules[hidden:]:
        value = linear(value, map_.weight, map_.bias)
    return value.view(*x.shape[:-1], value.shape[-1])


class Affine(NamedTuple):
    """A linear map with cast weights, which replaces a layer with uncast weights."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Map ``[..., I]`` to ``[..., O]``."""
        return F.linear(x, self.weight, self.bias)


def cast_maps(dtype: torch.dtype, layers: Iterable[Any]) -> list[Any]:
    """Return layers for :func:`run_layers` with only their linear maps cast."""
    return [
        Affine(layer.weight.to(dtype), layer.bias.to(dtype))
        if isinstance(layer, nn.Linear)
        else layer
        for layer in layers
    ]

"""Dense layers with fewer passes over memory and, on CPUs, oneDNN's matrix product.

Torch multiplies float32 matrices by MKL, which uses AVX-512 on Intel's processors alone and takes
twice oneDNN's time on the others that have it (``benchmarks/learner.py`` times both); without
AVX-512 MKL is the faster one. Torch ships oneDNN's product too, as the operator that its compiler
uses; where an installation lacks it, or it does not apply, MKL computes. A layer of linear map,
norm and activation is one node of the graph here, with its backward pass written out. On other
devices, under autocast and in compiled graphs these are torch's plain operations; only products
without a gradient stay oneDNN's in a compiled graph.

Shape letters: N rows, I inputs, O outputs, G blocks, w = width of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchrl.modules import DreamerV3MLP

#: Multiplications from which oneDNN's product is faster than MKL's for all its overhead.
ONEDNN_MULTIPLICATIONS = 2**20


def _find_onednn() -> Callable[..., Tensor] | None:
    name = "mkldnn::_linear_pointwise"
    if not torch.backends.mkldnn.is_available():
        return None
    if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"):
        return None
    return cast(Callable[..., Tensor], torch.ops.mkldnn._linear_pointwise.default)


_onednn = _find_onednn() if torch.backends.cpu.get_cpu_capability() == "AVX512" else None


def by_hand(x: Tensor) -> bool:
    """Whether the hand-written passes for CPUs apply to ``x``."""
    return on_cpu(x) and not torch.compiler.is_compiling()


def on_cpu(x: Tensor) -> bool:
    """Whether ``x`` is computed with on a CPU in its own precision."""
    return x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply ``[N, I]`` by ``[O, I]`` transposed, without a gradient: ``[N, O]``."""
    multiplications = x.numel() * len(weight)
    if (
        _onednn is None
        or multiplications < ONEDNN_MULTIPLICATIONS
        or x.dtype is not torch.float32
        or not _by_hand_or_operator(x)
    ):
        return F.linear(x, weight, bias)
    if torch.compiler.is_compiling():
        return cast(Tensor, torch.ops.w2f_torchrl.product(x, weight, bias))
    # A slice of a larger matrix would fall back to oneDNN's plain loops.
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()
    return _onednn(x, weight, bias, "none", [], "")


def block_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply the G blocks of ``[N, G w]`` by ``[G, w, v]``, without a gradient: ``[N, G v]``.

    Args:
        x: ``[N, G w]``.
        weight: ``[G, w, v]``.
        bias: ``[G, v]``.
    """
    blocks, width, _ = weight.shape
    small = x.numel() * weight.shape[-1] < 2 * blocks * ONEDNN_MULTIPLICATIONS
    if small or not _by_hand_or_operator(x):
        grouped = x.unflatten(-1, (blocks, width)).transpose(0, 1)
        out = torch.bmm(grouped, weight).transpose(0, 1).flatten(1)
        return out if bias is None else out + bias.flatten()
    if torch.compiler.is_compiling():
        return cast(Tensor, torch.ops.w2f_torchrl.block_product(x, weight, bias))
    biases = [None] * blocks if bias is None else list(bias)
    parts = zip(x.split(width, -1), weight, biases, strict=True)
    return torch.cat([product(part, matrix.t(), shift) for part, matrix, shift in parts], -1)


def _by_hand_or_operator(x: Tensor) -> bool:
    # The operators below have no gradient.
    return on_cpu(x) and not (torch.compiler.is_compiling() and torch.is_grad_enabled())


# Both as operators that a compiled graph calls as they are: Inductor takes oneDNN's own for one
# whose weights are constants.
_library = torch.library.Library("w2f_torchrl", "DEF")
for _function in (product, block_product):
    _name = _function.__name__
    _library.define(f"{_name}(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
    _library.impl(_name, _function, "CPU")


def _product_alike(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(len(x), len(weight))


def _block_product_alike(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(len(x), len(weight) * weight.shape[-1])


torch.library.register_fake("w2f_torchrl::product", _product_alike, lib=_library)
torch.library.register_fake("w2f_torchrl::block_product", _block_product_alike, lib=_library)


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
    """:func:`torch.nn.functional.linear`: ``[..., I]`` to ``[..., O]``."""
    if not by_hand(x):
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return product(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)
    rows: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return rows.view(*x.shape[:-1], len(weight))


class Normed(NamedTuple):
    """What the backward pass of ``silu(gain * x / rms(x))`` needs."""

    normed: Tensor
    scaled: Tensor
    scale: Tensor


def norm(x: Tensor, gain: Tensor, eps: float) -> tuple[Normed, Tensor]:
    """``silu(gain * x / rms(x))`` over the last dimension, and what its backward pass needs."""
    if x.dtype is not gain.dtype:  # from an autocast product
        x = x.to(gain.dtype)
    scale = inverse_rms(x, eps)
    normed = x * scale
    scaled = normed * gain
    return Normed(normed, scaled, scale), F.silu(scaled)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """``1 / sqrt(mean(x^2) + eps)`` over the last dimension ``[..., I]``: ``[..., 1]``."""
    if not by_hand(x):
        return x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(constant(eps, x.dtype), length, length, value=1 / x.shape[-1]).rsqrt_()


@cache
def constant(value: float, dtype: torch.dtype) -> Tensor:
    """A number as a tensor on the CPU, for operations that are fused for tensors only."""
    with torch.inference_mode(False):  # the first call's mode must not be that of all others
        return torch.tensor(value, dtype=dtype, device="cpu")


def activate(x: Tensor, normalise: Any) -> Tensor:
    """TorchRL's norm and SiLU ``[..., I]``, without a gradient; ``x`` may be overwritten."""
    if not by_hand(x):
        return F.silu(cast(Tensor, normalise(x)))
    x.mul_(inverse_rms(x, normalise.eps)).mul_(normalise.weight)
    return F.silu(x, inplace=True)


def norm_backward(grad: Tensor, saved: Normed, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the norm's input and of its scaled output."""
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
    """Apply TorchRL's layers (linear maps, each but the last with norm and activation).

    Args:
        layers: ``Linear, norm, SiLU`` repeated, and perhaps a last ``Linear``.
        x: ``[..., I]``.
    """
    if not by_hand(x):
        for layer in layers:
            x = layer(x)
        return x
    value = x.reshape(-1, x.shape[-1])
    modules: list[Any] = list(layers)  # a slice of a Sequential builds another one
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
    """A linear map in the place of its layer, which stays as it is."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Map ``[..., I]`` to ``[..., O]``."""
        return F.linear(x, self.weight, self.bias)


def maps_in(dtype: torch.dtype, layers: Iterable[Any]) -> list[Any]:
    """Layers for :func:`run_layers` whose linear maps are cast, and nothing else."""
    return [
        Affine(layer.weight.to(dtype), layer.bias.to(dtype))
        if isinstance(layer, nn.Linear)
        else layer
        for layer in layers
    ]


class MLP(DreamerV3MLP):
    """:class:`~torchrl.modules.DreamerV3MLP`, faster: same parameters and results."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """Map ``[..., I]``, given in parts, to ``[..., O]``."""
        value = inputs[0] if len(inputs) == 1 else torch.cat(inputs, -1)
        return run_layers(self.model, value)

"""Matrix products without a gradient, on CPUs by oneDNN.

Torch multiplies float32 matrices by MKL, which uses AVX-512 on Intel processors only and takes
twice oneDNN's time on other processors that have it (``benchmarks/speed/learner.py`` times both);
without AVX-512 MKL is faster. Torch ships oneDNN's product as the operator that its compiler uses.
Where an installation lacks it, or it does not apply, MKL computes.

A compiled graph calls these products too, if it needs no gradient.

Shape letters: N rows, I inputs, O outputs, G blocks, w width of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from w2f_torchrl.kernels import switch

#: Minimum number of multiplications for oneDNN: below it, its overhead exceeds what it saves.
ONEDNN_MULTIPLICATIONS = 2**20


def _find_onednn() -> Callable[..., Tensor] | None:
    name = "mkldnn::_linear_pointwise"
    if not torch.backends.mkldnn.is_available():
        return None
    if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"):
        return None
    return cast(Callable[..., Tensor], torch.ops.mkldnn._linear_pointwise.default)


_onednn = _find_onednn() if torch.backends.cpu.get_cpu_capability() == "AVX512" else None


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply as :func:`torch.nn.functional.linear` does: ``[N, I]``, ``[O, I]`` to ``[N, O]``."""
    multiplications = x.numel() * len(weight)
    if (
        _onednn is None
        or multiplications < ONEDNN_MULTIPLICATIONS
        or x.dtype is not torch.float32
        or not _applies_to(x)
    ):
        return F.linear(x, weight, bias)
    if torch.compiler.is_compiling():
        return cast(Tensor, torch.ops.w2f_torchrl.product(x, weight, bias))
    # A slice of a larger matrix would fall back to oneDNN's plain loops.
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()
    return _onednn(x, weight, bias, "none", [], "")


def block_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply each of the G blocks of ``x`` by a separate matrix.

    Args:
        x: ``[N, G w]``.
        weight: ``[G, w, v]``.
        bias: ``[G, v]``.

    Returns:
        ``[N, G v]``.
    """
    blocks, width, _ = weight.shape
    small = x.numel() * weight.shape[-1] < 2 * blocks * ONEDNN_MULTIPLICATIONS
    if small or not _applies_to(x):
        grouped = x.unflatten(-1, (blocks, width)).transpose(0, 1)  # [G, N, w]
        out = torch.bmm(grouped, weight).transpose(0, 1).flatten(1)  # [N, G v]
        return out if bias is None else out + bias.flatten()
    if torch.compiler.is_compiling():
        return cast(Tensor, torch.ops.w2f_torchrl.block_product(x, weight, bias))
    biases = [None] * blocks if bias is None else list(bias)
    parts = zip(x.split(width, -1), weight, biases, strict=True)
    return torch.cat([product(part, matrix.t(), shift) for part, matrix, shift in parts], -1)


def outer(x: Tensor, y: Tensor) -> Tensor:
    """Sum the outer products of rows: ``[N, I]``, ``[N, O]`` to ``[I, O]``."""
    return product(x.t(), y.t())


def outer_blocks(x: Tensor, y: Tensor) -> Tensor:
    """Sum the outer products of rows per block: ``[G, N, I]``, ``[G, N, O]`` to ``[G, I, O]``."""
    small = x[0].numel() * y.shape[-1] < 2 * ONEDNN_MULTIPLICATIONS
    if small or not switch.use_cpu_kernels(x):
        return x.transpose(1, 2) @ y
    return torch.stack([outer(a, b) for a, b in zip(x, y, strict=True)])


def _applies_to(x: Tensor) -> bool:
    if torch.compiler.is_compiling():  # the operators below have no gradient
        return switch.on_cpu(x) and not torch.is_grad_enabled()
    return switch.use_cpu_kernels(x)


# Both as operators that a compiled graph calls unchanged: Inductor takes oneDNN's own operator for
# one whose weights are constants.
_library = torch.library.Library("w2f_torchrl", "DEF")
for _function in (product, block_product):
    _name = _function.__name__
    _library.define(f"{_name}(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
    _library.impl(_name, _function, "CPU")


def _fake_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(len(x), len(weight))


def _fake_block_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(len(x), len(weight) * weight.shape[-1])


torch.library.register_fake("w2f_torchrl::product", _fake_product, lib=_library)
torch.library.register_fake("w2f_torchrl::block_product", _fake_block_product, lib=_library)

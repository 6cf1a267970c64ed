"""Draws of one-hot categoricals without a gradient.

The plain form, with a gradient, is :func:`w2f_torchrl.modules.sample_one_hot`. All invert the
distribution function, so the same uniform numbers give the same classes.

Shape letters: N rows, K categoricals, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from w2f_torchrl.kernels import switch

#: Floats that a CPU handles at once: softmax over shorter rows is not vectorised.
VECTOR = 16


def draw_classes_first(logits: Tensor, unimix: float, uniform: Tensor) -> Tensor:
    """Draw from logits whose classes come first: a CPU vectorises softmax and sums over K.

    Args:
        logits: ``[N, C, K]``.
        unimix: Share of the uniform distribution in the mixture, in [0, 1).
        uniform: Draws from U[0, 1) ``[N, K]``.

    Returns:
        One-hot samples ``[N, K, C]``.
    """
    classes = logits.shape[1]
    probs = torch.softmax(logits, 1).mul_(1 - unimix).add_(unimix / classes)
    # The last cumulative probability is not compared: rounding can leave it below 1.
    index = (uniform.unsqueeze(1) > probs.cumsum(1)[:, :-1]).sum(1)  # [N, K]
    if not switch.use_cpu_kernels(logits):  # a compiler fuses this form
        return one_hot(index, classes, logits.dtype)
    one_hots = torch.eye(classes, dtype=logits.dtype, device=logits.device)
    return one_hots.index_select(0, index.flatten()).view(*uniform.shape, classes)


def one_hot(index: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """Compare with every class: ``[..., K]`` to ``[..., K, C]``."""
    every = torch.arange(classes, device=index.device)
    return (index.unsqueeze(-1) == every).to(dtype)


def softmax_classes(logits: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """Return probabilities ``[N, K, C]`` in ``dtype`` of logits ``[N, K C]``."""
    if not switch.use_cpu_kernels(logits) or classes >= VECTOR:
        # The kernel casts as it reads.
        other = None if logits.dtype is dtype else dtype
        return torch.softmax(logits.unflatten(-1, (-1, classes)), -1, other)
    # A CPU's kernel is slow over a few values in a row, and fast over all rows at once.
    outermost = logits.reshape(-1, classes).t().contiguous()  # [C, N K]
    return torch.softmax(outermost, 0).t().view(len(logits), -1, classes)


def thresholds(uniform: Tensor, unimix: float, classes: int) -> Tensor:
    """Return the values to compare cumulative probabilities with, for all steps at once.

    A draw u takes the first class c with u <= (1 - m) F_c + m (c + 1) / C, where F are the
    cumulative probabilities without the uniform share m.

    Args:
        uniform: Draws from U[0, 1) ``[..., K]``.
        unimix: m, in [0, 1).
        classes: C.

    Returns:
        ``[..., K, C]``: above F_c a class after c is taken. No class follows the last one: its
        threshold is negative, since rounding can leave its cumulative probability below 1.
    """
    share = torch.arange(1, classes + 1, dtype=uniform.dtype, device=uniform.device)
    threshold = (uniform.unsqueeze(-1) - share * (unimix / classes)) / (1 - unimix)
    threshold[..., -1] = -1
    return threshold


def drawn_classes(probs: Tensor, threshold: Tensor) -> Tensor:
    """Draw classes ``[..., K]`` by inverting the cumulative sum of their probabilities.

    Args:
        probs: Without the uniform share ``[..., K, C]``.
        threshold: From :func:`thresholds`.
    """
    return (threshold > probs.cumsum(-1)).sum(-1)


def draw(probs: Tensor, threshold: Tensor, one_hots: Tensor) -> Tensor:
    """Draw one-hot samples ``[..., K, C]``; ``one_hots`` is the identity ``[C, C]``."""
    drawn = drawn_classes(probs, threshold)
    if torch.compiler.is_compiling():
        return one_hot(drawn, probs.shape[-1], one_hots.dtype)
    return one_hots.index_select(0, drawn.flatten()).view(probs.shape)

"""Draws of one-hot categoricals, and two-hot distributions over symexp-spaced bins.

The plain form of a draw, with a gradient, is :func:`w2f_torchrl.modules.sample_one_hot`. All draws
invert the distribution function, so the same uniform numbers give the same classes. Two-hot losses
(DreamerV3, eq. 10, 11) need no dense targets.

Shape letters: N rows, K categoricals, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchrl.modules import SymExpTwoHot

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
    # A CPU's kernel is slow for rows of a few values, and fast over all rows at once.
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
    threshold[..., -1].fill_(-1)  # an assignment makes a tensor on the host in torch 2.11
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


class TwoHot(SymExpTwoHot):
    """A faster :class:`~torchrl.modules.SymExpTwoHot`, with the same support and results.

    A two-hot target has two entries, so its cross-entropy needs two of the 255 log-probabilities
    and no dense target.
    """

    def decode(self, logits: Tensor) -> Tensor:
        """Return the expected value of logits ``[..., bins]`` as ``[...]``.

        Mirrored bins are paired before they are weighed, as TorchRL does: the support reaches
        4.8e8 and even probabilities must still give exactly zero.
        """
        half = self.bins.numel() // 2
        probs = torch.softmax(logits, -1)
        paired = probs[..., -half:] - probs[..., :half].flip(-1)
        bins: Tensor = self.bins[-half:].to(logits.dtype)
        # Autocast would multiply in bfloat16 on CUDA: 3 digits of rewards and values.
        with torch.autocast(logits.device.type, enabled=False):
            return torch.mv(paired.flatten(0, -2), bins).view(logits.shape[:-1])

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy ``[...]`` of logits ``[..., bins]`` to raw scalars.

        Args:
            logits: ``[..., bins]``.
            target: ``[...]`` or ``[..., 1]``, any range; saturates at the ends of the support.
        """
        if target.shape == (*logits.shape[:-1], 1):
            target = target.squeeze(-1)
        loss = self.losses(logits, target.unsqueeze(-1))
        return loss.squeeze(-1)

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropies to several targets with one pass over the logits.

        Args:
            logits: ``[..., bins]``.
            targets: ``[..., J]``, no gradient.

        Returns:
            ``[..., J]``.
        """
        with torch.no_grad():
            bins: Tensor = self.bins.to(targets.dtype)
            targets = targets.clamp(bins[0], bins[-1]).contiguous()
            lower = torch.bucketize(targets, bins, right=True).sub_(1)
            lower.clamp_(0, len(bins) - 2)
            start = bins[lower]
            upper_weight = (targets - start) / (bins[lower + 1] - start)
            index = torch.stack((lower, lower + 1), -1)
            weight = torch.stack((1 - upper_weight, upper_weight), -1)
        log_probs = torch.log_softmax(logits, -1)
        picked = log_probs.gather(-1, index.flatten(-2)).unflatten(-1, (-1, 2))
        loss: Tensor = -(picked * weight).sum(-1)
        return loss

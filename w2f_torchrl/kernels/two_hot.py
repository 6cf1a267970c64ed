"""Two-hot distributions over symexp-spaced bins, without dense targets (DreamerV3, eq. 10, 11)."""

from __future__ import annotations

import torch
from torch import Tensor
from torchrl.modules import SymExpTwoHot


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

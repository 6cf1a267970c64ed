"""Skip updates whose gradients are not finite."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from w2f_torchrl.objectives import World2FilterLoss

FINITE = "finite"
"""Name of the metric that is 1 if an update was applied, otherwise 0."""


class FiniteGuard(nn.Module):
    """Decide on the device whether an update is applied; otherwise restore the return statistics.

    The host learns of a bad update only when it reads the metrics. With ``stop`` no update is
    applied after the first bad one, so the networks are still unchanged at that time.

    The gradients are checked, not the losses, because only gradients change weights, and all ranks
    of a distributed run have equal ones.

    Args:
        loss: The loss, whose return statistics are updated in the forward pass.
        on_nan: ``stop`` or ``skip``.
    """

    halted: Tensor

    def __init__(self, loss: World2FilterLoss, on_nan: str = "stop") -> None:
        super().__init__()
        self.skips = on_nan == "skip"
        # In a tuple, so that it does not become a submodule. Its buffers are looked up each time,
        # because moving a module to CUDA replaces them.
        self._normalizers = (loss.return_norm,)
        self.register_buffer("halted", torch.zeros((), dtype=torch.bool))

    def remember(self) -> list[Tensor]:
        """Return copies of the statistics that the forward pass is about to change."""
        return [statistic.clone() for statistic in self._statistics()]

    def _statistics(self) -> list[Tensor]:
        return [buffer for module in self._normalizers for buffer in module.buffers()]

    @torch.no_grad()
    def judge(
        self, metrics: TensorDictBase, norm: Tensor, remembered: list[Tensor]
    ) -> tuple[Tensor, TensorDictBase]:
        """Decide whether an update is applied.

        Args:
            metrics: Scalar metrics of the update.
            norm: Norm of the gradients, a scalar.
            remembered: The copies from :meth:`remember`.

        Returns:
            Whether the update is applied, a bool scalar on the device, and the metrics with
            ``finite``; with ``skip`` those of a bad update are zero, to keep sums finite.
        """
        good = norm.isfinite() & ~self.halted
        if self.skips:
            values = torch.where(good, torch.stack(list(metrics.values())), 0)
            metrics = metrics.update(dict(zip(metrics.keys(), values.unbind(), strict=True)))
        else:
            self.halted.logical_or_(~good)
        for statistic, before in zip(self._statistics(), remembered, strict=True):
            statistic.copy_(torch.where(good, statistic, before))
        return good, metrics.set(FINITE, good.float())

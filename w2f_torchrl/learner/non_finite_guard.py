"""Updates whose gradients are not finite change nothing."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from w2f_torchrl.objectives import World2FilterLoss

FINITE = "finite"
"""Name of the entry that says whether an update was applied: 1 or 0."""


class FiniteGuard(nn.Module):
    """Decides on the device whether an update is applied, and undoes what the losses changed.

    The host reads nothing: it learns of a bad update with the metrics. With ``stop`` no update is
    applied after the first bad one, so that the networks are still those of before when it does.

    Gradients are looked at, not losses: they are what spoils weights, and all ranks of a
    distributed run have the same.

    Args:
        loss: Its return statistics are updated in the forward pass.
        on_nan: ``stop`` or ``skip``.
    """

    halted: Tensor

    def __init__(self, loss: World2FilterLoss, on_nan: str = "stop") -> None:
        super().__init__()
        self.skips = on_nan == "skip"
        # In a tuple, so that it is no submodule of this one too. Its buffers are looked up each
        # time: moving a module to CUDA replaces them.
        self._normalizers = (loss.return_norm,)
        self.register_buffer("halted", torch.zeros((), dtype=torch.bool))

    def remember(self) -> list[Tensor]:
        """Copies of what the forward pass is about to change."""
        return [statistic.clone() for statistic in self._statistics()]

    def _statistics(self) -> list[Tensor]:
        return [buffer for module in self._normalizers for buffer in module.buffers()]

    @torch.no_grad()
    def judge(
        self, metrics: TensorDictBase, norm: Tensor, remembered: list[Tensor]
    ) -> tuple[Tensor, TensorDictBase]:
        """Decide about an update.

        Args:
            metrics: The update's scalars.
            norm: The gradients' norm, a scalar.
            remembered: What :meth:`remember` gave.

        Returns:
            Whether the update is applied, a bool scalar on the device, and the metrics with
            ``finite``; with ``skip`` those of a bad update are zero, so that sums stay finite.
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

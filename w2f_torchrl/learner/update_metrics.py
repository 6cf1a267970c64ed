"""The metrics of the updates between two rows of ``metrics.jsonl``."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from w2f_torchrl.learner.non_finite_guard import FINITE

logger = logging.getLogger(__name__)


class Sums(NamedTuple):
    """Sums over updates, on the host."""

    values: TensorDictBase
    """Scalar sums by name."""
    applied: int
    """Number of updates with finite gradients."""
    missed: int
    """Number of the other updates."""

    def means(self) -> dict[str, float]:
        """Return means over the applied updates, of which at least one is required."""
        means = {name: float(value) for name, value in (self.values / self.applied).items()}
        if self.missed:
            means["train/skipped_updates"] = float(self.missed)
            logger.warning("%d of %d updates were skipped", self.missed, self.missed + self.applied)
        return means

    def not_finite(self) -> list[str]:
        """Return the names of the sums that are not finite."""
        return sorted(name for name, value in self.values.items() if not torch.isfinite(value))


class UpdateMetrics:
    """Sum metrics on the device, so that the host waits for it only in :meth:`read`.

    Args:
        device: Device of the learner's metrics.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.count = 0
        """Updates since the last row."""
        self.slots: list[Tensor] = []
        """Replay slots ``[B, T]`` of the sample of each of these updates."""
        self._sums: TensorDictBase | None = None

    def add(self, metrics: TensorDictBase, slots: Tensor) -> None:
        """Add the metrics of an update.

        Args:
            metrics: Scalars on the device, including ``finite``.
            slots: Replay slots of its sample, ``[B, T]``.
        """
        self._sums = metrics if self._sums is None else self._sums + metrics
        self.count += 1
        self.slots.append(slots)

    def read(self) -> Sums:
        """Copy the sums to the host; they are kept until :meth:`clear`."""
        assert self._sums is not None, "read() needs at least one update"
        sums = self._sums.to("cpu")
        applied = round(float(sums[FINITE]))
        return Sums(sums.exclude(FINITE), applied, self.count - applied)

    def clear(self) -> None:
        """Begin the next row."""
        self._sums, self.count, self.slots = None, 0, []

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the row that is not yet written."""
        sums = None if self._sums is None else self._sums.to_dict()
        return {"sums": sums, "summed": self.count, "window": self.slots}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state from :meth:`state_dict`; other entries are ignored."""
        sums = state["sums"]
        self._sums = None if sums is None else TensorDict(sums).to(self.device)
        self.count, self.slots = state["summed"], state["window"]


def shown_row(row: dict[str, float], ranks: int) -> dict[str, float]:
    """Return a row of metrics with the names under which it is logged.

    Args:
        row: Means over updates and ranks.
        ranks: Number of ranks.
    """
    row = {name: value for name, value in row.items() if not name.startswith("loss_")}
    # The evaluation logs its IoU under the plain name; this is the one of training batches.
    if "wm/mask_iou" in row:
        row["train/mask_iou"] = row.pop("wm/mask_iou")
    if "segmentation/frames" in row:
        row["segmentation/frames"] *= ranks
    return row

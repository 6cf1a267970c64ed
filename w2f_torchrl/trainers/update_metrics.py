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
    """Scalars by name."""
    applied: int
    """Updates whose gradients were finite."""
    missed: int
    """The others."""

    def means(self) -> dict[str, float]:
        """Means over the updates that were applied, of which there must be some."""
        means = {name: float(value) for name, value in (self.values / self.applied).items()}
        if self.missed:
            means["train/skipped_updates"] = float(self.missed)
            logger.warning("%d of %d updates were skipped", self.missed, self.missed + self.applied)
        return means

    def not_finite(self) -> list[str]:
        """Names of the sums that are not finite."""
        return sorted(name for name, value in self.values.items() if not torch.isfinite(value))


class UpdateMetrics:
    """Adds up on the device, so that the host waits for it at :meth:`read` only.

    Args:
        device: Where the learner's metrics are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.count = 0
        """Updates since the last row."""
        self.slots: list[Tensor] = []
        """Slots of the replay ``[B, T]`` that each of them learned from."""
        self._sums: TensorDictBase | None = None

    def add(self, metrics: TensorDictBase, slots: Tensor) -> None:
        """Add an update's.

        Args:
            metrics: Scalars on the device, among them ``finite``.
            slots: Of its sample, ``[B, T]``.
        """
        self._sums = metrics if self._sums is None else self._sums + metrics
        self.count += 1
        self.slots.append(slots)

    def read(self) -> Sums:
        """Bring the sums to the host; they stay until :meth:`clear`."""
        assert self._sums is not None, "there are updates to read the metrics of"
        sums = self._sums.to("cpu")
        applied = round(float(sums[FINITE]))
        return Sums(sums.exclude(FINITE), applied, self.count - applied)

    def clear(self) -> None:
        """Begin the next row."""
        self._sums, self.count, self.slots = None, 0, []

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of a row that isn't written yet."""
        sums = None if self._sums is None else self._sums.to_dict()
        return {"sums": sums, "summed": self.count, "window": self.slots}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, and more entries that are not read."""
        sums = state["sums"]
        self._sums = None if sums is None else TensorDict(sums).to(self.device)
        self.count, self.slots = state["summed"], state["window"]


def shown_row(row: dict[str, float], ranks: int) -> dict[str, float]:
    """A row of metrics under the names that it is written with.

    Args:
        row: Means over updates, and over ranks.
        ranks: How many.
    """
    row = {name: value for name, value in row.items() if not name.startswith("loss_")}
    # The evaluation's IoU has the plain name; this one is of the training batches.
    if "wm/mask_iou" in row:
        row["train/mask_iou"] = row.pop("wm/mask_iou")
    if "segmentation/frames" in row:
        row["segmentation/frames"] *= ranks
    return row

"""The number of updates that are due, exactly at the replay ratio."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from w2f_torchrl.utils.checks import check_number


class UpdateSchedule:
    """Count the learner updates that are due after a number of agent steps.

    An update replays ``batch_size * batch_length`` records, so a train ratio of R replayed records
    per agent step means R / (batch_size * batch_length) updates per step. After any sequence of
    calls the updates add up to exactly ``floor(ratio * (steps - start))``: the ratio is a fraction
    and the count an integer. (TorchRL's ``DreamerV3UpdateRatio`` adds floats, and allows one
    update at its first call, whatever the ratio.)

    Args:
        train_ratio: Replayed records per agent step, not negative. A float is read as its
            decimal form: 0.1 means 1/10.
        batch_size: Slices in an update's batch (B), over all ranks.
        batch_length: Records in a slice (T).
        start: Agent steps without updates, such as those that first fill the replay.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> schedule = UpdateSchedule(512, batch_size=16, batch_length=64)  # an update per 2 steps
        >>> schedule(3), schedule(4), schedule(8)
        (1, 1, 2)
    """

    def __init__(
        self,
        train_ratio: int | float | str | Fraction,
        batch_size: int,
        batch_length: int,
        start: int = 0,
    ) -> None:
        if isinstance(train_ratio, int | float):
            check_number("train_ratio", train_ratio)
        counts = {"batch_size": batch_size, "batch_length": batch_length, "start": start}
        for name, value in counts.items():
            check_number(name, value, integer=True)
        ratio = Fraction(str(train_ratio))
        if ratio < 0:
            raise ValueError(f"train_ratio must not be negative, got {train_ratio}.")
        if batch_size < 1 or batch_length < 1:
            raise ValueError(
                f"batch_size and batch_length must be positive, got {batch_size} and "
                f"{batch_length}."
            )
        if start < 0:
            raise ValueError(f"start must not be negative, got {start}.")
        self.ratio = ratio / (batch_size * batch_length)
        self.start = start
        self.updates = 0
        self._before = 0
        """Updates that were due at an earlier ratio."""

    def __call__(self, steps: int) -> int:
        """Return the updates that are due now, and count them as done.

        Args:
            steps: Agent steps since the beginning of the run, over all envs and ranks.

        Raises:
            ValueError: If ``steps`` allows fewer updates than were already returned.
        """
        total = self.total(steps)
        due = total - self.updates
        if due < 0:
            raise ValueError(
                f"steps={steps} allows {total} updates, but {self.updates} were already due: "
                "steps must not decrease."
            )
        self.updates = total
        return due

    def total(self, steps: int) -> int:
        """Return all updates of a run after a number of agent steps, without counting any as done.

        Args:
            steps: Agent steps since the beginning of the run, over all envs and ranks.
        """
        # int() rounds down, as the product is not negative.
        return self._before + int(self.ratio * max(steps - self.start, 0))

    def state_dict(self) -> dict[str, Any]:
        """Return the ratio (as "a/b"), the start and the updates so far."""
        return {
            "ratio": str(self.ratio),
            "start": self.start,
            "updates": self.updates,
            "before": self._before,
        }

    def change_ratio(self, state_dict: dict[str, Any], steps: int) -> None:
        """Continue a schedule with the ratio of this one, after the number of ranks has changed.

        Earlier updates are kept; from now on steps count at the new ratio.

        Args:
            state_dict: State of the other schedule.
            steps: Agent steps so far.
        """
        self.start = max(state_dict["start"], steps)
        self.updates = self._before = state_dict["updates"]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a schedule.

        Raises:
            ValueError: If the saved ratio differs.
        """
        if Fraction(state_dict["ratio"]) != self.ratio:
            raise ValueError(
                f"The saved schedule made {state_dict['ratio']} updates per agent step, this one "
                f"makes {self.ratio}: train_ratio, batch_size and batch_length must not change."
            )
        self.start = state_dict["start"]
        self.updates = state_dict["updates"]
        self._before = state_dict.get("before", 0)

"""Work whose failures a run tolerates: they are written down, and training continues."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from w2f_torchrl.trainers.interruptions import EXCEPTIONS_NAME, keep_exception

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Tolerance:
    """Counts how often each kind of work has failed in a row.

    Args:
        run_dir: The run's directory: errors are appended to its ``exceptions.txt``.
        most: Consecutive failures of a kind at which the error ends the run.
    """

    def __init__(self, run_dir: Path, most: int) -> None:
        self.run_dir, self.most = run_dir, most
        self.in_a_row: dict[str, int] = {}
        """By the work's name; a success makes it 0."""

    def attempt(self, work: str, action: Callable[[], T], *, frames: int, updates: int) -> T | None:
        """Do something that may fail, but not too often in a row.

        Args:
            work: What a message calls it.
            action: Does it.
            frames: Environment frames so far.
            updates: Updates so far.

        Returns:
            What the action returned; None if it failed.

        Raises:
            Exception: The action's, if it is the last straw.
        """
        try:
            result = action()
        except Exception as error:
            self.in_a_row[work] = failures = self.in_a_row.get(work, 0) + 1
            if failures >= self.most:
                logger.error("%s failed %d times in a row: the run ends", work, failures)
                self.in_a_row[work] = 0  # a resume may fail as often
                raise
            keep_exception(self.run_dir, error, frames=frames, updates=updates)
            logger.error(
                "%s failed at frame %d: %s. Training continues; the traceback is in %s. At %d "
                "failures in a row the run ends (evaluation.max_failures).",
                work,
                frames,
                repr(error)[:500],
                self.run_dir / EXCEPTIONS_NAME,
                self.most,
            )
            return None
        self.in_a_row[work] = 0
        return result

    def state_dict(self) -> dict[str, int]:
        """Return the failures in a row of each kind of work."""
        return dict(self.in_a_row)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take over a state from :meth:`state_dict`."""
        self.in_a_row = dict(state)

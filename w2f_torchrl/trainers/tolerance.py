"""Tolerate failures of some work: they are logged, and training continues."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from w2f_torchrl.trainers.interruptions import EXCEPTIONS_NAME, keep_exception

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Tolerance:
    """Count how often each kind of work has failed in a row.

    Args:
        run_dir: The run's directory: errors are appended to its ``exceptions.txt``.
        max_failures: Consecutive failures of one kind after which the error ends the run.
    """

    def __init__(self, run_dir: Path, max_failures: int) -> None:
        self.run_dir, self.max_failures = run_dir, max_failures
        self.in_a_row: dict[str, int] = {}
        """Failures in a row by name of the work; a success resets it to 0."""

    def attempt(self, work: str, action: Callable[[], T], *, frames: int, updates: int) -> T | None:
        """Call ``action``, which may fail, but not too often in a row.

        Args:
            work: Name of the work in messages.
            action: The function to call.
            frames: Environment frames so far.
            updates: Updates so far.

        Returns:
            The result of ``action``; None if it failed.

        Raises:
            Exception: The exception of ``action``, if it has failed too often in a row.
        """
        try:
            result = action()
        except Exception as error:
            self.in_a_row[work] = failures = self.in_a_row.get(work, 0) + 1
            if failures >= self.max_failures:
                logger.error("%s failed %d times in a row: the run ends", work, failures)
                self.in_a_row[work] = 0  # after a resume it may fail as often again
                raise
            keep_exception(self.run_dir, error, frames=frames, updates=updates)
            logger.error(
                "%s failed at frame %d: %s. Training continues; the traceback is in %s. At %d "
                "failures in a row the run ends (evaluation.max_failures).",
                work,
                frames,
                repr(error)[:500],
                self.run_dir / EXCEPTIONS_NAME,
                self.max_failures,
            )
            return None
        self.in_a_row[work] = 0
        return result

    def state_dict(self) -> dict[str, int]:
        """Return the failures in a row of each kind of work."""
        return dict(self.in_a_row)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Load a state from :meth:`state_dict`."""
        self.in_a_row = dict(state)

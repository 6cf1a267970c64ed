"""Slow work beside the training: encoding videos, drawing curves."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

logger = logging.getLogger(__name__)


class BackgroundWorker:
    """Does jobs one after another in a thread of low priority.

    Nothing is lost at the end: :meth:`close` waits for all jobs, and so does the interpreter when
    it exits without a :meth:`close`. A job that raises is reported with its traceback, and its
    label is kept in :attr:`failed`.

    Args:
        pending: Most jobs that wait or run. A further one is waited with for ``patience`` seconds,
            then left out with a warning: a slow disk never holds training up for longer, nor fills
            the memory.
        patience: Seconds.
    """

    def __init__(self, pending: int = 32, patience: float = 1.0) -> None:
        self.failed: list[str] = []
        """Labels of the jobs that raised or were left out."""
        self._patience = patience
        self._waiting: set[str] = set()
        self._slots = threading.BoundedSemaphore(pending)
        self._pool = ThreadPoolExecutor(1, "w2f-background", initializer=_lower_priority)

    def submit(self, label: str, job: Callable[[], object]) -> bool:
        """Queue a job, unless one of that label waits already.

        Args:
            label: What a report of a failure calls it.
            job: The work; what it returns is dropped.

        Returns:
            Whether there was room for it.
        """
        if label in self._waiting:
            return True
        if not self._slots.acquire(timeout=self._patience):
            logger.warning("%s is left out: the work beside training takes too long.", label)
            self.failed.append(label)
            return False
        self._waiting.add(label)
        self._pool.submit(self._run, label, job)
        return True

    def flush(self) -> None:
        """Wait until everything that was queued is done."""
        self._pool.submit(lambda: None).result()

    def close(self) -> None:
        """Finish all jobs and end the thread. Closing twice is allowed."""
        self._pool.shutdown(wait=True)

    def _run(self, label: str, job: Callable[[], object]) -> None:
        self._waiting.discard(label)
        try:
            job()
        except Exception:
            logger.exception("%s could not be made.", label)
            self.failed.append(label)
        finally:
            self._slots.release()


def _lower_priority() -> None:
    """On Linux a priority belongs to a thread: training and the environments go first."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)

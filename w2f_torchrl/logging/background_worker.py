"""Slow work in the background of training: encoding videos, drawing curves."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

logger = logging.getLogger(__name__)


class BackgroundWorker:
    """Run jobs one after another in a low-priority thread.

    No job is lost at the end: :meth:`close` waits for all jobs, and so does the interpreter if it
    exits without a :meth:`close`. A job that raises is logged with its traceback, and its label is
    kept in :attr:`failed`.

    Args:
        pending: Maximum number of queued or running jobs. If the queue is full, :meth:`submit`
            waits for ``patience`` seconds, then drops the job with a warning: a slow disk neither
            delays training for longer nor fills the memory.
        patience: Maximum waiting time, seconds.
    """

    def __init__(self, pending: int = 32, patience: float = 1.0) -> None:
        self.failed: list[str] = []
        """Labels of the jobs that raised or were dropped."""
        self._patience = patience
        self._waiting: set[str] = set()
        self._unfinished: list[str] = []
        self._slots = threading.BoundedSemaphore(pending)
        self._pool = ThreadPoolExecutor(1, "w2f-background", initializer=_lower_priority)

    def submit(self, label: str, job: Callable[[], object]) -> bool:
        """Queue a job, unless one with the same label is already waiting.

        Args:
            label: Name of the job in messages.
            job: The work; its return value is ignored.

        Returns:
            Whether the job was accepted.
        """
        if label in self._waiting:
            return True
        if not self._slots.acquire(timeout=self._patience):
            logger.warning("%s was dropped: background work takes too long.", label)
            self.failed.append(label)
            return False
        self._waiting.add(label)
        self._unfinished.append(label)
        self._pool.submit(self._run, label, job)
        return True

    def unfinished(self) -> list[str]:
        """Return the labels of the jobs that are queued or running, in order."""
        return list(self._unfinished)

    def flush(self) -> None:
        """Wait until all queued jobs are done."""
        self._pool.submit(lambda: None).result()

    def close(self) -> None:
        """Finish all jobs and end the thread. Closing twice is allowed."""
        self._pool.shutdown(wait=True)

    def _run(self, label: str, job: Callable[[], object]) -> None:
        self._waiting.discard(label)
        try:
            job()
        except Exception:
            logger.exception("%s failed.", label)
            self.failed.append(label)
        finally:
            self._unfinished.remove(label)
            self._slots.release()


def _lower_priority() -> None:
    """Lower this thread's priority on Linux, so that training and environments go first."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)

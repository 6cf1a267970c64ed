"""A MultiSyncCollector that always ends, and that says how a worker died."""

from __future__ import annotations

import atexit
import signal
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty
from typing import Any

from tensordict import TensorDictBase
from torchrl.collectors import MultiSyncCollector

# Signals that a terminal or a cluster sends to all processes: the main one decides what to do.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

_LOOK_EVERY = 0.5
"""Seconds between two looks whether the workers live, while waiting for them."""


class WorkerError(RuntimeError):
    """A worker process died; the message says which, how, and what went wrong in it."""


class SyncCollector(MultiSyncCollector):
    """A MultiSyncCollector whose process always ends, and that never waits for a dead worker.

    TorchRL leaves the weight scheme to the garbage collector. When that comes at the interpreter's
    end, after an exception above all, the scheme starts a thread that never runs and hangs; workers
    that nobody shut down are waited for without end as well. It also waits without end for a dead
    worker to acknowledge new weights.

    Args:
        failures: Folder where workers leave what went wrong, in files named after their index.
    """

    def __init__(
        self, *args: Any, failures: tempfile.TemporaryDirectory[str], **kwargs: Any
    ) -> None:
        atexit.register(_shutdown_if_alive, weakref.ref(self))
        self._failures = failures
        super().__init__(*args, **kwargs)
        for scheme in (self._weight_sync_schemes or {}).values():
            scheme._wait_for_ack = _AckWaiter(self, scheme)

    def iterator(self) -> Iterator[TensorDictBase]:
        """Yield batches.

        Raises:
            WorkerError: If a worker died.
        """
        with self.watched():
            yield from super().iterator()

    def map_fn(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Call a method in every worker.

        Raises:
            WorkerError: If a worker died.
        """
        with self.watched():
            results: list[Any] = super().map_fn(*args, **kwargs)
        return results

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Turn what a worker's death leads to into a WorkerError."""
        try:
            yield
        except WorkerError:
            raise
        except (RuntimeError, ValueError, OSError, EOFError) as error:
            self.check_workers(patience=1.0, cause=error)
            raise

    def check_workers(self, patience: float = 0.0, cause: BaseException | None = None) -> None:
        """Raise a WorkerError if a worker is dead.

        Args:
            patience: Seconds to wait for one to die whose connection is closed already.
            cause: What was noticed first.
        """
        for index, process in enumerate(self.procs):
            if process._closed:  # by TorchRL, which ends the others as it finds a dead one
                continue
            process.join(timeout=patience)
            if not process.is_alive():
                raise WorkerError(self._describe(index, process.exitcode)) from cause

    def _describe(self, index: int, code: int | None) -> str:
        worker = f"collector worker {index} of {len(self.procs)}"
        if code is not None and code < 0:
            return (
                f"{worker} was killed by {signal.Signals(-code).name}. The kernel does that when "
                "memory runs out; then lower environment.num_envs or replay.capacity."
            )
        report = Path(self._failures.name) / str(index)
        reason = report.read_text() if report.exists() else "no Python exception was reported"
        return f"{worker} ended with exit code {code}:\n{reason}"

    def shutdown(
        self, timeout: float | None = None, close_env: bool = True, raise_on_error: bool = True
    ) -> None:
        """End the workers, then the weight scheme's queues."""
        try:
            super().shutdown(timeout, close_env, raise_on_error)
        finally:
            for scheme in (getattr(self, "_weight_sync_schemes", None) or {}).values():
                scheme.shutdown()
            self._failures.cleanup()


class _AckWaiter:
    """Waits until workers have taken new weights, and looks whether they live."""

    def __init__(self, collector: SyncCollector, scheme: Any) -> None:
        self._collector, self._queues = weakref.ref(collector), scheme._ack_queues

    def __call__(self, worker_ids: list[int] | None = None, timeout: float | None = None) -> None:
        del timeout
        for worker in self._queues if worker_ids is None else worker_ids:
            while True:
                try:
                    self._queues[worker].get(timeout=_LOOK_EVERY)
                    break
                except Empty:
                    collector = self._collector()
                    if collector is not None:
                        collector.check_workers()


def ignore_stop_signals() -> None:
    """Leave Ctrl+C, and what a cluster sends to all processes, to the main one."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _shutdown_if_alive(collector: weakref.ref[SyncCollector]) -> None:
    alive = collector()
    if alive is not None:
        alive.shutdown(raise_on_error=False)

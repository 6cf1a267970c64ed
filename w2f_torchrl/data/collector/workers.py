"""A MultiSyncCollector that always ends, and reports workers that died or hang."""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import signal
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty
from typing import Any

from tensordict import TensorDictBase
from torchrl.collectors import MultiSyncCollector

from w2f_torchrl.utils.stopping import stop_is_wanted

# Signals that a terminal or a cluster sends to all processes; the main process handles them.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
TIMEOUT_SECONDS = 300.0
START_SECONDS = 120.0
"""Minimum time that a worker has to start, to import and to build its envs."""
STOP_SECONDS = 10.0
"""How long to wait for a batch after a stop signal before giving up."""

_POLL_SECONDS = 0.5
"""How often to check that workers are alive, while waiting for them."""
_PR_SET_PDEATHSIG = 1


class WorkerError(RuntimeError):
    """A worker process died or hangs; the message names the worker and the reason."""


class SyncCollector(MultiSyncCollector):
    """A MultiSyncCollector whose process always ends, and that never waits for a lost worker.

    TorchRL leaves the weight scheme to the garbage collector. If that runs at the interpreter's
    exit, especially after an exception, the scheme starts a thread that never runs, and hangs.
    TorchRL also waits forever for workers that were not shut down, and for a dead worker to
    acknowledge new weights.

    Args:
        failures: Folder where workers write their tracebacks, in files named after their index.
        timeout_seconds: How long to wait for a worker that does not respond.
    """

    def __init__(
        self,
        *args: Any,
        failures: tempfile.TemporaryDirectory[str],
        timeout_seconds: float = TIMEOUT_SECONDS,
        **kwargs: Any,
    ) -> None:
        atexit.register(_shutdown_if_alive, weakref.ref(self))
        self._failures, self.timeout_seconds = failures, timeout_seconds
        with _ended_unless_started(max(timeout_seconds, START_SECONDS)):
            super().__init__(*args, **kwargs)
        for scheme in (self._weight_sync_schemes or {}).values():
            scheme._wait_for_ack = _AckWaiter(self, scheme)
        self.queue_out = _WatchedQueue(self, vars(self)["queue_out"])

    def iterator(self) -> Iterator[TensorDictBase]:
        """Yield batches.

        Raises:
            WorkerError: If a worker died or does not respond.
        """
        with self.watched():
            yield from super().iterator()

    def map_fn(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Call a method in every worker.

        Raises:
            WorkerError: If a worker died or does not respond.
        """
        with self.watched():
            results: list[Any] = super().map_fn(*args, **kwargs)
        return results

    def _recv_and_check(
        self,
        pipe: Any,
        *,
        timeout: float | None = None,
        check_interval: float = _POLL_SECONDS,
        worker_idx: int | None = None,
    ) -> Any:
        """Receive a worker's answer; TorchRL's method waits forever for one that hangs."""
        del timeout
        patience = Patience(self.timeout_seconds)
        while not pipe.poll(min(check_interval, _POLL_SECONDS)):
            self.check_workers()
            if patience.is_over():
                raise self.hangs([] if worker_idx is None else [worker_idx], patience)
        return pipe.recv()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Turn errors caused by a worker's death into a WorkerError; kill the other workers."""
        try:
            try:
                yield
            except WorkerError:
                raise
            except (RuntimeError, ValueError, OSError, EOFError) as error:
                self.check_workers(patience=1.0, cause=error)
                raise
        except WorkerError:
            self.kill()  # TorchRL would wait ten seconds for a hung worker to end
            raise

    def check_workers(self, patience: float = 0.0, cause: BaseException | None = None) -> None:
        """Raise a WorkerError if a worker is dead.

        Args:
            patience: Seconds to wait for a worker to die whose connection is already closed.
            cause: The exception that was raised first.
        """
        for index, process in enumerate(self.procs):
            if process._closed:  # by TorchRL, which ends the others when it finds a dead one
                continue
            process.join(timeout=patience)
            if not process.is_alive():
                raise WorkerError(self._describe(index, process.exitcode)) from cause

    def hangs(self, workers: Iterable[int], patience: Patience) -> WorkerError:
        """Return the error that names the workers that hang."""
        names = ", ".join(map(str, sorted(workers))) or "?"
        return WorkerError(
            f"collector worker {names} of {len(self.procs)} hangs: no response {patience.why()}."
        )

    def kill(self) -> None:
        """Kill the workers, even hung ones; call :meth:`shutdown` afterwards."""
        _kill(getattr(self, "procs", ()))

    def _describe(self, index: int, code: int | None) -> str:
        worker = f"collector worker {index} of {len(self.procs)}"
        if code is not None and code < 0:
            return (
                f"{worker} was killed by {signal.Signals(-code).name}. The kernel does that when "
                "memory runs out; in that case lower environment.num_envs or replay.capacity."
            )
        report = Path(self._failures.name) / str(index)
        reason = report.read_text() if report.exists() else "no Python exception was reported"
        return f"{worker} ended with exit code {code}:\n{reason}"

    def shutdown(
        self, timeout: float | None = None, close_env: bool = True, raise_on_error: bool = True
    ) -> None:
        """End the workers, then close the queues of the weight scheme."""
        try:
            super().shutdown(timeout, close_env, raise_on_error)
        finally:
            self.kill()  # on a busy machine TorchRL's ten seconds may not suffice
            for scheme in (getattr(self, "_weight_sync_schemes", None) or {}).values():
                scheme.shutdown()
            self._failures.cleanup()


class Patience:
    """Count the seconds of a wait; poll it twice per second.

    Time in which this process itself was suspended (Ctrl+Z, a sleeping machine) is not counted.

    Args:
        seconds: Maximum length of the wait.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._waited, self._since_stop = seconds, 0.0, 0.0
        self._looked_at = time.monotonic()

    def is_over(self) -> bool:
        """Count the time since the last call, and return whether the wait is over."""
        now = time.monotonic()
        passed = min(now - self._looked_at, 4 * _POLL_SECONDS)
        self._looked_at = now
        self._waited += passed
        self._since_stop += passed if stop_is_wanted() else 0.0
        return self._waited > self._seconds or self._since_stop > STOP_SECONDS

    def why(self) -> str:
        """Return how long the wait lasted, for a message."""
        if self._waited > self._seconds:
            return f"for {self._seconds:g} seconds (collection.timeout_seconds)"
        return f"for {STOP_SECONDS:g} seconds after the stop signal"


class _WatchedQueue:
    """The queue of batches, which checks that workers are alive and make progress."""

    def __init__(self, collector: SyncCollector, queue: Any) -> None:
        self._collector, self._queue = weakref.ref(collector), queue
        self._missing = set(range(len(collector.procs)))

    def get(self, timeout: float | None = None) -> Any:
        """Return a worker's part of a batch, and the data that TorchRL sends with it."""
        del timeout
        collector = self._collector()
        assert collector is not None, "called by the collector"
        patience = Patience(collector.timeout_seconds)
        while True:
            try:
                item = self._queue.get(timeout=_POLL_SECONDS)
                break
            except Empty:
                collector.check_workers()
                if patience.is_over():
                    raise collector.hangs(self._missing, patience) from None
        worker = item[0][1] if isinstance(item[0], tuple) else item[0]
        self._missing.discard(worker)
        if not self._missing:
            self._missing = set(range(len(collector.procs)))
        return item

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)


class _AckWaiter:
    """Wait until workers have received new weights, and check that they are alive."""

    def __init__(self, collector: SyncCollector, scheme: Any) -> None:
        self._collector, self._queues = weakref.ref(collector), scheme._ack_queues

    def __call__(self, worker_ids: list[int] | None = None, timeout: float | None = None) -> None:
        del timeout
        for worker in self._queues if worker_ids is None else worker_ids:
            self._wait(worker)

    def _wait(self, worker: int) -> None:
        patience: Patience | None = None
        while True:
            try:
                self._queues[worker].get(timeout=_POLL_SECONDS)
                return
            except Empty:
                collector = self._collector()
                if collector is None:
                    continue
                collector.check_workers()
                patience = patience or Patience(collector.timeout_seconds)
                if patience.is_over():
                    raise collector.hangs([worker], patience) from None


@contextmanager
def _ended_unless_started(seconds: float) -> Iterator[None]:
    """Kill processes started in the block if it fails or takes longer than ``seconds``.

    Raises:
        WorkerError: If one of them was killed.
    """
    before = set(multiprocessing.active_children())

    def new() -> list[Any]:
        return [child for child in multiprocessing.active_children() if child not in before]

    late = threading.Timer(seconds, lambda: _kill(new()))
    late.daemon = True
    late.start()
    try:
        yield
    except BaseException as error:
        children = new()
        codes = [child.exitcode for child in children]
        gone = isinstance(error, (RuntimeError, OSError, EOFError)) and not late.is_alive()
        gone |= isinstance(error.__cause__, EOFError) or any(code and code < 0 for code in codes)
        _kill(children)
        if gone and isinstance(error, Exception):
            raise WorkerError(
                f"a collector's worker ended while starting, or took longer than {seconds:g} "
                f"seconds: {error}"
            ) from error
        raise
    finally:
        late.cancel()


def _kill(processes: Iterable[Any]) -> None:
    alive = [process for process in processes if not process._closed and process.is_alive()]
    for process in alive:
        process.kill()
    for process in alive:
        process.join(timeout=10.0)


def begin_worker(dies_with_parent: bool) -> None:
    """Prepare a worker process: ignore stop signals, and end with the main process.

    Args:
        dies_with_parent: Whether the kernel kills this process when the thread that started it
            ends (Linux only). Otherwise a hung worker survives a SIGKILL of the main process.
    """
    ignore_stop_signals()
    if dies_with_parent and sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def ignore_stop_signals() -> None:
    """Ignore Ctrl+C and the signals of clusters, which the main process handles."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _shutdown_if_alive(collector: weakref.ref[SyncCollector]) -> None:
    alive = collector()
    if alive is not None:
        alive.shutdown(raise_on_error=False)

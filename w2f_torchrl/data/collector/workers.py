"""A MultiSyncCollector that always ends, and that says how a worker died or that it hangs."""

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

# Signals that a terminal or a cluster sends to all processes: the main one decides what to do.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
TIMEOUT_SECONDS = 300.0
START_SECONDS = 120.0
"""A worker that is being started has this long at least: it imports, and builds its envs."""
STOP_SECONDS = 10.0
"""How long a batch may take to complete after a stop signal; then it is given up."""

_LOOK_EVERY = 0.5
"""Seconds between two looks whether the workers live, while waiting for them."""
_PR_SET_PDEATHSIG = 1


class WorkerError(RuntimeError):
    """A worker process died or hangs; the message says which, and what went wrong in it."""


class SyncCollector(MultiSyncCollector):
    """A MultiSyncCollector whose process always ends, and that never waits for a lost worker.

    TorchRL leaves the weight scheme to the garbage collector. When that comes at the interpreter's
    end, after an exception above all, the scheme starts a thread that never runs and hangs; workers
    that nobody shut down are waited for without end as well. It also waits without end for a dead
    worker to acknowledge new weights.

    Args:
        failures: Folder where workers leave what went wrong, in files named after their index.
        timeout_seconds: How long a worker may give no sign while it is waited for.
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
            WorkerError: If a worker died, or gives no sign.
        """
        with self.watched():
            yield from super().iterator()

    def map_fn(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Call a method in every worker.

        Raises:
            WorkerError: If a worker died, or gives no sign.
        """
        with self.watched():
            results: list[Any] = super().map_fn(*args, **kwargs)
        return results

    def _recv_and_check(
        self,
        pipe: Any,
        *,
        timeout: float | None = None,
        check_interval: float = _LOOK_EVERY,
        worker_idx: int | None = None,
    ) -> Any:
        """Receive what a worker answers; TorchRL's own waits without end for one that hangs."""
        del timeout
        patience = Patience(self.timeout_seconds)
        while not pipe.poll(min(check_interval, _LOOK_EVERY)):
            self.check_workers()
            if patience.is_over():
                raise self.hangs([] if worker_idx is None else [worker_idx], patience)
        return pipe.recv()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Turn what a worker's death leads to into a WorkerError, after which none is left."""
        try:
            try:
                yield
            except WorkerError:
                raise
            except (RuntimeError, ValueError, OSError, EOFError) as error:
                self.check_workers(patience=1.0, cause=error)
                raise
        except WorkerError:
            self.kill()  # TorchRL would ask a hung one to end, for ten seconds
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

    def hangs(self, workers: Iterable[int], patience: Patience) -> WorkerError:
        """The error that says which of the workers hang."""
        names = ", ".join(map(str, sorted(workers))) or "?"
        return WorkerError(
            f"collector worker {names} of {len(self.procs)} hangs: no sign of it {patience.why()}."
        )

    def kill(self) -> None:
        """End the workers at once, hung ones too; :meth:`shutdown` has to follow."""
        _kill(getattr(self, "procs", ()))

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
            self.kill()  # on a busy machine TorchRL's ten seconds may not do
            for scheme in (getattr(self, "_weight_sync_schemes", None) or {}).values():
                scheme.shutdown()
            self._failures.cleanup()


class Patience:
    """Counts the seconds of a wait, looked at twice a second.

    Time in which this process itself stood still (Ctrl+Z, a machine that sleeps) isn't counted.

    Args:
        seconds: How long it lasts.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._waited, self._since_stop = seconds, 0.0, 0.0
        self._looked_at = time.monotonic()

    def is_over(self) -> bool:
        """Count the time since the last look, and say whether it was enough."""
        now = time.monotonic()
        passed = min(now - self._looked_at, 4 * _LOOK_EVERY)
        self._looked_at = now
        self._waited += passed
        self._since_stop += passed if stop_is_wanted() else 0.0
        return self._waited > self._seconds or self._since_stop > STOP_SECONDS

    def why(self) -> str:
        """How long it lasted, for a message."""
        if self._waited > self._seconds:
            return f"for {self._seconds:g} seconds (collection.timeout_seconds)"
        return f"for {STOP_SECONDS:g} seconds after the stop signal"


class _WatchedQueue:
    """The queue that batches come through; it looks whether the workers live and get on."""

    def __init__(self, collector: SyncCollector, queue: Any) -> None:
        self._collector, self._queue = weakref.ref(collector), queue
        self._missing = set(range(len(collector.procs)))

    def get(self, timeout: float | None = None) -> Any:
        """Take a worker's part of a batch, and what TorchRL sends with it."""
        del timeout
        collector = self._collector()
        assert collector is not None, "who asks is the collector"
        patience = Patience(collector.timeout_seconds)
        while True:
            try:
                item = self._queue.get(timeout=_LOOK_EVERY)
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
    """Waits until workers have taken new weights, and looks whether they live."""

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
                self._queues[worker].get(timeout=_LOOK_EVERY)
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
    """End the processes that are started in the block if it fails, or takes longer than that.

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
                f"a collector's worker ended while it was started, or took longer than {seconds:g} "
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
    """Prepare a worker process: stop signals are for the main one, which no worker outlives.

    Args:
        dies_with_parent: Whether the kernel is to end this process when the thread ends that
            started it; on Linux. A worker that hangs would stay after a SIGKILL of the main one.
    """
    ignore_stop_signals()
    if dies_with_parent and sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def ignore_stop_signals() -> None:
    """Leave Ctrl+C, and what a cluster sends to all processes, to the main one."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _shutdown_if_alive(collector: weakref.ref[SyncCollector]) -> None:
    alive = collector()
    if alive is not None:
        alive.shutdown(raise_on_error=False)

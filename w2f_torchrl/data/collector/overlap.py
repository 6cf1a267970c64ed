"""Collect the next batch while the learner trains on the last one."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tensordict import TensorDictBase
from torchrl.collectors import MultiSyncCollector


class OverlappedCollector:
    """Keep the workers of a synchronous collector busy: request the next batch in advance.

    TorchRL's workers stop after each batch until the next one is requested, so they are idle while
    the learner computes. Here a thread requests it and waits. New weights are sent when the pending
    batch is complete, so each batch comes from a single policy, the one before the last updates,
    and a seed gives the same batches at any speed. The last requested batch is discarded.

    Args:
        collector: A collector with worker processes; do not use it directly afterwards.
    """

    def __init__(self, collector: MultiSyncCollector):
        self.collector = collector
        self._batches: Iterator[TensorDictBase] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="collection")
        self._under_way: Future[TensorDictBase | None] | None = None

    def __iter__(self) -> Iterator[TensorDictBase]:
        """Yield batches ``[N, T]``; request the next batch before each of them."""
        self._batches = iter(self.collector)
        if self._under_way is None:
            self._ask()
        while (batch := self._wait()) is not None:
            self._ask()
            yield batch

    def under_way(self) -> TensorDictBase | None:
        """Wait for the pending batch ``[N, T]`` and return it without taking it; None if none is.

        Raises:
            Exception: The exception with which its collection failed.
        """
        return None if self._under_way is None else self._under_way.result()

    def hold(self, batch: TensorDictBase) -> None:
        """Make ``batch`` ``[N, T]`` the pending one, which is taken before any is requested."""
        self._under_way = Future()
        self._under_way.set_result(batch)

    def update_policy_weights_(self, weights: Any) -> None:
        """Send weights to all workers, between two batches.

        Raises:
            Exception: The exception with which the pending batch failed.
        """
        under_way = self._under_way
        if under_way is not None:
            under_way.result()
        self.collector.update_policy_weights_(weights)

    def kill(self) -> None:
        """Kill the workers; call :meth:`shutdown` afterwards."""
        self.collector.kill()

    def shutdown(self, **options: Any) -> None:
        """Wait for the pending batch, then end the workers."""
        self._thread.shutdown(wait=True)
        self.collector.shutdown(**options)

    def _ask(self) -> None:
        assert self._batches is not None
        self._under_way = self._thread.submit(next, self._batches, None)

    def _wait(self) -> TensorDictBase | None:
        assert self._under_way is not None
        return self._under_way.result()

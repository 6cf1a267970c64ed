"""Collection of the next batch while the learner learns from the last one."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tensordict import TensorDictBase
from torchrl.collectors import MultiSyncCollector


class OverlappedCollector:
    """Keep a synchronous collector's workers busy: as a batch is taken, the next is asked for.

    TorchRL's workers stop after each batch until the next is asked for, so all wait while the
    learner computes. Here a thread asks and waits. New weights are sent when the batch under way
    is complete, so each batch is of one policy, the one before the last updates, and a seed gives
    the same batches at any speed. At the end one batch is collected in vain.

    Args:
        collector: A collector with worker processes; not to be used by itself any more.
    """

    def __init__(self, collector: MultiSyncCollector):
        self.collector = collector
        self._batches: Iterator[TensorDictBase] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="collection")
        self._under_way: Future[TensorDictBase | None] | None = None

    def __iter__(self) -> Iterator[TensorDictBase]:
        """Give batches ``[N, T]``, each after asking for the one that follows it."""
        self._batches = iter(self.collector)
        if self._under_way is None:
            self._ask()
        while (batch := self._wait()) is not None:
            self._ask()
            yield batch

    def under_way(self) -> TensorDictBase | None:
        """Wait for the batch ``[N, T]`` under way, which stays to be taken; None if there is none.

        Raises:
            Exception: What it failed with.
        """
        return None if self._under_way is None else self._under_way.result()

    def hold(self, batch: TensorDictBase) -> None:
        """Have a batch ``[N, T]`` taken before any is asked for, as the one that was under way."""
        self._under_way = Future()
        self._under_way.set_result(batch)

    def update_policy_weights_(self, weights: Any) -> None:
        """Send weights to all workers, between two batches.

        Raises:
            Exception: What the batch under way failed with.
        """
        under_way = self._under_way
        if under_way is not None:
            under_way.result()
        self.collector.update_policy_weights_(weights)

    def kill(self) -> None:
        """End the workers at once; :meth:`shutdown` has to follow."""
        self.collector.kill()

    def shutdown(self, **options: Any) -> None:
        """Wait for the batch under way, then end the workers."""
        self._thread.shutdown(wait=True)
        self.collector.shutdown(**options)

    def _ask(self) -> None:
        assert self._batches is not None
        self._under_way = self._thread.submit(next, self._batches, None)

    def _wait(self) -> TensorDictBase | None:
        assert self._under_way is not None
        return self._under_way.result()

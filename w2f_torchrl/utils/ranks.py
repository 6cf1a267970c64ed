"""The processes of one run, and their communication apart from gradients.

torchrun, or submitit with several tasks, starts the same program once per rank. A run with a single
process runs the same code with one rank, without communication.
"""

from __future__ import annotations

import atexit
import importlib.util
import itertools
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

logger = logging.getLogger(__name__)

T = TypeVar("T")


class RankError(RuntimeError):
    """Another rank of the run has stopped, or cannot be reached."""


class Ranks:
    """The place of this process among the processes of a run.

    Every method must be called by all ranks, in the same order, from the main thread. Messages are
    small and travel between the hosts (gloo), so that none of them waits for a device.

    Args:
        rank: Index of this process, in [0, size).
        size: Number of processes of the run.
        local_rank: Index of this process on its machine.
        local_size: Number of processes on its machine.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1):
        self.rank, self.size = rank, size
        self.local_rank, self.local_size = local_rank, local_size
        self._pending: tuple[Any, torch.Tensor] | None = None
        self._agreed = False

    @classmethod
    def from_environment(cls) -> Ranks:
        """Read the variables of torchrun or submitit; one process if they are not set.

        Raises:
            ValueError: If the variables contradict each other.
        """
        _export_submitit_tasks()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        rank, size, local_rank, local_size = (
            int(os.environ.get(name, default)) for name, default in zip(names, "0101", strict=True)
        )
        if not 0 <= rank < size:
            raise ValueError(f"RANK={rank} must be in [0, WORLD_SIZE={size}).")
        return cls(rank, size, local_rank, local_size)

    @property
    def is_first(self) -> bool:
        """Whether this rank logs, evaluates and writes checkpoints."""
        return self.rank == 0

    def connect(self, device: torch.device, timeout_seconds: float) -> None:
        """Join the process group, once per process: gloo between hosts, NCCL between GPUs.

        Args:
            device: Device of this rank.
            timeout_seconds: How long a rank waits for another that is alive, which includes
                compilation, and rank 0's evaluations and checkpoints. A rank that dies is noticed
                immediately, since its connections close.
        """
        # Random state, streams and graphs belong to the current device.
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        if self.size == 1:
            return
        if dist.is_initialized():  # the runs of a sweep in one process share the group
            return
        timeout = timedelta(seconds=timeout_seconds)
        store, *_ = next(iter(rendezvous("env://", timeout=timeout)))
        store = _fresh_store(store, self.rank, self.size, timeout)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=self.rank,
            world_size=self.size,
            timeout=timeout,
        )
        atexit.register(_leave)

    def on_first(self, function: Callable[[], T]) -> T:
        """Call a function on rank 0 only, and return its result on every rank.

        Raises:
            Exception: The exception of the function, on every rank.
        """
        if self.size == 1:
            return function()
        result: T | None = None
        error: Exception | None = None
        if self.is_first:
            try:
                result = function()
            except Exception as raised:  # noqa: BLE001  # raised below, on every rank
                error = raised
        message: list[Any] = [result, error]
        dist.broadcast_object_list(message, 0, device=torch.device("cpu"))
        if message[1] is not None:
            raise message[1] if error is None else error
        return message[0]  # type: ignore[no-any-return]

    def on_first_or_silent(self, make: Callable[[], T]) -> T:
        """Make a logger or a progress bar on rank 0; return a silent one on the other ranks."""
        return make() if self.is_first else cast(T, Silent())

    def gather(self, items: Sequence[T]) -> list[T]:
        """Return the items of all ranks on every rank, starting with rank 0."""
        if self.size == 1:
            return list(items)
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, list(items))
        return list(itertools.chain.from_iterable(everyone))

    def mean(self, row: dict[str, float]) -> dict[str, float]:
        """Average each metric over the ranks that have it."""
        if self.size == 1:
            return row
        rows = self.gather([row])
        names = dict.fromkeys(itertools.chain.from_iterable(rows))
        values = {name: [other[name] for other in rows if name in other] for name in names}
        return {name: sum(found) / len(found) for name, found in values.items()}

    def agree(self, wish: bool) -> bool:
        """Return whether any rank passed True at the previous call or earlier.

        The answer is one call late, so that no rank waits for another: the message is exchanged
        while the ranks compute.
        """
        if self.size == 1:
            return wish
        if self._agreed:
            return True
        before = self._pending
        flag = torch.tensor([int(wish)])
        self._pending = (dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True), flag)
        if before is not None:
            before[0].wait()
            self._agreed = bool(before[1])
        return self._agreed

    def copy_from_first(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite tensors of equal shapes with rank 0's."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)


class Silent:
    """Replacement for a logger or a progress bar on ranks that show nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Return a method that does nothing."""
        return _do_nothing


@contextmanager
def lost_ranks_explained(ranks: Ranks) -> Iterator[None]:
    """Explain the failure of a collective because of a lost rank.

    Raises:
        RankError: Instead of the exception of the communication library, which is its cause.
    """
    try:
        yield
    except Exception as error:
        if not is_lost_rank(ranks, error):
            raise
        raise RankError(describe_lost_rank(ranks, error)) from error


def describe_lost_rank(ranks: Ranks, error: BaseException) -> str:
    """Describe the loss of a rank, and what to do, for errors that :func:`is_lost_rank` accepts."""
    return (
        f"rank {ranks.rank}: another of the {ranks.size} ranks has stopped or cannot be reached, "
        f"so this one ends too ({str(error).splitlines()[0]}). The launcher names the rank that "
        "failed first; resume=auto continues from the last checkpoint."
    )


def is_lost_rank(ranks: Ranks, error: BaseException) -> bool:
    """Return whether an exception was caused by the loss of another rank."""
    if ranks.size == 1 or not isinstance(error, (RuntimeError, dist.DistError)):
        return False
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower() or "NCCL" in str(error)


def _export_submitit_tasks() -> None:
    """Export the rendezvous of a submitit job with several tasks, as torchrun would."""
    if "RANK" in os.environ or "SUBMITIT_EXECUTOR" not in os.environ:
        return
    if importlib.util.find_spec("submitit") is None:
        return
    from submitit.helpers import TorchDistributedEnvironment

    environment = TorchDistributedEnvironment()
    if environment.world_size > 1:
        environment.export(set_cuda_visible_devices=False)


def _fresh_store(store: Store, rank: int, size: int, timeout: timedelta) -> Store:
    """Return a part of the store that only the ranks of this attempt share.

    torchrun restarts ranks with the store of the previous attempt, where an early rank may find
    addresses that nobody listens to any more. Therefore rank 0 draws a name for the attempt, and
    sends it to each rank under an identity drawn by that rank, until the rank has answered.

    Raises:
        RankError: If ranks are still missing after the timeout.
    """
    own, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    if rank > 0:
        store.set(f"hello/{rank}", own)
        store.wait([f"welcome/{own}"], timeout)
        attempt = store.get(f"welcome/{own}").decode()
        store.set(f"{attempt}/{rank}", "here")
        return PrefixStore(attempt, store)
    missing = set(range(1, size))
    while missing:
        for other in sorted(missing):
            if store.check([f"hello/{other}"]):  # set in this attempt or in an earlier one
                store.set(f"welcome/{store.get(f'hello/{other}').decode()}", own)
            if store.check([f"{own}/{other}"]):
                missing.discard(other)
        if missing and time.monotonic() > end:
            raise RankError(f"ranks {sorted(missing)} of {size} did not arrive within {timeout}.")
        time.sleep(0.02)
    return PrefixStore(own, store)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    del args, kwargs

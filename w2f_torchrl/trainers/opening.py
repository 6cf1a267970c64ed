"""A run before its parts are built: settings, processes, directory, checkpoint to resume from."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from w2f_torchrl.checkpoint.lock import RunLock
from w2f_torchrl.checkpoint.resume import Resumption, find_resumption
from w2f_torchrl.config import RunConfig
from w2f_torchrl.data.collector.leftovers import Leftovers
from w2f_torchrl.trainers.collecting import check_guard
from w2f_torchrl.trainers.interruptions import stop_on_signal
from w2f_torchrl.trainers.preemption import hand_over, is_restart
from w2f_torchrl.utils.closing import end_all
from w2f_torchrl.utils.memory import keep_freed_memory
from w2f_torchrl.utils.ranks import Ranks
from w2f_torchrl.utils.seeding import derive_seed
from w2f_torchrl.utils.stopping import StopRequested, may_be_cut


@dataclass
class Run:
    """What a run has before any of its parts is built.

    As a context it closes what is left open, and until :meth:`built` a stop signal ends it at once.
    """

    config: RunConfig
    """Validated and frozen; ``distributed.ranks`` and ``segmentation.chosen`` are filled in."""
    ranks: Ranks
    device: torch.device
    directory: Path
    lock: RunLock
    leftovers: Leftovers
    resumption: Resumption | None
    """The checkpoint that it resumes from."""
    building: ExitStack
    """Holds the handlers of stop signals while the parts are built."""
    ends: list[Callable[[], None]] = field(default_factory=list)
    """What closes the parts that were built, such as the loggers."""

    def __enter__(self) -> Run:
        """Return the run."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Close the run.

        Raises:
            KeyboardInterrupt: In place of the error of a Ctrl+C before the first step.
        """
        self.abandon(error)

    def abandon(self, error: BaseException | None = None) -> None:
        """Close the run, whatever of it is open.

        Args:
            error: What ended it before its time.

        Raises:
            KeyboardInterrupt: In place of the error of a Ctrl+C before the first step.
            SystemExit: In a submitit job, which is requeued, after a signal.
        """
        self.building.close()
        self.close()
        _answer(error, self.directory, self.ranks)

    def built(self) -> None:
        """Leave stop signals to the trainer: all parts are built."""
        self.building.close()

    def close(self) -> None:
        """Close the parts, and give the run directory back. Closing twice is allowed."""
        end_all(self.ends)
        self.lock.abandon()


def open_run(config: RunConfig) -> Run:
    """Validate the settings, join the other ranks, take the run directory, find what to resume.

    Raises:
        ConfigError: If a setting is out of range.
        CheckpointError: If the directory is in use or holds another run, or the checkpoint to
            resume from is missing, damaged or of another model.
        RuntimeError: If a script starts worker processes outside ``if __name__ == "__main__":``.
    """
    ranks = Ranks.from_environment()
    config = config.validated(ranks=ranks.size)
    check_guard(config, ranks.local_size)
    directory = Path(config.run_dir)
    lock, leftovers = RunLock(directory), Leftovers(directory, ranks.rank)
    building = ExitStack()
    try:
        # What is loaded and compiled here is made again by a resume, so it may end at any moment.
        building.enter_context(stop_on_signal())
        building.enter_context(may_be_cut(at_once=True))
        device = config.torch_device()
        ranks.connect(device, config.distributed.timeout_seconds)
        # torchrun counts restarts only on the machine where a rank failed.
        restart = any(ranks.gather([is_restart(directory)]))
        ranks.on_first(lock.acquire)
        leftovers.clear()
        resumption = find_resumption(config, ranks, is_restart=restart)
    except BaseException as error:
        building.close()
        lock.abandon()
        _answer(error, directory, ranks)
        raise
    torch.manual_seed(derive_seed(config.seed, "learner", ranks.rank))
    keep_freed_memory()
    return Run(config, ranks, device, directory, lock, leftovers, resumption, building)


def _answer(error: BaseException | None, run_dir: Path, ranks: Ranks) -> None:
    """Answer a signal before the first step, with nothing to save, as a trained run would."""
    if isinstance(error, StopRequested):
        hand_over([error.number], run_dir, is_first=ranks.is_first)
        if error.number == signal.SIGINT:
            raise KeyboardInterrupt from None

"""The parts of a run that a checkpoint holds, and the only place that restores them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from w2f_torchrl.checkpoint.file import malformed_is_an_error
from w2f_torchrl.checkpoint.folder import discard_checkpoints_after
from w2f_torchrl.checkpoint.layout import RANK_PARTS, SHARED_PARTS
from w2f_torchrl.checkpoint.resume import Resumption
from w2f_torchrl.checkpoint.writer import CheckpointWriter
from w2f_torchrl.data.replay.replay_files import ReplayFiles


class Stateful(Protocol):
    """A part of a run that is saved in checkpoints."""

    def state_dict(self) -> Any:
        """Return the state in plain Python types and tensors."""
        ...

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Load a state from :meth:`state_dict`."""
        ...


class Checkpoints:
    """The checkpoints that one rank of a run writes.

    Args:
        directory: The folder of the rank's checkpoints.
        header: Plain values about the run, written only by rank 0; None on the other ranks.
        shared: Parts with equal state on all ranks, by the names in
            :data:`~w2f_torchrl.checkpoint.layout.SHARED_PARTS`.
        own: Parts that every rank writes separately, by the names in
            :data:`~w2f_torchrl.checkpoint.layout.RANK_PARTS`.
        keep: How many checkpoints to keep, besides the best.
        every_updates: Updates between two checkpoints.

    Raises:
        ValueError: If the parts differ from these lists.
    """

    def __init__(
        self,
        directory: Path,
        *,
        header: Mapping[str, Any] | None,
        shared: Mapping[str, Stateful],
        own: Mapping[str, Stateful],
        keep: int,
        every_updates: int,
    ) -> None:
        for given, names in ((shared, SHARED_PARTS), (own, RANK_PARTS)):
            if tuple(given) != names:
                raise ValueError(f"parts are {', '.join(given)}; they must be {', '.join(names)}.")
        self.directory, self.header = directory, header
        self.shared, self.own = dict(shared), dict(own)
        self.keep, self.every_updates = keep, every_updates
        self.last = 0
        """Updates at the last checkpoint."""
        self.writer: CheckpointWriter | None = None

    def restore(self, resumption: Resumption) -> None:
        """Restore every part, and delete newer checkpoints.

        A part that this rank did not save keeps its initial state.

        Raises:
            CheckpointError: If the state of a part is malformed or of another model.
        """
        saved = resumption.checkpoint
        with malformed_is_an_error(resumption.path):
            for name, part in self.shared.items():
                part.load_state_dict(saved.payload[name])
            for name, part in self.own.items():
                if name in resumption.own:
                    part.load_state_dict(resumption.own[name])
        discard_checkpoints_after(self.directory, saved.updates)
        self.last = saved.updates

    def start(self, files: ReplayFiles) -> None:
        """Start the thread that writes checkpoints; the replay must be open."""
        self.writer = CheckpointWriter(self.directory, self.keep, files)

    def are_due(self, updates: int) -> bool:
        """Return whether ``checkpoint.every_updates`` have passed since the last one."""
        return updates // self.every_updates > self.last // self.every_updates

    def save(self, *, updates: int, frames: int, wait: bool, exception: str | None = None) -> Path:
        """Write the state of every part; all ranks call it.

        Args:
            updates: Learner updates so far.
            frames: Environment frames so far.
            wait: Whether to return only when it is on disk.
            exception: Traceback of the exception that ended the run.

        Returns:
            The path of the checkpoint, which may still be being written.
        """
        assert self.writer is not None, "the run has started"
        self.last = updates
        payload = {name: part.state_dict() for name, part in self.own.items()}
        if self.header is not None:
            payload |= self._networks() | {"exception": exception}
        return self.writer.save(payload, updates=updates, frames=frames, wait=wait)

    def save_best(self, *, updates: int, frames: int) -> None:
        """Write the shared parts as ``best.pt``; only rank 0 calls it."""
        assert self.writer is not None, "the run has started"
        self.writer.save_best(self._networks(), updates=updates, frames=frames)

    def close(self) -> None:
        """Wait for the last write, and end the thread.

        Raises:
            OSError: If that write failed.
        """
        if self.writer is not None:
            self.writer.close()

    def _networks(self) -> dict[str, Any]:
        states = {name: part.state_dict() for name, part in self.shared.items()}
        return dict(self.header or {}) | states

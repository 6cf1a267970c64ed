"""The one list of what a checkpoint of a run holds, and the one place that puts it back."""

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
    """A part of a run that persists."""

    def state_dict(self) -> Any:
        """Return the state in plain Python types and tensors."""
        ...

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Take over a state from :meth:`state_dict`."""
        ...


class Checkpoints:
    """The checkpoints of a run, as one rank writes them.

    Args:
        directory: The folder of the rank's checkpoints.
        header: Plain values about the run that only rank 0 writes; None on the other ranks.
        shared: Parts that are equal on all ranks, by the names in
            :data:`~w2f_torchrl.checkpoint.layout.SHARED_PARTS`.
        own: Parts of which each rank has its own, by the names in
            :data:`~w2f_torchrl.checkpoint.layout.RANK_PARTS`.
        keep: How many checkpoints are kept, besides the best.
        every_updates: Updates between two checkpoints.

    Raises:
        ValueError: If a part is missing from the list, or is not in it.
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
                raise ValueError(f"parts are {', '.join(given)}: must be {', '.join(names)}.")
        self.directory, self.header = directory, header
        self.shared, self.own = dict(shared), dict(own)
        self.keep, self.every_updates = keep, every_updates
        self.last = 0
        """Updates at the last checkpoint."""
        self.writer: CheckpointWriter | None = None

    def restore(self, resumption: Resumption) -> None:
        """Put every part back, and delete the checkpoints that lie in its future.

        A part of a rank that did not save it stays as it was made.

        Raises:
            CheckpointError: If a part's state is malformed or of another model.
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
        """Start the thread that writes; the replay's files are open from now on."""
        self.writer = CheckpointWriter(self.directory, self.keep, files)

    def are_due(self, updates: int) -> bool:
        """Return whether ``checkpoint.every_updates`` have passed since the last one."""
        return updates // self.every_updates > self.last // self.every_updates

    def save(self, *, updates: int, frames: int, wait: bool, exception: str | None = None) -> Path:
        """Take the state of every part, and write it; all ranks call it.

        Args:
            updates: Learner updates so far.
            frames: Environment frames so far.
            wait: Whether to return only when it is on disk.
            exception: The traceback of what ended the run.

        Returns:
            The path that the checkpoint has or will have.
        """
        assert self.writer is not None, "the run has started"
        self.last = updates
        payload = {name: part.state_dict() for name, part in self.own.items()}
        if self.header is not None:
            payload |= self._networks() | {"exception": exception}
        return self.writer.save(payload, updates=updates, frames=frames, wait=wait)

    def save_best(self, *, updates: int, frames: int) -> None:
        """Write the shared parts as those that evaluated best; only rank 0 calls it."""
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

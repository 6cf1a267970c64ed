"""Checkpoints written in the background: the state is taken in a moment, a thread writes it."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from w2f_torchrl.checkpoint.file import CheckpointError, read_manifest
from w2f_torchrl.checkpoint.folder import (
    BEST_NAME,
    checkpoint_path,
    list_checkpoints,
    save_checkpoint,
)
from w2f_torchrl.checkpoint.layout import REPLAY
from w2f_torchrl.data.replay.replay_files import Manifest, Pending, ReplayFiles

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes checkpoints and the replay's new records, in this order on disk: records, checkpoint.

    A crash at any moment leaves the checkpoints before with every record that they need: a record
    is overwritten only when no checkpoint needs it, and those that would lose one are deleted
    first, but never the newest.

    Args:
        directory: The run's ``checkpoints``.
        keep: How many are kept, besides the best.
        files: The replay's records.
    """

    def __init__(self, directory: Path, keep: int, files: ReplayFiles) -> None:
        self.directory, self.keep, self.files = directory, keep, files
        self._manifests: dict[Path, Manifest | None] = {
            path: _manifest_of(path) for path in list_checkpoints(directory)
        }
        # Of the checkpoint with the highest number, at first; then of the last one written.
        self._newest = list(self._manifests.values())[-1] if self._manifests else None
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self.pause = 0.0
        """Seconds that the last :meth:`save` held training up."""

    def save(
        self,
        payload: dict[str, Any],
        *,
        updates: int,
        frames: int,
        wait: bool = False,
    ) -> Path:
        """Copy the state, and write it in the background.

        Args:
            payload: The state, as :func:`~w2f_torchrl.checkpoint.folder.save_checkpoint` takes
                it; tensors are copied.
            updates: Learner updates so far.
            frames: Environment frames so far.
            wait: Whether to return only when everything is on disk.

        Returns:
            The path that the checkpoint has or will have.

        Raises:
            OSError: If the disk is full, also where the write before failed for that.
        """
        start = time.monotonic()
        self.wait()
        pending = self.files.prepare(self._newest)
        payload = _copy(payload)
        self._writing = self._thread.submit(self._write, payload, pending, updates, frames)
        if wait:
            self.wait()
        self.pause = time.monotonic() - start
        return checkpoint_path(self.directory, updates)

    def wait(self) -> None:
        """Wait for the last write.

        Raises:
            OSError: If it failed.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def make_room(self, records: int) -> bool:
        """Delete old checkpoints whose records a growing replay on disk will overwrite.

        Args:
            records: Maximum number of records that a stream may get before the next call.

        Returns:
            Whether the newest would lose records too, so that another must be written first.
        """
        if not self.files.mapped:
            return False
        written = [count + records for count in self.files.replay.heads.written.tolist()]
        with self._lock:
            if self.files.overwrites(written, self._newest):
                return True
            self._forget_overwritten(written)
        return False

    def _forget_overwritten(self, written: list[int]) -> None:
        for path, manifest in list(self._manifests.items()):
            if manifest is not self._newest and self.files.overwrites(written, manifest):
                logger.info("deleting %s: the replay is about to overwrite records it needs", path)
                path.unlink(missing_ok=True)
                del self._manifests[path]

    def _write(self, payload: dict[str, Any], pending: Pending, updates: int, frames: int) -> None:
        with self._lock:
            self._forget_overwritten(pending.written)
        payload[REPLAY] = self.files.commit(pending)
        path = save_checkpoint(
            self.directory, payload, updates=updates, frames=frames, keep=self.keep
        )
        with self._lock:
            self._manifests[path] = self._newest = payload[REPLAY]
            left = set(list_checkpoints(self.directory))
            self._manifests = {path: m for path, m in self._manifests.items() if path in left}
            self.files.remove_unused(self._manifests.values())

    def save_best(self, networks: dict[str, Any], *, updates: int, frames: int) -> None:
        """Write ``best.pt`` in the background: networks to act with, without a replay.

        So it keeps no old records alive; a run that resumes from it fills its replay again.

        Raises:
            OSError: If the write before failed.
        """
        self.wait()
        networks = _copy(networks)
        self._writing = self._thread.submit(self._write_best, networks, updates, frames)

    def _write_best(self, networks: dict[str, Any], updates: int, frames: int) -> None:
        save_checkpoint(self.directory, networks, updates=updates, frames=frames, name=BEST_NAME)

    def close(self) -> None:
        """Wait for the last write, and end the thread.

        Raises:
            OSError: If that write failed.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()


def _manifest_of(path: Path) -> Manifest | None:
    try:
        return read_manifest(path)
    except CheckpointError:  # a damaged one that a resume has passed over: it needs no records
        return None


def _copy(value: Any) -> Any:
    """Copy nested tensors to the host; a tensor that is there twice is copied once."""
    return _Copier()(value)


class _Copier:
    def __init__(self) -> None:
        self._copies: dict[int, torch.Tensor] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) not in self._copies:
                self._copies[id(value)] = value.detach().to("cpu", copy=True)
            return self._copies[id(value)]
        if isinstance(value, dict):
            return {key: self(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self(item) for item in value)
        return value

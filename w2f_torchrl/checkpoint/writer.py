"""Write checkpoints in the background: the state is copied quickly, and a thread writes it."""

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
    """Write checkpoints, each after the new records of the replay.

    A crash at any moment leaves earlier checkpoints with all the records that they need: before a
    record is overwritten, the checkpoints that need it are deleted, but never the newest.

    Args:
        directory: The run's ``checkpoints`` folder.
        keep: How many checkpoints to keep, besides the best.
        files: The files of the replay's records.
    """

    def __init__(self, directory: Path, keep: int, files: ReplayFiles) -> None:
        self.directory, self.keep, self.files = directory, keep, files
        self._manifests: dict[Path, Manifest | None] = {
            path: _manifest_of(path) for path in list_checkpoints(directory)
        }
        # The manifest with the highest number; later, of the last checkpoint written.
        self._newest = list(self._manifests.values())[-1] if self._manifests else None
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self.pause = 0.0
        """Seconds for which the last :meth:`save` blocked training."""

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
            payload: The state, as in :func:`~w2f_torchrl.checkpoint.folder.save_checkpoint`;
                tensors are copied.
            updates: Learner updates so far.
            frames: Environment frames so far.
            wait: Whether to return only when everything is on disk.

        Returns:
            The path of the checkpoint, which may still be being written.

        Raises:
            OSError: If the disk is full, now or in the previous write.
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
            records: Maximum number of records added to a stream before the next call.

        Returns:
            Whether even the newest would lose records, so that another must be written first.
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
        """Write ``best.pt`` in the background: the networks, without a replay.

        It therefore needs no old records; a run that resumes from it fills its replay again.

        Raises:
            OSError: If the previous write failed.
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
    except CheckpointError:  # a damaged one, skipped by the resume: it needs no records
        return None


def _copy(value: Any) -> Any:
    """Copy nested tensors to the host; a tensor that occurs twice is copied once."""
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

"""One process at a time in a run directory."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from w2f_torchrl.trainers.checkpointing import CheckpointError

LOCK_NAME = ".lock"


class RunLock:
    """A lock on a run directory, which the kernel frees when the process ends, however it ends.

    Args:
        run_dir: The directory.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Take the lock, if the directory is there and this process hasn't got it yet.

        Raises:
            CheckpointError: If another process, or another Trainer of this one, has it.
        """
        if self._file is not None or not self.run_dir.is_dir():
            return
        # Not "w": whoever has the lock has written who it is.
        stream = (self.run_dir / LOCK_NAME).open("a+")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            stream.seek(0)
            owner = stream.read().strip() or "another process"
            stream.close()
            raise CheckpointError(
                f"run_dir={self.run_dir} is in use by {owner}: two runs would mix. Wait until it "
                "has ended, or pass another run_dir."
            ) from error
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        stream.flush()
        self._file = stream

    def release(self) -> None:
        """Give the lock back. Giving it back twice is allowed."""
        if self._file is not None:
            self._file.close()
            self._file = None

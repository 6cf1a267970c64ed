"""Allow only one process at a time in a run directory."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from pathlib import Path
from typing import IO

from w2f_torchrl.checkpoint.file import CheckpointError

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"
_TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


class RunLock:
    """A lock on a run directory, which the kernel frees when the process ends in any way.

    It uses flock, or a POSIX lock if the file system does not support flock. Some support neither
    (Lustre without its option ``flock``, some NFS): then a warning says that a second run is not
    prevented.

    Args:
        run_dir: The directory.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._file: IO[str] | None = None
        self._made = False

    def acquire(self) -> None:
        """Take the lock, unless already held; create the directory if it does not exist.

        Raises:
            CheckpointError: If another process, or another Trainer of this process, holds it; or if
                a file that a run writes is a link to another place.
        """
        if self._file is not None:
            return
        while self._file is None:
            self._made |= not self.run_dir.exists()
            self.run_dir.mkdir(parents=True, exist_ok=True)
            check_no_links(self.run_dir)
            self._file = self._take()

    def _take(self) -> IO[str] | None:
        """Return the locked file; None if its directory was deleted meanwhile."""
        path = self.run_dir / LOCK_NAME
        try:
            # Not truncated: it names the process that holds the lock.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError:
            return None
        stream = os.fdopen(descriptor, "r+")
        try:
            _lock(descriptor, self.run_dir)
        except OSError as error:
            owner = stream.read().strip() or "another process"
            stream.close()
            raise CheckpointError(
                f"run_dir={self.run_dir} is in use by {owner}: two runs would mix. Wait until it "
                "has ended, or pass another run_dir."
            ) from error
        if not path.exists() or not os.path.samestat(os.fstat(descriptor), path.stat()):
            stream.close()
            return None
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        stream.flush()
        return stream

    def release(self) -> None:
        """Release the lock. Releasing twice is allowed."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def abandon(self) -> None:
        """Release the lock, and delete the directory if it was created only for the lock."""
        if self._file is not None and self._made and os.listdir(self.run_dir) == [LOCK_NAME]:
            (self.run_dir / LOCK_NAME).unlink()
            self.run_dir.rmdir()
        self.release()


def _lock(descriptor: int, run_dir: Path) -> None:
    """Lock a file by the method that its file system supports.

    Raises:
        OSError: If another process holds the lock.
    """
    for lock in (fcntl.flock, fcntl.lockf):
        try:
            lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN:
                raise
        else:
            return
    logger.warning(
        "the file system of run_dir=%s does not support locks, so a second run in it is not "
        "prevented. Make sure that no two runs use this run_dir at the same time.",
        run_dir,
    )


def check_no_links(run_dir: Path) -> None:
    """Refuse a directory that contains a link to a file: a run would write to its target.

    Directories are not trusted. Links to folders, such as a replay on a faster disk, are allowed.

    Raises:
        CheckpointError: If it contains one; names the link.
    """
    for path in run_dir.iterdir():
        if path.is_symlink() and not path.is_dir():
            raise CheckpointError(
                f"{path} is a link to {os.readlink(path)}: the run would write there. Delete the "
                "link, or pass another run_dir."
            )

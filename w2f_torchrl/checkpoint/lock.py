"""One process at a time in a run directory."""

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
    """A lock on a run directory, which the kernel frees when the process ends, however it ends.

    flock where the file system has it, else a POSIX lock; some have neither (Lustre without its
    option ``flock``, some NFS): then a warning says that nothing keeps a second run out.

    Args:
        run_dir: The directory.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._file: IO[str] | None = None
        self._made = False

    def acquire(self) -> None:
        """Take the lock, if this process hasn't got it yet; make the directory if there is none.

        Raises:
            CheckpointError: If another process, or another Trainer of this one, has it; or if a
                file that a run writes is a link to elsewhere.
        """
        if self._file is not None:
            return
        while self._file is None:
            self._made |= not self.run_dir.exists()
            self.run_dir.mkdir(parents=True, exist_ok=True)
            check_no_links(self.run_dir)
            self._file = self._take()

    def _take(self) -> IO[str] | None:
        """The locked file; None if its directory was deleted meanwhile."""
        path = self.run_dir / LOCK_NAME
        try:
            # Not truncated: whoever has the lock has written who it is.
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
        """Give the lock back. Giving it back twice is allowed."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def abandon(self) -> None:
        """Give the lock back, and delete a directory that was made for nothing but it."""
        if self._file is not None and self._made and os.listdir(self.run_dir) == [LOCK_NAME]:
            (self.run_dir / LOCK_NAME).unlink()
            self.run_dir.rmdir()
        self.release()


def _lock(descriptor: int, run_dir: Path) -> None:
    """Lock a file in the way that its file system allows.

    Raises:
        OSError: If another process has the lock.
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
        "the file system of run_dir=%s has no locks: nothing keeps a second run out of it. See to "
        "it that no two runs have this run_dir at a time.",
        run_dir,
    )


def check_no_links(run_dir: Path) -> None:
    """Refuse a directory in which a file is a link: a run would write to where it leads.

    A directory may come from anywhere. Links to folders, such as a replay on a faster disk, stay.

    Raises:
        CheckpointError: Naming the link.
    """
    for path in run_dir.iterdir():
        if path.is_symlink() and not path.is_dir():
            raise CheckpointError(
                f"{path} is a link to {os.readlink(path)}: the run would write there. Delete the "
                "link, or pass another run_dir."
            )

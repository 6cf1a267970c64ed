"""What a run puts outside of its directory, under names that it knows again after a SIGKILL.

Queues between processes are made of named semaphores, and tensors that are handed over go through
sockets in a temporary folder. Python deletes both as a process ends, but not where it is killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import multiprocessing
import os
import shutil
import stat
import tempfile
from multiprocessing import resource_sharer, util
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")


class Leftovers:
    """The temporary folder and the semaphores of one rank of a run.

    Args:
        run_dir: The run's directory: the names are derived from its path.
        rank: Which of the run's processes.
    """

    def __init__(self, run_dir: Path, rank: int = 0) -> None:
        whose = f"{os.getuid()} {run_dir.resolve()} {rank}"
        # Short: a socket's path has 108 bytes at most, a semaphore's name on some systems 31.
        self._name = f"w2f-{hashlib.sha256(whose.encode()).hexdigest()[:8]}"
        self._before: dict[str, Any] = {}

    @property
    def folder(self) -> Path:
        """For the temporary files of the run's processes."""
        return Path(tempfile.gettempdir()) / self._name

    def clear(self) -> list[Path]:
        """Delete what an earlier process left; call it with the run's lock in hand.

        Returns:
            What was deleted.
        """
        found = list(SHARED_MEMORY.glob(f"sem.{self._name}-*")) if SHARED_MEMORY.is_dir() else []
        for path in found:
            path.unlink(missing_ok=True)
        if self.folder.is_dir() and not self.folder.is_symlink():
            found.append(self.folder)
            shutil.rmtree(self.folder, ignore_errors=True)
        if found:
            logger.info("cleared %d things that a killed process of this run left", len(found))
        return found

    def take(self) -> None:
        """Give what this process and its children make from now on the run's names.

        Python has no public way to say them; without its private one they are random, and only
        what is left after a SIGKILL stays.
        """
        config = _settings()
        if config.get("semprefix") == f"/{self._name}":
            return
        self._before = {key: config.get(key) for key in ("semprefix", "tempdir")}
        config["semprefix"] = f"/{self._name}"
        if self.scratch() is not None:
            config["tempdir"] = str(self.folder)

    def scratch(self) -> Path | None:
        """The folder, made if it is missing; None where another user has put something there."""
        with contextlib.suppress(FileExistsError):
            self.folder.mkdir(mode=0o700)
        found = self.folder.lstat()
        own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
        return self.folder if own else None

    def free(self) -> None:
        """Delete the semaphores, when the processes that share them have ended.

        Python does so when the last reference goes, which threads and finalizers hold for long.
        """
        registry: dict[Any, Any] = getattr(util, "_finalizer_registry", {})
        for finalizer in list(registry.values()):
            arguments = getattr(finalizer, "_args", None) or ("",)
            if str(arguments[0]).startswith(f"/{self._name}-"):
                finalizer()

    def remove(self) -> None:
        """Delete the folder, when all processes have ended. Removing twice is allowed."""
        self.free()
        for key, value in self._before.items():
            if value is None:
                _settings().pop(key, None)
            else:
                _settings()[key] = value
        self._before = {}
        address = str(getattr(getattr(resource_sharer, "_resource_sharer", None), "_address", ""))
        if address.startswith(str(self.folder)):
            resource_sharer.stop(1.0)  # else later processes would look for its socket there
        shutil.rmtree(self.folder, ignore_errors=True)


def _settings() -> dict[str, Any]:
    """What child processes inherit: a prefix of names, a folder."""
    config: dict[str, Any] = getattr(multiprocessing.current_process(), "_config", {})
    return config

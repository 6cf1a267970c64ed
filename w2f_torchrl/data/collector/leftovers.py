"""Files of a run outside its directory, under names that it can find again after a SIGKILL.

Queues between processes use named semaphores, and tensors are passed through sockets in a temporary
folder. Python deletes both when a process ends, but not when it is killed.
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
        rank: Rank of the process.
    """

    def __init__(self, run_dir: Path, rank: int = 0) -> None:
        whose = f"{os.getuid()} {run_dir.resolve()} {rank}"
        # Short: a socket's path has at most 108 bytes, a semaphore's name on some systems 31.
        self._name = f"w2f-{hashlib.sha256(whose.encode()).hexdigest()[:8]}"
        self._before: dict[str, Any] = {}

    @property
    def folder(self) -> Path:
        """Folder of the temporary files of the run's processes."""
        return Path(tempfile.gettempdir()) / self._name

    def clear(self) -> list[Path]:
        """Delete the files of an earlier process; call it while holding the run's lock.

        Returns:
            The deleted files and semaphores.
        """
        found = list(SHARED_MEMORY.glob(f"sem.{self._name}-*")) if SHARED_MEMORY.is_dir() else []
        for path in found:
            path.unlink(missing_ok=True)
        if self.folder.is_dir() and not self.folder.is_symlink():
            found.append(self.folder)
            shutil.rmtree(self.folder, ignore_errors=True)
        if found:
            logger.info("deleted %d files left by a killed process of this run", len(found))
        return found

    def take(self) -> None:
        """Use the run's names for everything this process and its children create from now on.

        Python has no public way to set them. Without its private one the names are random, and
        files left by a SIGKILL are not deleted.
        """
        config = _settings()
        if config.get("semprefix") == f"/{self._name}":
            return
        self._before = {key: config.get(key) for key in ("semprefix", "tempdir")}
        config["semprefix"] = f"/{self._name}"
        if self.scratch() is not None:
            config["tempdir"] = str(self.folder)

    def scratch(self) -> Path | None:
        """Return the folder, created if missing; None if another user owns the path."""
        with contextlib.suppress(FileExistsError):
            self.folder.mkdir(mode=0o700)
        found = self.folder.lstat()
        own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
        return self.folder if own else None

    def free(self) -> None:
        """Delete the semaphores, after the processes that share them have ended.

        Python does so only with the last reference, which threads and finalizers keep for long.
        """
        registry: dict[Any, Any] = getattr(util, "_finalizer_registry", {})
        for finalizer in list(registry.values()):
            arguments = getattr(finalizer, "_args", None) or ("",)
            if str(arguments[0]).startswith(f"/{self._name}-"):
                finalizer()

    def remove(self) -> None:
        """Delete the folder, after all processes have ended. Removing twice is allowed."""
        self.free()
        for key, value in self._before.items():
            if value is None:
                _settings().pop(key, None)
            else:
                _settings()[key] = value
        self._before = {}
        address = str(getattr(getattr(resource_sharer, "_resource_sharer", None), "_address", ""))
        if address.startswith(str(self.folder)):
            resource_sharer.stop(1.0)  # otherwise later processes would look for its socket there
        shutil.rmtree(self.folder, ignore_errors=True)


def _settings() -> dict[str, Any]:
    """Return settings that child processes inherit: a name prefix and a folder."""
    config: dict[str, Any] = getattr(multiprocessing.current_process(), "_config", {})
    return config

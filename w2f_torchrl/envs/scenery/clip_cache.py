"""Clips on disk, decoded or computed once and mapped into every process that shows them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from w2f_torchrl.utils.files import atomic_path

logger = logging.getLogger(__name__)

FORMAT = 1
VARIABLE = "W2F_CACHE"

UInt8Array = npt.NDArray[np.uint8]


class Clip(Protocol):
    """A source of frames."""

    @property
    def name(self) -> str:
        """Name for messages."""

    def key(self) -> list[object]:
        """Return plain values that differ from those of every other clip."""

    def read(self, size: int) -> UInt8Array:
        """Return the frames, uint8 [T, size, size, 3]."""


def cache_directory() -> Path:
    """Return the folder of clips: ``$W2F_CACHE``, or ``w2f_torchrl`` in the user's cache."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "w2f_torchrl"


def cached_path(clip: Clip, size: int) -> Path:
    """Return the path of a clip at a size, whether the file exists or not."""
    text = json.dumps([FORMAT, size, clip.key()])
    digest = hashlib.sha256(text.encode()).hexdigest()[:32]
    return cache_directory() / "backgrounds" / f"{digest}.npy"


def mapped_clip(clip: Clip, size: int) -> UInt8Array:
    """Map a clip's frames into memory, read-only; create the file first if it does not exist.

    The file gets its name when it is complete. Processes that need the same clip at the same time
    wait for the one that creates it. All processes share the pages.

    Args:
        clip: The clip.
        size: Side of the frames, pixels.

    Returns:
        uint8 [T, size, size, 3].

    Raises:
        BackgroundError: If the clip cannot be read.
        OSError: If the cache cannot be written; ``W2F_CACHE`` can name another place.
    """
    path = cached_path(clip, size)
    frames = _map(path, size)
    if frames is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(path.with_suffix(".lock")):
            frames = _map(path, size)
            if frames is None:
                if path.exists():
                    logger.warning("%s is damaged: reading %s again", path, clip.name)
                _write(path, clip.read(size))
                frames = _map(path, size)
    if frames is None:
        raise OSError(f"{path} cannot be read back; set {VARIABLE} to move the cache elsewhere.")
    return frames


def _map(path: Path, size: int) -> UInt8Array | None:
    """Map a file's frames without keeping it open; return None if it is missing or damaged.

    The number of open files is limited, often to 1024, and a source may have thousands of clips.
    """
    import torch  # not at the top: the validation of settings imports this module

    try:
        with path.open("rb") as stream:
            form: Any = np.lib.format  # untyped
            if form.read_magic(stream) != (1, 0):
                return None
            shape, fortran, dtype = form.read_array_header_1_0(stream)
            begin, end = stream.tell(), os.fstat(stream.fileno()).st_size
    except (FileNotFoundError, ValueError):
        return None
    wanted = len(shape) == 4 and shape[1:] == (size, size, 3) and shape[0] > 0
    if not wanted or fortran or dtype != np.uint8 or end - begin != math.prod(shape):
        return None
    # A private map: pages that are only read stay shared by all processes.
    everything = torch.from_file(str(path), shared=False, size=end, dtype=torch.uint8)
    frames: UInt8Array = everything.numpy()[begin:].reshape(shape)
    frames.flags.writeable = False
    return frames


def _write(path: Path, frames: UInt8Array) -> None:
    with atomic_path(path, unique=True) as temporary, temporary.open("wb") as stream:
        np.save(stream, frames, allow_pickle=False)
        stream.flush()
        os.fsync(stream.fileno())


@contextlib.contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """Let one process in at a time."""
    with lock.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield

"""Checkpoint files that are whole or refused.

A checkpoint is one file, ``checkpoint_<updates>.pt``: what :func:`torch.save` writes, followed by
a footer with the SHA-256 digest of everything before it. One file, because a digest in a second
file can be out of step with the first after a crash. ``torch.load`` ignores the footer.

The replay's records lie in the run's ``replay`` folder and are shared by its checkpoints, each of
which holds the digests of those that it needs (``w2f_torchrl.data.replay.replay_files``).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import torch

from w2f_torchrl.checkpoint.layout import REPLAY, upgrade
from w2f_torchrl.data.replay.replay_files import Manifest
from w2f_torchrl.utils.files import atomic_path

logger = logging.getLogger(__name__)

FORMAT_NAME = "w2f_torchrl.checkpoint"
FORMAT_VERSION = 3
READABLE_VERSIONS = (1, 2, 3)
"""``w2f_torchrl.checkpoint.layout`` says how they differ."""
PACKAGES = ("torch", "torchrl", "tensordict", "numpy")

_FOOTER = re.compile(rb"\nw2f-sha256:([0-9a-f]{64})\n")
_FOOTER_BYTES = len(b"\nw2f-sha256:") + 64 + len(b"\n")
# Exact types: a numpy scalar is an instance of float, and weights_only loading refuses it.
_LEAVES = (torch.Tensor, torch.nn.Parameter, int, float, bool, str, bytes, type(None))


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or of a form that this version can't read."""


class Checkpoint(NamedTuple):
    """What :func:`load_checkpoint` returns.

    Attributes:
        payload: The dict given to :func:`write_checkpoint`; an older format's in today's layout.
        updates: Learner updates done when it was saved.
        frames: Environment frames collected when it was saved.
        versions: Package name to version at the time of saving.
        format_version: Of the file.
    """

    payload: dict[str, Any]
    updates: int
    frames: int
    versions: dict[str, str]
    format_version: int


def write_checkpoint(path: Path, payload: dict[str, Any], *, updates: int, frames: int) -> Path:
    """Write a checkpoint file atomically.

    The bytes go to a hidden temporary file in the same folder, are forced to disk, and take their
    name in one step: a crash at any moment leaves what was there before.

    Args:
        path: Of the file; its folder is created if missing.
        payload: Dicts (string or integer keys), lists and tuples of tensors, numbers, strings,
            bytes and None, nested at will: what ``torch.load(weights_only=True)`` reads.
        updates: Learner updates so far.
        frames: Environment frames so far.

    Returns:
        The path.

    Raises:
        TypeError: If the payload holds anything else; names the entry.
        ValueError: If a counter is negative.
        OSError: If the disk is full, or the folder cannot be written.
    """
    if updates < 0 or frames < 0:
        raise ValueError(f"updates and frames must not be negative, got {updates} and {frames}.")
    _check_payload(payload, "payload")
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "format": FORMAT_NAME,
        "format_version": FORMAT_VERSION,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "updates": int(updates),
        "frames": int(frames),
        "payload": payload,
    }
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        _write(document, stream)
    _sync_directory(path.parent)
    return path


def read_manifest(path: str | os.PathLike[str]) -> Manifest | None:
    """Return what a checkpoint holds of the replay, or None; no tensor is read.

    Raises:
        CheckpointError: If the file is not of this package's format.
    """
    document = _read(Path(path), "cpu", mmap=True)
    manifest: Manifest | None = document["payload"].get(REPLAY)
    return manifest


def verify_checkpoint(path: str | os.PathLike[str]) -> None:
    """Compare a checkpoint's bytes with the digest in its footer.

    Args:
        path: A checkpoint file.

    Raises:
        CheckpointError: If the file is missing, cut short or altered; names the file.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            content = max(0, os.fstat(stream.fileno()).st_size - _FOOTER_BYTES)
            digest = _digest(stream, content)
            footer = _FOOTER.fullmatch(stream.read())
    except OSError as error:
        raise CheckpointError(f"Checkpoint {path} can't be read: {error}.") from error
    if footer is None:
        raise CheckpointError(
            f"Checkpoint {path} is cut short or wasn't written by {FORMAT_NAME}: no digest at its "
            "end."
        )
    if footer.group(1).decode() != digest:
        raise CheckpointError(f"Checkpoint {path} is damaged: its SHA-256 digest doesn't match.")


def load_checkpoint(
    path: str | os.PathLike[str], map_location: torch.device | str = "cpu"
) -> Checkpoint:
    """Verify and read a checkpoint. Nothing in the file is executed (``weights_only``).

    Args:
        path: A file that :func:`write_checkpoint` wrote.
        map_location: Device to put the tensors on.

    Returns:
        The payload and the counters.

    Raises:
        CheckpointError: If the file is missing or damaged, or of an unknown format or version.
    """
    verify_checkpoint(path)
    document = _read(Path(path), map_location)
    payload, updates, frames = (document[name] for name in ("payload", "updates", "frames"))
    if document["format_version"] < 3:
        with malformed_is_an_error(path):
            payload = upgrade(payload, updates=updates, frames=frames)
    return Checkpoint(payload, updates, frames, document["versions"], document["format_version"])


def _read(path: Path, map_location: torch.device | str, *, mmap: bool = False) -> dict[str, Any]:
    """Read a file whose digest holds, which says nothing of who wrote it.

    Raises:
        CheckpointError: If it is none of this format, or lacks a part.
    """
    try:
        document = torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)
    except Exception as error:  # what is in the file decides on the kind
        # The first line: torch's next ones advise to load the file without weights_only.
        raise CheckpointError(
            f"Checkpoint {path} is malformed, or holds what no checkpoint does: "
            f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        ) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT_NAME:
        raise CheckpointError(f"{path} is not a {FORMAT_NAME} file.")
    version = document.get("format_version")
    if version not in READABLE_VERSIONS:
        raise CheckpointError(
            f"Checkpoint {path} has format version {version!r}; this w2f_torchrl reads versions "
            f"{', '.join(map(str, READABLE_VERSIONS))}. It was saved with "
            f"{document.get('versions')}: use the w2f_torchrl of that time."
        )
    parts = {"payload": dict, "updates": int, "frames": int, "versions": dict}
    for name, kind in parts.items():
        if not isinstance(document.get(name), kind):
            raise CheckpointError(
                f"Checkpoint {path} is malformed: its {name} is not a {kind.__name__}."
            )
    return document


@contextmanager
def malformed_is_an_error(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what a malformed checkpoint leads to into a CheckpointError that names the file.

    Raises:
        CheckpointError: In place of a KeyError and the like.
    """
    try:
        yield
    except (KeyError, IndexError, AttributeError, TypeError, OverflowError) as error:
        raise CheckpointError(
            f"Checkpoint {path} is malformed: {type(error).__name__}: {str(error)[:200]}"
        ) from error


class _DigestingWriter:
    """A file for :func:`torch.save` that hashes what passes and remembers why a write failed."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            count = self._stream.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        return count

    def flush(self) -> None:
        self._stream.flush()


def _write(document: dict[str, Any], stream: IO[bytes]) -> None:
    writer = _DigestingWriter(stream)
    try:
        torch.save(document, cast(IO[bytes], writer))  # torch.save calls write and flush only
    except RuntimeError:
        # torch.save hides a full disk behind an internal error about a position in the file.
        if writer.error is not None:
            raise writer.error from None
        raise
    stream.write(f"\nw2f-sha256:{writer.digest.hexdigest()}\n".encode())
    stream.flush()
    os.fsync(stream.fileno())


def _digest(stream: IO[bytes], size: int, chunk: int = 1 << 20) -> str:
    digest = hashlib.sha256()
    while size > 0 and (data := stream.read(min(chunk, size))):
        digest.update(data)
        size -= len(data)
    return digest.hexdigest()


def _check_payload(value: Any, key: str) -> None:
    if type(value) in (dict, OrderedDict):
        for name, item in value.items():
            if type(name) not in (str, int):
                raise TypeError(
                    f"{key} has a key {name!r} of type {_type_name(name)}; a checkpoint's keys are "
                    "str or int."
                )
            _check_payload(item, f"{key}[{name!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _check_payload(item, f"{key}[{index}]")
    elif type(value) not in _LEAVES:
        raise TypeError(
            f"{key} is a {_type_name(value)}; a checkpoint holds dict, list, tuple, tensor, int, "
            "float, bool, str, bytes and None only."
        )


def _type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

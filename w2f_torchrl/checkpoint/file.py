"""Checkpoint files that are either complete or refused.

A checkpoint is one file, ``checkpoint_<updates>.pt``: the output of :func:`torch.save`, followed by
a footer with the SHA-256 digest of everything before it. It is one file because, after a crash, a
digest in a second file might not match the first. ``torch.load`` ignores the footer.

The replay's records are in the run's ``replay`` folder and shared by its checkpoints, each of which
contains the digests of those that it needs (``w2f_torchrl.data.replay.replay_files``).
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
"""``w2f_torchrl.checkpoint.layout`` describes the differences."""
PACKAGES = ("torch", "torchrl", "tensordict", "numpy")

_FOOTER = re.compile(rb"\nw2f-sha256:([0-9a-f]{64})\n")
_FOOTER_BYTES = len(b"\nw2f-sha256:") + 64 + len(b"\n")
# Exact types: a numpy scalar is an instance of float, and weights_only loading refuses it.
_LEAVES = (torch.Tensor, torch.nn.Parameter, int, float, bool, str, bytes, type(None))


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or in a format that this version cannot read."""


class Checkpoint(NamedTuple):
    """The result of :func:`load_checkpoint`.

    Attributes:
        payload: The dict given to :func:`write_checkpoint`; older formats in the current layout.
        updates: Learner updates done when it was saved.
        frames: Environment frames collected when it was saved.
        versions: Package name to version at the time of saving.
        format_version: Format version of the file.
    """

    payload: dict[str, Any]
    updates: int
    frames: int
    versions: dict[str, str]
    format_version: int


def write_checkpoint(path: Path, payload: dict[str, Any], *, updates: int, frames: int) -> Path:
    """Write a checkpoint file atomically.

    The bytes are written to a hidden temporary file in the same folder and forced to disk; then it
    is renamed. A crash at any moment leaves an existing file unchanged.

    Args:
        path: Path of the file; its folder is created if missing.
        payload: Dicts (string or integer keys), lists and tuples of tensors, numbers, strings,
            bytes and None, in any nesting: types that ``torch.load(weights_only=True)`` reads.
        updates: Learner updates so far.
        frames: Environment frames so far.

    Returns:
        The path.

    Raises:
        TypeError: If the payload contains another type; names the entry.
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
    """Return a checkpoint's manifest of the replay, or None, without reading tensors.

    Raises:
        CheckpointError: If the file is not in this package's format.
    """
    document = _read(Path(path), "cpu", mmap=True)
    manifest: Manifest | None = document["payload"].get(REPLAY)
    return manifest


def verify_checkpoint(path: str | os.PathLike[str]) -> None:
    """Compare a checkpoint's bytes with the digest in its footer.

    Args:
        path: A checkpoint file.

    Raises:
        CheckpointError: If the file is missing, truncated or altered; names the file.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            content = max(0, os.fstat(stream.fileno()).st_size - _FOOTER_BYTES)
            digest = _digest(stream, content)
            footer = _FOOTER.fullmatch(stream.read())
    except OSError as error:
        raise CheckpointError(f"Checkpoint {path} cannot be read: {error}.") from error
    if footer is None:
        raise CheckpointError(
            f"Checkpoint {path} is truncated, or is not a {FORMAT_NAME} file: it does not end with "
            "a digest."
        )
    if footer.group(1).decode() != digest:
        raise CheckpointError(f"Checkpoint {path} is damaged: its SHA-256 digest does not match.")


def load_checkpoint(
    path: str | os.PathLike[str], map_location: torch.device | str = "cpu"
) -> Checkpoint:
    """Verify and read a checkpoint. Nothing in the file is executed (``weights_only``).

    Args:
        path: A file from :func:`write_checkpoint`.
        map_location: Device of the loaded tensors.

    Returns:
        The payload and the counters.

    Raises:
        CheckpointError: If the file is missing or damaged, or has an unknown format or version.
    """
    verify_checkpoint(path)
    document = _read(Path(path), map_location)
    payload, updates, frames = (document[name] for name in ("payload", "updates", "frames"))
    if document["format_version"] < 3:
        with malformed_is_an_error(path):
            payload = upgrade(payload, updates=updates, frames=frames)
    return Checkpoint(payload, updates, frames, document["versions"], document["format_version"])


def _read(path: Path, map_location: torch.device | str, *, mmap: bool = False) -> dict[str, Any]:
    """Read a file whose digest matches. It may still come from anyone.

    Raises:
        CheckpointError: If it has another format, or lacks a part.
    """
    try:
        document = torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)
    except Exception as error:  # its type depends on the contents of the file
        # Only the first line: torch's others recommend loading without weights_only.
        raise CheckpointError(
            f"Checkpoint {path} is malformed, or contains types that checkpoints do not: "
            f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        ) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT_NAME:
        raise CheckpointError(f"{path} is not a {FORMAT_NAME} file.")
    version = document.get("format_version")
    if version not in READABLE_VERSIONS:
        raise CheckpointError(
            f"Checkpoint {path} has format version {version!r}; this w2f_torchrl reads versions "
            f"{', '.join(map(str, READABLE_VERSIONS))}. It was saved with "
            f"{document.get('versions')}: use the w2f_torchrl version that saved it."
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
    """Turn errors caused by a malformed checkpoint into a CheckpointError that names the file.

    Raises:
        CheckpointError: Instead of a KeyError and similar errors.
    """
    try:
        yield
    except (KeyError, IndexError, AttributeError, TypeError, OverflowError) as error:
        raise CheckpointError(
            f"Checkpoint {path} is malformed: {type(error).__name__}: {str(error)[:200]}"
        ) from error


class _DigestingWriter:
    """A file for :func:`torch.save` that hashes its data and keeps the error of a failed write."""

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
        torch.save(document, cast(IO[bytes], writer))  # torch.save calls only write and flush
    except RuntimeError:
        # torch.save reports a full disk as an internal error about a position in the file.
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
    elif type(value) is bytes and not value:
        raise TypeError(f"{key} is empty bytes, which torch.load(weights_only=True) refuses.")
    elif type(value) not in _LEAVES:
        raise TypeError(
            f"{key} is a {_type_name(value)}; a checkpoint only holds dict, list, tuple, tensor, "
            "int, float, bool, str, bytes and None."
        )


def _type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

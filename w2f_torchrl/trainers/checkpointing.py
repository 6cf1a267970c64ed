"""Checkpoint files that are whole or refused.

A checkpoint is one file, ``checkpoint_<updates>.pt``: what :func:`torch.save` writes, followed by
a footer with the SHA-256 digest of everything before it. One file, because a digest in a second
file can be out of step with the first after a crash. ``torch.load`` ignores the footer.

The replay's records lie in the run's ``replay`` folder and are shared by its checkpoints, each of
which holds the digests of those that it needs (``w2f_torchrl.data.replay_files``).
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
from typing import IO, Any, Literal, NamedTuple, cast

import torch

from w2f_torchrl.data.record_files import MissingRecordsError, RecordsError
from w2f_torchrl.data.replay_files import Manifest, describe_damage, find_damage
from w2f_torchrl.utils.files import atomic_path

logger = logging.getLogger(__name__)

FORMAT_NAME = "w2f_torchrl.checkpoint"
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
"""Version 1 holds no replay, no random streams and no state of the environments."""
REPLAY_FOLDER = "replay"
BEST_NAME = "best.pt"
PACKAGES = ("torch", "torchrl", "tensordict", "numpy")

_NAME = re.compile(r"checkpoint_(\d+)\.pt")
_FOOTER = re.compile(rb"\nw2f-sha256:([0-9a-f]{64})\n")
_FOOTER_BYTES = len(b"\nw2f-sha256:") + 64 + len(b"\n")
# Exact types: a numpy scalar is an instance of float, and weights_only loading refuses it.
_RUN_PARTS = {
    "config": dict,
    "action_size": int,
    "learner": dict,
    "steps": int,
    "schedule": dict,
    "segmentation": dict,
}
_LEAVES = (torch.Tensor, torch.nn.Parameter, int, float, bool, str, bytes, type(None))


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or of a form that this version can't read."""


class Checkpoint(NamedTuple):
    """What :func:`load_checkpoint` returns.

    Attributes:
        payload: The dict given to :func:`save_checkpoint`.
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


def save_checkpoint(
    directory: str | os.PathLike[str],
    payload: dict[str, Any],
    *,
    updates: int,
    frames: int,
    keep: int = 3,
    name: str | None = None,
) -> Path:
    """Write a checkpoint atomically, then delete the oldest ones.

    The bytes go to a hidden temporary file in ``directory``, are forced to disk, and take their
    name in one step: a crash at any moment leaves the earlier checkpoints as they were. One process
    writes to a directory at a time; temporary files that an earlier, killed one left are removed.

    Args:
        directory: Where the checkpoints of the run are; created if missing.
        payload: Dicts (string or integer keys), lists and tuples of tensors, numbers, strings,
            bytes and None, nested at will: what ``torch.load(weights_only=True)`` reads.
        updates: Learner updates so far; the file's number.
        frames: Environment frames so far.
        keep: How many checkpoints to keep, the new one included: it and the ``keep - 1`` highest
            numbers among the others.
        name: Of the file, which is then not counted and deletes none; None for
            ``checkpoint_<updates>.pt``.

    Returns:
        The path of the new checkpoint.

    Raises:
        TypeError: If the payload holds anything else; names the entry.
        ValueError: If ``keep`` is below 1 or a counter is negative.
        OSError: If the disk is full, or the directory can't be written.
    """
    if keep < 1:
        raise ValueError(f"checkpoint.keep must be at least 1, got {keep}.")
    if updates < 0 or frames < 0:
        raise ValueError(f"updates and frames must not be negative, got {updates} and {frames}.")
    _check_payload(payload, "payload")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _remove_temporaries(directory)
    path = checkpoint_path(directory, updates) if name is None else directory / name
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
    _sync_directory(directory)
    if name is not None:
        return path
    others = [other for other in list_checkpoints(directory) if other != path]
    for old in others[: max(0, len(others) - (keep - 1))]:
        old.unlink()
    return path


def checkpoint_path(directory: str | os.PathLike[str], updates: int) -> Path:
    """The name of a checkpoint after so many updates."""
    return Path(directory) / f"checkpoint_{updates:012d}.pt"


def list_checkpoints(directory: str | os.PathLike[str]) -> list[Path]:
    """List the checkpoints of a directory, lowest number of updates first.

    Args:
        directory: The directory; one that doesn't exist holds none.

    Returns:
        Paths, sorted by number and not by name.
    """
    directory = Path(directory)
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if _NAME.fullmatch(path.name)), key=_number)


def latest_checkpoint(directory: str | os.PathLike[str]) -> Path | None:
    """Return the checkpoint with the highest number, unverified, or None if there is none."""
    paths = list_checkpoints(directory)
    return paths[-1] if paths else None


def latest_valid_checkpoint(directory: str | os.PathLike[str]) -> Path | None:
    """Return the highest-numbered checkpoint whose digests hold, its records' too.

    A damaged one is skipped with a warning. Where records that all of them share are damaged, it is
    the highest-numbered one whose own file is whole: a run that resumes leaves those records out.
    Records that are missing altogether are no damage: a run that resumes without them fills its
    replay again, and says so.

    Args:
        directory: The directory of checkpoints.

    Returns:
        The path, or None if the directory holds no checkpoint at all.

    Raises:
        CheckpointError: If there are checkpoints and every one is damaged.
    """
    paths = list_checkpoints(directory)
    lacking: list[Path] = []
    for path in reversed(paths):
        try:
            damage = verify_all(path)
        except CheckpointError as error:
            logger.warning("%s Trying the one before it.", error)
        else:
            if not damage:
                return path
            lacking.append(path)
            logger.warning("Checkpoint %s: %s Trying the one before it.", path, damage[0])
    if lacking:
        logger.warning(
            "All checkpoints lack records: %s is taken, and damaged records are left out of the "
            "replay, 256 for each place.",
            lacking[0],
        )
        return lacking[0]
    if paths:
        raise CheckpointError(
            f"All {len(paths)} checkpoints in {directory} are damaged. Start over in another "
            "run_dir."
        )
    return None


def verify_all(path: str | os.PathLike[str]) -> list[str]:
    """Compare a checkpoint and its replay's records with their digests.

    Args:
        path: A checkpoint file.

    Returns:
        What is damaged of its records, in words; nothing where they are whole, or gone altogether.

    Raises:
        CheckpointError: If the file is damaged, or none of a run; names it.
    """
    verify_checkpoint(path)
    document = _read(Path(path), "cpu", mmap=True)
    if document["payload"].keys() & _RUN_PARTS.keys():  # other users keep what they like
        check_run(document["payload"], path)
    manifest: Manifest | None = document["payload"].get("replay")
    if manifest is None:
        return []
    folder = records_folder(run_of(path))
    try:
        with malformed_is_an_error(path):
            found = find_damage(manifest, folder)
    except MissingRecordsError:
        return []
    except RecordsError as error:
        raise CheckpointError(f"Checkpoint {path} is damaged: {error}") from error
    _found_damage[Path(path)] = found
    return [describe_damage(place, manifest, folder) for place in found]


_found_damage: dict[Path, list[tuple[int, int]]] = {}


def take_damage(path: Path, manifest: Manifest, records: Path) -> list[tuple[int, int]]:
    """Streams and blocks of a checkpoint's records that are damaged.

    Reading all records takes seconds: what :func:`verify_all` has just found isn't looked for
    again, once.
    """
    found = _found_damage.pop(path, None)
    return find_damage(manifest, records) if found is None else found


def records_folder(run_dir: str | os.PathLike[str], rank: int = 0) -> Path:
    """Where a run keeps the records of a rank's replay."""
    return Path(run_dir) / (REPLAY_FOLDER if rank == 0 else f"{REPLAY_FOLDER}_{rank}")


def run_of(path: str | os.PathLike[str]) -> Path:
    """The directory of the run that wrote a checkpoint of the first rank."""
    return Path(path).parent.parent


def read_manifest(path: str | os.PathLike[str]) -> Manifest | None:
    """What a checkpoint holds of the replay, None if it has none; no tensor is read.

    Raises:
        CheckpointError: If the file is none of a run.
    """
    document = _read(Path(path), "cpu", mmap=True)
    manifest: Manifest | None = document["payload"].get("replay")
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
        path: A file that :func:`save_checkpoint` wrote.
        map_location: Device to put the tensors on.

    Returns:
        The payload and the counters.

    Raises:
        CheckpointError: If the file is missing or damaged, or of an unknown format or version.
    """
    verify_checkpoint(path)
    document = _read(Path(path), map_location)
    return Checkpoint(
        document["payload"],
        document["updates"],
        document["frames"],
        document["versions"],
        document["format_version"],
    )


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
            f"{' and '.join(map(str, READABLE_VERSIONS))}. It was saved with "
            f"{document.get('versions')}: use the w2f_torchrl of that time."
        )
    parts = {"payload": dict, "updates": int, "frames": int, "versions": dict}
    for name, kind in parts.items():
        if not isinstance(document.get(name), kind):
            raise CheckpointError(f"Checkpoint {path} is malformed: its {name} is no {kind}.")
    return document


def check_run(payload: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Refuse a checkpoint that lacks a part that a run resumes from.

    Raises:
        CheckpointError: Naming the part.
    """
    if payload.get("exported"):
        raise CheckpointError(
            f"resume: {path} is an exported policy, which holds no optimizer, counters or replay: "
            "load_policy opens it; a run needs one of its own checkpoints."
        )
    for name, kind in _RUN_PARTS.items():
        if not isinstance(payload.get(name), kind):
            raise CheckpointError(
                f"Checkpoint {path} is malformed: its {name} is {type(payload.get(name)).__name__}."
            )


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


def resolve_resume(
    resume: str | os.PathLike[str] | Literal["auto"] | None, run_dir: str | os.PathLike[str]
) -> Path | None:
    """Find the checkpoint that the setting ``resume`` means.

    Args:
        resume: None starts a new run; ``"auto"`` takes the latest valid checkpoint of
            ``run_dir``, if there is one; a path names a checkpoint file, a ``checkpoints``
            directory, or a run directory.
        run_dir: The directory of the run that is about to start.

    Returns:
        A verified checkpoint, or None for a run that starts at zero.

    Raises:
        CheckpointError: If ``resume`` is None and ``run_dir`` already holds checkpoints (the new
            run would mix with the old one), if the path doesn't exist or holds no checkpoint, or
            if the checkpoint is damaged.
    """
    own = Path(run_dir) / "checkpoints"
    if resume is None:
        if latest_checkpoint(own) is not None:
            raise CheckpointError(
                f"run_dir={run_dir} already holds checkpoints and resume=null starts a new run. "
                "Pass resume=auto to continue it, or another run_dir."
            )
        return None
    if resume == "auto":
        return latest_valid_checkpoint(own)
    path = Path(resume)
    if path.is_dir():
        found = latest_valid_checkpoint(path) or latest_valid_checkpoint(path / "checkpoints")
        if found is None:
            raise CheckpointError(f"resume={resume} holds no file named checkpoint_<updates>.pt.")
        return found
    if not path.exists():
        raise CheckpointError(
            f"resume={resume} does not exist. Allowed: null, auto, or the path of a checkpoint, "
            "of a directory of checkpoints, or of a run."
        )
    for damage in verify_all(path):
        logger.warning("Checkpoint %s: %s These records are left out of the replay.", path, damage)
    return path


def discard_checkpoints_after(directory: str | os.PathLike[str], updates: int) -> list[Path]:
    """Delete the checkpoints that lie in the future of a run resumed at ``updates``.

    Without this, going back to an older checkpoint in the same run directory and then resuming
    with ``"auto"`` would jump to the abandoned branch.

    Args:
        directory: The directory of checkpoints.
        updates: The count of the checkpoint that the run resumes from; it stays.

    Returns:
        The deleted paths.
    """
    future = [path for path in list_checkpoints(directory) if _number(path) > updates]
    for path in future:
        path.unlink()
    return future


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


def _number(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name} is not named checkpoint_<updates>.pt.")
    return int(match.group(1))


def _remove_temporaries(directory: Path) -> None:
    for path in directory.glob(".*.pt.tmp"):
        path.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

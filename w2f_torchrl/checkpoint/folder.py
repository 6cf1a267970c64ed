"""A run's folder of checkpoints: naming them, finding the newest intact one, deleting old ones.

A run directory holds ``checkpoints/checkpoint_<updates>.pt`` and ``checkpoints/best.pt`` of rank 0,
``checkpoints/rank_<n>/`` of the other ranks, and a folder of records of each rank's replay.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

from w2f_torchrl.checkpoint.file import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    malformed_is_an_error,
    verify_checkpoint,
    write_checkpoint,
)
from w2f_torchrl.checkpoint.layout import REPLAY
from w2f_torchrl.data.replay.record_files import MissingRecordsError, RecordsError
from w2f_torchrl.data.replay.replay_files import Manifest, describe_damage, find_damage

logger = logging.getLogger(__name__)

BEST_NAME = "best.pt"
"""File name of the checkpoint with the best evaluation."""
REPLAY_FOLDER = "replay"
_NAME = re.compile(r"checkpoint_(\d+)\.pt")
_RUN_PARTS = {"config": dict, "action_size": int, "learner": dict, "counters": dict, "masks": dict}


class FoundCheckpoint(NamedTuple):
    """A checkpoint whose digest matches, read once."""

    path: Path
    checkpoint: Checkpoint
    damage: list[tuple[int, int]]
    """Streams and blocks of rank 0's records that are damaged."""


def checkpoints_of(run_dir: str | os.PathLike[str], rank: int = 0) -> Path:
    """Return the folder in which a rank of a run writes its checkpoints."""
    folder = Path(run_dir) / "checkpoints"
    return folder if rank == 0 else folder / f"rank_{rank}"


def records_folder(run_dir: str | os.PathLike[str], rank: int = 0) -> Path:
    """Return the folder of the records of a rank's replay."""
    return Path(run_dir) / (REPLAY_FOLDER if rank == 0 else f"{REPLAY_FOLDER}_{rank}")


def run_of(path: str | os.PathLike[str]) -> Path:
    """Return the directory of the run that wrote a checkpoint of rank 0."""
    return Path(path).parent.parent


def checkpoint_path(directory: str | os.PathLike[str], updates: int) -> Path:
    """Return the path of the checkpoint with a number of updates."""
    return Path(directory) / f"checkpoint_{updates:012d}.pt"


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

    Only one process may write to a directory at a time; temporary files of a killed process are
    deleted.

    Args:
        directory: The checkpoints of the run; created if missing.
        payload: As in :func:`~w2f_torchrl.checkpoint.file.write_checkpoint`.
        updates: Learner updates so far; the number of the file.
        frames: Environment frames so far.
        keep: How many checkpoints to keep: the new one, and the ``keep - 1`` highest numbers among
            the others.
        name: File name of a checkpoint that is neither counted nor deletes others; None for
            ``checkpoint_<updates>.pt``.

    Returns:
        The path of the new checkpoint.

    Raises:
        TypeError: If the payload contains a type that checkpoints cannot hold.
        ValueError: If ``keep`` is below 1 or a counter is negative.
        OSError: If the disk is full, or the directory cannot be written.
    """
    if keep < 1:
        raise ValueError(f"checkpoint.keep must be at least 1, got {keep}.")
    directory = Path(directory)
    for left in directory.glob(".*.pt.tmp"):
        left.unlink(missing_ok=True)
    path = checkpoint_path(directory, updates) if name is None else directory / name
    write_checkpoint(path, payload, updates=updates, frames=frames)
    if name is None:
        others = [other for other in list_checkpoints(directory) if other != path]
        for old in others[: max(0, len(others) - (keep - 1))]:
            old.unlink(missing_ok=True)  # the main thread may make room at the same time
    return path


def list_checkpoints(directory: str | os.PathLike[str]) -> list[Path]:
    """List the checkpoints of a directory, lowest number of updates first.

    Args:
        directory: The directory; it need not exist.

    Returns:
        Paths, sorted by number, not by name.
    """
    directory = Path(directory)
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if _NAME.fullmatch(path.name)), key=_number)


def latest_checkpoint(directory: str | os.PathLike[str]) -> Path | None:
    """Return the unverified path of the checkpoint with the highest number, or None."""
    paths = list_checkpoints(directory)
    return paths[-1] if paths else None


def latest_valid_checkpoint(directory: str | os.PathLike[str]) -> Path | None:
    """Return the path of the checkpoint from :func:`find_latest`, or None."""
    found = find_latest(directory)
    return None if found is None else found.path


def find_latest(directory: str | os.PathLike[str]) -> FoundCheckpoint | None:
    """Read the highest-numbered checkpoint whose file, other ranks' parts and records are intact.

    A damaged one is skipped with a warning. If all of them lack a rank's part or have damaged
    records, the highest-numbered one whose file is intact is returned. A resume then leaves those
    records out, or fills all replays again if a part is missing. Missing records do not count as
    damage: a run that resumes without them logs a warning and fills its replay again.

    Args:
        directory: The directory of checkpoints.

    Returns:
        The checkpoint, or None if the directory contains none.

    Raises:
        CheckpointError: If checkpoints exist but all of them are damaged.
    """
    paths = list_checkpoints(directory)
    incomplete: FoundCheckpoint | None = None
    for path in reversed(paths):
        try:
            found = open_checkpoint(path)
        except CheckpointError as error:
            logger.warning("%s Trying the previous one.", error)
            continue
        faults = [*_lost_parts(found), *describe_records(found)]
        if not faults:
            return found
        incomplete = incomplete or found
        logger.warning("Checkpoint %s: %s Trying the previous one.", path, faults[0])
    if incomplete is not None:
        logger.warning(
            "All checkpoints lack a part or have damaged records: %s is used. Damaged records are "
            "left out of the replay, in blocks of 256; without a rank's part all replays fill "
            "again.",
            incomplete.path,
        )
        return incomplete
    if paths:
        raise CheckpointError(
            f"All {len(paths)} checkpoints in {directory} are damaged. Start a new run in another "
            "run_dir."
        )
    return None


def _lost_parts(found: FoundCheckpoint) -> list[str]:
    """Describe the other ranks' parts of a checkpoint that are missing or damaged.

    A run that is killed between the writes of its ranks leaves such a checkpoint.
    """
    faults = []
    for rank in range(1, int(found.checkpoint.payload.get("ranks", 1))):
        part = checkpoints_of(run_of(found.path), rank) / found.path.name
        try:
            verify_checkpoint(part)
        except CheckpointError as error:
            faults.append(f"{error} It is the part of rank {rank}.")
    return faults


def open_checkpoint(path: str | os.PathLike[str]) -> FoundCheckpoint:
    """Read a checkpoint; compare its file and its replay's records with their digests.

    Args:
        path: A checkpoint file of rank 0.

    Raises:
        CheckpointError: If the file is damaged or does not belong to a run; names it.
    """
    path = Path(path)
    checkpoint = load_checkpoint(path)
    # Payloads that do not belong to a run may have any content.
    if checkpoint.payload.keys() & (_RUN_PARTS.keys() | {"exported"}):
        check_run(checkpoint.payload, path)
    damage = damaged_records(checkpoint, path, records_folder(run_of(path)))
    return FoundCheckpoint(path, checkpoint, damage)


def damaged_records(checkpoint: Checkpoint, path: Path, folder: Path) -> list[tuple[int, int]]:
    """Return streams and blocks of damaged records; empty if the records do not exist.

    Args:
        checkpoint: The checkpoint of any rank.
        path: Path of its file.
        folder: Folder of its records.

    Raises:
        CheckpointError: If the manifest is malformed.
    """
    manifest: Manifest | None = checkpoint.payload.get(REPLAY)
    if manifest is None:
        return []
    try:
        with malformed_is_an_error(path):
            return find_damage(manifest, folder)
    except MissingRecordsError:
        return []
    except RecordsError as error:
        raise CheckpointError(f"Checkpoint {path} is damaged: {error}") from error


def describe_records(found: FoundCheckpoint) -> list[str]:
    """Describe the damaged records of a checkpoint, one line per block."""
    manifest, folder = found.checkpoint.payload.get(REPLAY), records_folder(run_of(found.path))
    return [describe_damage(place, manifest, folder) for place in found.damage if manifest]


def check_run(payload: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Refuse a checkpoint that lacks a part that a resume needs.

    Raises:
        CheckpointError: If a part is missing; names it.
    """
    if payload.get("exported"):
        raise CheckpointError(
            f"resume: {path} is an exported policy, without optimizer, counters and replay. Open "
            "it with load_policy; to resume a run, pass one of its checkpoints."
        )
    for name, kind in _RUN_PARTS.items():
        if not isinstance(payload.get(name), kind):
            raise CheckpointError(
                f"Checkpoint {path} is malformed: its {name} is {type(payload.get(name)).__name__}."
            )


def resolve_resume(
    resume: str | os.PathLike[str] | Literal["auto"] | None, run_dir: str | os.PathLike[str]
) -> FoundCheckpoint | None:
    """Read the checkpoint that the setting ``resume`` selects.

    Args:
        resume: None starts a new run; ``"auto"`` selects the latest valid checkpoint of
            ``run_dir``, if any; a path selects a checkpoint file, a ``checkpoints`` directory, or a
            run directory.
        run_dir: The directory of the run that is starting.

    Returns:
        The checkpoint, or None for a new run.

    Raises:
        CheckpointError: If ``resume`` is None and ``run_dir`` already holds checkpoints (two runs
            would mix), if the path does not exist or contains no checkpoint, or if the checkpoint
            is damaged.
    """
    own = checkpoints_of(run_dir)
    if resume is None:
        if latest_checkpoint(own) is not None:
            raise CheckpointError(
                f"run_dir={run_dir} already holds checkpoints and resume=null starts a new run. "
                "Pass resume=auto to continue it, or another run_dir."
            )
        return None
    if resume == "auto":
        return find_latest(own)
    path = Path(resume)
    if path.is_dir():
        found = find_latest(path) or find_latest(path / "checkpoints")
        if found is None:
            raise CheckpointError(f"resume={resume} has no file named checkpoint_<updates>.pt.")
        return found
    if not path.exists():
        raise CheckpointError(
            f"resume={resume} does not exist. Allowed: null, auto, or the path of a checkpoint, "
            "of a directory of checkpoints, or of a run."
        )
    found = open_checkpoint(path)
    for damage in describe_records(found):
        logger.warning("Checkpoint %s: %s These records are left out of the replay.", path, damage)
    return found


def discard_checkpoints_after(directory: str | os.PathLike[str], updates: int) -> list[Path]:
    """Delete the checkpoints that are newer than the one from which a run resumes.

    Otherwise, after a resume from an older checkpoint in the same run directory, ``"auto"`` would
    select a checkpoint of the abandoned branch.

    Args:
        directory: The directory of checkpoints.
        updates: Number of the checkpoint from which the run resumes; it is kept.

    Returns:
        The deleted paths.
    """
    future = [path for path in list_checkpoints(directory) if _number(path) > updates]
    for path in future:
        path.unlink()
        logger.warning("%s is deleted: the run resumes from update %d", path, updates)
    return future


def _number(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name} is not named checkpoint_<updates>.pt.")
    return int(match.group(1))

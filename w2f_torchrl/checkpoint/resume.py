"""Find the checkpoint from which a run resumes, and read the parts of one rank."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from w2f_torchrl.checkpoint.file import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    malformed_is_an_error,
)
from w2f_torchrl.checkpoint.folder import (
    FoundCheckpoint,
    checkpoints_of,
    damaged_records,
    latest_checkpoint,
    records_folder,
    resolve_resume,
    run_of,
)
from w2f_torchrl.checkpoint.layout import HEADER, REPLAY, SHARED_PARTS
from w2f_torchrl.checkpoint.older import check_same_networks
from w2f_torchrl.checkpoint.rules import forbidden_changes
from w2f_torchrl.config import RunConfig, config_to_dict
from w2f_torchrl.data.replay.record_files import MissingRecordsError
from w2f_torchrl.data.replay.replay_files import Manifest, open_records

logger = logging.getLogger(__name__)

T = TypeVar("T")


class RankGroup(Protocol):
    """The required methods of a run's processes; see :class:`~w2f_torchrl.utils.ranks.Ranks`."""

    rank: int

    def on_first(self, function: Callable[[], T]) -> T:
        """Call a function on rank 0 only, and return its result on every rank."""
        ...

    def gather(self, items: list[Any]) -> list[Any]:
        """Return the items of all ranks."""
        ...


@dataclass(frozen=True)
class SavedRecords:
    """The records of a replay in a checkpoint."""

    manifest: Manifest
    folder: Path
    damage: Collection[tuple[int, int]] = ()
    """Streams and blocks to leave out."""


@dataclass(frozen=True)
class Resumption:
    """A checkpoint from which one rank resumes."""

    path: Path
    """Path of rank 0's file."""
    checkpoint: Checkpoint
    """Checkpoint of rank 0."""
    own: dict[str, Any]
    """States of this rank's separate parts by name, without those that it did not save."""
    records: SavedRecords | None
    """Records of its replay; None if the replay has to fill again."""

    @property
    def must_fill_again(self) -> bool:
        """Whether the records of the replay are lost."""
        steps = self.checkpoint.payload["counters"]["steps"]
        return self.records is None and (self.checkpoint.format_version == 1 or bool(steps))


def find_resumption(config: RunConfig, ranks: RankGroup, *, is_restart: bool) -> Resumption | None:
    """Find and read the checkpoint from which a run resumes; all ranks call it.

    Args:
        config: The run's settings.
        ranks: The run's processes.
        is_restart: Whether a launcher has restarted the run, so that it must resume.

    Returns:
        The checkpoint, each of its files hashed once, or None for a new run.

    Raises:
        CheckpointError: If the run directory already holds another run, the checkpoint is missing,
            damaged or malformed, or settings that must stay the same have changed.
    """
    found: list[FoundCheckpoint] = []

    def find() -> Path | None:
        checkpoint = _find_checkpoint(config, is_restart=is_restart)
        if checkpoint is None:
            return None
        found.append(checkpoint)
        return checkpoint.path

    path = ranks.on_first(find)
    if path is None:
        return None
    checkpoint = found[0].checkpoint if found else load_checkpoint(path)
    with malformed_is_an_error(path):
        _check_settings(checkpoint, path, config)
        damage = found[0].damage if found else None
        return _read_rank(checkpoint, path, ranks, Path(config.run_dir), damage)


def _find_checkpoint(config: RunConfig, *, is_restart: bool) -> FoundCheckpoint | None:
    resume, run_dir = config.resume, Path(config.run_dir)
    # A restarted run continues from its own checkpoints, wherever it began.
    own = latest_checkpoint(checkpoints_of(run_dir)) is not None
    if is_restart and (resume is None or own):
        resume = "auto"
    found = resolve_resume(resume, run_dir)
    holds_run = own or (run_dir / "metrics.jsonl").exists()
    if resume is None and holds_run:
        raise CheckpointError(
            f"run_dir={run_dir} already holds a run and resume=null starts a new one. "
            "Pass resume=auto to continue it, or another run_dir."
        )
    if found is not None and resume != "auto" and holds_run and not is_restart:
        _check_own(found.path, run_dir, str(resume))
    return found


def _check_own(path: Path, run_dir: Path, resume: str) -> None:
    """Refuse another run's checkpoint where a run is: that run's newer half would be deleted.

    Raises:
        CheckpointError: If the checkpoint is of another run.
    """
    if run_of(path).resolve() != run_dir.resolve():
        raise CheckpointError(
            f"run_dir={run_dir} already holds a run, and resume={resume} is a checkpoint of "
            "another one. Pass resume=auto to continue the run, or another run_dir."
        )


def _check_settings(checkpoint: Checkpoint, path: Path, config: RunConfig) -> None:
    saved = checkpoint.payload["config"]
    if changed := forbidden_changes(saved, config_to_dict(config)):
        raise CheckpointError(
            f"{path}: {'; '.join(changed)}. Pass the former values to continue this run, or start "
            "another run."
        )
    check_same_networks(saved["model"], config.model)


def _read_rank(
    checkpoint: Checkpoint,
    path: Path,
    ranks: RankGroup,
    run_dir: Path,
    damage: list[tuple[int, int]] | None,
) -> Resumption:
    """Read the parts of this rank.

    Args:
        checkpoint: Checkpoint of rank 0.
        path: Path of its file.
        ranks: The run's processes.
        run_dir: The run's directory.
        damage: Damage of rank 0's records; None on other ranks.
    """
    own_path = checkpoints_of(run_of(path), ranks.rank) / path.name
    own: Checkpoint | None = checkpoint
    if ranks.rank:
        own = _read_part(own_path)
    if own is None:
        logger.warning("%s has no intact part of rank %d", path, ranks.rank)
    folder = records_folder(run_of(path), ranks.rank)
    manifest = None if own is None else _manifest_of(own, path, folder)
    # Either all ranks resume their replays or none does, as all do the same number of updates.
    if not all(ranks.gather([manifest is not None])):
        manifest = None
    records = None
    if own is not None and manifest is not None:
        if damage is None:
            damage = damaged_records(own, own_path, folder)
        assert own.payload["sampling"] is not None  # records are useless without it
        records = SavedRecords(manifest, folder, damage)
    shared = (*HEADER, *SHARED_PARTS, REPLAY)
    parts = {} if own is None else {k: v for k, v in own.payload.items() if k not in shared}
    return Resumption(path, checkpoint, parts | _log_state(checkpoint, path, run_dir), records)


def _read_part(path: Path) -> Checkpoint | None:
    """Return a rank's part of a checkpoint, or None, with a warning, if it is damaged.

    An error would end one rank while the others wait for it.
    """
    if not path.exists():
        return None
    try:
        return load_checkpoint(path)
    except CheckpointError as error:
        logger.warning("%s", error)
        return None


def _log_state(checkpoint: Checkpoint, path: Path, run_dir: Path) -> dict[str, Any]:
    """Return where the metrics end; the file's size is valid only in the run that wrote it."""
    state = {"bytes": None, "wandb": None} | checkpoint.payload.get("log", {})
    if run_of(path).resolve() != run_dir.resolve():
        state = {"bytes": None, "wandb": None}
    return {"log": state | {"frames": checkpoint.frames, "updates": checkpoint.updates}}


def _manifest_of(saved: Checkpoint, path: Path, folder: Path) -> Manifest | None:
    """Return a checkpoint's manifest of the replay; None, with a warning, without its records.

    Args:
        saved: Checkpoint of a rank.
        path: Path of rank 0's file.
        folder: Folder of the rank's records.
    """
    manifest: Manifest | None = saved.payload.get(REPLAY)
    if manifest is None:
        if saved.format_version == 1 or saved.updates:
            logger.warning("%s contains no replay, which fills again before the first update", path)
        return None
    try:
        open_records(manifest, folder).close()
    except MissingRecordsError as error:
        logger.warning("%s The replay fills again before the first update.", error)
        return None
    return manifest

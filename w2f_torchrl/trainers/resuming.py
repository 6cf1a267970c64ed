"""What a run takes over from a checkpoint beside its networks."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w2f_torchrl.data.record_files import MissingRecordsError
from w2f_torchrl.data.replay_files import Manifest, open_records
from w2f_torchrl.trainers.checkpointing import (
    Checkpoint,
    CheckpointError,
    check_run,
    load_checkpoint,
    malformed_is_an_error,
    records_folder,
    resolve_resume,
    run_of,
    take_damage,
)
from w2f_torchrl.trainers.config import EnvironmentConfig, RunConfig, config_to_dict
from w2f_torchrl.trainers.distributed import Ranks
from w2f_torchrl.trainers.open_replay import check_layout
from w2f_torchrl.trainers.resume_settings import forbidden_changes

logger = logging.getLogger(__name__)

WANDB_RUN = "wandb_run.json"


def find_checkpoint(config: RunConfig, *, again: bool) -> Path | None:
    """Find what a run goes on from.

    Args:
        config: The run's settings.
        again: Whether a launcher starts the run again, and so means to go on with it.

    Returns:
        A verified checkpoint, or None for a run that begins.

    Raises:
        CheckpointError: If the run directory holds a run that must not be mixed with another, or
            the checkpoint is missing or damaged.
    """
    resume = config.resume or ("auto" if again else None)
    checkpoint = resolve_resume(resume, config.run_dir)
    if resume is None and (Path(config.run_dir) / "metrics.jsonl").exists():
        raise CheckpointError(
            f"run_dir={config.run_dir} already holds a run and resume=null starts a new one. "
            "Pass resume=auto to go on with it, or another run_dir."
        )
    return checkpoint


def load_run(path: Path, config: RunConfig) -> Checkpoint:
    """Load the checkpoint that a run goes on from.

    Args:
        path: Of the first rank's file.
        config: The run's settings.

    Raises:
        CheckpointError: If the file is damaged or malformed, or settings that must stay have
            changed; names them.
    """
    saved = load_checkpoint(path)
    check_run(saved.payload, path)
    with malformed_is_an_error(path):
        changed = forbidden_changes(saved.payload["config"], config_to_dict(config))
    if changed:
        raise CheckpointError(
            f"{path}: {'; '.join(changed)}. Pass the former values to continue this run, or start "
            "another run."
        )
    return saved


@dataclass(frozen=True)
class Resumption:
    """What one rank goes on with, beside what is equal on all of them."""

    state: dict[str, Any]
    """What it saved under ``resume``; empty if it saved nothing."""
    manifest: Manifest | None
    """Of its replay; None if that has to fill again."""
    records: Path
    """The folder of the replay's records."""
    damage: Collection[tuple[int, int]] = ()
    """Of the replay: streams and blocks of records that are left out."""

    @classmethod
    def read(cls, saved: Checkpoint, path: Path, ranks: Ranks, config: RunConfig) -> Resumption:
        """Read a rank's part of a checkpoint.

        Args:
            saved: The first rank's part.
            path: Of that file.
            ranks: This process's place among the run's.
            config: The run's settings.

        Raises:
            CheckpointError: If settings that must stay have changed.
        """
        own_path = checkpoint_folder(path.parent, ranks.rank) / path.name
        own = saved if ranks.is_first else _part_of_rank(path, ranks.rank)
        records = records_folder(run_of(path), ranks.rank)
        manifest = None if own is None else _replay_of(own, path, records)
        # All ranks' replays, or none: their updates are the same.
        if not all(ranks.gather([manifest is not None])):
            manifest = None
        if manifest is not None:
            check_layout(config, manifest)
        state = {} if own is None else own.payload.get("resume", {})
        damage = [] if manifest is None else take_damage(own_path, manifest, records)
        return cls(state, manifest, records, damage)

    def why_new_episodes(self, environment: dict[str, Any], *, replay_empty: bool) -> str | None:
        """Why the envs can't go on from where the checkpoint has them; None if they can.

        Args:
            environment: The run's settings that must be those of then.
            replay_empty: Whether the replay has lost records that it had.
        """
        if replay_empty:
            return "the replay is empty"
        if not self.state:
            return "their state is in no checkpoint of this rank"
        if self.state["collector"] is None:
            return "their state was not saved (an exception, or envs without resume_state)"
        # What a checkpoint of an older version doesn't name had its default.
        then = vars(EnvironmentConfig()) | self.state["environment"]
        return _describe_difference(then, environment)


def restore_run_dir(run_dir: Path, saved: Checkpoint, path: Path) -> None:
    """Take a run directory back to the moment of a checkpoint, if it is one of its own.

    Metrics that were written later go, and its run at Weights & Biases gets its id back.

    Args:
        run_dir: The directory.
        saved: The checkpoint.
        path: Of its file.
    """
    if run_of(path).resolve() != run_dir.resolve():
        return
    resume = saved.payload.get("resume", {})
    size, metrics = resume.get("metrics_bytes"), run_dir / "metrics.jsonl"
    if size is not None and metrics.exists():
        if metrics.stat().st_size < size:
            logger.warning("%s has lost lines that it had when %s was written", metrics, path)
        else:
            os.truncate(metrics, size)
    wandb, target = resume.get("wandb"), run_dir / WANDB_RUN
    if wandb and read_wandb_run(run_dir) is None:
        target.unlink(missing_ok=True)
        target.write_text(wandb)


def read_wandb_run(run_dir: Path) -> str | None:
    """What the run is at Weights & Biases, if it is logged there: its id and rows, as JSON.

    None also where the file is damaged.
    """
    path = run_dir / WANDB_RUN
    try:
        text = path.read_text()
        json.loads(text)
    except (OSError, ValueError):
        return None
    return text


def checkpoint_folder(folder: Path, rank: int) -> Path:
    """Where a rank writes; all but the first only what is their own: replay, envs, streams.

    Args:
        folder: The first rank's.
        rank: Which.
    """
    return folder if rank == 0 else folder / f"rank_{rank}"


def _part_of_rank(path: Path, rank: int) -> Checkpoint | None:
    """What a rank, not the first, saved of its own at the time of a checkpoint."""
    own = checkpoint_folder(path.parent, rank) / path.name
    if not own.exists():
        logger.warning("%s has no part of rank %d", path, rank)
        return None
    return load_checkpoint(own)


def _replay_of(saved: Checkpoint, path: Path, records: Path) -> Manifest | None:
    """What a checkpoint holds of the replay; None, with a warning, if its records are gone."""
    manifest: Manifest | None = saved.payload.get("replay")
    if manifest is None:
        if saved.format_version == 1 or saved.updates:
            logger.warning("%s holds no replay: it fills again before the first update", path)
        return None
    try:
        open_records(manifest, records).close()
    except MissingRecordsError as error:
        logger.warning("%s The replay fills again before the first update.", error)
        return None
    return manifest


def _describe_difference(saved: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Name the first setting in which two configurations of the environments differ."""
    for name in sorted(saved.keys() | now.keys()):
        if saved.get(name) != now.get(name):
            return f"{name} was {saved.get(name)!r} and is {now.get(name)!r}"
    return None

"""What a run takes over from a checkpoint beside its networks."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from w2f_torchrl.data.record_files import MissingRecordsError
from w2f_torchrl.data.replay_files import Manifest, open_records
from w2f_torchrl.trainers.checkpointing import Checkpoint, records_folder

logger = logging.getLogger(__name__)

WANDB_RUN = "wandb_run.json"


def cut_metrics(run_dir: Path, saved: Checkpoint, path: Path) -> None:
    """Take back the metrics that were written after a checkpoint of this run directory."""
    size = saved.payload.get("resume", {}).get("metrics_bytes")
    metrics = run_dir / "metrics.jsonl"
    if size is None or not metrics.exists() or path.parent.parent.resolve() != run_dir.resolve():
        return
    if metrics.stat().st_size < size:
        logger.warning("%s has lost lines that it had when %s was written", metrics, path)
    else:
        os.truncate(metrics, size)


def rank_checkpoint(folder: Path, rank: int) -> Path:
    """The folder of what a rank other than the first saves of its own: replay, envs, streams."""
    return folder / f"rank_{rank}"


def replay_of(saved: Checkpoint, path: Path, rank: int) -> Manifest | None:
    """What a checkpoint holds of the replay, if its records are there.

    Returns:
        None, with a warning, if the replay has to fill again.
    """
    manifest: Manifest | None = saved.payload.get("replay")
    if manifest is None:
        if saved.format_version == 1 or saved.updates:
            logger.warning("%s holds no replay: it fills again before the first update", path)
        return None
    try:
        open_records(manifest, records_folder(path, rank)).close()
    except MissingRecordsError as error:
        logger.warning("%s The replay fills again before the first update.", error)
        return None
    return manifest


def describe_difference(saved: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Name the first setting in which two configurations of the environments differ."""
    for name in sorted(saved.keys() | now.keys()):
        if saved.get(name) != now.get(name):
            return f"{name} was {saved.get(name)!r} and is {now.get(name)!r}"
    return None


def read_wandb_run(run_dir: Path) -> str | None:
    """What the run is at Weights & Biases, if it is logged there: its id and rows, as JSON."""
    path = run_dir / WANDB_RUN
    return path.read_text() if path.exists() else None


def keep_wandb_run(run_dir: Path, saved: str | None, path: Path) -> None:
    """Give a run directory its id back, if it has lost it."""
    if saved and path.parent.parent.resolve() == run_dir.resolve():
        target = run_dir / WANDB_RUN
        if not target.exists():
            target.write_text(saved)

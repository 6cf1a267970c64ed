"""Runs and checkpoints on a command line."""

from __future__ import annotations

from pathlib import Path

from w2f_torchrl.trainers.checkpointing import latest_valid_checkpoint


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means.

    Raises:
        FileNotFoundError: If there is none.
    """
    if path.is_file():
        return path
    for folder in (path, path / "checkpoints"):
        if folder.is_dir() and (found := latest_valid_checkpoint(folder)) is not None:
            return found
    raise FileNotFoundError(f"{path} is no checkpoint, and no run directory that holds one.")

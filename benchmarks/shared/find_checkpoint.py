"""Find the checkpoints that a command line names."""

from __future__ import annotations

from pathlib import Path

from w2f_torchrl.checkpoint import latest_valid_checkpoint


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that a path names: itself, or a run's newest.

    Raises:
        FileNotFoundError: If the path neither is nor contains a checkpoint.
    """
    if path.is_file():
        return path
    for folder in (path, path / "checkpoints"):
        if folder.is_dir() and (found := latest_valid_checkpoint(folder)) is not None:
            return found
    raise FileNotFoundError(f"{path} is neither a checkpoint nor a run directory with one.")

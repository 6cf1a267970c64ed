"""Checkpoints: the file format, the folder, the list of parts, and resuming."""

from w2f_torchrl.checkpoint.file import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    malformed_is_an_error,
    read_manifest,
    verify_checkpoint,
    write_checkpoint,
)
from w2f_torchrl.checkpoint.folder import (
    BEST_NAME,
    checkpoint_path,
    discard_checkpoints_after,
    latest_checkpoint,
    latest_valid_checkpoint,
    list_checkpoints,
    resolve_resume,
    save_checkpoint,
)

__all__ = [
    "BEST_NAME",
    "Checkpoint",
    "CheckpointError",
    "checkpoint_path",
    "discard_checkpoints_after",
    "latest_checkpoint",
    "latest_valid_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "malformed_is_an_error",
    "read_manifest",
    "resolve_resume",
    "save_checkpoint",
    "verify_checkpoint",
    "write_checkpoint",
]

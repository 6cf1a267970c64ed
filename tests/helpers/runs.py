"""Whole runs of a few seconds."""

from __future__ import annotations

from pathlib import Path

from helpers.models import TINY
from w2f_torchrl.config import to_run_config
from w2f_torchrl.trainers import RunConfig


def tiny_run(run_dir: Path, **settings) -> RunConfig:
    """A whole run of a few hundred frames at 16 pixels, in this process."""
    values = {
        "environment": {"domain": "cartpole", "task": "balance", "num_envs": 2, "image_size": 16},
        "model": vars(TINY),
        "training": {
            "total_frames": 256,
            "batch_size": 2,
            "batch_length": 8,
            "train_ratio": 4,
            "prefill_steps": 32,
        },
        "collection": {"num_workers": 0, "steps_per_batch": 8},
        "replay": {"capacity": 2000},
        "evaluation": {"every_frames": 128, "episodes": 1},
        "checkpoint": {"every_updates": 8, "keep": 2},
        "logging": {"every_updates": 5},
        "device": "cpu",
        "run_dir": str(run_dir),
    }
    for key, value in settings.items():
        values[key] = values[key] | value if isinstance(value, dict) and key in values else value
    return to_run_config(values)

"""A model of a few thousand parameters for pictures of 16 x 16, and a run that trains it.

It makes several updates per second on a fraction of a core, and learns nothing.
"""

from __future__ import annotations

from typing import Any

from w2f_torchrl.modules import ModelConfig

MODEL = {
    "preset": "tiny",
    "belief_size": 16,
    "hidden_size": 8,
    "num_categoricals": 4,
    "num_classes": 4,
    "cnn_depth": 4,
    "units": 8,
    "background_belief_size": 8,
    "background_hidden_size": 8,
    "background_num_classes": 4,
    "background_cnn_depth": 4,
    "num_blocks": 4,
    "num_bins": 41,
}
TINY = ModelConfig(**MODEL)
EVERY = 5
"""Updates from one line of training metrics to the next."""

_OVERRIDES = f"""
environment.domain=cartpole environment.task=balance environment.num_envs=1
environment.image_size=16 training.batch_size=2 training.batch_length=8 training.train_ratio=8
training.prefill_steps=32 collection.num_workers=0 collection.steps_per_batch=8
replay.capacity=2000 evaluation.every_frames=0
checkpoint.every_updates=10 logging.every_updates={EVERY}
"""


def tiny_overrides(**settings: Any) -> list[str]:
    """Hydra overrides of the run.

    Args:
        **settings: More of them, ``group__name=value``.
    """
    more = [f"{name.replace('__', '.')}={value}" for name, value in settings.items()]
    sizes = [f"model.{name}={value}" for name, value in MODEL.items()]
    return _OVERRIDES.split() + sizes + more


def missing_and_repeated(rows: list[dict[str, float]]) -> tuple[list[int], list[int]]:
    """Which updates' lines of training metrics a run lacks, and which it has twice.

    Args:
        rows: All of the run's metrics.
    """
    updates = [int(row["updates"]) for row in rows if "wm/total_loss" in row]
    wanted = range(EVERY, max(updates, default=0) + 1, EVERY)
    return sorted(set(wanted) - set(updates)), sorted({u for u in updates if updates.count(u) > 1})

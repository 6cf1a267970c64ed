"""The learner, the run around it, its evaluation and its checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from w2f_torchrl._lazy import lazy_exports
from w2f_torchrl.trainers.config import ConfigError, RunConfig, to_run_config

if TYPE_CHECKING:
    from w2f_torchrl.trainers.evaluator import Evaluator, LoadedPolicy, load_policy
    from w2f_torchrl.trainers.export import export_policy
    from w2f_torchrl.trainers.learner import Learner
    from w2f_torchrl.trainers.trainer import Trainer
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "evaluator": ("Evaluator", "LoadedPolicy", "load_policy"),
            "export": ("export_policy",),
            "learner": ("Learner",),
            "trainer": ("Trainer",),
        },
    )

__all__ = [
    "ConfigError",
    "Evaluator",
    "Learner",
    "LoadedPolicy",
    "RunConfig",
    "Trainer",
    "export_policy",
    "load_policy",
    "to_run_config",
]

"""The training loop of a run; also exports the learner, the evaluation and the settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from w2f_torchrl._lazy import lazy_exports
from w2f_torchrl.config import ConfigError, RunConfig, to_run_config

if TYPE_CHECKING:
    from w2f_torchrl.evaluation.evaluator import Evaluator
    from w2f_torchrl.evaluation.export import export_policy
    from w2f_torchrl.evaluation.policy import LoadedPolicy, load_policy
    from w2f_torchrl.learner.learner import Learner
    from w2f_torchrl.trainers.trainer import Trainer
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "w2f_torchrl.evaluation.evaluator": ("Evaluator",),
            "w2f_torchrl.evaluation.policy": ("LoadedPolicy", "load_policy"),
            "w2f_torchrl.evaluation.export": ("export_policy",),
            "w2f_torchrl.learner.learner": ("Learner",),
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

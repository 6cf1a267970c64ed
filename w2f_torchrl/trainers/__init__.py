"""The learner, the run around it, its evaluation and its checkpoints."""

from w2f_torchrl.trainers.config import ConfigError, RunConfig, to_run_config
from w2f_torchrl.trainers.evaluator import Evaluator, LoadedPolicy, load_policy
from w2f_torchrl.trainers.learner import Learner
from w2f_torchrl.trainers.trainer import Trainer

__all__ = [
    "ConfigError",
    "Evaluator",
    "Learner",
    "LoadedPolicy",
    "RunConfig",
    "Trainer",
    "load_policy",
    "to_run_config",
]

"""Every setting with its type, unit, range and default; imports neither torch nor a simulator."""

from w2f_torchrl.config.environment import AlgoConfig, EnvironmentConfig, SegmentationConfig
from w2f_torchrl.config.loss import LossConfig
from w2f_torchrl.config.methods import (
    METHODS,
    MethodConfig,
    R2DreamerConfig,
    RepoConfig,
    TiaConfig,
)
from w2f_torchrl.config.model import LATENTS, ModelConfig
from w2f_torchrl.config.output import CheckpointConfig, EvaluationConfig, LoggingConfig
from w2f_torchrl.config.presets import PRESETS
from w2f_torchrl.config.run import RunConfig, config_to_dict, save_config, to_run_config
from w2f_torchrl.config.training import (
    EXECUTIONS,
    GRAPHED,
    ON_NAN,
    PRECISIONS,
    AugmentationConfig,
    CollectionConfig,
    DataConfig,
    DistributedConfig,
    OptimizerConfig,
    ReplayConfig,
    TrainingConfig,
)
from w2f_torchrl.config.validation import ConfigError

__all__ = [
    "EXECUTIONS",
    "GRAPHED",
    "LATENTS",
    "METHODS",
    "ON_NAN",
    "PRECISIONS",
    "PRESETS",
    "AlgoConfig",
    "AugmentationConfig",
    "CheckpointConfig",
    "CollectionConfig",
    "ConfigError",
    "DataConfig",
    "DistributedConfig",
    "EnvironmentConfig",
    "EvaluationConfig",
    "LoggingConfig",
    "LossConfig",
    "MethodConfig",
    "ModelConfig",
    "OptimizerConfig",
    "R2DreamerConfig",
    "ReplayConfig",
    "RepoConfig",
    "RunConfig",
    "SegmentationConfig",
    "TiaConfig",
    "TrainingConfig",
    "config_to_dict",
    "save_config",
    "to_run_config",
]

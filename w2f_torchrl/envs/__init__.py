"""Environments with uint8 pixels, the simulator's foreground mask, and distractions.

After this package is imported, MuJoCo's OpenGL backend (``MUJOCO_GL``) is chosen when dm_control is
first imported, if the variable is unset: EGL if it finds a device, otherwise OSMesa. dm_control
reads the variable only once, at its import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from w2f_torchrl._lazy import lazy_exports
from w2f_torchrl.envs.renderers import _gl  # noqa: F401  # chooses when dm_control is imported
from w2f_torchrl.envs.renderers.drawing import ForegroundRule, validate_distraction
from w2f_torchrl.envs.scenery.clip_files import BackgroundError
from w2f_torchrl.envs.scenery.distractions import (
    BackgroundConfig,
    CameraConfig,
    ColorConfig,
    CorruptionConfig,
    DistractionConfig,
    ReactiveConfig,
)
from w2f_torchrl.envs.scenery.evaluation_sets import EvaluationSet, evaluation_sets
from w2f_torchrl.envs.tasks import register_env, validate_task

if TYPE_CHECKING:
    from w2f_torchrl.envs.dm_control import PixelDMControlEnv
    from w2f_torchrl.envs.factory import make_env
    from w2f_torchrl.envs.gym.task import MujocoTask
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "dm_control": ("PixelDMControlEnv",),
            "factory": ("make_env",),
            "gym.task": ("MujocoTask",),
        },
    )

__all__ = [
    "BackgroundConfig",
    "BackgroundError",
    "CameraConfig",
    "ColorConfig",
    "CorruptionConfig",
    "DistractionConfig",
    "EvaluationSet",
    "ForegroundRule",
    "MujocoTask",
    "PixelDMControlEnv",
    "ReactiveConfig",
    "evaluation_sets",
    "make_env",
    "register_env",
    "validate_distraction",
    "validate_task",
]

"""Environments with uint8 pixels, the simulator's foreground mask, and distractions.

Importing this package chooses MuJoCo's OpenGL backend (``MUJOCO_GL``) if the variable is unset:
EGL where a display can be had, else OSMesa. dm_control reads it once, at its own import.
"""

from __future__ import annotations

from w2f_torchrl.envs._gl import load_gl_backend

load_gl_backend()

from w2f_torchrl.envs.clip_files import BackgroundError  # noqa: E402
from w2f_torchrl.envs.distractions import (  # noqa: E402
    BackgroundConfig,
    CameraConfig,
    ColorConfig,
    DistractionConfig,
)
from w2f_torchrl.envs.dm_control import PixelDMControlEnv  # noqa: E402
from w2f_torchrl.envs.evaluation_sets import EvaluationSet, evaluation_sets  # noqa: E402
from w2f_torchrl.envs.factory import make_env  # noqa: E402
from w2f_torchrl.envs.tasks import (  # noqa: E402
    register_env,
    validate_distraction,
    validate_task,
)

__all__ = [
    "BackgroundConfig",
    "BackgroundError",
    "CameraConfig",
    "ColorConfig",
    "DistractionConfig",
    "EvaluationSet",
    "PixelDMControlEnv",
    "evaluation_sets",
    "make_env",
    "register_env",
    "validate_distraction",
    "validate_task",
]

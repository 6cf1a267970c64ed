"""Environments with uint8 pixels and the simulator's foreground mask.

Importing this package chooses MuJoCo's OpenGL backend (``MUJOCO_GL``) if the variable is unset:
EGL where a display can be had, else OSMesa. dm_control reads it once, at its own import.
"""

from __future__ import annotations

from w2f_torchrl.envs._gl import load_gl_backend

load_gl_backend()

from w2f_torchrl.envs.dm_control import PixelDMControlEnv  # noqa: E402
from w2f_torchrl.envs.factory import make_env  # noqa: E402
from w2f_torchrl.envs.tasks import register_env, validate_task  # noqa: E402

__all__ = ["PixelDMControlEnv", "make_env", "register_env", "validate_task"]

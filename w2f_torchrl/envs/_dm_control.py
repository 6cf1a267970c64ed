"""dm_control, imported when the OpenGL backend is chosen; the package takes it from here alone."""

from __future__ import annotations

from w2f_torchrl.envs.renderers._gl import load_gl_backend

load_gl_backend()

from dm_control import _render, suite  # noqa: E402
from dm_control.mujoco import Physics, wrapper  # noqa: E402
from dm_control.rl.control import Environment  # noqa: E402

__all__ = ["Environment", "Physics", "_render", "suite", "wrapper"]

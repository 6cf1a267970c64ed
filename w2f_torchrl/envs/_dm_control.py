"""dm_control, imported when the OpenGL backend is chosen; the package takes it from here alone."""

from __future__ import annotations

from absl.logging import get_absl_logger

from w2f_torchrl._known_noise import drop_known_messages
from w2f_torchrl.envs.renderers._gl import load_gl_backend

drop_known_messages(get_absl_logger())
load_gl_backend()

from dm_control import _render, suite  # noqa: E402
from dm_control.mujoco import Physics, wrapper  # noqa: E402
from dm_control.rl.control import Environment  # noqa: E402

__all__ = ["Environment", "Physics", "_render", "suite", "wrapper"]

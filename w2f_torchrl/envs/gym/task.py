"""A task on your own model file, as a Gymnasium env."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt

from w2f_torchrl.envs.gym.tasks import EXTRA

try:
    import gymnasium
    from gymnasium.spaces import Box
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"MujocoTask needs gymnasium: {EXTRA}", name=error.name) from error

FloatArray = npt.NDArray[np.float64]


class MujocoTask(gymnasium.Env[FloatArray, npt.NDArray[np.float32]]):
    """A task on a MuJoCo model: subclass it, write :meth:`reward`, and register the class.

    ``gymnasium.register(ID, entry_point=CLASS, kwargs={"model_file": PATH},
    max_episode_steps=N)`` gives it an id, with which ``environment=gym environment.task=ID`` trains
    on it, drawn by this package. Its state is saved exactly if its attributes are numbers, text,
    arrays, and lists or dictionaries of these.

    ``self.model`` and ``self.data`` are MuJoCo's, ``self.np_random`` is the episode's generator.
    Actions are the actuators' controls [A], limited to ``ctrlrange``; those without limits need
    ``environment.action_range``. Observations, which pixels replace, are ``qpos`` and ``qvel``.

    Args:
        model_file: An MJCF or URDF file, or the text of one.
        frame_skip: Simulation steps per control step, at least 1.
        render_mode: Of Gymnasium; the env itself draws nothing.

    Raises:
        ValueError: If the file cannot be read or has no actuators, or if ``frame_skip`` is below 1.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(
        self, model_file: str | Path, *, frame_skip: int = 1, render_mode: str | None = None
    ) -> None:
        if frame_skip < 1:
            raise ValueError(f"frame_skip={frame_skip} must be at least 1.")
        text = str(model_file)
        inline = text.lstrip().startswith("<")
        load = mujoco.MjModel.from_xml_string if inline else mujoco.MjModel.from_xml_path
        name = "the model" if inline else f"model_file={text!r}"
        try:
            self.model = load(text)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if self.model.nu == 0:
            raise ValueError(f"{name} has no actuators to act with.")
        self.data = mujoco.MjData(self.model)
        self.frame_skip, self.render_mode = frame_skip, render_mode
        limited = self.model.actuator_ctrllimited.astype(bool)[:, None]
        limits = np.where(limited, self.model.actuator_ctrlrange, [-np.inf, np.inf])
        low, high = limits.T.astype(np.float32)
        self.action_space = Box(low, high, dtype=np.float32)
        size = self.model.nq + self.model.nv
        self.observation_space = Box(-np.inf, np.inf, (size,), dtype=np.float64)

    def initialize(self) -> None:
        """Set the state of an episode's start, which is otherwise the model's reference pose.

        Draw from ``self.np_random``. MuJoCo's ``mj_forward`` follows.
        """

    def reward(self, action: npt.NDArray[np.float32]) -> float:
        """Return the reward of a control step; ``self.data`` is the state that it led to.

        Args:
            action: The controls [A].
        """
        raise NotImplementedError

    def terminated(self) -> bool:
        """Return whether the task ends the episode here; never by default."""
        return False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[FloatArray, dict[str, Any]]:
        """Start an episode."""
        super().reset(seed=seed)
        mujoco.mj_resetData(self.model, self.data)
        self.initialize()
        mujoco.mj_forward(self.model, self.data)
        return self._observation(), {}

    def step(
        self, action: npt.NDArray[np.float32]
    ) -> tuple[FloatArray, float, bool, bool, dict[str, Any]]:
        """Hold the controls for ``frame_skip`` simulation steps."""
        self.data.ctrl[:] = action
        mujoco.mj_step(self.model, self.data, self.frame_skip)
        # Recompute what follows from the positions, which mj_step has just changed.
        mujoco.mj_step1(self.model, self.data)
        reward, over = float(self.reward(action)), bool(self.terminated())
        return self._observation(), reward, over, False, {}

    def _observation(self) -> FloatArray:
        return np.concatenate([self.data.qpos, self.data.qvel])

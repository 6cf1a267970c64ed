"""Pictures, masks and distractions of Gymnasium envs that hold a MuJoCo simulation."""

from __future__ import annotations

from typing import Any

import gymnasium
import mujoco
import numpy as np
import numpy.typing as npt
from gymnasium.spaces import Discrete

from w2f_torchrl.envs.gym.pictures import Mask, Picture, own_mask
from w2f_torchrl.envs.renderers.drawing import find_camera
from w2f_torchrl.envs.renderers.make import Distractions, make_renderer
from w2f_torchrl.envs.renderers.rendering import Drawing
from w2f_torchrl.envs.simulation import Camera, FreeCamera, names_of, wrap

Pair = tuple[mujoco.MjModel, mujoco.MjData]


def find_simulation(env: gymnasium.Env[Any, Any]) -> Pair | None:
    """Return MuJoCo's model and data of an env, None without.

    They are the attributes ``model`` and ``data`` of the unwrapped env, as of Gymnasium's and
    Meta-World's; or ``sim.model._model`` and ``sim.data._data``, as of robosuite's.

    Args:
        env: The env. If it has a method ``foreground_mask``, it draws itself and nothing is found.
    """
    if own_mask(env) is not None:
        return None
    inner: Any = env.unwrapped
    found = getattr(inner, "model", None), getattr(inner, "data", None)
    if not _is_pair(found):
        sim = getattr(inner, "sim", None)
        found = (
            getattr(getattr(sim, "model", None), "_model", None),
            getattr(getattr(sim, "data", None), "_data", None),
        )
    return found if _is_pair(found) else None


def _is_pair(found: tuple[Any, Any]) -> bool:
    return isinstance(found[0], mujoco.MjModel) and isinstance(found[1], mujoco.MjData)


def find_view(task: str, env: gymnasium.Env[Any, Any], camera_id: int | str | None) -> Camera:
    """Return the camera that an env is drawn through.

    Args:
        task: Name of the env, for the message.
        env: An env with a simulation.
        camera_id: A camera of the model by its index or name; None for the one of the env's own
            pictures: that of Gymnasium's renderer, which is often a free camera; or robosuite's
            ``render_camera``; or else the model's first, or a free one if it has none.

    Raises:
        ValueError: If the model does not have the camera.
    """
    pair, inner = find_simulation(env), env.unwrapped
    assert pair is not None, "checked by the caller"
    cameras = names_of(wrap(*pair), "camera")
    if camera_id is not None:
        return find_camera(task, camera_id, cameras)
    renderer = getattr(inner, "mujoco_renderer", None)
    if renderer is not None:
        chosen = renderer.camera_id
        if chosen is not None and chosen >= 0:
            return find_camera(task, int(chosen), cameras)
        return FreeCamera.of_model(pair[0], renderer.default_cam_config)
    named = getattr(inner, "render_camera", None)
    if isinstance(named, str):
        return find_camera(task, named, cameras)
    return 0 if cameras else FreeCamera.of_model(pair[0])


class SimulationPictures:
    """Draw the simulation of an env with the package's renderers.

    The env's own renderer is not used. The simulation is read, and changed only while a picture is
    drawn.

    Args:
        env: An env with a simulation (:func:`find_simulation`). If it replaces its model or data at
            a reset, so does this.
        drawing: How to draw it; ``domain`` must be None.
        distractions: What distracts, None for nothing.
        seed: Of the distractions; None draws one.

    Raises:
        ValueError: If a video cannot be read, the camera cannot wander, the scenery reacts to more
            action dimensions than there are, or the rule of the foreground names no body.
    """

    def __init__(
        self,
        env: gymnasium.Env[Any, Any],
        drawing: Drawing,
        distractions: Distractions | None = None,
        *,
        seed: int | None = None,
    ) -> None:
        self.image_size, self.has_mask = drawing.image_size, drawing.foreground_mask
        self._env, self._drawing, self._distractions = env, drawing, distractions
        space: Any = env.action_space  # Gymnasium may be missing: then every space is Any to mypy.
        self._choices = int(space.n) if isinstance(space, Discrete) else None
        if self._choices is None:
            low, high = (np.asarray(end, np.float64) for end in (space.low, space.high))
            limited = np.isfinite(low) & np.isfinite(high)
            low, high = np.where(limited, low, -1.0), np.where(limited, high, 1.0)
            self._center, self._half_range = (high + low) / 2, (high - low) / 2
        self._step_unit = None if distractions is None else distractions.config.step_unit
        self._make(seed)

    def _make(self, seed: int | None) -> None:
        found = find_simulation(self._env)
        assert found is not None, "the env had a simulation"
        self._pair: Pair = found
        actions = self._choices or len(self._center)
        self._renderer, self.distractor = make_renderer(
            wrap(*found), self._drawing, self._distractions, seed=seed, action_size=actions
        )

    @property
    def simulation(self) -> Pair:
        """MuJoCo's model and data."""
        return self._pair

    def start(self) -> None:
        """Draw what the env now simulates, and begin an episode of the distractions."""
        found = find_simulation(self._env)
        if found is None or any(a is not b for a, b in zip(found, self._pair, strict=True)):
            state = None if self.distractor is None else self.distractor.state_dict()
            self._renderer.close()
            self._make(0)
            if self.distractor is not None and state is not None:
                self.distractor.load_state_dict(state)
        self._renderer.upload_height_fields()
        if self.distractor is not None:
            self.distractor.reset()

    def control_step(self) -> None:
        """Move the distractions that change with the env's steps."""
        if self.distractor is not None and self._step_unit == "control":
            self.distractor.step()

    def agent_step(self, action: Any, reward: float) -> None:
        """Move the distractions that change with the agent's steps, or react to them.

        Args:
            action: In the env's units.
            reward: Mean reward of its control steps.
        """
        if self.distractor is None:
            return
        if self._step_unit == "agent":
            self.distractor.step()
        self.distractor.react(self._scaled(action), reward)

    def _scaled(self, action: Any) -> npt.NDArray[np.float64]:
        """Return an action [A] in [-1, 1]; of A choices, 1 for the one that was made."""
        if self._choices is not None:
            return np.where(np.arange(self._choices) == int(action), 1.0, -1.0)
        scaled: npt.NDArray[np.float64] = (np.asarray(action) - self._center) / self._half_range
        return np.clip(scaled, -1.0, 1.0)

    def draw(self) -> tuple[Picture, Mask | None]:
        """Return the picture uint8 ``[3, H, W]`` and the mask bool ``[1, H, W]``, or None."""
        return self._renderer.draw()

    def upload(self) -> None:
        """Let the next picture show a simulation that was changed from outside."""
        self._renderer.upload_height_fields()

    def close(self) -> None:
        """Free OpenGL's resources."""
        self._renderer.close()

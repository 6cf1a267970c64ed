"""Control Suite tasks from pixels, rendered once per agent step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from dm_env import TimeStep
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import DMControlEnv

from w2f_torchrl.envs._dm_control import Environment, suite
from w2f_torchrl.envs.renderers._gl import require_gl_backend
from w2f_torchrl.envs.renderers.drawing import (
    DEFAULT_RULE,
    ForegroundRule,
    RenderMode,
    find_camera,
    validate_further_cameras,
)
from w2f_torchrl.envs.renderers.foreground import Foreground
from w2f_torchrl.envs.renderers.further_cameras import FurtherCameras
from w2f_torchrl.envs.renderers.make import Distractions, make_distractor, make_renderer
from w2f_torchrl.envs.renderers.rendering import Drawing
from w2f_torchrl.envs.scenery.distractions import Distraction
from w2f_torchrl.envs.simulation import names_of
from w2f_torchrl.envs.simulation_state import SimulationState
from w2f_torchrl.envs.tasks import default_camera, validate_pixel_settings, validate_task
from w2f_torchrl.keys import MASK

# MuJoCo writes +-1e10 for an actuator without limits.
_UNLIMITED = 1e9


class PixelDMControlEnv(DMControlEnv):
    """A Control Suite task from pixels, with the simulator's foreground mask.

    One image is rendered per agent step, after the action repeat. The tensordict holds:

    - ``pixels``: uint8 [3, H, W] in [0, 255];
    - ``foreground_mask``: bool [1, H, W], True on the agent, on objects and on targets (the rule is
      :class:`~w2f_torchrl.envs.renderers.foreground.Foreground`). With ``render="fast"`` it is
      exact: all pixels that show foreground and no others. With ``render="reference"`` it is the
      silhouette without multisampling; outline pixels of the image blend both sides;
    - ``action``: float32 [A] in [-1, 1]. Values outside are clipped. For actuators with other
      limits [-1, 1] is scaled to their range; those without limits get the clipped value;
    - ``reward``: float32 [1], the sum over the control steps of the repeat;
    - ``terminated``, ``truncated``, ``done``: bool [1]. A time limit truncates; an end declared by
      the task, with a discount below 1, terminates. An episode that ends within an action repeat
      cuts it short.

    ``env.physics`` is the simulation, and ``env.physics.render`` renders it at any size, without
    distractions. Distractions change only images: states and rewards are those of the task.
    ``env.distractor`` steps them, and is None without distractions; its ``state_dict`` and
    ``load_state_dict`` let them continue.

    Args:
        env_name: Domain, such as ``"walker"``.
        task_name: Task, such as ``"walk"``.
        image_size: Height H and width W in pixels, at least 16.
        camera_id: Index or name of the model's camera; None for the one that follows the agent: 0,
            or 2 for quadruped and for the fetch task of dog.
        action_repeat: Control steps per agent step, at least 1.
        render: ``"fast"`` (no multisampling, shadows or reflections) or ``"reference"``
            (as dm_control renders; with distractions, the same without multisampling).
        distraction: ``"none"``, ``"easy"``, ``"medium"``, ``"hard"``, ``"reactive_action"`` and
            others, or a :class:`~w2f_torchrl.envs.DistractionConfig`; see
            :func:`~w2f_torchrl.envs.scenery.distractions.parse_distraction`.
        background_source: Source of the videos, see
            :func:`~w2f_torchrl.envs.scenery.backgrounds.list_clips`; None for the procedural clips.
        background_split: Which of its clips, or which colours of scenery that reacts: ``"train"``
            or ``"val"``.
        foreground_mask: Whether to render ``foreground_mask``.
        further_cameras: Cameras whose pictures are added as ``pixels_camera_N`` uint8 [3, H, W],
            with their masks ``pixels_camera_N_mask``; not with distractions.
        foreground: Bodies to include and to exclude.
        state_observations: Whether to add the suite's own observations (``position``, ``velocity``,
            ...) as float32 entries; scalars become [1].
        seed: Seed of the task and the distractions; None draws one.
        device: Device of the tensors.

    Raises:
        ValueError: If a setting is not allowed; names it, its value and what is allowed.
        RuntimeError: If no OpenGL backend works, or if the env is stepped after the end of an
            episode without a reset.
    """

    def __init__(
        self,
        env_name: str,
        task_name: str,
        *,
        image_size: int = 64,
        camera_id: int | str | None = None,
        action_repeat: int = 2,
        render: RenderMode = "fast",
        distraction: Distraction = "none",
        background_source: str | None = None,
        background_split: str = "train",
        foreground_mask: bool = True,
        further_cameras: Sequence[int] = (),
        foreground: ForegroundRule = DEFAULT_RULE,
        state_observations: bool = False,
        seed: int | None = None,
        device: torch.device | str | None = "cpu",
    ) -> None:
        validate_task(env_name, task_name)
        validate_pixel_settings(image_size, action_repeat, render)
        distractions = Distractions.parse(distraction, background_source, background_split)
        validate_further_cameras(further_cameras, distractions)
        drawing = Drawing(image_size, 0, render, foreground_mask, foreground, env_name)
        super().__init__(
            env_name,
            task_name,
            drawing=drawing,
            camera_id=default_camera(env_name, task_name) if camera_id is None else camera_id,
            distractions=distractions,
            further_cameras=further_cameras,
            state_observations=state_observations,
            _seed=seed,
            frame_skip=action_repeat,
            device=device,
        )

    @property
    def max_episode_steps(self) -> int | None:
        """Control steps after which the task ends an episode; None without a time limit."""
        limit = self._env._step_limit
        return None if math.isinf(limit) else math.ceil(limit)

    def _check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """Do nothing: the constructor has checked the specs."""

    def _build_env(
        self,
        env_name: str,
        task_name: str,
        *,
        drawing: Drawing,
        camera_id: int | str,
        distractions: Distractions | None,
        further_cameras: Sequence[int],
        state_observations: bool,
        _seed: int | None,
    ) -> Environment:
        self.env_name = env_name
        self.task_name = task_name
        self._state_observations = state_observations
        self._episode_over = True
        env = suite.load(env_name, task_name, task_kwargs={"random": _seed})
        cameras = names_of(env.physics, "camera")
        drawing = replace(drawing, camera=find_camera(env_name, camera_id, cameras))
        further = [find_camera(env_name, camera, cameras) for camera in further_cameras]
        self._renderer, self.distractor = make_renderer(
            env.physics, drawing, distractions, seed=_seed
        )
        self._further = FurtherCameras(env.physics, further, drawing)
        self._distracts_each = None if distractions is None else distractions.config.step_unit
        self._action_map = _ActionMap(env)
        self._simulation = SimulationState(env)
        return env

    def _make_specs(self, env: Environment) -> None:
        device = self.device
        size = self._renderer.image_size
        observation = Composite(
            pixels=Bounded(0, 255, shape=(3, size, size), dtype=torch.uint8, device=device),
            device=device,
        )
        if self._renderer.foreground_mask:
            observation[MASK] = Categorical(
                2, shape=(1, size, size), dtype=torch.bool, device=device
            )
        self._further.add_specs(observation)
        if self._state_observations:
            for name, spec in env.observation_spec().items():
                observation[name] = Unbounded(
                    shape=spec.shape or (1,), dtype=torch.float32, device=device
                )
        self.observation_spec = observation
        self.reward_spec = Unbounded(shape=(1,), dtype=torch.float32, device=device)
        flag = Categorical(2, shape=(1,), dtype=torch.bool, device=device)
        self.done_spec = Composite(
            done=flag.clone(), terminated=flag.clone(), truncated=flag.clone(), device=device
        )
        self.action_spec = Bounded(
            -1.0, 1.0, shape=env.action_spec().shape, dtype=torch.float32, device=device
        )

    def _set_seed(self, seed: int | None) -> None:
        """Seed the task and the distractions; the next reset starts the streams.

        Unlike :class:`~torchrl.envs.DMControlEnv` this resets nothing, so that the first episode
        after a seed is the first of its stream.
        """
        if seed is not None:
            self._env.task._random = np.random.RandomState(seed)
            if self.distractor is not None:
                self.distractor.seed(seed)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: object) -> TensorDictBase:
        time_step = self._env.reset()
        self._episode_over = False
        self._upload_height_fields()
        if self.distractor is not None:
            self.distractor.reset()
        return self._tensordict(self._observe(time_step))

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        if self._episode_over:
            raise RuntimeError(
                f"The episode of {self.env_name} {self.task_name} is over: call reset() before the "
                "next step."
            )
        action = tensordict.get("action")
        control = self._action_map(action)
        reward, steps = 0.0, 0
        for _ in range(self.wrapper_frame_skip):
            time_step = self._env.step(control)
            reward += time_step.reward
            steps += 1
            if self._distracts_each == "control":
                self._distract()
            if time_step.last():
                break
        if self._distracts_each == "agent":
            self._distract()
        if self.distractor is not None:
            self.distractor.react(action.detach().cpu().numpy(), reward / steps)
        self._episode_over = time_step.last()
        terminated = self._episode_over and time_step.discount < 1.0
        output = self._observe(time_step)
        output["reward"] = torch.tensor([reward], dtype=torch.float32)
        output["terminated"] = torch.tensor([terminated])
        output["truncated"] = torch.tensor([self._episode_over and not terminated])
        output["done"] = torch.tensor([self._episode_over])
        return self._tensordict(output)

    def resume_state(self) -> dict[str, Any]:
        """Return all that the next steps depend on: simulation, task, random states, distractions.

        Returns:
            Plain values and tensors, which ``torch.load(weights_only=True)`` can read.
        """
        distractor = None if self.distractor is None else self.distractor.state_dict()
        return {
            "simulation": self._simulation.state_dict(),
            "distractor": distractor,
            "episode_over": self._episode_over,
        }

    def load_resume_state(self, state: dict[str, Any]) -> None:
        """Continue from a state of :meth:`resume_state`, in an env made with the same arguments.

        Raises:
            ValueError: If the state belongs to another task or other distractions.
        """
        if (self.distractor is None) != (state["distractor"] is None):
            raise ValueError("the state and the env must both have distractions, or neither.")
        self._simulation.load_state_dict(state["simulation"])
        if self.distractor is not None:
            self.distractor.load_state_dict(state["distractor"])
        self._episode_over = state["episode_over"]
        self._upload_height_fields()

    def _upload_height_fields(self) -> None:
        self._renderer.upload_height_fields()
        self._further.upload_height_fields()

    def _distract(self) -> None:
        assert self.distractor is not None, "a step unit comes with a distractor"
        self.distractor.step()

    def _observe(self, time_step: TimeStep) -> dict[str, torch.Tensor]:
        pixels, mask = self._renderer.draw()
        observation = {"pixels": torch.from_numpy(pixels)}
        if mask is not None:
            observation[MASK] = torch.from_numpy(mask)
        observation.update(self._further.draw())
        if self._state_observations:
            observation.update(_as_tensors(time_step.observation))
        return observation

    def _tensordict(self, entries: dict[str, torch.Tensor]) -> TensorDictBase:
        cpu = torch.device("cpu")
        tensordict: TensorDictBase = TensorDict._new_unsafe(
            entries, batch_size=self.batch_size, device=cpu
        )
        return tensordict if self.device == cpu else tensordict.to(self.device)

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Free the simulation's and the renderer's resources."""
        if not self.is_closed:
            self._renderer.close()
            self._further.close()
        super().close(raise_if_closed=raise_if_closed)


def validate_simulation(
    domain: str,
    task: str,
    distractions: Distractions | None,
    *,
    camera_id: int | str | None,
    image_size: int,
    render: RenderMode,
    foreground: ForegroundRule,
) -> None:
    """Raise errors that workers would raise seconds later, and decode videos once for all.

    Args:
        domain: Domain of the suite.
        task: One of its tasks.
        distractions: What distracts, None for nothing.
        camera_id: Index or name of a camera, None for the usual one.
        image_size: Height and width of the images, pixels.
        render: How the envs render.
        foreground: What is, or is not, foreground.

    Raises:
        ValueError: If the model lacks the camera or a name, a video cannot be read, or a
            distraction does not suit the model.
        RuntimeError: If no OpenGL backend works.
    """
    require_gl_backend()
    if camera_id is None and distractions is None and foreground == DEFAULT_RULE:
        return
    physics = suite.load(domain, task).physics
    chosen = default_camera(domain, task) if camera_id is None else camera_id
    camera = find_camera(domain, chosen, names_of(physics, "camera"))
    Foreground(physics, foreground)
    if distractions is not None:
        drawing = Drawing(image_size, camera, render, domain=domain)
        make_distractor(physics, drawing, distractions, seed=0)


class _ActionMap:
    """Map an agent's action to the actuators' controls."""

    def __init__(self, env: Environment) -> None:
        spec = env.action_spec()
        low = np.broadcast_to(spec.minimum, spec.shape).astype(np.float64)
        high = np.broadcast_to(spec.maximum, spec.shape).astype(np.float64)
        limited = (low > -_UNLIMITED) & (high < _UNLIMITED)
        low, high = np.where(limited, low, -1.0), np.where(limited, high, 1.0)
        self._center, self._half_range = (high + low) / 2, (high - low) / 2

    def __call__(self, action: torch.Tensor) -> npt.NDArray[np.float64]:
        clipped = np.clip(action.detach().cpu().numpy().astype(np.float64), -1.0, 1.0)
        control: npt.NDArray[np.float64] = self._center + self._half_range * clipped
        return control


def _as_tensors(observation: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the suite's observations as float32 tensors, scalars as [1]."""
    return {
        name: torch.from_numpy(np.atleast_1d(np.asarray(value, dtype=np.float32)).copy())
        for name, value in observation.items()
    }

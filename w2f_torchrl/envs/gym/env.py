"""Gymnasium's environments as TorchRL envs from pixels."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import gymnasium
import torch
from gymnasium.spaces import Box, Discrete
from tensordict import TensorDictBase
from torchrl.envs import GymWrapper

from w2f_torchrl.envs.gym.attributes import NotSavedError
from w2f_torchrl.envs.gym.pictures import OwnPictures, RepeatedPictures
from w2f_torchrl.envs.gym.simulation import SimulationPictures, find_simulation, find_view
from w2f_torchrl.envs.gym.state import GymSimulationState
from w2f_torchrl.envs.renderers.drawing import DEFAULT_RULE, ForegroundRule, RenderMode
from w2f_torchrl.envs.renderers.make import Distractions
from w2f_torchrl.envs.renderers.rendering import Drawing
from w2f_torchrl.envs.scenery.distractions import Distraction
from w2f_torchrl.envs.scenery.distractor import Distractor

logger = logging.getLogger(__name__)


class PixelGymEnv(GymWrapper):
    """An env of Gymnasium from pixels: TorchRL's ``GymWrapper``.

    An env that holds a MuJoCo simulation (:func:`~w2f_torchrl.envs.gym.simulation.find_simulation`)
    is drawn by this package, with the exact mask and with distractions. Others draw themselves, and
    their picture is resized to a square. One picture is drawn per agent step, after the action
    repeat. The tensordict holds:

    - ``pixels``: uint8 [3, H, W] in [0, 255]; none of the env's own observations;
    - ``foreground_mask``: bool [1, H, W], of a simulation, or of an env with a method of that name
      (:class:`~w2f_torchrl.envs.gym.pictures.OwnPictures`);
    - ``action``: the env's space: a box [A], or a number, counted from 0;
    - ``reward``: float32 [1], the sum over the control steps of the repeat;
    - ``terminated``: bool [1], an end that is part of the task; ``truncated``: a time limit.

    ``env.distractor`` steps the distractions, None without. Distractions change only images: states
    and rewards are those of the task.

    Args:
        task: An id of Gymnasium.
        image_size: H and W, pixels.
        action_repeat: Control steps per agent step.
        seed: Seed of the first episode, from which the following ones continue, and of the
            distractions; None draws one.
        device: Device of the tensors.
        foreground_mask: Whether to return the mask, if there is one.
        render: ``"fast"``, or for a simulation ``"reference"``, the model's own quality.
        camera_id: A simulation's camera, by index or name; None for that of the env's own
            pictures. Another env gets it as an argument.
        distraction: As of :class:`~w2f_torchrl.envs.PixelDMControlEnv`, of a simulation.
        background_source: Source of the videos; None for the procedural clips.
        background_split: Which of its clips.
        foreground: Bodies of the simulation that are, or are not, foreground.
        arguments: Further ones of ``gymnasium.make``.
        **kwargs: Of TorchRL's ``GymWrapper``.

    Raises:
        ValueError: If the env cannot be made, does not draw, or has actions that are neither a box
            nor one choice; or if a setting needs a simulation and there is none.
    """

    def __init__(
        self,
        task: str,
        *,
        image_size: int = 64,
        action_repeat: int = 1,
        seed: int | None = None,
        device: torch.device | str | None = "cpu",
        foreground_mask: bool = True,
        render: RenderMode = "fast",
        camera_id: int | str | None = None,
        distraction: Distraction = "none",
        background_source: str | None = None,
        background_split: str = "train",
        foreground: ForegroundRule = DEFAULT_RULE,
        arguments: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        distractions = Distractions.parse(distraction, background_source, background_split)
        drawing = Drawing(image_size, -1, render, foreground_mask, foreground)
        env = _make(task, arguments or {})
        try:
            _check_actions(task, env)
            painter: OwnPictures | SimulationPictures
            if find_simulation(env) is None:
                _check_drawing(task, drawing, distractions)
                if camera_id is not None:
                    env.close()
                    env = _make(task, {**(arguments or {}), "camera_id": camera_id})
                painter = OwnPictures(env, image_size, foreground_mask)
            else:
                _check_views(task, arguments or {}, camera_id)
                drawing = replace(drawing, camera=find_view(task, env, camera_id))
                painter = SimulationPictures(env, drawing, distractions, seed=seed)
        except ValueError:
            env.close()
            raise
        pictures = RepeatedPictures(env, painter, action_repeat)
        super().__init__(pictures, categorical_action_encoding=True, device=device, **kwargs)
        self._painter = painter
        self._first_seed = seed
        self._logged = False
        self._simulation = (
            GymSimulationState(env, painter.simulation)
            if isinstance(painter, SimulationPictures)
            else None
        )

    @property
    def distractor(self) -> Distractor | None:
        """The distractions of a simulation, None without."""
        painter = self._painter
        return painter.distractor if isinstance(painter, SimulationPictures) else None

    @property
    def max_episode_steps(self) -> int | None:
        """Control steps after which episodes are truncated; None without a limit."""
        spec = self._env.spec
        return None if spec is None else spec.max_episode_steps

    def _set_seed(self, seed: int | None) -> None:
        """Seed the next reset, which starts the stream, and the distractions.

        TorchRL's method resets at once, so that the first episode after a seed would be the second
        one of its stream.
        """
        self._first_seed = seed
        if seed is not None and self.distractor is not None:
            self.distractor.seed(seed)

    def resume_state(self) -> dict[str, Any] | None:
        """Return all that the next steps depend on: simulation, env, wrappers, distractions.

        Returns:
            Plain values and tensors, which ``torch.load(weights_only=True)`` can read. None if the
            env holds no simulation, or something else that cannot be saved, which is logged.
        """
        if self._simulation is None:
            return None
        try:
            simulation = self._simulation.state_dict()
        except NotSavedError as error:
            if not self._logged:
                logger.info("a resumed run begins new episodes, since %s", error)
            self._logged = True
            return None
        distractor = self.distractor
        return {
            "simulation": simulation,
            "distractor": None if distractor is None else distractor.state_dict(),
            "first_seed": self._first_seed,
        }

    def load_resume_state(self, state: dict[str, Any]) -> None:
        """Continue from a state of :meth:`resume_state`, in an env made with the same arguments.

        Raises:
            ValueError: If the state belongs to another env or other distractions.
        """
        distractor, painter = self.distractor, self._painter
        if self._simulation is None or (distractor is None) != (state["distractor"] is None):
            raise ValueError("the state belongs to another env, or to other distractions.")
        self._simulation.load_state_dict(state["simulation"])
        if distractor is not None:
            distractor.load_state_dict(state["distractor"])
        self._first_seed = state["first_seed"]
        assert isinstance(painter, SimulationPictures), "it has a simulation"
        painter.upload()

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        if self._first_seed is not None:
            kwargs["seed"], self._first_seed = self._first_seed, None
        return super()._reset(tensordict, **kwargs)


def _make(task: str, kwargs: Mapping[str, Any]) -> gymnasium.Env[Any, Any]:
    try:
        return gymnasium.make(task, render_mode="rgb_array", **kwargs)
    except gymnasium.error.DependencyNotInstalled as error:
        raise ValueError(
            f"environment.task={task!r} needs a package that is not installed: {error} "
            "(pip install 'w2f_torchrl[gym]' has those of classic control, Box2D and MuJoCo)."
        ) from error
    except (gymnasium.error.Error, TypeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"environment.task={task!r} with environment.kwargs={dict(kwargs)}: {error}"
        ) from error


def _check_actions(task: str, env: gymnasium.Env[Any, Any]) -> None:
    space = env.action_space
    if not isinstance(space, Box | Discrete):
        raise ValueError(
            f"environment.task={task!r}: the actions are {space}; allowed: Box, or Discrete."
        )


def _check_drawing(task: str, drawing: Drawing, distractions: Distractions | None) -> None:
    """Refuse what only a simulation can be drawn with."""
    rule = drawing.rule
    settings = {
        "render": None if drawing.render == "fast" else drawing.render,
        "distraction": None if distractions is None else distractions.config,
        "foreground_include": list(rule.include) or None,
        "foreground_exclude": list(rule.exclude) or None,
    }
    for name, value in settings.items():
        if value is not None:
            raise ValueError(
                f"environment.{name}={value!r} has no effect on environment.task={task!r}, which "
                "draws itself: only envs that hold a MuJoCo simulation (model and data) and have "
                "no method foreground_mask() take it; leave it out."
            )


_OTHER_VIEWS = ("width", "height", "max_geom", "visual_options")


def _check_views(task: str, arguments: Mapping[str, Any], camera_id: int | str | None) -> None:
    """Refuse arguments of the env's own renderer, which is not used."""
    for name in (*_OTHER_VIEWS, *(["camera_name"] if camera_id is not None else [])):
        if name in arguments:
            raise ValueError(
                f"environment.kwargs.{name} has no effect on environment.task={task!r}, whose "
                "simulation is drawn by environment.image_size, render, camera_id and "
                "camera_name; leave it out."
            )

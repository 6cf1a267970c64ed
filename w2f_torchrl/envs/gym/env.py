"""Gymnasium's environments as TorchRL envs from pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
import torch
from gymnasium.spaces import Box, Discrete
from tensordict import TensorDictBase
from torchrl.envs import GymWrapper

from w2f_torchrl.envs.gym.pictures import RepeatedPictures


class PixelGymEnv(GymWrapper):
    """An env of Gymnasium, seen through its own pictures: TorchRL's ``GymWrapper``.

    One picture is drawn per agent step, after the action repeat, and resized to a square. The
    tensordict holds:

    - ``pixels``: uint8 [3, H, W] in [0, 255]; none of the env's own observations;
    - ``foreground_mask``: bool [1, H, W], only of an env with a method of that name
      (:class:`~w2f_torchrl.envs.gym.pictures.RepeatedPictures`);
    - ``action``: the env's space: a box [A], or a number, counted from 0;
    - ``reward``: float32 [1], the sum over the control steps of the repeat;
    - ``terminated``: bool [1], an end that is part of the task; ``truncated``: a time limit.

    The state of a Gymnasium env cannot be saved, so a resumed run begins new episodes.

    Args:
        task: An id of Gymnasium.
        image_size: H and W, pixels.
        action_repeat: Control steps per agent step.
        seed: Seed of the first episode, from which the following ones continue; None draws one.
        device: Device of the tensors.
        foreground_mask: Whether to return the mask, if the env has one.
        render: ``"fast"``; an env draws as it draws.
        camera_id: Camera of an env that takes one (MuJoCo's); None for its own.
        arguments: Further ones of ``gymnasium.make``.
        **kwargs: Of TorchRL's ``GymWrapper``.

    Raises:
        ValueError: If the env cannot be made, does not draw, or has actions that are neither a box
            nor one choice.
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
        render: str = "fast",
        camera_id: int | None = None,
        arguments: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if render != "fast":
            raise ValueError(
                f"environment.render={render!r} has no effect on an env of Gymnasium: leave it out."
            )
        camera = {} if camera_id is None else {"camera_id": camera_id}
        env = _make(task, {**(arguments or {}), **camera})
        _check_actions(task, env)
        pictures = RepeatedPictures(env, image_size, action_repeat, foreground_mask)
        super().__init__(pictures, categorical_action_encoding=True, device=device, **kwargs)
        self._first_seed = seed

    @property
    def max_episode_steps(self) -> int | None:
        """Control steps after which episodes are truncated; None without a limit."""
        spec = self._env.spec
        return None if spec is None else spec.max_episode_steps

    def _set_seed(self, seed: int | None) -> None:
        """Seed the next reset, which starts the stream.

        TorchRL's method resets at once, so that the first episode after a seed would be the second
        one of its stream.
        """
        self._first_seed = seed

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
            "(pip install 'w2f_torchrl[gym]' has those of classic control and Box2D)."
        ) from error
    except (gymnasium.error.Error, TypeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"environment.task={task!r} with environment.kwargs={dict(kwargs)}: {error}"
        ) from error


def _check_actions(task: str, env: gymnasium.Env[Any, Any]) -> None:
    space = env.action_space
    if not isinstance(space, Box | Discrete):
        env.close()
        raise ValueError(
            f"environment.task={task!r}: the actions are {space}; allowed: Box, or Discrete."
        )

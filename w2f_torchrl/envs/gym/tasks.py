"""Gymnasium's ids, checked without building an env; imports neither torch nor a simulator."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torchrl.envs import EnvBase

DOMAIN = "gym"
"""Value of ``environment.domain``."""
SDL = {"PYGAME_HIDE_SUPPORT_PROMPT": "1", "SDL_VIDEODRIVER": "dummy", "SDL_AUDIODRIVER": "dummy"}
"""Variables that pygame, which draws many envs, reads at its import: it greets on stdout, and looks
for a screen and loudspeakers, which pictures in memory do not need."""
EXTRA = "pip install 'w2f_torchrl[gym]'"


def validate_gym_task(task: str) -> None:
    """Check that Gymnasium knows an id, without building its env.

    Args:
        task: An id such as ``"CartPole-v1"``. ``"MODULE:ID"`` imports a module that registers it.

    Raises:
        ValueError: If Gymnasium is not installed or does not know the id.
    """
    if importlib.util.find_spec("gymnasium") is None:
        raise ValueError(f"environment.domain={DOMAIN} needs gymnasium: {EXTRA}")
    for name, value in SDL.items():
        os.environ.setdefault(name, value)
    import gymnasium

    module, _, name = task.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        gymnasium.spec(name)
    except (gymnasium.error.Error, ImportError) as error:
        raise ValueError(
            f"environment.task={task!r} is no id of Gymnasium: {error} An env of another package "
            "is MODULE:ID, where importing MODULE registers it."
        ) from error


def validate_gym_settings(kwargs: Mapping[str, Any]) -> None:
    """Check the arguments that a run passes to ``gymnasium.make``.

    Args:
        kwargs: ``environment.kwargs``.

    Raises:
        ValueError: If one is the run's own affair.
    """
    for name in ("id", "render_mode", "changes"):
        if name in kwargs:
            raise ValueError(
                f"environment.kwargs={dict(kwargs)}: {name} is set by the run; leave it out."
            )


def make_gym(
    task: str,
    *,
    image_size: int,
    action_repeat: int,
    render: Literal["fast", "reference"],
    camera_id: int | str | None,
    foreground_mask: bool,
    seed: int | None,
    device: torch.device | str,
    changes: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> EnvBase:
    """Make one env, as :func:`~w2f_torchrl.envs.register_env` describes.

    Args:
        task: An id of Gymnasium.
        image_size: As all of the following, see :class:`~w2f_torchrl.envs.gym.env.PixelGymEnv`.
        action_repeat: Control steps per agent step.
        render: ``"fast"`` or ``"reference"``.
        camera_id: Camera of a simulation, or of an env that takes one.
        foreground_mask: Whether to return the mask, if there is one.
        seed: Seed of the first episode.
        device: Device of the tensors.
        changes: ``distraction``, ``background_source``, ``background_split`` and ``foreground``.
        **arguments: Further ones of ``gymnasium.make``.
    """
    validate_gym_task(task)
    from w2f_torchrl.envs.gym.env import PixelGymEnv

    return PixelGymEnv(
        task,
        image_size=image_size,
        action_repeat=action_repeat,
        render=render,
        camera_id=camera_id,
        foreground_mask=foreground_mask,
        seed=seed,
        device=device,
        arguments=arguments,
        **(changes or {}),
    )

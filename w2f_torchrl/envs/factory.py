"""Make an env, or a batch of envs in processes, from the names of its domain and task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torchrl.envs import (
    Compose,
    EnvBase,
    InitTracker,
    ParallelEnv,
    RewardSum,
    StepCounter,
    Transform,
    TransformedEnv,
)

from w2f_torchrl.envs.actions import action_transform
from w2f_torchrl.envs.dm_control import PixelDMControlEnv, validate_simulation
from w2f_torchrl.envs.renderers.drawing import (
    DEFAULT_RULE,
    ForegroundRule,
    RenderMode,
)
from w2f_torchrl.envs.renderers.make import Distractions
from w2f_torchrl.envs.scenery.distractions import Distraction
from w2f_torchrl.envs.tasks import (
    registered_factory,
    takes_distractions,
    validate_action_range,
    validate_integer,
    validate_kwargs,
    validate_pixel_settings,
    validate_task,
)
from w2f_torchrl.utils.main_guard import require_main_guard
from w2f_torchrl.utils.seeding import derive_seed


def _validate_task(
    domain: str, task: str, kwargs: Mapping[str, Any], action_range: Sequence[float] | None
) -> None:
    validate_task(domain, task)
    validate_kwargs(domain, kwargs)
    if action_range is None:
        return
    if registered_factory(domain) is None:
        raise ValueError(
            f"environment.action_range={list(action_range)} must be null for {domain!r}: the "
            "Control Suite's actions lie in [-1, 1]."
        )
    validate_action_range(action_range)


def make_env(
    domain: str,
    task: str,
    *,
    image_size: int = 64,
    action_repeat: int = 2,
    distraction: Distraction = "none",
    num_envs: int = 1,
    seed: int = 0,
    render: RenderMode = "fast",
    background_source: str | None = None,
    background_split: str = "train",
    device: torch.device | str = "cpu",
    camera_id: int | str | None = None,
    foreground_mask: bool = True,
    further_cameras: Sequence[int] = (),
    state_observations: bool = False,
    foreground: ForegroundRule = DEFAULT_RULE,
    action_range: Sequence[float] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> TransformedEnv:
    """Make one env, or a batch of envs that run in separate processes.

    Env ``i`` is seeded with ``derive_seed(seed, "env", i)``: the envs of a batch differ, and the
    same seed gives the same batch, bit for bit.

    Args:
        domain: A Control Suite domain; ``"gym"``; or one of
            :func:`~w2f_torchrl.envs.register_env`.
        task: Task of the domain; of ``"gym"`` an id of Gymnasium.
        image_size: Height H and width W in pixels, at least 16.
        action_repeat: Control steps per agent step, at least 1.
        distraction: ``"none"``; ``"easy"``, ``"medium"`` or ``"hard"``, as the Distracting Control
            Suite defines them; ``"reactive_action"``, ``"reactive_reward"``, ``"reactive_time"`` or
            ``"reactive_action_time"``, a grid of colours that depends on these; or a
            :class:`~w2f_torchrl.envs.DistractionConfig`.
        num_envs: B, the number of envs. 1 makes an env without a batch dimension.
        seed: Non-negative seed of the batch.
        render: ``"fast"`` or ``"reference"``, see :class:`PixelDMControlEnv`.
        background_source: Source of the distraction's videos: a folder, ``"davis"``,
            ``"procedural"`` or ``"procedural:SEED"`` (see
            :func:`~w2f_torchrl.envs.scenery.backgrounds.list_clips`); None for procedural.
        background_split: Which of its clips, or which colours of scenery that reacts: ``"train"``
            or ``"val"``.
        device: Device of the tensors.
        camera_id: Index or name of the model's camera, None for the usual one of the domain, or of
            the env.
        foreground_mask: Whether to render ``foreground_mask``.
        further_cameras: Further cameras of a Control Suite task, see :class:`PixelDMControlEnv`.
        state_observations: Whether to add the Control Suite's own observations.
        foreground: Bodies that are, or are not, foreground against the default rule
            (:class:`~w2f_torchrl.envs.ForegroundRule`); of the Control Suite and of Gymnasium's
            envs that hold a MuJoCo simulation.
        action_range: Lowest and highest action of a registered env whose spec has no limits; None
            if it has.
        kwargs: Further arguments of ``gymnasium.make`` or of a registered factory.

    Returns:
        An env with ``pixels`` uint8 [*B, 3, H, W], ``foreground_mask`` bool [*B, 1, H, W],
        ``action`` float32 [*B, A] in [-1, 1] (clipped, then scaled to the env's box) or, if the
        env's actions are discrete, one-hot, ``is_init`` bool [*B, 1], ``reward`` and
        ``episode_reward`` float32 [*B, 1], ``step_count`` int64 [*B, 1] in agent steps, and
        TorchRL's ``done``, ``terminated`` and ``truncated``.

    Raises:
        ValueError: If a setting is not allowed; names it, its value and what is allowed.
        RuntimeError: If no OpenGL backend works; the message says how to install one. Also if a
            script makes a batch outside ``if __name__ == "__main__":``, since its processes import
            the script again.
    """
    validate_pixel_settings(image_size, action_repeat, render)
    validate_integer("num_envs", num_envs, 1)
    if num_envs > 1:
        require_main_guard(f"make_env(num_envs={num_envs})")
    validate_integer("seed", seed, 0)
    distractions = Distractions.parse(distraction, background_source, background_split)
    _validate_task(domain, task, kwargs or {}, action_range)
    pixels: dict[str, Any] = {"image_size": image_size, "camera_id": camera_id, "render": render}
    further: dict[str, Any] = {"state_observations": state_observations}
    further["further_cameras"] = further_cameras
    changes = _changes(domain, distractions, foreground)
    if (registered := registered_factory(domain)) is None:
        validate_simulation(domain, task, distractions, foreground=foreground, **pixels)
    else:
        _validate_registered(domain, further)
        changes = {"changes": changes} if changes else {}
    make_one = partial(
        registered or partial(PixelDMControlEnv, domain, **further),
        task,
        action_repeat=action_repeat,
        foreground_mask=foreground_mask,
        **pixels,
        **changes,
        **(kwargs or {}),
    )
    env = _one_or_batch(make_one, num_envs, seed, device)
    # The suite's env clips and scales actions by itself.
    scaling = [_action_transform_or_close(env, domain, action_range)] if registered else []
    return TransformedEnv(env, Compose(*scaling, InitTracker(), RewardSum(), StepCounter()))


def _validate_registered(domain: str, further: dict[str, Any]) -> None:
    if any(further.values()):
        raise ValueError(
            f"{further} must be empty and false for the domain {domain!r}: its spec says what it "
            "observes."
        )


def _changes(
    domain: str, distractions: Distractions | None, foreground: ForegroundRule
) -> dict[str, Any]:
    """Return the arguments of an env that change its pictures and masks, if there are any."""
    found: dict[str, Any] = {}
    if foreground != DEFAULT_RULE:
        found["foreground"] = foreground
    if distractions is not None:
        found["distraction"] = distractions.config
        found["background_source"] = distractions.source
        found["background_split"] = distractions.split
    if found and not takes_distractions(domain):
        name, value = next(iter(found.items()))
        allowed = {"foreground": "the default rule", "distraction": "'none'"}[name]
        raise ValueError(
            f"{name} is {value!r}: must be {allowed} for the domain {domain!r}, whose factory "
            "renders its own images."
        )
    return found


def _action_transform_or_close(
    env: EnvBase, domain: str, action_range: Sequence[float] | None
) -> Transform:
    try:
        return action_transform(env, domain, action_range)
    except ValueError:
        env.close()
        raise


def _one_or_batch(
    make_one: Callable[..., EnvBase], num_envs: int, seed: int, device: torch.device | str
) -> EnvBase:
    seeds = [{"seed": derive_seed(seed, "env", index)} for index in range(num_envs)]
    if num_envs == 1:
        return make_one(**seeds[0], device=device)
    # A fork would inherit OpenGL's state. Daemons end with this process, even if an exception ends
    # it before close() is called.
    return ParallelEnv(
        num_envs,
        make_one,
        create_env_kwargs=seeds,
        device=device,
        mp_start_method="spawn",
        daemon=True,
    )

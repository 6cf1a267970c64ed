"""Tasks by name, the Control Suite's and registered ones, and checks made before any work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from w2f_torchrl.envs.gym.tasks import (
    DOMAIN,
    make_gym,
    validate_gym_settings,
    validate_gym_task,
)
from w2f_torchrl.envs.recorded import DOMAIN as RECORDED
from w2f_torchrl.envs.recorded import make_recorded
from w2f_torchrl.envs.renderers.drawing import RENDER_MODES as RENDER_MODES
from w2f_torchrl.envs.renderers.drawing import RenderMode as RenderMode
from w2f_torchrl.envs.renderers.drawing import validate_distraction as validate_distraction
from w2f_torchrl.envs.suite_tasks import TASKS_BY_DOMAIN
from w2f_torchrl.utils.checks import check_number

if TYPE_CHECKING:
    from torchrl.envs import EnvBase

MIN_IMAGE_SIZE = 16
MAX_IMAGE_SIZE = 1024


EnvFactory = Callable[..., "EnvBase"]

OWN_ARGUMENTS = (
    *("task", "image_size", "action_repeat", "render", "camera_id", "foreground_mask", "seed"),
    "device",
)
"""Arguments of a factory that come from the settings of a run."""

_REGISTRY: dict[str, EnvFactory] = {}
_BUILTIN: dict[str, EnvFactory] = {DOMAIN: make_gym, RECORDED: make_recorded}


def register_env(domain: str, factory: EnvFactory) -> None:
    """Register your own domain for :func:`~w2f_torchrl.envs.make_env`.

    The factory is called once per env, as ``factory(task, image_size=..., action_repeat=...,
    render=..., camera_id=..., foreground_mask=..., seed=..., device=...)``. It returns a TorchRL
    env with ``pixels`` uint8 [3, H, W] and, unless ``foreground_mask`` is False,
    ``foreground_mask`` bool [1, H, W]; ``action`` [A], a box with limits, or one choice, OneHot or
    Categorical; ``reward`` float32 [1],
    summed over the action repeat; ``done`` and ``terminated`` bool [1], and ``truncated`` if
    episodes may be truncated. ``make_env`` clips the policy's actions to [-1, 1] and scales them to
    the box, so that the env never receives an action outside its spec. The factory raises
    ValueError for a task or a setting that it does not support. Batches call it in worker
    processes, so it must be importable from a module.

    If the env has ``resume_state()``, which returns plain values and tensors (None if it cannot),
    and ``load_resume_state(state)``, a resumed run continues within its episodes; otherwise it
    starts new ones.

    ``environment.kwargs`` are further arguments of the factory, by name.

    Args:
        domain: The name that users pass to :func:`~w2f_torchrl.envs.make_env`.
        factory: Builds one env.

    Raises:
        ValueError: If the name is empty, or taken by the package or an earlier call.
        TypeError: If the factory is not callable.
    """
    if not isinstance(domain, str) or not domain.strip():
        raise ValueError(f"domain is {domain!r}: must be a name.")
    if not callable(factory):
        raise TypeError(f"factory is {factory!r}: must be callable, see register_env.")
    if domain in {*_REGISTRY, *_BUILTIN, *TASKS_BY_DOMAIN}:
        raise ValueError(f"domain {domain!r} is taken: register the env under another name.")
    _REGISTRY[domain] = factory


def registered_factory(domain: str) -> EnvFactory | None:
    """Return the factory of a domain outside the Control Suite, None for the suite's domains."""
    return _REGISTRY.get(domain) or _BUILTIN.get(domain)


def takes_distractions(domain: str) -> bool:
    """Return whether envs of a domain may be distracted: all but those of registered factories.

    Of Gymnasium's, only those that hold a MuJoCo simulation can, which is seen when one is made.
    """
    return registered_factory(domain) is None or domain == DOMAIN


def validate_task(domain: str, task: str) -> None:
    """Check that a task exists, without loading a model.

    Args:
        domain: A domain of the Control Suite, such as ``"walker"``; ``"gym"``; or a registered one.
        task: One of its tasks, such as ``"walk"``; of ``"gym"`` an id of Gymnasium. A registered
            factory checks it itself.

    Raises:
        ValueError: If the domain or task does not exist; the message lists those that do.
    """
    if domain in _REGISTRY or domain == RECORDED:
        return
    if domain == DOMAIN:
        validate_gym_task(task)
        return
    if domain not in TASKS_BY_DOMAIN:
        domains = sorted([*TASKS_BY_DOMAIN, *_BUILTIN, *_REGISTRY])
        raise ValueError(
            f"domain is {domain!r}: must be one of {', '.join(domains)}. To use a domain that a "
            "file registers with register_env, pass plugins=[FILE.py]; from Python, import the "
            "file first."
        )
    tasks = TASKS_BY_DOMAIN[domain]
    if task not in tasks:
        raise ValueError(f"task is {task!r}: {domain} has {', '.join(tasks)}.")


def validate_kwargs(domain: str, kwargs: Mapping[str, Any]) -> None:
    """Check the further arguments of an env, as far as they can be without building it.

    Args:
        domain: As for :func:`validate_task`.
        kwargs: ``environment.kwargs``.

    Raises:
        ValueError: If the domain takes none, or if one is set by the run.
    """
    if kwargs and registered_factory(domain) is None:
        raise ValueError(
            f"environment.kwargs={dict(kwargs)} must be empty for {domain!r}: the Control Suite's "
            "tasks take none."
        )
    for name in OWN_ARGUMENTS:
        if name in kwargs:
            raise ValueError(
                f"environment.kwargs={dict(kwargs)}: {name} comes from the run's own settings; "
                "leave it out."
            )
    if domain == DOMAIN:
        validate_gym_settings(kwargs)


def validate_integer(name: str, value: object, minimum: int) -> None:
    """Check an integer setting.

    Args:
        name: Name of the setting, for the message.
        value: What the user gave. A bool does not count as an integer.
        minimum: Smallest allowed value.

    Raises:
        ValueError: If the value has another type, or is too small.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} is {value!r}: must be an integer of at least {minimum}.")


def validate_pixel_settings(image_size: int, action_repeat: int, render: str) -> None:
    """Check the settings that an env is rendered and stepped with.

    Args:
        image_size: Height and width in pixels, from 16 to 1024.
        action_repeat: Control steps per agent step, at least 1.
        render: ``"fast"`` or ``"reference"``.

    Raises:
        ValueError: If a setting is not allowed; names it, its value and what is allowed.
    """
    validate_integer("image_size", image_size, MIN_IMAGE_SIZE)
    if image_size > MAX_IMAGE_SIZE:
        raise ValueError(f"image_size is {image_size}: must be at most {MAX_IMAGE_SIZE}.")
    validate_integer("action_repeat", action_repeat, 1)
    if render not in RENDER_MODES:
        raise ValueError(f"render is {render!r}: must be one of {', '.join(RENDER_MODES)}.")


def validate_action_range(
    action_range: Sequence[float], name: str = "environment.action_range"
) -> None:
    """Check the declared range of actions.

    Args:
        action_range: Lowest and highest value.
        name: The setting, for the message.

    Raises:
        ValueError: If it is not two finite numbers, the lower one first.
    """
    for number in action_range:
        check_number(name, number)
    if len(action_range) != 2 or not action_range[0] < action_range[1]:
        raise ValueError(f"{name}={list(action_range)} must be [lowest, highest], or null.")


def default_camera(domain: str, task: str) -> int:
    """Return the camera that agents learn from: 0, or 2 if camera 0 does not follow the agent.

    The quadruped's camera 0 is fixed to its arena, and that of dog's fetch task follows only the
    ball.
    """
    return 2 if domain == "quadruped" or (domain, task) == ("dog", "fetch") else 0

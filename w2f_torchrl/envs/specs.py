"""Check that an env provides what a run needs, before anything is built on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import Composite, TensorSpec
from torchrl.envs import EnvBase

from w2f_torchrl.keys import MASK, mask_of

FLAGS = ("done", "terminated")

_KNOWN = ("pixels", MASK, "is_init", "episode_reward", "step_count")
"""Observations that every run handles, or that its transforms add."""
_TAKEN = (
    *("action", "reward", "done", "terminated", "truncated", "loc", "scale", "logits"),
    *("state", "belief", "previous_action", "background_state", "background_belief"),
    *("encoded_latents",),
    *("stream", "index", "previous", "initial", "latents"),
)
_KEPT = (
    *(torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.float32, torch.float64),
)
"""Dtypes that records can hold."""


def extra_observations(env: EnvBase) -> list[str]:
    """Return the entries of an env's observations other than images, masks and what runs add.

    Args:
        env: A single env.

    Raises:
        ValueError: If an entry has a name that the networks or the replay use, or is not a tensor
            of numbers or flags with a fixed shape.
    """
    names = [str(name) for name in env.observation_spec.keys() if name not in _KNOWN]
    for name in names:
        spec = env.observation_spec[name]
        if name in _TAKEN:
            raise ValueError(
                f"observation {name!r} has the name of an entry of the networks or the replay: "
                f"rename it; taken are {', '.join(_TAKEN)}."
            )
        dtype = getattr(spec, "dtype", None)
        if dtype not in _KEPT or isinstance(spec, Composite) or any(n < 0 for n in spec.shape):
            raise ValueError(
                f"observation {name!r} must be a tensor of a fixed shape, of bool, integers or "
                f"floats, got {_name(dtype)} {list(spec.shape)}: leave it out, for example with "
                "TorchRL's ExcludeTransform."
            )
    return names


def check_further(
    env: EnvBase,
    vectors: Mapping[str, int],
    pictures: Sequence[str],
    image_size: int,
    *,
    masks: bool,
) -> None:
    """Compare what a model observes besides ``pixels`` with what an env offers.

    Args:
        env: A single env.
        vectors: Names and sizes of vectors.
        pictures: Names of further pictures.
        image_size: S, required side of the pictures, pixels.
        masks: Whether each picture needs a mask.

    Raises:
        ValueError: Naming the setting, its value and what the env offers.
    """
    spec = env.observation_spec
    offered = {str(name): (list(spec[name].shape), spec[name].dtype) for name in spec.keys()}
    further = {name: found for name, found in offered.items() if name not in _KNOWN}
    listed = ", ".join(f"{name} {_name(d)} {s}" for name, (s, d) in further.items()) or "none"
    for name, size in vectors.items():
        if further.get(name, ([], None))[0] != [size]:
            raise ValueError(
                f"model.vectors={{{name}: {size}}} is not a vector that the env observes; its "
                f"further observations: {listed} (environment.state_observations=true adds the "
                "Control Suite's)."
            )
    picture, mask = ([3, image_size, image_size], torch.uint8), [1, image_size, image_size]
    for name in pictures:
        if further.get(name) != picture:
            raise ValueError(
                f"model.pictures=[{name}] is not a picture uint8 {picture[0]} that the env "
                f"observes; its further observations: {listed} (environment.further_cameras=[1] "
                "adds pixels_camera_1)."
            )
        if masks and further.get(mask_of(name)) != (mask, torch.bool):
            raise ValueError(
                f"model.pictures=[{name}] needs a mask {mask_of(name)} bool {mask} with this "
                f"algorithm; the env's further observations: {listed}."
            )


def check_env(env: EnvBase, domain: str, image_size: int) -> None:
    """Compare an env's specs, and the data it returns, with the requirements of a run.

    Args:
        env: A single env. It is reset and stepped once; torch's random state is preserved.
        domain: Name of the env, for the messages.
        image_size: S, required side of the images, pixels.

    Raises:
        ValueError: Naming the domain, the entry, its value and what is allowed.
    """
    if env.batch_size:
        raise ValueError(
            f"domain {domain!r}: the factory made a batch of envs {list(env.batch_size)}; allowed: "
            "one env, of batch size []."
        )
    _check_specs(env, domain, image_size)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        before = env.reset()
        _check_observation(before, domain, image_size, "reset() gives")
        action = torch.zeros(env.action_spec.shape, device=env.device)
        after = env.step(before.set("action", action))["next"]
    _check_observation(after, domain, image_size, "step() gives")
    _check_entry(domain, "reward", after.get("reward", None), [1], torch.float32, "step() gives")
    for name in FLAGS:
        _check_entry(domain, name, after.get(name, None), [1], torch.bool, "step() gives")
    if not after["reward"].isfinite().all():
        raise ValueError(f"domain {domain!r}: step() returns reward {after['reward'].item()}.")


def _check_specs(env: EnvBase, domain: str, image_size: int) -> None:
    observation = env.observation_spec
    specs = {name: observation.get(name, None) for name in ("pixels", MASK)}
    specs |= {"reward": env.full_reward_spec.get("reward", None)}
    specs |= {name: env.full_done_spec.get(name, None) for name in FLAGS}
    if specs[MASK] is None:  # masks may come from a segmenter
        del specs[MASK]
    wanted = _wanted(image_size)
    for name, spec in specs.items():
        _check_entry(domain, name, spec, *wanted[name], "the spec says")


def _check_observation(data: TensorDictBase, domain: str, image_size: int, source: str) -> None:
    wanted = _wanted(image_size)
    _check_entry(domain, "pixels", data.get("pixels", None), *wanted["pixels"], source)
    if MASK in data.keys():
        _check_entry(domain, MASK, data.get(MASK), *wanted[MASK], source)


def _wanted(image_size: int) -> dict[str, tuple[list[int], torch.dtype]]:
    picture = [3, image_size, image_size], torch.uint8
    mask = [1, image_size, image_size], torch.bool
    return {
        "pixels": picture,
        MASK: mask,
        "reward": ([1], torch.float32),
        **{name: ([1], torch.bool) for name in FLAGS},
    }


def _check_entry(
    domain: str,
    name: str,
    found: TensorSpec | Tensor | None,
    shape: list[int],
    dtype: torch.dtype,
    source: str,
) -> None:
    allowed = f"{_name(dtype)} {shape}"
    if found is None:
        raise ValueError(f"domain {domain!r}: {name} is missing; it must be {allowed}.")
    if list(found.shape) == shape and found.dtype is dtype:
        return
    hint = " (channels first, environment.image_size square)" if name == "pixels" else ""
    raise ValueError(
        f"domain {domain!r}: {name} must be {allowed}{hint}, {source} {_name(found.dtype)} "
        f"{list(found.shape)}."
    )


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")

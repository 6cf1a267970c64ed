"""Bring the entries of a file into the form of the replay, and refuse those that don't fit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from w2f_torchrl.data.recorded.episodes import (
    STATES,
    Array,
    DataError,
    RecordedData,
    RecordedEpisode,
)
from w2f_torchrl.keys import MASK

CHUNK = 256
"""Images resized at a time, to bound memory."""
ROUNDING = 1e-5
"""How far recorded actions may exceed their range."""


def load_episode(data: RecordedData, index: int) -> RecordedEpisode:
    """Read an episode in the form of the replay.

    Args:
        data: The data set.
        index: The episode's place in ``data.spans``.

    Raises:
        DataError: If a file can't be read, or its entries have wrong shapes, dtypes or values.
    """
    span = data.spans[index]
    return in_form_of_replay(span.name, data.read(span), data)


def in_form_of_replay(name: str, arrays: dict[str, Array], data: RecordedData) -> RecordedEpisode:
    """Check an episode's entries and convert them.

    Args:
        name: The episode's name, for messages.
        arrays: From :meth:`~w2f_torchrl.data.recorded.episodes.RecordedData.read`.
        data: The data set, for its settings.

    Raises:
        DataError: Naming the file, the key, what it holds and what is allowed.
    """
    pixels = pixels_of(name, arrays["image"], data.image_size)
    length = len(pixels)
    for key, values in arrays.items():
        if len(values) != length:
            raise DataError(
                f"{name}: {key} has {len(values)} rows, but image has {length}; all entries of an "
                "episode must have as many."
            )
    action = actions_of(name, arrays["action"], data)
    reward = rewards_of(name, arrays["reward"])
    mask = masks_of(name, arrays[MASK], data.image_size) if MASK in arrays else None
    states = {
        key: states_of(name, key, values)
        for key, values in arrays.items()
        if key.startswith(STATES)
    }
    terminated = bool(np.asarray(arrays["is_terminal"])[-1])
    return RecordedEpisode(name, pixels, action, reward, terminated, mask, states)


def check_rows(
    name: str, small: dict[str, Array], starts: Sequence[int], data: RecordedData
) -> None:
    """Check actions and rewards of a file before any image is read.

    Args:
        name: The file, for messages.
        small: ``action`` and ``reward``, as many rows each.
        starts: Rows in which episodes begin, the first 0.
        data: The data set, for its settings.

    Raises:
        DataError: Naming the file, the key, what it holds and what is allowed.
    """
    length = len(small["action"])
    if len(small["reward"]) != length:
        raise DataError(
            f"{name}: reward has {len(small['reward'])} rows, but action has {length}; all entries "
            "must have as many."
        )
    rewards_of(name, small["reward"])
    for start, stop in zip(starts, [*starts[1:], length], strict=True):
        actions_of(name, small["action"][start:stop], data)


def check_image(name: str, key: str, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> None:
    """Check the dtype and shape of the images.

    Raises:
        DataError: If they are not uint8 ``[T, H, W, 3]`` or ``[T, 3, H, W]``.
    """
    fits = len(shape) == 4 and (shape[3] == 3 or shape[1] == 3) and min(shape) > 0
    if dtype != np.uint8 or not fits:
        raise DataError(
            f"{name}: {key} is {dtype} {list(shape)}; allowed: uint8 [T, H, W, 3] or [T, 3, H, W]."
        )


def pixels_of(name: str, image: Array, size: int) -> Tensor:
    """Return images as uint8 ``[T, 3, size, size]``; others are resized by means over areas."""
    check_image(name, "image", image.shape, image.dtype)
    if image.shape[3] == 3:
        image = image.transpose(0, 3, 1, 2)
    pixels = torch.from_numpy(np.ascontiguousarray(image))
    if pixels.shape[2:] == (size, size):
        return pixels
    parts = [_resized(part.float(), size).round().to(torch.uint8) for part in pixels.split(CHUNK)]
    return torch.cat(parts)


def masks_of(name: str, mask: Array, size: int) -> Tensor:
    """Return masks as bool ``[T, 1, size, size]``.

    Raises:
        DataError: If they are not bool, or uint8 that is 0 outside, of ``[T, H, W]`` or with a
            dimension of 1 after T or at the end.
    """
    shown = list(mask.shape)
    if mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    elif mask.ndim == 4 and mask.shape[3] == 1:
        mask = mask[..., 0]
    if mask.ndim != 3 or mask.dtype not in (np.bool_, np.uint8):
        raise DataError(
            f"{name}: {MASK} is {mask.dtype} {shown}; allowed: bool, or uint8 with 0 outside, "
            "[T, H, W], [T, 1, H, W] or [T, H, W, 1]."
        )
    masks = torch.from_numpy(np.ascontiguousarray(mask != 0))[:, None]
    if masks.shape[2:] == (size, size):
        return masks
    return torch.cat([_resized(part.float(), size) > 0.5 for part in masks.split(CHUNK)])


def rewards_of(name: str, reward: Array) -> Tensor:
    """Return rewards as float32 ``[T]``, zero for the first observation.

    Raises:
        DataError: If they are not numbers ``[T]`` or ``[T, 1]``, or not finite.
    """
    values = _numbers(name, "reward", reward)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        raise DataError(f"{name}: reward is {list(reward.shape)}; allowed: [T] or [T, 1].")
    values = values.copy()
    values[0] = 0
    return torch.from_numpy(values)


def states_of(name: str, key: str, values: Array) -> Array:
    """Return true states as float64 ``[T, K]``."""
    numbers = _numbers(name, key, values).astype(np.float64)
    return numbers.reshape(len(numbers), -1)


def actions_of(name: str, action: Array, data: RecordedData) -> Tensor:
    """Return the actions that led to the observations, float32 ``[T, A]``, zero for the first.

    Raises:
        DataError: If they have another size or dtype, or values out of range.
    """
    choices = data.settings.choices
    rows = _continuous(name, action, data) if choices is None else _one_hot(name, action, choices)
    led = np.zeros_like(rows)
    if data.convention == "taken_at":
        led[1:] = rows[:-1]  # the last one has led to nothing that was recorded
    else:
        if data.zero_first and choices is None and np.any(action[0]):
            raise DataError(
                f"{name}: action of the first observation is {np.asarray(action[0]).tolist()}, but "
                "no action led to it. If rows hold the action taken at their observation, set "
                "data.actions=taken_at; if they hold the one that led to it, "
                "data.actions=led_to ignores the first."
            )
        led[1:] = rows[1:]
    return torch.from_numpy(led)


def _continuous(name: str, action: Array, data: RecordedData) -> Array:
    values = _numbers(name, "action", action)
    if values.ndim == 1:
        values = values[:, None]
    if values.ndim != 2 or values.shape[1] != data.action_size:
        raise DataError(
            f"{name}: action is {list(action.shape)}; allowed: [T, {data.action_size}], as in the "
            "other episodes."
        )
    low, high = data.action_limits
    if data.settings.action_range is not None:
        values = (2 * (values - low) / (high - low) - 1).astype(np.float32)
    # A row whose action led to the first observation, or to nothing, holds zeros instead.
    led = values[1:] if data.convention == "led_to" else values[:-1]
    if led.size and float(np.abs(led).max()) > 1 + ROUNDING:
        found = [float(np.min(action)), float(np.max(action))]
        raise DataError(
            f"{name}: action lies in [{found[0]:g}, {found[1]:g}]; allowed: [{low.min():g}, "
            f"{high.max():g}]. "
            "data.action_range=[LOWEST,HIGHEST] scales another range to the policy's [-1, 1]."
        )
    clipped: Array = values.clip(-1, 1)
    return clipped


def _one_hot(name: str, action: Array, choices: int) -> Array:
    if np.issubdtype(action.dtype, np.integer) and action.size == len(action):
        index = action.reshape(-1)
        if index.size and not 0 <= int(index.min()) <= int(index.max()) < choices:
            raise DataError(
                f"{name}: action lies in [{index.min()}, {index.max()}]; allowed: 0 to "
                f"{choices - 1}, as data.choices={choices}."
            )
        return np.eye(choices, dtype=np.float32)[index]
    values = _numbers(name, "action", action)
    single = np.isin(values, (0, 1)).all() and (values.sum(-1) <= 1).all()
    if values.ndim != 2 or values.shape[1] != choices or not single:
        raise DataError(
            f"{name}: action is {action.dtype} {list(action.shape)}; allowed with data.choices="
            f"{choices}: an integer [T], or one-hot [T, {choices}]."
        )
    return values


def _numbers(name: str, key: str, values: Array) -> Array:
    if not (np.issubdtype(values.dtype, np.number) or values.dtype == np.bool_):
        raise DataError(f"{name}: {key} has dtype {values.dtype}; allowed: numbers.")
    if not np.isfinite(values).all():
        raise DataError(f"{name}: {key} holds nan or infinity; allowed: finite numbers.")
    return values.astype(np.float32)


def _resized(pictures: Tensor, size: int) -> Tensor:
    """Resize float ``[T, C, H, W]``: means over areas if they shrink, otherwise linearly."""
    if min(pictures.shape[2:]) >= size:
        return F.interpolate(pictures, (size, size), mode="area")
    return F.interpolate(pictures, (size, size), mode="bilinear", antialias=True)

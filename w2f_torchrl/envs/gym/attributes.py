"""Save and restore what the attributes of a Python object hold, if all of it can be."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import gymnasium
import mujoco
import numpy as np
import torch

_PLAIN = (bool, int, float, str, type(None))
_CONSTANT = (
    *(gymnasium.Space, gymnasium.envs.registration.EnvSpec, type, types.ModuleType),
    *(types.FunctionType, types.MethodType, types.BuiltinFunctionType),
    *(mujoco.MjModel, mujoco.MjData),
)
"""Types of attributes that do not change after an object is made, or are saved elsewhere."""


class NotSavedError(TypeError):
    """An attribute is of a kind that cannot be saved."""


def pack(attributes: Mapping[str, Any], skipped: Iterable[str] = ()) -> dict[str, Any]:
    """Convert an object's attributes to plain values and tensors.

    Args:
        attributes: Its ``vars``.
        skipped: Names that are not saved.

    Returns:
        Values that ``torch.load(weights_only=True)`` reads. The values of spaces, functions,
        classes and MuJoCo's model and data are left out.

    Raises:
        NotSavedError: If an attribute is something else than numbers, text, arrays, random
            generators, or lists, tuples and dictionaries of these; names it.
    """
    packed = {}
    for name, value in attributes.items():
        if name in skipped:
            continue
        try:
            packed[name] = _pack(value)
        except NotSavedError as error:
            raise NotSavedError(f"{name} is a {error}") from None
    return packed


def _pack(value: Any) -> Any:
    if type(value) in _PLAIN:
        return {"plain": value}
    if isinstance(value, _CONSTANT):
        return {"constant": None}
    if isinstance(value, np.random.Generator):
        return {"generator": _plain(value.bit_generator.state)}
    if isinstance(value, bytes):
        return {"bytes": torch.frombuffer(bytearray(value or b"\0"), dtype=torch.uint8)}
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
        return {"array": torch.from_numpy(np.array(value))}
    if isinstance(value, list | tuple | deque):
        return {"items": [_pack(item) for item in value]}
    if isinstance(value, dict) and all(type(key) in _PLAIN for key in value):
        return {"entries": [(key, _pack(item)) for key, item in value.items()]}
    raise NotSavedError(type(value).__name__)


def _plain(state: Any) -> Any:
    """Return a generator's state without numpy's types."""
    if isinstance(state, Mapping):
        return {name: _plain(value) for name, value in state.items()}
    return {"array": torch.from_numpy(state)} if isinstance(state, np.ndarray) else state


def unpack(packed: Mapping[str, Any], attributes: dict[str, Any]) -> None:
    """Restore values from :func:`pack`.

    Arrays of the same shape are written in place: some envs keep views of the simulation's data,
    which must stay views.

    Args:
        packed: From :func:`pack`.
        attributes: ``vars`` of an object that was made with the same arguments.
    """
    for name, value in packed.items():
        attributes[name] = _unpack(value, attributes.get(name))


def _unpack(packed: Mapping[str, Any], present: Any) -> Any:
    ((kind, value),) = packed.items()
    if kind in ("plain", "constant"):
        return value if kind == "plain" else present
    if kind == "bytes":
        return value.numpy().tobytes()
    if kind == "generator":
        found = np.random.Generator(getattr(np.random, value["bit_generator"])())
        found.bit_generator.state = _arrays(value)
        return found
    if kind == "items":
        old = list(present) if isinstance(present, list | tuple | deque) else []
        old += [None] * (len(value) - len(old))
        items = [_unpack(item, was) for item, was in zip(value, old, strict=False)]
        if isinstance(present, tuple) and hasattr(present, "_fields"):
            return type(present)(*items)
        if isinstance(present, deque):
            return deque(items, present.maxlen)
        return tuple(items) if isinstance(present, tuple) else items
    if kind == "entries":
        entries = present if isinstance(present, dict) else {}
        return {key: _unpack(item, entries.get(key)) for key, item in value}
    return _array(value.numpy(), present)


def _array(saved: Any, present: Any) -> Any:
    writeable = isinstance(present, np.ndarray) and present.flags.writeable
    if writeable and present.shape == saved.shape and present.dtype == saved.dtype:
        present[...] = saved
        return present
    array = saved.copy()
    return array if array.ndim else array[()]


def _arrays(state: Any) -> Any:
    if not isinstance(state, Mapping):
        return state
    if set(state) == {"array"}:
        return state["array"].numpy()
    return {name: _arrays(value) for name, value in state.items()}

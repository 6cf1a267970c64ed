"""Save and restore a Gymnasium env that holds a MuJoCo simulation, so that it continues exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import gymnasium
import mujoco
import numpy as np
import numpy.typing as npt
import torch

from w2f_torchrl.envs.gym.attributes import NotSavedError, pack, unpack
from w2f_torchrl.envs.gym.simulation import Pair, find_simulation
from w2f_torchrl.envs.simulation_state import INTEGRATION, model_arrays

Array = npt.NDArray[Any]

_OF_CONTACTS = ("contact", "efc", "iefc", "island", "map_", "solver", "timer", "warning", "bvh_")
"""Beginnings of names of ``MjData``: what depends on the present contacts, and statistics."""
_SKIPPED = ("env", "mujoco_renderer", "spec", "_cached_spec", "render_mode")
"""Attributes that are saved elsewhere, or draw the env's own pictures."""


class GymSimulationState:
    """Save and restore an env: its simulation, its attributes and those of its wrappers.

    The simulation is MuJoCo's integration state, the model's arrays that changed since the env was
    made, and what MuJoCo computed in its last step: an env reads positions of bodies, or forces of
    contacts, before it makes the next one.

    Args:
        env: An env with a simulation, before its first reset.
        simulation: Its model and data.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], simulation: Pair) -> None:
        self._env = env
        self._simulation = simulation
        self._original = {name: a.copy() for name, a in model_arrays(simulation[0]).items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values and tensors.

        Raises:
            NotSavedError: If the env or a wrapper has an attribute that cannot be saved, or has
                replaced its simulation.
        """
        model, data = self._simulation
        if find_simulation(self._env) != self._simulation:
            raise NotSavedError(f"{type(self._env.unwrapped).__name__} replaces its simulation")
        integration = np.empty(mujoco.mj_stateSize(model, INTEGRATION))
        mujoco.mj_getState(model, data, integration, INTEGRATION)
        changed = {
            name: torch.from_numpy(array.copy())
            for name, array in model_arrays(model).items()
            if array.tobytes() != self._original[name].tobytes()
        }
        layers = []
        for layer in _layers(self._env):
            try:
                layers.append(pack(vars(layer), _SKIPPED))
            except NotSavedError as error:
                raise NotSavedError(f"{type(layer).__name__}.{error}") from None
        return {
            "integration": torch.from_numpy(integration),
            "computed": {n: torch.from_numpy(a.copy()) for n, a in _computed(data).items()},
            "model": changed,
            "layers": layers,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state in an env that was made with the same arguments; this resets it first.

        Raises:
            ValueError: If the state belongs to another env.
        """
        model, data = self._simulation
        layers = list(_layers(self._env))
        size = mujoco.mj_stateSize(model, INTEGRATION)
        if len(state["integration"]) != size or len(state["layers"]) != len(layers):
            raise ValueError("the state belongs to another env, with another model or wrappers.")
        self._env.reset()  # some attributes exist only afterwards
        for name, array in model_arrays(model).items():
            saved = state["model"].get(name)
            array[...] = self._original[name] if saved is None else saved.numpy()
        mujoco.mj_setState(model, data, state["integration"].numpy(), INTEGRATION)
        mujoco.mj_forward(model, data)
        mujoco.mj_setState(model, data, state["integration"].numpy(), INTEGRATION)
        for name, array in _computed(data).items():
            saved = state["computed"].get(name)
            if saved is not None and saved.shape == array.shape:
                array[...] = saved.numpy()
        for layer, packed in zip(layers, state["layers"], strict=True):
            unpack(packed, vars(layer))


def _layers(env: gymnasium.Env[Any, Any]) -> Iterator[Any]:
    """Yield the wrappers, outermost first, and the env."""
    while isinstance(env, gymnasium.Wrapper):
        yield env
        env = env.env
    yield env


def _computed(data: mujoco.MjData) -> dict[str, Array]:
    """Return the arrays of a simulation whose sizes depend on the model alone."""
    names = [n for n in dir(data) if not n.startswith(("_", *_OF_CONTACTS))]
    values = ((name, getattr(data, name)) for name in names)
    return {n: v for n, v in values if isinstance(v, np.ndarray) and v.flags.writeable and v.size}

"""Save and restore everything that a dm_control simulation's future depends on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt
import torch
from dm_control.rl.control import Environment

Array = npt.NDArray[Any]

# Parts of a model that are large and that no task changes.
_CONSTANT = ("mesh_", "skin_", "tex_", "bvh_", "oct_", "names", "text_", "paths", "flex_")
INTEGRATION = mujoco.mjtState.mjSTATE_INTEGRATION
_COUNTERS = ("_step_count", "_reset_next_step")


class SimulationState:
    """Save and restore the state of one dm_control environment.

    The state holds MuJoCo's integration state (positions, velocities, activations, controls, mocap
    bodies, warm start), the model's arrays that the task has changed since it was loaded (a
    target's position, a terrain), the task's values and random state, and the episode's counters.

    Args:
        env: The environment, before its first reset.
    """

    def __init__(self, env: Environment) -> None:
        self._env = env
        self._model = {name: array.copy() for name, array in self._model_arrays().items()}

    def _model_arrays(self) -> dict[str, Array]:
        return model_arrays(self._env.physics.model.ptr)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values and tensors."""
        physics, task = self._env.physics, self._env.task
        size = mujoco.mj_stateSize(physics.model.ptr, INTEGRATION)
        integration = np.empty(size)
        mujoco.mj_getState(physics.model.ptr, physics.data.ptr, integration, INTEGRATION)
        return {
            "integration": torch.from_numpy(integration),
            "model": {
                name: torch.from_numpy(array.copy())
                for name, array in self._model_arrays().items()
                if array.tobytes() != self._model[name].tobytes()
            },
            "task": pack(vars(task)),
            "environment": {name: getattr(self._env, name) for name in _COUNTERS},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state, in an environment that was loaded with the same seed.

        Raises:
            ValueError: If the state belongs to another model.
        """
        physics = self._env.physics
        size = mujoco.mj_stateSize(physics.model.ptr, INTEGRATION)
        if len(state["integration"]) != size:
            raise ValueError(
                f"the state has {len(state['integration'])} numbers, but this model's has {size}: "
                "it is of another task."
            )
        for name, array in self._model_arrays().items():
            changed = state["model"].get(name)
            array[...] = self._model[name] if changed is None else changed.numpy()
        integration = state["integration"].numpy()
        mujoco.mj_setState(physics.model.ptr, physics.data.ptr, integration, INTEGRATION)
        # Recompute what follows from positions and velocities, such as contacts and camera poses:
        # dm_control ends each of its steps with this.
        mujoco.mj_step1(physics.model.ptr, physics.data.ptr)
        unpack(state["task"], vars(self._env.task))
        for name in _COUNTERS:
            setattr(self._env, name, state["environment"][name])


def model_arrays(model: mujoco.MjModel) -> dict[str, Array]:
    """Return the arrays of a model that a task may change, by name."""
    names = (n for n in dir(model) if not n.startswith(("__", *_CONSTANT)))
    values = ((name, getattr(model, name)) for name in names)
    return {n: v for n, v in values if isinstance(v, np.ndarray) and v.flags.writeable}


def pack(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Convert an object's numbers, arrays and random states to plain values and tensors.

    Values of other types are skipped: they are assumed to be settings.
    """
    packed: dict[str, Any] = {}
    for name, value in attributes.items():
        if type(value) in (bool, int, float, str, type(None)):
            packed[name] = value
        elif isinstance(value, np.random.RandomState):
            state: Any = value.get_state(legacy=True)
            keys = torch.from_numpy(state[1].astype(np.int64))
            packed[name] = {"random": [state[0], keys, *state[2:]]}
        elif isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biuf":
            packed[name] = {"array": torch.from_numpy(np.array(value))}
    return packed


def unpack(packed: Mapping[str, Any], attributes: dict[str, Any]) -> None:
    """Restore values from :func:`pack`."""
    for name, value in packed.items():
        if not isinstance(value, Mapping):
            attributes[name] = value
        elif "random" in value:
            kind, keys, *rest = value["random"]
            attributes[name].set_state((kind, keys.numpy().astype(np.uint32), *rest))
        else:
            array = value["array"].numpy().copy()
            attributes[name] = array if array.ndim else array[()]

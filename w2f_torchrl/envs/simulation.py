"""A MuJoCo simulation that something else steps, and cameras that no model has."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import mujoco
import numpy as np
import numpy.typing as npt

from w2f_torchrl.envs._dm_control import wrapper

FloatArray = npt.NDArray[np.float64]


class Simulation(Protocol):
    """What the renderers and the distractions read: dm_control's ``Physics`` or a :func:`wrap`."""

    @property
    def model(self) -> Any:
        """A ``dm_control.mujoco.wrapper.MjModel``."""

    @property
    def data(self) -> Any:
        """A ``dm_control.mujoco.wrapper.MjData``."""


class WrappedSimulation(NamedTuple):
    """MuJoCo's model and data in dm_control's wrappers, which copy nothing."""

    model: Any
    data: Any


def wrap(model: mujoco.MjModel, data: mujoco.MjData) -> WrappedSimulation:
    """Wrap a model and its data, whoever steps them.

    Args:
        model: MuJoCo's model.
        data: Its data; read at every picture, never written to for longer than a picture takes.
    """
    return WrappedSimulation(wrapper.MjModel(model), wrapper.MjData(data))


def names_of(simulation: Simulation, kind: str) -> list[str]:
    """Return the names of a model's objects by index, empty for those without.

    Args:
        simulation: The simulation.
        kind: ``"body"``, ``"geom"``, ``"site"``, ``"camera"``, ``"material"`` or ``"texture"``.
    """
    counts = {"body": "nbody", "geom": "ngeom", "site": "nsite", "camera": "ncam"}
    counts |= {"material": "nmat", "texture": "ntex"}
    model = simulation.model
    return [model.id2name(index, kind) or "" for index in range(getattr(model, counts[kind]))]


class FreeCamera:
    """A camera that belongs to no model: it looks at a point of the world, and does not follow.

    Args:
        lookat: The point, metres [3].
        distance: From it, metres.
        azimuth: Of the viewing direction, degrees from the x axis.
        elevation: Of the viewing direction, degrees; negative looks down.
    """

    def __init__(
        self, lookat: Iterable[float], distance: float, azimuth: float, elevation: float
    ) -> None:
        self.lookat: FloatArray = np.array(list(lookat), dtype=np.float64)
        self.distance, self.azimuth, self.elevation = distance, azimuth, elevation
        self.moved: tuple[FloatArray, FloatArray] | None = None
        """Position [3] and orientation [9] in place of the usual ones, while a picture is drawn."""

    @classmethod
    def of_model(
        cls, model: mujoco.MjModel, settings: Mapping[str, Any] | None = None
    ) -> FreeCamera:
        """Make the free camera of Gymnasium's renderer.

        It looks at the median of all geoms' positions in the model's reference pose, from as far
        away as the model is large. Gymnasium takes the positions at its first picture, which differ
        by the noise of a reset.

        Args:
            model: MuJoCo's model.
            settings: ``lookat``, ``distance``, ``azimuth`` or ``elevation`` in place of these.
        """
        data = mujoco.MjData(model)
        mujoco.mj_kinematics(model, data)
        usual = mujoco.MjvCamera()
        found: dict[str, Any] = {
            "lookat": np.median(data.geom_xpos, axis=0) if model.ngeom else np.zeros(3),
            "distance": float(model.stat.extent),
            "azimuth": usual.azimuth,
            "elevation": usual.elevation,
        }
        found |= {name: value for name, value in (settings or {}).items() if name in found}
        return cls(**found)

    @property
    def forward(self) -> FloatArray:
        """The viewing direction, a unit vector [3]."""
        azimuth, elevation = math.radians(self.azimuth), math.radians(self.elevation)
        level = math.cos(elevation)
        return np.array([level * math.cos(azimuth), level * math.sin(azimuth), math.sin(elevation)])

    @property
    def position(self) -> FloatArray:
        """Its position, metres [3]."""
        return self.lookat - self.distance * self.forward


Camera = int | FreeCamera
"""A camera of the model by its index, or a free one."""


def field_of_view(simulation: Simulation, camera: Camera) -> float:
    """Return a camera's vertical field of view, radians."""
    model = simulation.model
    if isinstance(camera, FreeCamera):
        return math.radians(float(model.vis.global_.fovy))
    return math.radians(float(model.cam_fovy[camera]))

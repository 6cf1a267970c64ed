"""The foreground of a Control Suite scene, for the simulator's mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mujoco
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from dm_control.mujoco import Physics

BoolArray = npt.NDArray[np.bool_]

TARGET_PREFIX = "target"


class StaticTargets:
    """Distinguish targets from scenery among the objects that do not move.

    Foreground is everything that moves (geoms and sites on a body that is not welded to the world,
    skins, tendons), and the task's targets: a static geom or site whose name, or whose body's name,
    is ``target*``, or that sits on a mocap body. Everything else (sky, floor, walls, rails, bases)
    is background. MuJoCo itself separates moving from static objects, as ``mjCAT_DYNAMIC`` and
    ``mjCAT_STATIC``, and does not render fully transparent ones; only names are checked here.

    Args:
        physics: The simulation, whose names are read once.
    """

    def __init__(self, physics: Physics) -> None:
        model = physics.model
        bodies = _named_target(physics, "body", model.nbody)
        bodies |= np.asarray(model.body_mocapid) >= 0
        self._is_target = {
            int(mujoco.mjtObj.mjOBJ_GEOM): (
                _named_target(physics, "geom", model.ngeom) | bodies[model.geom_bodyid]
            ),
            int(mujoco.mjtObj.mjOBJ_SITE): (
                _named_target(physics, "site", model.nsite) | bodies[model.site_bodyid]
            ),
        }

    def __call__(self, object_type: int, object_id: int) -> bool:
        """Return whether a rendered object that does not move is a target.

        Args:
            object_type: A value of ``mujoco.mjtObj``.
            object_id: The object's index among those of its type; negative for a decoration.

        Returns:
            True for a target. Decorations, which belong to no object, are not targets.
        """
        is_target = self._is_target.get(object_type)
        return is_target is not None and object_id >= 0 and bool(is_target[object_id])


def _named_target(physics: Physics, kind: str, count: int) -> BoolArray:
    names = [physics.model.id2name(index, kind) or "" for index in range(count)]
    return np.array([name.startswith(TARGET_PREFIX) for name in names], dtype=np.bool_)

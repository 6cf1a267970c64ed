"""The foreground of a scene, for the simulator's mask."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import mujoco
import numpy as np
import numpy.typing as npt

from w2f_torchrl.envs.renderers.drawing import DEFAULT_RULE, ForegroundRule
from w2f_torchrl.envs.simulation import Simulation, names_of

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.intp]

TARGET_PREFIXES = ("target", "goal")
_KINDS = {"body": "bodies", "geom": "geoms", "site": "sites"}
_INCLUDED, _EXCLUDED = 1, -1


class Foreground:
    """Distinguish a scene's foreground from its background, object by object.

    Foreground is everything that moves (geoms and sites on a body that is not welded to the world,
    skins, tendons, flexes), and the task's targets: a static geom or site whose name, or whose
    body's name, is ``target*`` or ``goal*``, or that sits on a mocap body. Everything else (sky,
    floor, walls, rails, bases) is background. A rule overrides this for what it names; a skin, a
    tendon or a flex is background if all bodies that it hangs on are excluded.

    What moves is what MuJoCo itself calls ``mjCAT_DYNAMIC``. It does not render fully transparent
    objects, which are therefore in no mask.

    Args:
        simulation: The simulation, whose names are read once.
        rule: What to include and to exclude.

    Raises:
        ValueError: If a pattern of the rule matches nothing; lists the names.
    """

    def __init__(self, simulation: Simulation, rule: ForegroundRule = DEFAULT_RULE) -> None:
        model = simulation.model
        _check_names(simulation, rule)
        chosen = _of_bodies(simulation, rule)
        mocap = np.asarray(model.body_mocapid) >= 0
        moving = np.asarray(model.body_weldid) != 0
        moving |= mocap[np.asarray(model.body_rootid)]
        shown = moving | mocap | _named_target(simulation, "body")
        shown = np.where(chosen == 0, shown, chosen == _INCLUDED)
        excluded = chosen == _EXCLUDED
        kinds = mujoco.mjtObj
        self._shown: dict[int, BoolArray] = {
            int(kinds.mjOBJ_GEOM): _on_bodies(simulation, "geom", shown, chosen, rule),
            int(kinds.mjOBJ_SITE): _on_bodies(simulation, "site", shown, chosen, rule),
            int(kinds.mjOBJ_TENDON): _hanging(_tendon_bodies(model), excluded),
            int(kinds.mjOBJ_SKIN): _hanging(_skin_bodies(model), excluded),
            int(kinds.mjOBJ_FLEX): _hanging(_flex_bodies(model), excluded),
        }
        moves = {"geom": kinds.mjOBJ_GEOM, "site": kinds.mjOBJ_SITE}
        self.all_that_moves = not (excluded & moving).any() and all(
            self._shown[int(kind)][moving[getattr(model, f"{name}_bodyid")]].all()
            for name, kind in moves.items()
        )
        """Whether nothing that moves is background."""

    def __call__(self, object_type: int, object_id: int) -> bool:
        """Return whether an object of the model is foreground.

        Args:
            object_type: A value of ``mujoco.mjtObj``.
            object_id: The object's index among those of its type; negative for a decoration.

        Returns:
            True for foreground. Decorations, which belong to no object, are background.
        """
        shown = self._shown.get(object_type)
        return shown is not None and object_id >= 0 and bool(shown[object_id])


def _named_target(simulation: Simulation, kind: str) -> BoolArray:
    names = names_of(simulation, kind)
    return np.array([name.startswith(TARGET_PREFIXES) for name in names], dtype=np.bool_)


def _on_bodies(
    simulation: Simulation, kind: str, shown: BoolArray, chosen: IntArray, rule: ForegroundRule
) -> BoolArray:
    """Return which geoms or sites are foreground: by their names, or else by their bodies."""
    bodies = np.asarray(getattr(simulation.model, f"{kind}_bodyid"))
    target = _named_target(simulation, kind) & (chosen[bodies] == 0)
    own = _named(names_of(simulation, kind), rule)
    found: BoolArray = np.where(own == 0, shown[bodies] | target, own == _INCLUDED)
    return found


def _matches(names: Sequence[str], patterns: Sequence[str]) -> BoolArray:
    found = [bool(n) and any(fnmatchcase(n, pattern) for pattern in patterns) for n in names]
    return np.array(found, dtype=np.bool_)


def _named(names: Sequence[str], rule: ForegroundRule) -> IntArray:
    """Return what a rule says of objects by their names: 1 included, -1 excluded, 0 nothing."""
    included, excluded = _matches(names, rule.include), _matches(names, rule.exclude)
    return np.where(excluded, _EXCLUDED, np.where(included, _INCLUDED, 0))


def _of_bodies(simulation: Simulation, rule: ForegroundRule) -> IntArray:
    """Return what a rule says of each body by its name, or else by its nearest named ancestor."""
    chosen = _named(names_of(simulation, "body"), rule)
    parents = np.asarray(simulation.model.body_parentid)
    for body in range(1, len(chosen)):  # parents come before their children
        if chosen[body] == 0:
            chosen[body] = chosen[parents[body]]
    return chosen


def _check_names(simulation: Simulation, rule: ForegroundRule) -> None:
    names = {kind: names_of(simulation, kind) for kind in _KINDS}
    everything = [name for found in names.values() for name in found]
    for setting, patterns in (("include", rule.include), ("exclude", rule.exclude)):
        for pattern in patterns:
            if not _matches(everything, [pattern]).any():
                known = [
                    f"the {plural} {', '.join(filter(None, names[kind]))}"
                    for kind, plural in _KINDS.items()
                    if any(names[kind])
                ]
                raise ValueError(
                    f"environment.foreground_{setting}={list(patterns)}: nothing is named "
                    f"{pattern!r}; this model has {'; '.join(known)}."
                )


def _hanging(bodies: Iterable[Iterable[int]], excluded: BoolArray) -> BoolArray:
    """Return for each object whether one of its bodies is not excluded."""
    lists = [list(found) for found in bodies]
    return np.array([not found or not excluded[found].all() for found in lists], dtype=np.bool_)


def _tendon_bodies(model: mujoco.MjModel) -> Iterable[list[int]]:
    owners = {
        int(mujoco.mjtWrap.mjWRAP_JOINT): model.jnt_bodyid,
        int(mujoco.mjtWrap.mjWRAP_SITE): model.site_bodyid,
        int(mujoco.mjtWrap.mjWRAP_SPHERE): model.geom_bodyid,
        int(mujoco.mjtWrap.mjWRAP_CYLINDER): model.geom_bodyid,
    }
    for start, count in zip(model.tendon_adr, model.tendon_num, strict=True):
        path = range(int(start), int(start) + int(count))
        kinds = ((int(model.wrap_type[at]), int(model.wrap_objid[at])) for at in path)
        yield [int(owners[kind][index]) for kind, index in kinds if kind in owners]


def _skin_bodies(model: mujoco.MjModel) -> Iterable[list[int]]:
    for start, count in zip(model.skin_boneadr, model.skin_bonenum, strict=True):
        yield model.skin_bonebodyid[int(start) : int(start) + int(count)].tolist()


def _flex_bodies(model: mujoco.MjModel) -> Iterable[list[int]]:
    for flex in range(model.nflex):
        found: list[int] = []
        for kind in ("vert", "node"):  # an interpolated flex hangs on nodes
            start = int(getattr(model, f"flex_{kind}adr")[flex])
            count = int(getattr(model, f"flex_{kind}num")[flex])
            found += getattr(model, f"flex_{kind}bodyid")[start : start + count].tolist()
        yield [body for body in found if body >= 0]

"""Where the foreground is, found by moving and by painting it."""

from __future__ import annotations

from w2f_torchrl.envs import PixelDMControlEnv

# isort: split
# MuJoCo after torch's compiler: the other order crashes with Mesa (see test_imports.py).
import mujoco
import numpy as np
import numpy.typing as npt
from dm_control.mujoco import Physics

# Static geoms and sites that a task is about; what moves is found by moving it.
TARGETS: dict[str, list[str]] = {
    "reacher": ["target"],
    "finger": ["target"],
    "fish": ["target"],
    "point_mass": ["target"],
    "swimmer": ["target"],
    "manipulator": ["target_ball"],
    "quadruped": ["target"],
}


def moving_bodies(physics: Physics) -> npt.NDArray[np.bool_]:
    """Bodies whose pose depends on the joints' positions."""
    data = physics.copy(share_model=True).data
    poses = []
    for value in (0.0, 0.3, -0.2):
        data.qpos[:] = value + 0.1 * np.arange(physics.model.nq)
        mujoco.mj_kinematics(physics.model.ptr, data.ptr)
        poses.append(np.concatenate([data.xpos, data.xquat], axis=1))
    moved = np.ptp(np.stack(poses), axis=0).max(axis=1) > 1e-9
    return np.asarray(moved, dtype=np.bool_)


def paint_foreground(physics: Physics, targets: list[str], color: tuple[float, ...]) -> None:
    """Give all that moves, skins, tendons and the named targets one colour."""
    model = physics.model
    moves = moving_bodies(physics)
    for kind, body_ids, rgba, materials in (
        ("geom", model.geom_bodyid, model.geom_rgba, model.geom_matid),
        ("site", model.site_bodyid, model.site_rgba, model.site_matid),
    ):
        for index, body in enumerate(body_ids):
            if moves[body] or model.id2name(index, kind) in targets:
                paint(model, rgba, materials, index, color)
    for index in range(model.ntendon):
        paint(model, model.tendon_rgba, model.tendon_matid, index, color)
    for index in range(model.nskin):
        paint(model, model.skin_rgba, model.skin_matid, index, color)


def paint(model, rgba, materials, index: int, color: tuple[float, ...]) -> None:
    alpha = rgba[index, 3]
    if materials[index] >= 0:
        alpha = min(alpha, model.mat_rgba[materials[index], 3])
    materials[index] = -1
    rgba[index] = (*color, alpha)


def where_the_foreground_shows(env: PixelDMControlEnv, domain: str) -> np.ndarray:
    """Pixels ``[H, W]`` that change with the foreground's colour; the model stays as it was."""
    model, pictures = env.physics.model, []
    painted = (model.geom_rgba, model.geom_matid, model.site_rgba, model.site_matid)
    painted += (model.tendon_rgba, model.tendon_matid, model.skin_rgba, model.skin_matid)
    original = [array.copy() for array in painted]
    # No surface that is lit at all looks the same in both.
    for color in ((0.0, 1.0, 0.0), (1.0, 0.0, 1.0)):
        paint_foreground(env.physics, TARGETS.get(domain, []), color)
        pictures.append(env._renderer.draw()[0])
        for array, saved in zip(painted, original, strict=True):
            array[:] = saved
    return (pictures[0] != pictures[1]).any(axis=0)

"""The simulator's foreground mask against pictures of the same scene in other colours."""

from __future__ import annotations

from w2f_torchrl.envs import PixelDMControlEnv

# isort: split
# MuJoCo after torch's compiler: the other order crashes with Mesa (see test_imports.py).
import mujoco
import numpy as np
import numpy.typing as npt
import pytest
import torch
from dm_control.mujoco import Physics

pytestmark = pytest.mark.render

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
CASES = [
    ("acrobot", "swingup"),
    ("ball_in_cup", "catch"),
    ("cartpole", "swingup"),
    ("cheetah", "run"),
    ("finger", "turn_hard"),
    ("hopper", "hop"),
    ("pendulum", "swingup"),
    ("quadruped", "walk"),
    ("reacher", "easy"),
    ("walker", "walk"),
    ("dog", "walk"),
    ("fish", "swim"),
    ("humanoid", "walk"),
    ("manipulator", "bring_ball"),
    ("point_mass", "easy"),
    ("quadruped", "escape"),  # transparent rays of the range finders in front
    ("quadruped", "fetch"),
    ("swimmer", "swimmer6"),
    ("lqr", "lqr_6_2"),  # tendons along the rails
]


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


@pytest.mark.parametrize("size", [64, 84])
@pytest.mark.parametrize(("domain", "task"), CASES)
def test_mask_is_where_the_foregrounds_colour_shows(domain: str, task: str, size: int) -> None:
    env = PixelDMControlEnv(domain, task, image_size=size, seed=2)
    env.reset()
    torch.manual_seed(0)
    shown = 0
    for _ in range(4):
        output = None
        for _ in range(3):
            output = env._step(env.full_action_spec.rand())
        shows = where_the_foreground_shows(env, domain)
        np.testing.assert_array_equal(output["foreground_mask"][0].numpy(), shows)
        shown += shows.sum()
    assert shown > 0
    env.close()


def test_without_the_foreground_only_masked_pixels_change() -> None:
    env = PixelDMControlEnv("walker", "walk", seed=2)
    data = env.reset()
    env.physics.model.geom_rgba[moving_bodies(env.physics)[env.physics.model.geom_bodyid], 3] = 0
    pixels, mask = env._renderer.draw()
    changed = (pixels != data["pixels"].numpy()).any(axis=0)
    np.testing.assert_array_equal(changed, data["foreground_mask"][0].numpy())
    assert not mask.any()
    env.close()


@pytest.mark.parametrize(("domain", "task"), [("walker", "walk"), ("reacher", "easy")])
def test_reference_mask_is_the_silhouette_without_multisampling(domain: str, task: str) -> None:
    masks = []
    for render in ("fast", "reference"):
        env = PixelDMControlEnv(domain, task, render=render, seed=2)
        masks.append(env.reset()["foreground_mask"])
        env.close()
    assert torch.equal(*masks)


def test_an_invisible_target_is_background() -> None:
    env = PixelDMControlEnv("reacher", "easy", seed=2)
    target = env.physics.model.name2id("target", "geom")
    before = env.reset()["foreground_mask"]
    env.physics.model.geom_matid[target] = -1
    env.physics.model.geom_rgba[target, 3] = 0
    after = env._renderer.draw()[1]
    assert 0 < after.sum() < before.sum()
    env.close()

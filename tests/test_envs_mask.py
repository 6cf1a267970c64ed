"""The simulator's foreground mask against pictures of the same scene in other colours."""

from __future__ import annotations

from w2f_torchrl.envs import PixelDMControlEnv

# isort: split
# MuJoCo after torch's compiler: the other order crashes with Mesa (see test_imports.py).
import numpy as np
import pytest
import torch
from helpers.foreground import moving_bodies, where_the_foreground_shows

pytestmark = pytest.mark.render

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

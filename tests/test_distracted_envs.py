"""Distracted environments: what they draw, what they leave alone, and that a seed fixes them."""

from __future__ import annotations

import pickle
from functools import partial

from helpers.foreground import TARGETS, moving_bodies, where_the_foreground_shows

from w2f_torchrl.envs import (
    BackgroundConfig,
    CameraConfig,
    ColorConfig,
    DistractionConfig,
    PixelDMControlEnv,
    make_env,
    tasks,
)
from w2f_torchrl.envs.scenery.backgrounds import load_clips
from w2f_torchrl.utils.seeding import derive_seed

# isort: split
# MuJoCo after torch's compiler: the other order crashes with Mesa (see test_imports.py).
import mujoco
import numpy as np
import numpy.typing as npt
import pytest
import torch
from dm_control import suite
from torchrl.envs import ParallelEnv, SerialEnv, TransformedEnv, check_env_specs

pytestmark = pytest.mark.render

PAPER_TASKS = [
    ("ball_in_cup", "catch"),
    ("cartpole", "swingup"),
    ("cheetah", "run"),
    ("finger", "spin"),
    ("reacher", "easy"),
    ("walker", "walk"),
]
VIDEO = BackgroundConfig(num_videos=2)
KINDS = {
    "background": DistractionConfig(background=VIDEO),
    "camera": DistractionConfig(camera=CameraConfig(0.3)),
    "color": DistractionConfig(color=ColorConfig(0.3)),
    "all": DistractionConfig(VIDEO, CameraConfig(0.3), ColorConfig(0.3)),
}
ALL = KINDS["all"]
SIZE = 24

Picture = npt.NDArray[np.uint8]


def make(domain: str, task: str, **settings: object) -> PixelDMControlEnv:
    defaults = {"image_size": SIZE, "distraction": ALL, "seed": 3}
    return PixelDMControlEnv(domain, task, **(defaults | settings))


def play(env: PixelDMControlEnv, steps: int = 5, seed: int = 0) -> torch.Tensor:
    """Random actions; the stacked pictures, masks and rewards."""
    generator = torch.Generator().manual_seed(seed)
    data = env.reset()
    pictures, masks, rewards = [data["pixels"]], [data["foreground_mask"]], []
    for _ in range(steps):
        action = torch.rand(env.action_spec.shape, generator=generator) * 2 - 1
        data = env.step(data.set("action", action))["next"]
        pictures.append(data["pixels"])
        masks.append(data["foreground_mask"])
        rewards.append(data["reward"])
    return torch.stack(pictures), torch.stack(masks), torch.stack(rewards)


# ------------------------------------------------------------------ specs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("domain", "task"), PAPER_TASKS)
def test_specs(domain: str, task: str, kind: str) -> None:
    env = make(domain, task, distraction=KINDS[kind])
    check_env_specs(env)
    env.close()


@pytest.mark.parametrize(("domain", "task"), PAPER_TASKS)
def test_specs_in_serial_env(domain: str, task: str) -> None:
    env = SerialEnv(
        4, [partial(make, domain, task, distraction=config) for config in KINDS.values()]
    )
    check_env_specs(env)
    env.close()


@pytest.mark.slow
@pytest.mark.parametrize(("domain", "task"), PAPER_TASKS)
def test_specs_in_parallel_env(domain: str, task: str) -> None:
    """All distractions at once, one in each process."""
    env = ParallelEnv(
        4,
        [partial(make, domain, task, distraction=config) for config in KINDS.values()],
        mp_start_method="spawn",
    )
    check_env_specs(env)
    env.close()


@pytest.mark.slow
@pytest.mark.parametrize("render", ["fast", "reference"])
@pytest.mark.parametrize(("domain", "task"), suite.ALL_TASKS)
def test_every_task_of_the_suite_is_distracted(domain: str, task: str, render: str) -> None:
    env = make(domain, task, image_size=64, render=render)
    pictures, masks, _ = play(env)
    assert pictures.float().std() > 10
    assert 0.0005 < masks.float().mean() < 0.4
    env.close()


# ------------------------------------------------------------------ what a picture is made of


def plain_pictures(
    env: PixelDMControlEnv, plain: suite.common.Physics, camera: int
) -> tuple[Picture, Picture, Picture]:
    """dm_control's own picture of the scene and labels, as the distracted camera sees it.

    Returns:
        Colours [H, W, 3], whether foreground shows, whether floor shows (bool [H, W] each).
    """
    model = plain.model
    for name in ("geom_pos", "site_pos", "site_rgba"):
        getattr(model, name)[:] = getattr(env.physics.model, name)
    plain.set_state(env.physics.get_state())
    plain.forward()
    with env.distractor.applied():
        for name in ("cam_xpos", "cam_xmat"):
            getattr(plain.data, name)[:] = getattr(env.physics.data, name)
        model.mat_rgba[:] = env.physics.model.mat_rgba
    size = env._renderer.image_size
    flags = {"shadow": False, "reflection": False, "skybox": False, "haze": False}
    rgb = plain.render(size, size, camera, render_flag_overrides=flags)
    labels = plain.render(size, size, camera, segmentation=True)
    ids, kinds = labels[..., 0], labels[..., 1]
    is_geom = kinds == int(mujoco.mjtObj.mjOBJ_GEOM)
    floor_ids = [
        i
        for i in range(model.ngeom)
        if model.geom_type[i] == mujoco.mjtGeom.mjGEOM_PLANE
        and model.id2name(i, "geom") in ("floor", "ground")
    ]
    floor = is_geom & np.isin(ids, floor_ids)
    return rgb, (kinds >= 0) & ~floor, floor


def without_scenery(domain: str, task: str, *, floor: bool) -> suite.common.Physics:
    """A simulation of one's own, without multisampling, whose static scenery is transparent."""
    physics = suite.load(domain, task, task_kwargs={"random": 3}).physics
    physics.model.vis.quality.offsamples = 0
    model, moves = physics.model, moving_bodies(physics)
    for index, body in enumerate(model.geom_bodyid):
        name = model.id2name(index, "geom")
        is_floor = name in ("floor", "ground")
        if moves[body] or name in TARGETS.get(domain, []) or (is_floor and floor):
            continue
        model.geom_rgba[index] = 0
        model.geom_matid[index] = -1
    return physics


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize(("domain", "task"), PAPER_TASKS)
def test_a_fast_picture_recomposed(domain: str, task: str, size: int) -> None:
    """Foreground from dm_control's picture, floor blended with the frame, the frame elsewhere."""
    env = make(domain, task, image_size=size)
    alpha = {"reacher": 0.0, "walker": 1.0, "cheetah": 1.0}.get(domain, 0.3)
    plain = without_scenery(domain, task, floor=alpha > 0)
    clips = load_clips(None, "train", 2, size)
    data, shown = env.reset(), np.zeros(3, dtype=np.int64)
    torch.manual_seed(0)
    for _ in range(6):
        data = env.step(data.set("action", env.action_spec.rand()))["next"]
        rgb, foreground, floor = plain_pictures(env, plain, 0)
        frame = clips[env.distractor.video.clip][env.distractor.video.frame]
        blend = np.round(alpha * rgb.astype(float) + (1 - alpha) * frame.astype(float))
        expected = np.where(floor[..., None], blend, frame.astype(float))
        expected = np.where(foreground[..., None], rgb, expected)
        np.testing.assert_array_equal(data["foreground_mask"][0].numpy(), foreground)
        pixels = data["pixels"].permute(1, 2, 0).numpy()
        blended = floor & (alpha < 1)
        np.testing.assert_array_equal(pixels[~blended], expected[~blended])
        np.testing.assert_allclose(pixels[blended], expected[blended], atol=1)  # halves round
        shown += [foreground.sum(), floor.sum(), (~floor & ~foreground).sum()]
    assert shown[0] > 0
    assert shown[2] > 0
    assert (shown[1] > 0) == (alpha > 0)
    env.close()


@pytest.mark.parametrize("render", ["fast", "reference"])
@pytest.mark.parametrize("kind", ["camera", "all"])
@pytest.mark.parametrize(("domain", "task"), [*PAPER_TASKS, ("quadruped", "walk")])
def test_masks_are_exact(domain: str, task: str, kind: str, render: str) -> None:
    """A pixel is masked just when it changes with the foreground's colour."""
    env = make(domain, task, image_size=64, distraction=KINDS[kind], render=render)
    data, seen = env.reset(), 0  # the task hides targets at its reset
    env.physics.model.mat_reflectance[:] = 0.0  # a mirror image is no foreground
    torch.manual_seed(0)
    for _ in range(3):
        data = env.step(data.set("action", env.action_spec.rand()))["next"]
        shows = where_the_foreground_shows(env, domain)
        np.testing.assert_array_equal(data["foreground_mask"][0].numpy(), shows)
        seen += shows.sum()
    assert seen > 0
    env.close()


@pytest.mark.parametrize("render", ["fast", "reference"])
@pytest.mark.parametrize(
    ("domain", "task"), [*PAPER_TASKS, ("humanoid", "walk"), ("fish", "swim"), ("quadruped", "run")]
)
def test_a_camera_of_scale_zero_is_the_tasks_own(domain: str, task: str, render: str) -> None:
    """The position, the point looked at, and the orientation are MuJoCo's camera's."""
    still = DistractionConfig(camera=CameraConfig(0.0))
    distracted, plain = (
        make(domain, task, image_size=64, distraction=d, render=render) for d in (still, "none")
    )
    data, expected = distracted.reset(), plain.reset()
    for step in range(3):
        difference = data["pixels"].int() - expected["pixels"].int()
        # Rounding moves single pixels; the reference mode leaves multisampling out.
        assert difference.abs().float().mean() < (0.1 if render == "fast" else 3.0)
        action = torch.full(distracted.action_spec.shape, 0.2 * step)
        data = distracted.step(data.set("action", action))["next"]
        expected = plain.step(expected.set("action", action))["next"]
    distracted.close()
    plain.close()


def test_colors_of_the_floor_and_the_agent_change() -> None:
    """The picture is that of a simulation with these material colours."""
    env = make("walker", "walk", image_size=64, distraction=KINDS["color"])
    plain = suite.load("walker", "walk", task_kwargs={"random": 3})
    plain.physics.model.vis.quality.offsamples = 0
    pixels = env.reset()["pixels"].permute(1, 2, 0).numpy()
    plain.reset()
    plain.physics.model.mat_rgba[:, :3] = env.distractor.color.colors
    flags = {"shadow": False, "reflection": False}
    expected = plain.physics.render(64, 64, 0, render_flag_overrides=flags)
    np.testing.assert_array_equal(pixels, expected)
    original = suite.load("walker", "walk").physics.model.mat_rgba[:, :3]
    assert (np.abs(env.distractor.color.colors - original).max(axis=1) > 0.05).all()
    env.close()


@pytest.mark.parametrize("domain_task", [("cartpole", "swingup"), ("fish", "swim")])
def test_the_reference_shows_the_frame_on_the_sky_box(domain_task: tuple[str, str]) -> None:
    """Also where the sky isn't the model's first texture: as a simulation with that texture."""
    config = DistractionConfig(background=VIDEO)
    env = make(*domain_task, image_size=64, distraction=config, render="reference")
    plain = suite.load(*domain_task, task_kwargs={"random": 3})
    model = plain.physics.model
    quality = model.vis.quality
    quality.offsamples, quality.shadowsize = 0, 512
    quality.numslices, quality.numstacks = 16, 10
    [sky] = [i for i in range(model.ntex) if model.id2name(i, "texture") == "skybox"]
    pixels = env.reset()["pixels"].permute(1, 2, 0).numpy()
    frame = env.distractor.frame
    assert frame.shape == (200, 200, 3)
    model.tex_data[model.tex_adr[sky] : model.tex_adr[sky] + frame.size] = frame.ravel()
    model.tex_width[sky] = model.tex_height[sky] = 200
    model.mat_rgba[model.name2id("grid", "material"), 3] = 0.3
    plain.reset()
    expected = plain.physics.render(64, 64, 0)
    np.testing.assert_array_equal(pixels, expected)
    env.close()


# ------------------------------------------------------------------ what stays the same


@pytest.mark.parametrize("render", ["fast", "reference"])
@pytest.mark.parametrize(("domain", "task"), PAPER_TASKS)
def test_distractions_change_neither_rewards_nor_the_simulation(
    domain: str, task: str, render: str
) -> None:
    rewards, states = [], []
    for distraction in ("none", ALL):
        env = make(domain, task, distraction=distraction, render=render)
        reward = play(env, steps=20)[2]
        rewards.append(reward)
        states.append(env.physics.get_state())
        env.close()
    assert torch.equal(*rewards)
    np.testing.assert_array_equal(*states)


@pytest.mark.parametrize("render", ["fast", "reference"])
def test_the_model_is_as_it_was_after_a_picture(render: str) -> None:
    env = make("cartpole", "swingup", render=render)
    model, data = env.physics.model, env.physics.data
    arrays = [model.mat_rgba, model.geom_group, model.site_group, model.tex_data, model.tex_height]
    arrays += [model.tex_width, data.cam_xpos, data.cam_xmat]
    before = env.physics.render(48, 64, 0)
    env.reset()
    env.physics.forward()
    saved = [np.array(array) for array in arrays]
    for _ in range(3):
        env.distractor.step()
        env._renderer.draw()
    for array, copy in zip(arrays, saved, strict=True):
        np.testing.assert_array_equal(array, copy)
    plain = suite.load("cartpole", "swingup", task_kwargs={"random": 3})
    plain.reset()
    after = env.physics.render(48, 64, 0)
    np.testing.assert_array_equal(after, plain.physics.render(48, 64, 0))
    assert (before != after).any()  # reset moved the cart
    env.close()


# ------------------------------------------------------------------ seeds and state


@pytest.mark.parametrize("render", ["fast", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_fixes_everything(kind: str, render: str) -> None:
    runs = []
    for seed in (3, 3, 4):
        env = make("reacher", "easy", distraction=KINDS[kind], seed=seed, render=render)
        first = play(env)
        env.set_seed(seed)
        again = play(env)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        runs.append(first)
        env.close()
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    assert (runs[0][0] != runs[2][0]).any()


def test_each_distraction_has_a_stream_of_its_own() -> None:
    together = make("walker", "walk")
    together.reset()
    for kind, name in (("background", "video"), ("camera", "camera"), ("color", "color")):
        alone = make("walker", "walk", distraction=KINDS[kind])
        alone.reset()
        mine, theirs = (getattr(env.distractor, name) for env in (alone, together))
        for key, value in mine.state_dict().items():
            assert value == theirs.state_dict()[key]
        alone.close()
    together.close()


def test_envs_of_a_batch_differ_and_are_those_of_their_seeds() -> None:
    batch = make_env("walker", "walk", image_size=SIZE, distraction=ALL, num_envs=2, seed=5)
    first = batch.reset()
    assert (first["pixels"][0] != first["pixels"][1]).float().mean() > 0.3
    for index in range(2):
        env = make("walker", "walk", seed=derive_seed(5, "env", index))
        data = env.reset()
        assert torch.equal(first["pixels"][index], data["pixels"])
        assert torch.equal(first["foreground_mask"][index], data["foreground_mask"])
        env.close()
    check_env_specs(batch)
    batch.close()


@pytest.mark.parametrize("render", ["fast", "reference"])
def test_distractions_go_on_from_saved_state(render: str) -> None:
    env, other = (make("walker", "walk", seed=seed, render=render) for seed in (3, 8))
    play(env)
    state = pickle.loads(pickle.dumps(env.distractor.state_dict()))
    other.reset()
    other.distractor.load_state_dict(state)
    other.physics.set_state(env.physics.get_state())
    other.physics.forward()
    env.physics.forward()
    for step in range(30):
        for each in (env, other):
            each.distractor.step()
            if step == 20:
                each.distractor.reset()
        if step % 5 == 0:
            np.testing.assert_array_equal(env._renderer.draw()[0], other._renderer.draw()[0])
    assert env.distractor.state_dict() == other.distractor.state_dict()
    wrong = make("walker", "walk", distraction=KINDS["color"])
    with pytest.raises(ValueError, match=r"the state is of .*video.*distractions are \['color'\]"):
        wrong.distractor.load_state_dict(state)
    for each in (env, other, wrong):
        each.close()


@pytest.mark.parametrize(("unit", "steps"), [("control", 3 * 4), ("agent", 3)])
def test_steps_are_control_steps_or_agent_steps(unit: str, steps: int) -> None:
    config = DistractionConfig(VIDEO, CameraConfig(0.3), ColorConfig(0.3), step_unit=unit)
    env = make("cheetah", "run", distraction=config, action_repeat=4)
    calls = []
    walk = env.distractor.step

    def counted() -> None:
        calls.append(1)
        walk()

    env.distractor.step = counted
    play(env, steps=3)
    assert len(calls) == steps
    env.close()


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize("num_envs", [1, 2])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distraction": "harder"}, "distraction is 'harder': must be one of none, easy"),
        ({"distraction": KINDS["color"], "background_source": "davis"}, "must be None, since"),
        ({"distraction": "easy", "background_split": "test"}, "background_split is 'test'"),
        ({"distraction": "easy", "background_source": "no/such"}, "'no/such': no such folder"),
        (
            {"domain": "cartpole", "task": "balance", "distraction": "easy", "camera_id": 1},
            "camera_id is 1: the camera distraction moves cameras that are fixed",
        ),
        (
            {"distraction": DistractionConfig(background=BackgroundConfig(61))},
            "num_videos is 61: background_source 'procedural' has 60 clips",
        ),
    ],
)
def test_bad_settings_are_named_before_a_process_starts(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], message: str, num_envs: int
) -> None:
    monkeypatch.setattr("w2f_torchrl.envs.factory.ParallelEnv", None)
    with pytest.raises(ValueError, match=message):
        make_env(**{"domain": "walker", "task": "walk", "num_envs": num_envs} | settings)


def test_a_registered_domain_takes_no_distraction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_REGISTRY", {"mine": lambda task, **settings: None})
    with pytest.raises(ValueError, match="must be 'none' for the domain 'mine'"):
        make_env("mine", "task", distraction="easy")


def test_make_env_by_difficulty() -> None:
    env = make_env("finger", "spin", image_size=SIZE, distraction="easy")
    assert isinstance(env, TransformedEnv)
    assert env.base_env.distractor.config.color == ColorConfig(0.1)
    assert env.rollout(3)["foreground_mask"].any()
    env.close()

"""Gymnasium's envs that hold a MuJoCo simulation: pictures, masks, distractions, resumes."""

from __future__ import annotations

import importlib
import io
import json
import logging
import os
import subprocess
import sys
import types

import pytest
import torch
from helpers.checkout import ROOT
from helpers.runs import tiny_run
from hydra import compose, initialize_config_dir

from w2f_torchrl.data.environments import probe_env
from w2f_torchrl.envs import ForegroundRule, make_env
from w2f_torchrl.trainers import ConfigError, Trainer, to_run_config

# isort: split
# MuJoCo after torch's compiler: the other order crashes with Mesa (see test_imports.py).
gymnasium = pytest.importorskip("gymnasium", reason="needs the extra gym: make extras")
import mujoco  # noqa: E402
import numpy as np  # noqa: E402

from w2f_torchrl.envs import MujocoTask  # noqa: E402
from w2f_torchrl.envs.gym.simulation import find_simulation  # noqa: E402
from w2f_torchrl.envs.renderers.rendering import Drawing, SceneRenderer  # noqa: E402
from w2f_torchrl.envs.simulation import FreeCamera, wrap  # noqa: E402

pytestmark = pytest.mark.render
SIZE = 48
EVERYTHING = {
    "background": {"num_videos": 1},
    "camera": {"scale": 0.2},
    "color": {"scale": 0.3},
    "corruption": {"start": 0.5, "noise": 20},
}

SLIDER = """
<mujoco>
  <asset><material name="steel" rgba="0.6 0.6 0.7 1"/></asset>
  <worldbody>
    <light pos="0 0 3"/>
    <geom name="ground" type="plane" size="2 2 .1" rgba=".3 .5 .3 1"/>
    <geom name="wall" type="box" pos="0 .6 .3" size=".8 .02 .3" rgba=".6 .3 .3 1"/>
    <site name="goal" pos=".3 0 .1" size=".05" rgba="1 1 0 1"/>
    <body name="cart" pos="0 0 .1">
      <joint name="slide" type="slide" axis="1 0 0" range="-1 1" damping="1"/>
      <geom name="box" type="box" size=".1 .1 .1" material="steel"/>
      <body name="flag" pos="0 0 .1"><geom name="pole" type="capsule" fromto="0 0 0 0 0 .2"
        size=".02" rgba=".2 .2 .9 1"/></body>
    </body>
    <camera name="front" pos="0 -1.5 .8" xyaxes="1 0 0 0 .4 .9"/>
  </worldbody>
  <actuator><motor joint="slide" ctrlrange="-2 2" ctrllimited="true" gear="20"/></actuator>
</mujoco>
"""


class Slider(MujocoTask):
    """A cart that is rewarded for being near a goal, and ends at the wall's edge."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.log: list[float] = []

    def initialize(self):
        self.data.qpos[0] = self.np_random.uniform(-0.3, 0.3)

    def reward(self, action):
        self.log.append(float(self.data.qpos[0]))
        return 1 - abs(float(self.data.body("cart").xpos[0]) - 0.3)

    def terminated(self):
        return abs(self.data.qpos[0]) > 0.95


@pytest.fixture
def slider(tmp_path):
    file = tmp_path / "slider.xml"
    file.write_text(SLIDER)
    kwargs = {"model_file": str(file), "frame_skip": 15}
    gymnasium.register("w2f/Slider-v0", Slider, kwargs=kwargs, max_episode_steps=40)
    yield "w2f/Slider-v0"
    del gymnasium.registry["w2f/Slider-v0"]


def ours(task: str, **settings):
    settings = {"image_size": SIZE, "action_repeat": 2, "seed": 3} | settings
    return make_env("gym", task, **settings)


def inner(env):
    return env.base_env._env.unwrapped


def play(env, steps: int):
    """Reset and act at random; the outputs of every step."""
    td, outputs = env.reset(), []
    outputs.append(td)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        action = 2 * torch.rand(env.action_spec.shape, generator=generator) - 1
        td = env.step(td.set("action", action))["next"]
        outputs.append(td.clone())
    return outputs


def segmented(env, shown) -> np.ndarray:
    """Where MuJoCo's own segmentation shows the objects that ``shown`` accepts, ``[H, W]``."""
    model, data = find_simulation(env.base_env._env.env)
    view = env.base_env._painter._drawing.camera
    if isinstance(view, FreeCamera):
        camera = mujoco.MjvCamera()
        camera.lookat[:], camera.distance = view.lookat, view.distance
        camera.azimuth, camera.elevation = view.azimuth, view.elevation
    else:
        camera = view
    samples, model.vis.quality.offsamples = model.vis.quality.offsamples, 0
    with mujoco.Renderer(model, SIZE, SIZE) as renderer:
        model.vis.quality.offsamples = samples
        renderer.enable_segmentation_rendering()
        renderer.update_scene(data, camera)
        objects = renderer.render()
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    kinds = {mujoco.mjtObj.mjOBJ_GEOM: "geom", mujoco.mjtObj.mjOBJ_SITE: "site"}
    for index, kind in {tuple(pair) for pair in objects.reshape(-1, 2).tolist()}:
        if kind in kinds and shown(model, kinds[kind], index):
            mask |= (objects == (index, kind)).all(-1)
    return mask


def moves(model, kind: str, index: int) -> bool:
    body = getattr(model, f"{kind}_bodyid")[index]
    name = getattr(model, kind)(index).name
    return model.body_weldid[body] != 0 or name.startswith("goal")


# ------------------------------------------------------------------ pictures and masks


@pytest.mark.parametrize(
    ("task", "camera"), [("Ant-v5", None), ("Ant-v5", "track"), ("HalfCheetah-v5", 0), (None, None)]
)
def test_masks_are_mujocos_own_segmentation_of_what_moves(task, camera, slider):
    env = ours(task or slider, camera_id=camera)
    assert env.base_env.distractor is None
    for steps in (1, 4, 7):
        outputs = play(env, steps)
        mask = outputs[-1]["foreground_mask"]
        assert (mask.dtype, mask.shape) == (torch.bool, (1, SIZE, SIZE))
        np.testing.assert_array_equal(mask[0].numpy(), segmented(env, moves))
        assert 20 < mask.sum() < 0.5 * SIZE**2
    env.close()


def test_the_picture_is_what_gymnasium_draws_at_the_models_own_quality():
    """Hopper's free camera is set completely, so nothing of it depends on the first reset."""
    env = ours("Hopper-v5", render="reference")
    found = play(env, 3)[-1]["pixels"].numpy()
    other = gymnasium.make("Hopper-v5", render_mode="rgb_array", width=SIZE, height=SIZE)
    other.reset()
    for name in ("qpos", "qvel"):
        getattr(other.unwrapped.data, name)[:] = getattr(inner(env).data, name)
    mujoco.mj_copyData(other.unwrapped.data, other.unwrapped.model, inner(env).data)
    wanted = other.render().transpose(2, 0, 1).astype(int)
    assert np.abs(found - wanted).max() <= 1
    assert wanted.std() > 20
    env.close()
    other.close()


def differing(one, other) -> int:
    """Pixels whose colour differs by more than rounding, or whose mask does."""
    colour = (np.abs(one[0].astype(int) - other[0]) > 2).any(0)
    return int((colour | (one[1] != other[1])[0]).sum())


def test_a_camera_that_moves_nowhere_sees_the_same(slider):
    """A free camera in the place of one of the model's, and one that is moved to its own place."""
    model = mujoco.MjModel.from_xml_string(SLIDER)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    simulation = wrap(model, data)
    fixed = SceneRenderer(simulation, Drawing(SIZE, 0)).draw()
    model.vis.global_.fovy = model.cam_fovy[0]
    free = FreeCamera.of_model(model)
    renderer = SceneRenderer(simulation, Drawing(SIZE, free))
    unmoved = renderer.draw()
    forward, up = free.forward, np.array([0.0, 0.0, 1.0])
    right = np.cross(forward, up) / np.linalg.norm(np.cross(forward, up))
    free.moved = free.position, np.stack([right, np.cross(right, forward), -forward], 1).ravel()
    again = renderer.draw()
    assert differing(again, unmoved) <= 4
    free.moved = data.cam_xpos[0].copy(), data.cam_xmat[0].copy()
    there = renderer.draw()
    assert differing(there, fixed) <= 4
    assert differing(fixed, unmoved) > 500


def test_other_code_may_draw_in_between(slider):
    """dm_control believes that its context is current, but an env's own renderer has changed it."""
    env, other = ours("Hopper-v5"), gymnasium.make("Hopper-v5", render_mode="rgb_array")
    undisturbed = [out["pixels"] for out in play(env, 3)]
    other.reset()
    env.close()
    env = ours("Hopper-v5")
    td, generator = env.reset(), torch.Generator().manual_seed(0)
    found = [td["pixels"]]
    for _ in range(3):
        other.render()
        action = 2 * torch.rand(env.action_spec.shape, generator=generator) - 1
        td = env.step(td.set("action", action))["next"]
        found.append(td["pixels"].clone())
    assert all(torch.equal(a, b) for a, b in zip(found, undisturbed, strict=True))
    env.close()
    other.close()


# ------------------------------------------------------------------ the rule


@pytest.mark.parametrize("distraction", ["none", {"background": {"replaces": "sky"}}])
@pytest.mark.parametrize(
    ("include", "exclude", "wanted"),
    [
        ((), ("flag",), {"box", "goal"}),
        (("wall",), (), {"box", "pole", "goal", "wall"}),
        (("flag",), ("world",), {"pole"}),
        ((), ("go*", "bo?"), {"pole"}),
    ],
)
def test_the_rule_moves_bodies_geoms_and_sites(slider, include, exclude, wanted, distraction):
    rule = ForegroundRule(include, exclude)
    env = ours(slider, foreground=rule, distraction=distraction)
    mask = play(env, 2)[-1]["foreground_mask"][0].numpy()
    truth = segmented(env, lambda model, kind, index: getattr(model, kind)(index).name in wanted)
    np.testing.assert_array_equal(mask, truth)
    assert mask.any()
    env.close()


def test_the_rule_holds_for_the_control_suite_too():
    rule = ForegroundRule(exclude=("proximal",))
    full, part = (
        make_env("finger", "turn_hard", image_size=32, seed=1, **kwargs)
        for kwargs in ({}, {"foreground": rule})
    )
    full, part = full.reset()["foreground_mask"], part.reset()["foreground_mask"]
    assert 0 < part.sum() < full.sum()
    assert not (part & ~full).any()
    with pytest.raises(ValueError, match=r"foreground_include=\['nose'\]: nothing is named"):
        make_env("finger", "turn_hard", foreground=ForegroundRule(("nose",)), num_envs=2)


# ------------------------------------------------------------------ distractions


@pytest.mark.parametrize("camera", [None, "track"])
def test_distractions_change_pictures_and_nothing_else(camera):
    envs = [ours("Ant-v5", camera_id=camera, distraction=d) for d in ("none", EVERYTHING)]
    assert envs[1].base_env.distractor is not None
    arrays = ("mat_rgba", "geom_rgba", "geom_group", "site_group", "tex_data")
    before = {name: getattr(inner(envs[1]).model, name).copy() for name in arrays}
    plain, distracted = (play(env, 6) for env in envs)
    for one, other in zip(plain[1:], distracted[1:], strict=True):
        assert torch.equal(one["reward"], other["reward"])
        assert (one["pixels"] != other["pixels"]).float().mean() > 0.5
    for name in ("qpos", "qvel", "cam_xpos", "cam_xmat", "xpos"):
        first, second = (getattr(inner(env).data, name) for env in envs)
        np.testing.assert_array_equal(first, second)
    for name, array in before.items():
        np.testing.assert_array_equal(array, getattr(inner(envs[1]).model, name))
    for env in envs:
        env.close()


def test_colours_of_geoms_without_a_material_change_too(slider):
    """The mask is the same, and its pixels are not: the pole has a colour, the cart a material."""
    plain, coloured = (
        ours(slider, distraction=d) for d in ("none", {"color": {"scale": 0.5, "dynamic": False}})
    )
    one, other = (play(env, 1)[-1] for env in (plain, coloured))
    assert torch.equal(one["foreground_mask"], other["foreground_mask"])
    for part in ("pole", "box", "ground"):
        where = segmented(plain, lambda model, kind, i, part=part: model.geom(i).name == part)
        assert where.any()
        changed = (one["pixels"] != other["pixels"]).any(0).numpy()
        assert changed[where].mean() > 0.5, part


def test_the_video_is_behind_and_the_floor_is_found(slider):
    """With an opaque floor the video shows where there is neither foreground nor floor."""
    settings = {"background": {"ground_alpha": 1.0, "num_videos": 1}}
    plain, behind = (ours(slider, distraction=d) for d in ("none", settings))
    one, other = (play(env, 1)[-1] for env in (plain, behind))
    assert torch.equal(one["foreground_mask"], other["foreground_mask"])
    same = (one["pixels"] == other["pixels"]).all(0).numpy()
    floor = segmented(
        plain, lambda model, kind, index: getattr(model, kind)(index).name == "ground"
    )
    kept = floor | one["foreground_mask"][0].numpy()
    assert same[kept].all()
    assert same[~kept].mean() < 0.05
    assert (~kept).sum() > 50


def test_scenery_reacts_to_the_scaled_action(slider):
    env = ours(slider, distraction="reactive_action")
    grid = env.base_env.distractor.reactive
    td = env.reset()
    assert grid.bins == (1,)  # of zero
    for action, wanted in ((-1.0, 0), (1.0, 2), (0.2, 1)):
        td = env.step(td.set("action", torch.tensor([action])))["next"]
        assert grid.bins == (wanted,)


# ------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize(
    ("task", "environment", "match"),
    [
        ("CartPole-v1", {"distraction": "easy"}, r"environment.distraction=.*'CartPole-v1', which"),
        ("CartPole-v1", {"foreground_exclude": ["cart"]}, r"foreground_exclude=\['cart'\] has no"),
        (
            "Ant-v5",
            {"foreground_include": ["leg"]},
            r"foreground_include=\['leg'\].*front_left_leg",
        ),
        ("Ant-v5", {"camera_name": "side"}, r"camera_id is 'side': Ant-v5 has .*\(0 track\)"),
        ("Ant-v5", {"camera_id": 3}, r"camera_id is 3: Ant-v5 has cameras 0 to 0"),
        ("Ant-v5", {"kwargs": {"visual_options": {}}}, "kwargs.visual_options has no effect"),
        ("Ant-v5", {"distraction": {"palette": {}}}, "palette colours .*Control Suite"),
    ],
)
def test_settings_without_effect_are_named(tmp_path, task, environment, match):
    environment = {"domain": "gym", "task": task} | environment
    config = tiny_run(tmp_path, environment=environment, segmentation={"source": "median"})
    config.validate()
    with pytest.raises(ConfigError, match=match):
        probe_env(config)


def test_two_cameras_and_rules_of_registered_envs_are_refused(tmp_path):
    both = {"domain": "gym", "task": "Ant-v5", "camera_id": 0, "camera_name": "track"}
    with pytest.raises(ConfigError, match="both choose a camera"):
        tiny_run(tmp_path, environment=both).validate()


def test_a_model_file_that_does_not_serve_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"model_file='.*none.xml'"):
        Slider(model_file=tmp_path / "none.xml")
    (tmp_path / "still.xml").write_text("<mujoco><worldbody/></mujoco>")
    with pytest.raises(ValueError, match="has no actuators"):
        Slider(model_file=tmp_path / "still.xml")


# ------------------------------------------------------------------ a model of one's own, resumes


def test_a_task_of_ones_own(slider):
    env = ours(slider)
    assert env.base_env.max_episode_steps == 40
    outputs = play(env, 3)
    task = inner(env)
    assert len(task.log) == 6
    total = sum(1 - abs(position - 0.3) for position in task.log[-2:])
    assert float(outputs[-1]["reward"]) == pytest.approx(total, abs=1e-5)
    starts = []
    for _ in range(2):
        env.reset()
        starts.append(float(task.data.qpos[0]))
    assert starts[0] != starts[1]
    td = env.reset()
    while not td["done"]:
        td = env.step(td.set("action", torch.ones(1)))["next"]
    assert td["terminated"]
    assert abs(task.data.qpos[0]) > 0.95


@pytest.mark.parametrize("task", ["Ant-v5", "Pusher-v5", None])
def test_a_saved_env_continues_exactly(task, slider):
    task = task or slider
    easy = {**EVERYTHING, "background": None}
    first, second = (ours(task, seed=s, distraction=easy) for s in (1, 2))
    play(first, 4)
    stream = io.BytesIO()
    torch.save(first.base_env.resume_state(), stream)
    stream.seek(0)
    play(second, 1)
    second.base_env.load_resume_state(torch.load(stream, weights_only=True))
    generator = torch.Generator().manual_seed(5)
    for step in range(12):
        action = 2 * torch.rand(first.action_spec.shape, generator=generator) - 1
        outputs = []
        for env in (first, second):
            if step == 6:
                env.reset()
            outputs.append(env.base_env._step(_scaled(env, action)))
        for name in ("pixels", "foreground_mask", "reward", "terminated", "truncated"):
            assert torch.equal(outputs[0][name], outputs[1][name]), (step, name)
    np.testing.assert_array_equal(inner(first).data.qpos, inner(second).data.qpos)


def _scaled(env, action):
    from tensordict import TensorDict

    box = env.base_env.action_spec.space
    scaled = box.low + (action + 1) / 2 * (box.high - box.low)
    return TensorDict({"action": scaled}, [])


def test_an_env_that_cannot_be_saved_says_so(slider, caplog):
    env = ours(slider)
    inner(env).log = [object()]
    with caplog.at_level(logging.INFO):
        assert env.base_env.resume_state() is None
    assert "begins new episodes, since Slider.log is a object" in caplog.text
    assert ours("CartPole-v1").base_env.resume_state() is None


@pytest.mark.usefixtures("no_curves")
def test_a_run_learns_before_a_video_and_resumes_within_episodes(tmp_path, caplog, slider):
    environment = {"domain": "gym", "task": slider, "distraction": "easy", "action_repeat": 2}
    for frames in (256, 320):
        settings = {"training": {"total_frames": frames}, "resume": "auto"}
        trainer = Trainer(tiny_run(tmp_path / "run", environment=environment, **settings))
        trainer.train()
    assert trainer.updates > 0
    assert "begin new episodes" not in caplog.text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_ant_trains_from_the_command_line(tmp_path):
    """A worker process, a few updates with masks, an evaluation with its film."""
    run = tmp_path / "run"
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "sota_configs" / "world2filter.py"),
            *("experiment=gym_ant", "environment.num_envs=2", "environment.image_size=32"),
            *("training.batch_size=2", "training.prefill_steps=64", "training.train_ratio=4"),
            *("training.total_frames=320", "evaluation.every_frames=320"),
            *("evaluation.episodes=1", "logging.every_updates=2", "logging.report=false"),
            *("device=cpu", f"run_dir={run}"),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("wm/fg_loss" in row for row in rows)
    assert any("eval/return_mean" in row for row in rows)
    assert list((run / "videos").rglob("*.mp4"))


# ------------------------------------------------------------------ other packages


class WithSim(gymnasium.Env):
    """An env in robosuite's form, which replaces its simulation at every reset."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012  # Gymnasium's way
    render_camera = "front"

    def __init__(self, render_mode=None):
        self.render_mode = render_mode
        self.action_space = gymnasium.spaces.Box(-2, 2, (1,), np.float32)
        self.observation_space = gymnasium.spaces.Box(-1, 1, (1,))
        self.made = 0
        self._make()

    def _make(self):
        model = mujoco.MjModel.from_xml_string(SLIDER)
        self.inner = types.SimpleNamespace(model=model, data=mujoco.MjData(model))
        mujoco.mj_forward(model, self.inner.data)
        self.sim = types.SimpleNamespace(
            model=types.SimpleNamespace(_model=model),
            data=types.SimpleNamespace(_data=self.inner.data),
        )
        self.made += 1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._make()
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.inner.data.ctrl[:] = action
        mujoco.mj_step(self.inner.model, self.inner.data, 20)
        return np.zeros(1, np.float32), 0.0, False, False, {}


def test_a_simulation_in_robosuites_form_that_is_replaced_at_each_reset():
    gymnasium.register("w2f/WithSim-v0", WithSim)
    try:
        env = ours("w2f/WithSim-v0", distraction={"color": {"scale": 0.4}})
        for _ in range(2):
            before = env.base_env.distractor.state_dict()["generators"]["color"]
            outputs = play(env, 3)
            assert env.base_env._painter._drawing.camera == 0
            mask = outputs[-1]["foreground_mask"][0].numpy()
            np.testing.assert_array_equal(mask, segmented(env, moves))
            assert mask.any()
            assert env.base_env.distractor.state_dict()["generators"]["color"] != before
        assert inner(env).made == 3
        assert env.base_env.resume_state() is None  # made anew at each reset
        env.close()
    finally:
        del gymnasium.registry["w2f/WithSim-v0"]


def test_metaworld_has_masks_and_continues():
    pytest.importorskip("metaworld", reason="pip install --no-deps metaworld==3.1.1")
    task = "w2f_torchrl.envs.gym.metaworld:Meta-World/MT1"
    kwargs = {"env_name": "drawer-open-v3"}
    first, second = (
        ours(task, kwargs=kwargs, camera_id="corner2", distraction={"camera": {}}, seed=seed)
        for seed in (1, 2)
    )
    play(first, 3)
    first.base_env.distractor.camera.scale = 0.0
    play(second, 1)
    second.base_env.load_resume_state(first.base_env.resume_state())
    generator = torch.Generator().manual_seed(5)
    for _ in range(8):
        action = 2 * torch.rand(first.action_spec.shape, generator=generator) - 1
        one, other = (env.base_env._step(_scaled(env, action)) for env in (first, second))
        assert torch.equal(one["reward"], other["reward"])
    plain = ours(task, kwargs=kwargs, camera_id="corner2")
    mask = play(plain, 3)[-1]["foreground_mask"][0].numpy()
    model = find_simulation(plain.base_env._env.env)[0]
    mocap = {i for i in range(model.nbody) if model.body_mocapid[i] >= 0}
    truth = segmented(
        plain,
        lambda model, kind, i: (
            moves(model, kind, i) or getattr(model, f"{kind}_bodyid")[i] in mocap
        ),
    )
    np.testing.assert_array_equal(mask, truth)


def test_the_preset_of_metaworld_is_a_run_of_its_task():
    pytest.importorskip("metaworld", reason="pip install --no-deps metaworld==3.1.1")
    importlib.import_module("sota_configs.world2filter")  # registers the typed settings
    with initialize_config_dir(str(ROOT / "sota_configs"), version_base="1.3"):
        config = to_run_config(compose("config", ["experiment=metaworld", "device=cpu"]))
    config.validate()
    assert config.environment.kwargs["env_name"] == "drawer-open-v3"
    assert config.needs_masks

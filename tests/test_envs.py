"""Pixel environments: what a step draws, sums and ends, and what bad settings get."""

from __future__ import annotations

import time
from functools import partial

from w2f_torchrl.envs import PixelDMControlEnv, make_env, register_env, tasks, validate_task
from w2f_torchrl.utils.seeding import derive_seed

# isort: split
# MuJoCo after torch's compiler: the other order crashes with Mesa (see test_imports.py).
import mujoco
import numpy as np
import pytest
import torch
from dm_control import suite
from tensordict import TensorDict
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase, SerialEnv, check_env_specs

pytestmark = pytest.mark.render

VISION_TASKS = [
    ("acrobot", "swingup"),
    ("ball_in_cup", "catch"),
    ("cartpole", "balance"),
    ("cartpole", "balance_sparse"),
    ("cartpole", "swingup"),
    ("cartpole", "swingup_sparse"),
    ("cheetah", "run"),
    ("finger", "spin"),
    ("finger", "turn_easy"),
    ("finger", "turn_hard"),
    ("hopper", "hop"),
    ("hopper", "stand"),
    ("pendulum", "swingup"),
    ("quadruped", "run"),
    ("quadruped", "walk"),
    ("reacher", "easy"),
    ("reacher", "hard"),
    ("walker", "run"),
    ("walker", "stand"),
    ("walker", "walk"),
]
OTHER_TASKS = [task for task in suite.ALL_TASKS if task not in VISION_TASKS]


def step(env: EnvBase, action: torch.Tensor) -> TensorDict:
    """One step without TorchRL's bookkeeping: what the env itself returns."""
    return env._step(TensorDict({"action": action}, []))


@pytest.mark.parametrize(
    ("domain", "task"),
    [*VISION_TASKS, *(pytest.param(*task, marks=pytest.mark.slow) for task in OTHER_TASKS)],
)
def test_every_task_steps_renders_and_masks(domain: str, task: str) -> None:
    env = PixelDMControlEnv(domain, task, seed=0)
    rollout = env.rollout(3)
    for data in (rollout, rollout["next"]):
        assert data["pixels"].shape == (3, 3, 64, 64)
        assert data["pixels"].dtype == torch.uint8
        assert data["pixels"].float().std() > 5
        assert data["foreground_mask"].shape == (3, 1, 64, 64)
        assert data["foreground_mask"].dtype == torch.bool
        assert 0.001 < data["foreground_mask"].float().mean() < 0.25
    assert rollout["action"].dtype == rollout["next", "reward"].dtype == torch.float32
    env.close()


@pytest.mark.parametrize("state_observations", [False, True])
@pytest.mark.parametrize("foreground_mask", [False, True])
def test_specs(foreground_mask: bool, state_observations: bool) -> None:
    env = PixelDMControlEnv(
        "finger",
        "turn_easy",
        image_size=20,
        foreground_mask=foreground_mask,
        state_observations=state_observations,
        seed=0,
    )
    check_env_specs(env)
    keys = set(env.reset().keys()) - {"done", "terminated", "truncated"}
    expected = {"pixels"} | ({"foreground_mask"} if foreground_mask else set())
    if state_observations:
        expected |= {"position", "velocity", "touch", "target_position", "dist_to_target"}
    assert keys == expected


def test_specs_in_serial_env() -> None:
    env = SerialEnv(2, partial(PixelDMControlEnv, "walker", "walk", image_size=16, seed=0))
    check_env_specs(env)
    env.close()


@pytest.mark.parametrize("render", ["fast", "reference"])
@pytest.mark.parametrize(
    ("domain", "task", "size"), [("walker", "walk", 64), ("quadruped", "run", 84)]
)
def test_picture_is_dm_controls(domain: str, task: str, size: int, render: str) -> None:
    env = PixelDMControlEnv(domain, task, image_size=size, render=render, seed=3)
    plain = suite.load(domain, task, task_kwargs={"random": 3})
    overrides = None
    if render == "fast":
        plain.physics.model.vis.quality.offsamples = 0
        overrides = {"shadow": False, "reflection": False}
    camera = tasks.default_camera(domain, task)
    env.reset()
    plain.reset()
    for _ in range(4):
        action = env.action_spec.rand()
        pixels = step(env, action)["pixels"]
        for _ in range(2):
            plain.step(env._action_map(action))
        expected = plain.physics.render(size, size, camera, render_flag_overrides=overrides)
        np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), expected)
    env.close()


def test_physics_render_keeps_its_own_size_and_quality() -> None:
    env = PixelDMControlEnv("walker", "walk", image_size=16, seed=3)
    plain = suite.load("walker", "walk", task_kwargs={"random": 3})
    env.reset()
    plain.reset()
    picture = env.physics.render(120, 160, 0)
    np.testing.assert_array_equal(picture, plain.physics.render(120, 160, 0))
    before = step(env, env.action_spec.zero())["pixels"]
    plain.physics.render(120, 160, 0)  # another context becomes current in between
    after = env._renderer.draw()[0]
    np.testing.assert_array_equal(before.numpy(), after)
    env.close()


@pytest.mark.parametrize(("foreground_mask", "passes"), [(False, 1), (True, 2)])
@pytest.mark.parametrize("action_repeat", [1, 4])
def test_one_render_per_agent_step(
    monkeypatch: pytest.MonkeyPatch, action_repeat: int, foreground_mask: bool, passes: int
) -> None:
    env = PixelDMControlEnv(
        "cartpole", "balance", action_repeat=action_repeat, foreground_mask=foreground_mask, seed=0
    )
    env.reset()
    calls = []
    draw = mujoco.mjr_render

    def counting_draw(*args: object) -> None:
        calls.append(args)
        draw(*args)

    monkeypatch.setattr(mujoco, "mjr_render", counting_draw)
    for _ in range(3):
        step(env, env.action_spec.rand())
    assert len(calls) == 3 * passes
    env.close()


@pytest.mark.parametrize("action_repeat", [1, 2, 3])
def test_rewards_and_the_end_of_an_episode(action_repeat: int) -> None:
    env = PixelDMControlEnv(
        "cartpole",
        "swingup",
        image_size=16,
        action_repeat=action_repeat,
        foreground_mask=False,
        state_observations=True,
        seed=5,
    )
    plain = suite.load("cartpole", "swingup", task_kwargs={"random": 5})
    env.reset()
    plain.reset()
    generator = torch.Generator().manual_seed(0)
    agent_steps = -(-1000 // action_repeat)
    control_steps = 0
    for index in range(agent_steps):
        action = torch.rand(1, generator=generator) * 2 - 1
        output = step(env, action)
        reward = 0.0
        for _ in range(min(action_repeat, 1000 - control_steps)):
            time_step = plain.step(action.numpy())
            reward += time_step.reward
            control_steps += 1
        torch.testing.assert_close(output["reward"].item(), reward, rtol=1e-6, atol=1e-7)
        velocity = torch.as_tensor(time_step.observation["velocity"], dtype=torch.float32)
        torch.testing.assert_close(output["velocity"], velocity)
        ends = index == agent_steps - 1
        assert output["done"].item() == output["truncated"].item() == ends
        assert not output["terminated"].item()
    assert time_step.last()
    with pytest.raises(RuntimeError, match=r"episode of cartpole swingup is over: call reset"):
        step(env, action)
    env.reset()
    assert not step(env, action)["done"].item()
    env.close()


def test_an_end_that_the_task_declares_terminates() -> None:
    env = PixelDMControlEnv("lqr", "lqr_2_1", action_repeat=4, seed=0)
    env.reset()
    assert not step(env, torch.zeros(1))["done"].item()
    with env.physics.reset_context():
        env.physics.data.qpos[:] = 0.0
        env.physics.data.qvel[:] = 0.0
    output = step(env, torch.zeros(1))
    assert output["terminated"].item()
    assert output["done"].item()
    assert not output["truncated"].item()
    env.close()


def test_stepping_before_the_first_reset_raises() -> None:
    env = PixelDMControlEnv("cartpole", "balance", seed=0)
    with pytest.raises(RuntimeError, match="call reset"):
        step(env, env.action_spec.zero())
    env.close()


def test_actions_are_clipped_and_scaled() -> None:
    env = PixelDMControlEnv("quadruped", "walk", image_size=16, seed=0)
    limits = suite.load("quadruped", "walk").action_spec()
    assert set(limits.maximum) == {0.8, 1.0, 1.1}, "no scaling to test"
    env.reset()
    for value, control in [(1.0, limits.maximum), (7.0, limits.maximum), (-7.0, limits.minimum)]:
        step(env, torch.full((12,), value))
        np.testing.assert_allclose(env.physics.control(), control)
    step(env, torch.zeros(12))
    np.testing.assert_allclose(env.physics.control(), (limits.maximum + limits.minimum) / 2)
    assert (env.action_spec.low == -1).all()
    assert (env.action_spec.high == 1).all()
    env.close()


def test_actuators_without_limits_get_the_clipped_action() -> None:
    env = PixelDMControlEnv("lqr", "lqr_2_1", image_size=16, seed=0)
    env.reset()
    for action, control in [(0.3, 0.3), (9.0, 1.0)]:
        step(env, torch.tensor([action]))
        np.testing.assert_allclose(env.physics.control(), control, rtol=1e-6)
    env.close()


def test_set_seed_restarts_the_stream() -> None:
    env = PixelDMControlEnv("reacher", "easy", seed=11)
    first, second = (env.reset()["pixels"] for _ in range(2))
    assert (first != second).any()
    env.set_seed(11)
    torch.testing.assert_close(env.reset()["pixels"], first)
    env.set_seed(12)
    assert (env.reset()["pixels"] != first).any()
    env.close()


def test_terrain_is_drawn_anew_each_episode() -> None:
    env = PixelDMControlEnv("quadruped", "escape", seed=0)
    for _ in range(2):
        pixels = env.reset()["pixels"]
    fresh = PixelDMControlEnv("quadruped", "escape", seed=0)
    np.copyto(fresh.physics.model.hfield_data, env.physics.model.hfield_data)
    fresh._renderer.upload_height_fields()
    fresh.physics.set_state(env.physics.get_state())
    fresh.physics.forward()
    np.testing.assert_array_equal(fresh._renderer.draw()[0], pixels.numpy())
    env.close()
    fresh.close()


def test_make_env_marks_starts_and_sums_rewards_over_episodes() -> None:
    env = make_env("cartpole", "balance", image_size=16, action_repeat=250, seed=0)
    check_env_specs(env)
    rollout = env.rollout(10, break_when_any_done=False)
    starts = torch.arange(10) % 4 == 0  # 1000 control steps are 4 agent steps
    assert torch.equal(rollout["is_init"].squeeze(-1), starts)
    assert torch.equal(
        rollout["next", "done"].squeeze(-1), starts.roll(-1) & (torch.arange(10) < 9)
    )
    assert rollout["next", "step_count"].flatten().tolist() == [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]
    returns = rollout["next", "reward"].flatten()[4:8].cumsum(0)
    torch.testing.assert_close(rollout["next", "episode_reward"].flatten()[4:8], returns)
    env.close()


def test_batch_in_processes_equals_its_envs_one_by_one() -> None:
    batch = make_env("reacher", "easy", num_envs=2, action_repeat=400, seed=7)
    actions = torch.rand(2, 7, 2) * 2 - 1
    policy_steps = iter(actions.unbind(1))

    def policy(tensordict: TensorDict) -> TensorDict:
        return tensordict.set("action", next(policy_steps))

    rollout = batch.rollout(7, policy, break_when_any_done=False)
    check_env_specs(batch, seed=None)
    batch.close()
    assert (rollout["pixels"][0, 0] != rollout["pixels"][1, 0]).any()
    assert rollout["is_init"].squeeze(-1).tolist() == [[True, False, False] * 2 + [True]] * 2
    for index in range(2):
        env = PixelDMControlEnv(
            "reacher", "easy", action_repeat=400, seed=derive_seed(7, "env", index)
        )
        output = TensorDict()
        for time_index in range(7):
            data = env.reset() if time_index % 3 == 0 else output
            for key in ("pixels", "foreground_mask"):
                assert torch.equal(rollout[key][index, time_index], data[key])
            output = step(env, actions[index, time_index])
            for key in ("pixels", "foreground_mask", "reward", "done", "truncated", "terminated"):
                assert torch.equal(rollout["next", key][index, time_index], output[key])
        env.close()


class CountingEnv(EnvBase):
    """Stands for a user's env: pixels that show how many steps were made."""

    def __init__(self, task: str, *, image_size: int, seed: int, **settings: object) -> None:
        super().__init__()
        self.task, self.seed, self.settings = task, seed, settings
        self.observation_spec = Composite(
            pixels=Bounded(0, 255, shape=(3, image_size, image_size), dtype=torch.uint8)
        )
        self.action_spec = Bounded(-1, 1, shape=(1,), dtype=torch.float32)
        self.reward_spec = Unbounded(shape=(1,), dtype=torch.float32)
        self.count = 0

    def _observe(self) -> dict[str, torch.Tensor]:
        shape = self.observation_spec["pixels"].shape
        return {"pixels": torch.full(shape, self.count, dtype=torch.uint8)}

    def _reset(self, tensordict: TensorDict | None = None, **kwargs: object) -> TensorDict:
        self.count = 0
        return TensorDict(self._observe(), [])

    def _step(self, tensordict: TensorDict) -> TensorDict:
        self.count += 1
        flags = {"reward": torch.ones(1), "done": torch.zeros(1, dtype=torch.bool)}
        return TensorDict(self._observe() | flags, [])

    def _set_seed(self, seed: int | None) -> None:
        self.seed = seed


def test_a_registered_env(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_REGISTRY", {})
    register_env("counting", CountingEnv)
    validate_task("counting", "anything")
    env = make_env("counting", "anything", image_size=16, seed=4, foreground_mask=False)
    inner = env.base_env
    assert (inner.task, inner.seed) == ("anything", derive_seed(4, "env", 0))
    assert inner.settings["foreground_mask"] is False
    rollout = env.rollout(5)
    assert rollout["next", "pixels"][:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5]
    assert rollout["next", "episode_reward"][-1].item() == 5
    for taken in ("counting", "walker"):
        with pytest.raises(ValueError, match=f"domain '{taken}' is taken"):
            register_env(taken, CountingEnv)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"domain": "walkr"}, r"domain is 'walkr': must be one of acrobot, .*walker"),
        ({"task": "fly"}, r"task is 'fly': walker has .*walk"),
        ({"render": "pretty"}, r"render is 'pretty': must be one of fast, reference"),
        ({"image_size": 8}, r"image_size is 8: must be an integer of at least 16"),
        ({"image_size": 64.0}, r"image_size is 64.0: must be an integer of at least 16"),
        ({"image_size": True}, r"image_size is True: must be an integer"),
        ({"action_repeat": 0}, r"action_repeat is 0: must be an integer of at least 1"),
        ({"num_envs": 0}, r"num_envs is 0: must be an integer of at least 1"),
        ({"seed": -1}, r"seed is -1: must be an integer of at least 0"),
        ({"camera_id": 9, "num_envs": 4}, r"camera_id is 9: walker has cameras 0 to 1"),
        ({"camera_id": -1}, r"camera_id is -1: walker has cameras 0 to 1"),
        ({"distraction": "easier"}, r"distraction is 'easier': must be one of none, easy"),
        ({"background_source": "clips"}, r"background_source is 'clips': must be None"),
        ({"background_split": "test"}, r"background_split is 'test': must be one of train, val"),
    ],
)
def test_bad_settings_are_named_at_once(settings: dict[str, object], message: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ValueError, match=message):
        make_env(**{"domain": "walker", "task": "walk"} | settings)
    assert time.perf_counter() - start < 1.0


def test_the_env_checks_its_own_settings() -> None:
    with pytest.raises(ValueError, match="image_size is 3"):
        PixelDMControlEnv("walker", "walk", image_size=3)
    with pytest.raises(ValueError, match="task is 'fly'"):
        PixelDMControlEnv("walker", "fly")
    with pytest.raises(ValueError, match="camera_id is 2: walker has cameras 0 to 1"):
        PixelDMControlEnv("walker", "walk", camera_id=2)

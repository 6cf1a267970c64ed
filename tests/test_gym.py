"""Gymnasium's envs from pixels: pictures, repeats, ends, seeds, masks, errors, and whole runs."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.checkout import ROOT
from helpers.models import SIZE, make_loss
from helpers.runs import tiny_run
from hydra import compose, initialize_config_dir
from torch.nn import functional as F
from torchrl.envs.utils import check_env_specs

from w2f_torchrl.checkpoint import latest_checkpoint
from w2f_torchrl.data import records_from_rollout
from w2f_torchrl.data.environments import probe_env
from w2f_torchrl.envs import make_env, validate_task
from w2f_torchrl.envs.gym import tasks
from w2f_torchrl.masks.prepare import collect_frames
from w2f_torchrl.segmenters import MedianSegmenter
from w2f_torchrl.trainers import ConfigError, Trainer, load_policy, to_run_config
from w2f_torchrl.utils.seeding import derive_seed

gymnasium = pytest.importorskip("gymnasium", reason="needs the extra gym: make extras")
np = pytest.importorskip("numpy")
from helpers import painted_env  # noqa: E402  # imports gymnasium

painted_env.register()
IDS = ("CartPole-v1", "Pendulum-v1", "CarRacing-v3")


def raw(task: str, seed: int, **kwargs):
    """The env itself, after the reset that a run's first env makes."""
    env = gymnasium.make(task, render_mode="rgb_array", **kwargs)
    env.reset(seed=derive_seed(seed, "env", 0))
    return env


def means_of_areas(picture, size: int):
    """Each pixel is the mean of those whose centres it covers: the definition, by products."""

    def shares(length: int):
        edges, centres = np.arange(size + 1) * length / size, np.arange(length) + 0.5
        covered = (edges[:-1, None] < centres) & (centres <= edges[1:, None])
        return covered / covered.sum(1, keepdims=True)

    rows, columns = shares(picture.shape[0]), shares(picture.shape[1])
    return rows @ picture.astype(np.float64).transpose(2, 0, 1) @ columns.T


# ------------------------------------------------------------------ one env


@pytest.mark.parametrize("task", IDS)
def test_pictures_are_the_envs_own_resized_and_specs_are_true(task):
    env = make_env("gym", task, image_size=64, action_repeat=1, seed=5)
    other = raw(task, 5)
    first = env.reset()["pixels"]
    assert (first.dtype, first.shape) == (torch.uint8, (3, 64, 64))
    assert np.abs(first.numpy() - means_of_areas(other.render(), 64)).max() <= 1
    assert first.float().std() > 5
    if task == "Pendulum-v1":
        check_env_specs(env)
    for one in (env, other):
        one.close()


def test_a_picture_of_the_right_size_is_not_touched():
    from w2f_torchrl.envs.gym.pictures import resize

    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    assert resize(picture, 16) is picture


@pytest.mark.parametrize(("task", "repeat"), [("CartPole-v1", 2), ("Pendulum-v1", 3)])
def test_actions_are_repeated_rewards_summed_and_ends_told_apart(task, repeat):
    """Against Gymnasium's own env with the same seed and actions; CartPole falls, Pendulum can't.

    The continuation's targets follow ``terminated``: a fall is an end, a time limit is not.
    """
    env, other = make_env("gym", task, image_size=SIZE, action_repeat=repeat, seed=2), raw(task, 2)
    assert env.base_env.max_episode_steps == (500 if task == "CartPole-v1" else 200)
    torch.manual_seed(0)
    played = env.rollout(300)
    rewards, ends = [], []
    for action in played["action"]:
        given = int(action.argmax()) if task == "CartPole-v1" else 2 * action.numpy()
        total, over = 0.0, False
        for _ in range(repeat):
            if not over:
                _, reward, terminated, truncated, _ = other.step(given)
                total, over = total + float(reward), terminated or truncated
        rewards.append(total)
        ends.append((terminated, truncated))
    torch.testing.assert_close(played["next", "reward"][:, 0], torch.tensor(rewards))
    falls = task == "CartPole-v1"
    assert ends[:-1] == [(False, False)] * (len(ends) - 1)
    assert ends[-1] == (falls, not falls)
    assert len(ends) == (67 if task == "Pendulum-v1" else len(ends)) < 100
    flags = [played["next", name][:, 0].tolist() for name in ("terminated", "truncated", "done")]
    assert flags == [[e[0] for e in ends], [e[1] for e in ends], [any(e) for e in ends]]
    last = means_of_areas(other.render(), SIZE)
    assert np.abs(played["next", "pixels"][-1].numpy() - last).max() <= 1

    records = records_from_rollout(played.unsqueeze(0)).unsqueeze(0)
    loss = make_loss("whole", actions=2 if falls else None)
    if not falls:
        records["action"] = records["action"].expand(-1, -1, 2)
    torch.manual_seed(0)
    model_td = loss.world_model(records.select(*loss.in_keys))
    found = loss.world_model_losses(model_td)[0]["continuation"]
    targets = torch.full((1, len(ends) + 1, 1), 1 - 1 / 333)
    targets[0, -1] = 0.0 if falls else 1 - 1 / 333
    logits = model_td["next", "continue_logits"]
    torch.testing.assert_close(found, F.binary_cross_entropy_with_logits(logits, targets))
    env.close()


def test_seeds_make_episodes_and_envs_differ():
    first, again, other = (
        make_env("gym", "CartPole-v1", image_size=32, action_repeat=1, seed=seed)
        for seed in (1, 1, 2)
    )
    starts = []
    for env in (first, again, other):
        states = []
        for _ in range(3):
            env.reset()
            states.append(env.base_env._env.unwrapped.state.copy())
        starts.append(np.stack(states))
    assert np.array_equal(starts[0], starts[1])
    assert not np.isclose(starts[0], starts[2]).any()
    assert not np.isclose(starts[0][0], starts[0][1]).any()
    first.set_seed(7, static_seed=True)
    first.reset()
    wanted = gymnasium.make("CartPole-v1").reset(seed=7)[0]
    assert np.allclose(first.base_env._env.unwrapped.state, wanted)


def test_one_drawing_per_agent_step_and_choices_are_counted_from_the_envs_first():
    env = make_env("gym", "w2f/Painted-v0", image_size=16, action_repeat=3)
    inner = env.base_env._env.unwrapped
    td = env.reset()
    drawn = inner.drawn
    for index in range(2):
        action = F.one_hot(torch.tensor(2 * index), 3).float()
        td = env.step(td.set("action", action))["next"]
    assert inner.drawn - drawn == 2
    assert [int(action) for action in inner.received] == [-1] * 3 + [1] * 3
    assert float(td["reward"]) == 3
    assert td["pixels"].max() == 200
    last = env.step(td.set("action", torch.eye(3)[1]))["next"]  # over after the seventh step
    assert (float(last["reward"]), bool(last["terminated"])) == (1, True)


def test_an_env_may_give_its_mask():
    env = make_env("gym", "w2f/Masked-v0", image_size=20, action_repeat=1)
    check_env_specs(env)
    mask = env.reset()["foreground_mask"]
    wanted = torch.zeros(1, 20, 20, dtype=torch.bool)
    wanted[:, 5:15, 5:15] = True
    assert torch.equal(mask, wanted)
    hidden = make_env("gym", "w2f/Masked-v0", image_size=20, foreground_mask=False)
    assert "foreground_mask" not in hidden.reset().keys()
    assert "foreground_mask" not in make_env("gym", "w2f/Painted-v0").reset().keys()


@pytest.mark.parametrize("task", ["CartPole-v1", "Pendulum-v1"])
def test_the_median_finds_what_moves(task):
    frames = collect_frames(make_env("gym", task, image_size=32, seed=1), 60, seed=0)["pixels"]
    masks = MedianSegmenter(24).fit(frames)(frames)
    assert 0.002 < masks.float().mean() < 0.15
    # What differs is drawn in the middle: the track's ends and the corners stay.
    assert not masks[..., :3].any()


# ------------------------------------------------------------------ what goes wrong


def gym_run(run_dir: Path, task: str = "CartPole-v1", **changes):
    environment = {"domain": "gym", "task": task, "action_repeat": 2}
    environment |= changes.pop("environment", {})
    settings = {"segmentation": {"source": "median"}, "resume": "auto"} | changes
    return tiny_run(run_dir, environment=environment, **settings)


@pytest.mark.parametrize(
    ("task", "environment", "match"),
    [
        ("CartPole-v9", {}, r"environment.task='CartPole-v9' is no id of Gymnasium: .*version"),
        ("CartPoel-v1", {}, r"environment.task='CartPoel-v1' is no id .*CartPole"),
        ("nowhere:CartPole-v1", {}, r"environment.task='nowhere:CartPole-v1' is no id"),
        ("CartPole-v1", {"kwargs": {"render_mode": "human"}}, "render_mode is set by the run"),
        ("CartPole-v1", {"kwargs": {"seed": 3}}, "seed comes from the run's own settings"),
    ],
)
def test_wrong_settings_are_named_before_an_env_is_made(
    tmp_path, monkeypatch, task, environment, match
):
    monkeypatch.setattr(gymnasium, "make", lambda *a, **k: pytest.fail("an env was made"))
    with pytest.raises(ConfigError, match=match):
        gym_run(tmp_path, task, environment=environment).validate()


@pytest.mark.parametrize(
    ("task", "environment", "match"),
    [
        ("CartPole-v1", {"kwargs": {"length": 2}}, r"kwargs=\{'length': 2\}.*'length'"),
        ("CartPole-v1", {"render": "reference"}, "environment.render='reference' has no effect"),
        ("CartPole-v1", {"camera_id": 1}, "unexpected keyword argument 'camera_id'"),
        ("CartPole-v1", {"action_range": [-1, 1]}, "must be null .*discrete"),
        ("Taxi-v4", {"kwargs": {"nonsense": 1}}, "nonsense"),
    ],
)
def test_what_the_env_itself_refuses_is_named(tmp_path, task, environment, match):
    with pytest.raises(ConfigError, match=match):
        probe_env(gym_run(tmp_path, task, environment=environment))


@pytest.mark.parametrize(
    "space", [gymnasium.spaces.MultiDiscrete([2, 3]), gymnasium.spaces.MultiBinary(3)]
)
def test_other_actions_are_named(tmp_path, space):
    environment = {"kwargs": {"action_space": space}}
    with pytest.raises(ValueError, match=r"the actions are Multi.*allowed: Box, or Discrete"):
        make_env("gym", "w2f/Painted-v0", kwargs=environment["kwargs"])


def test_an_env_that_draws_nothing_is_named():
    flat = {"picture": np.zeros((4, 4), np.uint8)}
    env = make_env("gym", "w2f/Painted-v0", kwargs=flat)
    with pytest.raises(ValueError, match=r"the env draws \(4, 4\); it must draw \[H, W, 3\]"):
        env.reset()


def test_the_simulators_masks_do_not_exist(tmp_path):
    with pytest.raises(ConfigError, match=r"segmentation=simulator .*gym has no foreground_mask"):
        Trainer(gym_run(tmp_path / "run", segmentation={"source": "simulator"}))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_missing_packages_name_the_extra(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise gymnasium.error.DependencyNotInstalled("Box2D is not installed")

    with monkeypatch.context() as patch:
        patch.setattr(gymnasium, "make", refuse)
        with pytest.raises(ConfigError, match=r"Box2D is not installed.*w2f_torchrl\[gym\]"):
            probe_env(gym_run(tmp_path))
    find = importlib.util.find_spec
    monkeypatch.setattr(
        tasks.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "gymnasium" else find(name, *rest),
    )
    with pytest.raises(ValueError, match=r"needs gymnasium: pip install 'w2f_torchrl\[gym\]'"):
        validate_task("gym", "CartPole-v1")


def test_the_control_suite_takes_no_further_arguments():
    with pytest.raises(ValueError, match=r"environment.kwargs=\{'a': 1\} must be empty"):
        make_env("cartpole", "balance", kwargs={"a": 1})


def test_checking_an_id_imports_no_torch():
    code = (
        "import sys\nfrom w2f_torchrl.envs import validate_task\n"
        "validate_task('gym', 'CartPole-v1')\nassert 'torch' not in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


# ------------------------------------------------------------------ runs


def composed(*overrides: str):
    importlib.import_module("sota_configs.world2filter")  # registers the typed settings
    with initialize_config_dir(str(ROOT / "sota_configs"), version_base="1.3"):
        return to_run_config(compose("config", list(overrides)))


def test_arguments_of_the_env_come_from_the_command_line():
    config = composed(
        "environment=gym",
        "environment.task=CarRacing-v3",
        "environment.kwargs.continuous=false",
        "segmentation=median",
        "device=cpu",
    )
    assert config.environment.action_repeat == 1
    facts = probe_env(config)
    assert (facts.action_size, facts.discrete_actions, facts.has_mask) == (5, True, False)
    config = composed("environment=gym", "environment.task=CarRacing-v3", "algo=dreamer_v3")
    facts = probe_env(config)
    assert (facts.action_size, facts.discrete_actions) == (3, False)
    composed("experiment=gym_cartpole", "device=cpu").validate()


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("Pendulum-v1", {"algo": {"name": "dreamer_v3", "latent": None}, "segmentation": {}}),
        ("w2f/Masked-v0", {"segmentation": {"source": "simulator"}}),
    ],
    ids=["Pendulum-v1", "a mask of its own"],
)
def test_a_run_trains_and_its_policy_acts(tmp_path, task, changes):
    trainer = Trainer(gym_run(tmp_path / "run", task, **changes))
    trainer.train()
    assert trainer.updates > 0
    policy = load_policy(latest_checkpoint(tmp_path / "run" / "checkpoints"))
    played = policy.make_env(seed=1).rollout(5, policy)
    assert played["next", "reward"].isfinite().all()


@pytest.mark.usefixtures("no_curves")
def test_a_resume_begins_new_episodes_and_says_so(tmp_path, caplog):
    for frames in (256, 320):
        Trainer(gym_run(tmp_path / "run", training={"total_frames": frames})).train()
    assert "the environments begin new episodes" in caplog.text


@pytest.mark.timeout(900)
def test_cartpole_trains_from_the_command_line(tmp_path):
    """A worker process, a few updates, an evaluation with its film, in well under a minute."""
    run = tmp_path / "run"
    sizes = "belief_size=16 hidden_size=8 num_categoricals=4 num_classes=4 cnn_depth=4 units=8"
    small = [f"model.{word}" for word in sizes.split()]
    small += ["model.background_belief_size=16", "model.background_hidden_size=8"]
    small += ["model.background_num_classes=4", "model.background_cnn_depth=4"]
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "sota_configs" / "world2filter.py"),
            *("experiment=gym_cartpole", "environment.num_envs=2", "environment.image_size=32"),
            *("training.batch_size=2", "training.prefill_steps=64", "training.train_ratio=4"),
            *("training.total_frames=320", "evaluation.every_frames=320"),
            *("evaluation.episodes=1", "evaluation.action=sample", "logging.every_updates=2"),
            *("logging.report=false", "device=cpu", f"run_dir={run}", *small),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "pygame" not in done.stdout
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row for row in rows if "wm/total_loss" in row]
    assert losses[-1]["updates"] >= 10
    assert all(0 < row["ac/entropy"] <= 0.6932 for row in losses)  # log 2
    assert any(0 < row["eval/return_mean"] <= 500 for row in rows if "eval/return_mean" in row)
    assert any(row["episode/length"] < 100 for row in rows if "episode/length" in row)
    assert list((run / "videos").rglob("*.mp4"))

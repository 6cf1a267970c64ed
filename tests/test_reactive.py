"""Scenery that reacts: what it shows and when, what it leaves alone, and that it is restored."""

from __future__ import annotations

import itertools
import pickle

from helpers.counting_env import RECURRENT, DummyPolicy
from helpers.foreground import where_the_foreground_shows
from tensordict import TensorDict

from w2f_torchrl.data import make_collector
from w2f_torchrl.data.collector.resumable import collector_state, load_collector_state
from w2f_torchrl.envs import (
    BackgroundConfig,
    CameraConfig,
    ColorConfig,
    DistractionConfig,
    PixelDMControlEnv,
    ReactiveConfig,
    evaluation_sets,
    make_env,
    validate_distraction,
)
from w2f_torchrl.envs.scenery.distractions import REACTIVE, parse_distraction
from w2f_torchrl.envs.scenery.reactive import ReactiveGrid
from w2f_torchrl.evaluation import record_episodes, replace_backgrounds

# isort: split
# MuJoCo after torch's compiler: the other order crashes with Mesa (see test_imports.py).
import numpy as np
import pytest
import torch
from PIL import Image

SIZE = 32
STEPS = 6


def grid(function: str = "action", *, action_size: int = 2, split: str = "train", **settings):
    config = ReactiveConfig(function, **settings)
    return ReactiveGrid(config, action_size=action_size, size=SIZE, split=split)


def pictures_of(grid: ReactiveGrid, action, reward: float, steps: int = 1) -> np.ndarray:
    """The picture after some equal agent steps of a new episode."""
    grid.start()
    for _ in range(steps):
        grid.step(np.asarray(action), reward)
    return grid.frame.copy()


# ------------------------------------------------------------------ the function


@pytest.mark.parametrize("bins", [1, 2, 3, 5])
def test_pictures_differ_just_when_a_bin_of_the_action_does(bins):
    """Bins are equal parts of [-1, 1] in each dimension."""
    made, edges = grid(action_bins=bins), np.linspace(-1, 1, bins + 1)[1:-1]
    values = np.array([-1.5, -1.0, -0.61, -0.35, -0.1, 0.0, 0.1, 0.35, 0.61, 1.0, 2.0])
    seen: dict[tuple, bytes] = {}
    for pair in itertools.product(values, values):
        expected = tuple(np.searchsorted(edges, pair, side="right"))
        picture = pictures_of(made, pair, 0.0).tobytes()
        assert seen.setdefault(expected, picture) == picture
    assert len(seen) == len(set(seen.values())) == bins**2


@pytest.mark.parametrize("bins", [1, 4, 256])
def test_pictures_of_the_reward_depend_on_its_bin_alone(bins):
    made, rewards = grid("reward", reward_bins=bins), np.linspace(0, 1, 301)
    expected = np.searchsorted(np.arange(1, bins) / bins, rewards, side="right")
    seen: dict[int, bytes] = {}
    generator = np.random.default_rng(0)
    for reward, bin_ in zip(rewards, expected, strict=True):
        steps = int(generator.integers(1, 9))
        picture = pictures_of(made, generator.uniform(-1, 1, 2), reward, steps).tobytes()
        assert seen.setdefault(bin_, picture) == picture
    assert len(seen) == len(set(seen.values())) == bins
    assert pictures_of(made, [0, 0], -3.0).tobytes() == seen[0]
    assert pictures_of(made, [0, 0], 7.0).tobytes() == seen[bins - 1]


def test_pictures_of_the_time_repeat_after_the_period():
    made = grid("time", time_period=4)
    generator = np.random.default_rng(0)
    first = [pictures_of(made, generator.uniform(-1, 1, 2), 0.3, step) for step in range(9)]
    assert len({picture.tobytes() for picture in first[:4]}) == 4
    for step, picture in enumerate(first):
        np.testing.assert_array_equal(picture, first[step % 4])


def test_pictures_of_action_and_time_are_of_both_together():
    made = grid("action_time", action_bins=3, action_dimensions=1, time_period=5)
    seen = {
        (action, step): pictures_of(made, [action, other], reward, step).tobytes()
        for action in (-1.0, 0.0, 1.0)
        for step in range(1, 6)
        for other, reward in ((0.0, 0.0), (1.0, 0.9))
    }
    assert len(set(seen.values())) == len(seen) == 15  # the second dimension is not read


def test_cells_are_blocks_of_uniform_independent_colours():
    made = grid(grid=8)
    colors = []
    for action in itertools.product((-1.0, 0.0, 1.0), repeat=2):
        picture = pictures_of(made, action, 0.0)
        blocks = picture.reshape(8, 4, 8, 4, 3)
        assert (blocks == blocks[:, :1, :, :1]).all()
        colors.append(blocks[:, 0, :, 0].reshape(-1, 3))
    colors = np.array(colors, dtype=np.float64)  # [pictures, cells, 3]
    # Uniform over 0 to 255: mean 127.5, standard deviation 73.9; each error is within 4 sigma.
    assert colors.mean() == pytest.approx(127.5, abs=4 * 73.9 / colors.size**0.5)
    assert colors.std() == pytest.approx(73.9, abs=3)
    assert abs(np.corrcoef(colors.reshape(9, -1))[np.triu_indices(9, 1)]).max() < 0.3
    assert abs(np.corrcoef(colors.reshape(-1, 3).T)[np.triu_indices(3, 1)]).max() < 0.2


@pytest.mark.parametrize(("cells", "size"), [(16, 64), (5, 32), (7, 200), (64, 32)])
def test_cells_cover_pictures_of_any_size(cells, size):
    made = ReactiveGrid(ReactiveConfig(grid=cells), action_size=1, size=size)
    picture = made.frame
    expected = Image.fromarray(made.cells()).resize((size, size), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(picture, np.asarray(expected))


@pytest.mark.parametrize("function", ["action", "reward", "time", "action_time"])
def test_validation_and_other_seeds_have_other_colours(function):
    ways = [grid(function), grid(function, split="val"), grid(function, seed=1)]
    ways += [grid(other) for other in ("action", "reward", "time") if other != function]
    pictures = [pictures_of(made, [0.9, -0.9], 0.5) for made in ways]
    for one, other in itertools.combinations(pictures, 2):
        assert (one == other).all(-1).mean() < 0.01
    again = pictures_of(grid(function), [0.9, -0.9], 0.5)
    np.testing.assert_array_equal(again, pictures[0])


def test_more_dimensions_than_the_action_has_are_refused():
    with pytest.raises(ValueError, match=r"action_dimensions=3 must be at most 2, the number of"):
        grid(action_dimensions=3)
    grid("time", action_dimensions=3)  # not read


# ------------------------------------------------------------------ in an env


def make(domain="walker", task="walk", **settings) -> PixelDMControlEnv:
    defaults = {"image_size": SIZE, "distraction": "reactive_action", "seed": 3}
    return PixelDMControlEnv(domain, task, **(defaults | settings))


def actions_of(env: PixelDMControlEnv, steps: int = STEPS, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(steps, *env.action_spec.shape, generator=generator) * 2 - 1


def play(env: PixelDMControlEnv, actions: torch.Tensor) -> TensorDict:
    """A reset and these actions: pixels and masks [T + 1], rewards [T]."""
    data = [env.reset()]
    for action in actions:
        data.append(env.step(TensorDict({"action": action}, []))["next"])
    return TensorDict(
        {
            "pixels": torch.stack([each["pixels"] for each in data]),
            "masks": torch.stack([each["foreground_mask"] for each in data]),
            "rewards": torch.stack([each.get("reward", torch.zeros(1)) for each in data]),
        }
    )


@pytest.mark.render
@pytest.mark.parametrize("repeat", [1, 3])
@pytest.mark.parametrize("name", REACTIVE)
def test_a_picture_shows_the_action_that_led_to_it_and_its_reward(name, repeat):
    """Outside the mask every pixel is that of a grid told about this step, not another."""
    env = make("cartpole", "balance", distraction=name, action_repeat=repeat)
    actions = actions_of(env)
    actions[2] = 1.5  # clipped
    played = play(env, actions)
    made = ReactiveGrid(REACTIVE[name], action_size=1, size=SIZE)
    expected = [made.frame.copy()]
    for action, reward in zip(actions, played["rewards"][1:], strict=True):
        made.step(action.clamp(-1, 1).numpy(), float(reward) / repeat)
        expected.append(made.frame.copy())
    for picture, mask, frame in zip(played["pixels"], played["masks"], expected, strict=True):
        outside = ~mask[0].numpy()
        assert 0 < mask.sum() < 0.2 * mask.numel()
        np.testing.assert_array_equal(picture.permute(1, 2, 0).numpy()[outside], frame[outside])
    assert len({frame.tobytes() for frame in expected}) > 2
    env.close()


@pytest.mark.render
def test_the_reward_of_a_repeat_that_is_cut_short_is_a_mean(monkeypatch):
    """The last agent step of an episode can have fewer control steps."""
    env = make("cartpole", "balance", distraction="reactive_reward", action_repeat=4)
    env._env._step_limit = 6
    told = []
    monkeypatch.setattr(env.distractor, "react", lambda action, reward: told.append(reward))
    rewards = play(env, actions_of(env, 2))["rewards"][1:, 0].tolist()
    assert told == [pytest.approx(rewards[0] / 4), pytest.approx(rewards[1] / 2)]
    assert min(told) > 0.5
    env.close()


@pytest.mark.render
@pytest.mark.parametrize("name", REACTIVE)
def test_colours_follow_the_actions_and_not_the_state(name):
    """Envs of two seeds are in other states, but the same bins have the same colours in both."""
    one, other = (make("cartpole", "swingup", distraction=name, seed=seed) for seed in (3, 8))
    actions = 0.8 * actions_of(one).sign()
    first, second = (play(env, actions) for env in (one, other))
    assert not np.array_equal(one.physics.get_state(), other.physics.get_state())
    outside = ~(first["masks"] | second["masks"])
    same = (first["pixels"] == second["pixels"]).all(1, keepdim=True)
    if name == "reactive_reward":  # of other states
        assert same[0][outside[0]].all()
    else:
        assert same[outside].all()
        third = play(one, -actions)
        differs = (first["pixels"] != third["pixels"]).all(1, keepdim=True)
        share = differs[1:][(outside & ~third["masks"])[1:]].float().mean()
        assert (share < 0.01) if name == "reactive_time" else (share > 0.8)
    for env in (one, other):
        env.close()


@pytest.mark.render
@pytest.mark.parametrize("name", REACTIVE)
def test_a_reset_shows_action_zero_reward_zero_time_zero(name):
    env = make("cartpole", "balance", distraction=name)
    first = env.reset()
    play(env, actions_of(env))
    again = env.reset()
    made = ReactiveGrid(REACTIVE[name], action_size=1, size=SIZE)
    for data in (first, again):
        outside = ~data["foreground_mask"][0].numpy()
        shown = data["pixels"].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(shown[outside], made.frame[outside])
    env.close()


@pytest.mark.render
@pytest.mark.parametrize("render", ["fast", "reference"])
@pytest.mark.parametrize(
    ("domain", "task"),
    [("walker", "walk"), ("cartpole", "swingup"), ("reacher", "easy"), ("ball_in_cup", "catch")],
)
def test_masks_are_exact(domain, task, render):
    """A pixel is masked just when it changes with the foreground's colour."""
    env = make(domain, task, image_size=64, render=render)
    data = env.reset()
    env.physics.model.mat_reflectance[:] = 0.0  # a mirror image is no foreground
    for action in actions_of(env, 3):
        data = env.step(data.set("action", action))["next"]
        shows = where_the_foreground_shows(env, domain)
        np.testing.assert_array_equal(data["foreground_mask"][0].numpy(), shows)
        assert shows.any()
    env.close()


@pytest.mark.render
@pytest.mark.parametrize("render", ["fast", "reference"])
@pytest.mark.parametrize(("domain", "task"), [("walker", "walk"), ("cheetah", "run")])
def test_masks_and_rewards_are_those_without_scenery(domain, task, render):
    """With an opaque floor nothing more or less is seen of the agent than without distractions."""
    opaque = DistractionConfig(reactive=ReactiveConfig(ground_alpha=1.0))
    # The reference mode without distractions has rounder bodies, and its outlines are smooth.
    still = DistractionConfig(color=ColorConfig(0.0)) if render == "reference" else "none"
    plain = make(domain, task, distraction=still, render=render)
    actions = actions_of(plain, 20)
    expected = play(plain, actions)
    for distraction in (opaque, "reactive_action", "reactive_reward"):
        env = make(domain, task, distraction=distraction, render=render)
        played = play(env, actions)
        assert torch.equal(played["rewards"], expected["rewards"])
        np.testing.assert_array_equal(env.physics.get_state(), plain.physics.get_state())
        if distraction is opaque:
            assert torch.equal(played["masks"], expected["masks"])
        else:  # soles below the floor are seen
            assert (played["masks"] | ~expected["masks"]).all()
        env.close()
    plain.close()


@pytest.mark.render
@pytest.mark.parametrize("render", ["fast", "reference"])
@pytest.mark.parametrize("name", REACTIVE)
def test_frames_after_a_restore_are_the_same(name, render):
    distraction = DistractionConfig(camera=CameraConfig(0.2), reactive=REACTIVE[name])
    settings = {"distraction": distraction, "render": render}
    first, second = make("cheetah", "run", **settings), make("cheetah", "run", seed=9, **settings)
    actions = actions_of(first, 8)
    play(first, actions[:4])
    second.reset()
    second.load_resume_state(pickle.loads(pickle.dumps(first.resume_state())))
    for action in actions[4:]:
        one, other = (
            env.step(TensorDict({"action": action}, []))["next"] for env in (first, second)
        )
        assert all(torch.equal(one[key], other[key]) for key in ("pixels", "foreground_mask"))
    assert first.resume_state()["distractor"] == second.resume_state()["distractor"]
    for env in (first, second):
        env.close()


def make_reactive_env(index: int, seed: int):
    del index
    settings = {"image_size": 16, "distraction": "reactive_action_time", "seed": seed}
    return make_env("cartpole", "swingup", **settings)


class RandomPolicy(DummyPolicy):
    """Random actions in the Control Suite's range."""

    def forward(self, tensordict):
        tensordict = super().forward(tensordict)
        tensordict["action"] = tensordict["action"] / 127.5 - 1
        return tensordict


@pytest.mark.render
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_collector_resumes_exactly(workers):
    options = {"num_envs": 2, "num_workers": workers, "frames_per_batch": 12, "seed": 3}
    first, second = (
        make_collector(make_reactive_env, RandomPolicy(), primers=RECURRENT, **options)
        for _ in range(2)
    )
    try:
        batches = iter(first)
        next(batches)
        state, expected = collector_state(first), next(batches)
        load_collector_state(second, state)  # with the random streams, which this process shares
        found = next(iter(second))
        assert expected["action"].std() > 0.2
        for key in ("pixels", "foreground_mask", "action", ("next", "pixels"), ("next", "reward")):
            assert torch.equal(expected[key], found[key]), key
    finally:
        first.shutdown()
        second.shutdown()


@pytest.mark.render
def test_replaced_scenery_is_the_other_splits_and_nothing_else_changes():
    env = make("cartpole", "swingup", distraction="reactive_action_time")
    episodes = record_episodes(env, 2, seed=1, max_steps=4)
    assert env.distractor.labels()["grid"].shape == (2,)
    assert ((episodes[0].scenery["grid"] >= 0) & (episodes[0].scenery["grid"] <= 1)).all()
    for episode, other in zip(episodes, replace_backgrounds(env, episodes), strict=True):
        assert torch.equal(episode.masks, other.masks)
        assert torch.equal(episode.actions, other.actions)
        np.testing.assert_array_equal(episode.scenery["grid"], other.scenery["grid"])
        differs = (episode.pixels != other.pixels).any(1, keepdim=True)
        assert not (differs & episode.masks).any()
        assert differs[~episode.masks].float().mean() > 0.98
    assert env.distractor.reactive.split == "train"
    env.close()


# ------------------------------------------------------------------ settings


def test_names_and_fields_say_the_same():
    for name, config in REACTIVE.items():
        assert parse_distraction(name) == DistractionConfig(reactive=config)
        assert name == f"reactive_{config.function}"
    mapping = {"reactive": {"function": "reward", "grid": 4, "seed": 2}, "camera": {"scale": 0.1}}
    expected = ReactiveConfig("reward", grid=4, seed=2)
    assert parse_distraction(mapping) == DistractionConfig(
        camera=CameraConfig(0.1), reactive=expected
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("reactive_state", "must be one of none, easy, medium, hard, reactive_action, reactive_"),
        ({"reactive": {"function": "state"}}, "reactive.function='state' is unknown; allowed:"),
        ({"reactive": {"cells": 4}}, "distraction.reactive.cells is unknown: must be one of func"),
        ({"reactive": {"grid": 0}}, "reactive.grid=0 must be at least 1"),
        ({"reactive": {"action_bins": 2.5}}, "reactive.action_bins=2.5 must be an integer"),
        ({"reactive": {"ground_alpha": 2}}, r"reactive.ground_alpha=2 must be in \[0, 1\]"),
        ({"reactive": "time"}, "reactive='time' must be a ReactiveConfig or null"),
        ({"reactive": {}, "background": {}}, "background and distraction.reactive change the"),
    ],
)
def test_bad_settings_are_named(value, message):
    with pytest.raises(ValueError, match=message):
        parse_distraction(value)


def test_videos_have_no_effect_with_a_grid():
    with pytest.raises(ValueError, match=r"'procedural': must be None, since .* shows no video"):
        validate_distraction("reactive_time", "procedural", "train")
    assert validate_distraction("reactive_time", None, "val") is not None


@pytest.mark.render
def test_dimensions_are_checked_before_a_process_starts(monkeypatch):
    monkeypatch.setattr("w2f_torchrl.envs.factory.ParallelEnv", None)
    distraction = {"reactive": {"action_dimensions": 2}}
    with pytest.raises(ValueError, match=r"action_dimensions=2 must be at most 1"):
        make_env("cartpole", "swingup", distraction=distraction, num_envs=2)


def test_evaluation_sets_show_the_colours_of_training_and_others():
    sets = evaluation_sets()
    for name, config in REACTIVE.items():
        for each, split in ((sets[name], "train"), (sets[f"unseen_{name}"], "val")):
            assert each.distraction == DistractionConfig(reactive=config)
            assert each.split == split
            assert each.background_source("my/clips") is None
    assert BackgroundConfig() == parse_distraction("easy").scenery

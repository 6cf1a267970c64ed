"""A camera that is disturbed at times: the chain, what each kind does, and masks of the visible."""

from __future__ import annotations

import pickle

from helpers.foreground import where_the_foreground_shows
from tensordict import TensorDict

from w2f_torchrl.envs import (
    CameraConfig,
    CorruptionConfig,
    DistractionConfig,
    PixelDMControlEnv,
    ReactiveConfig,
    evaluation_sets,
)
from w2f_torchrl.envs.renderers.corruption import corrupt, occluded
from w2f_torchrl.envs.scenery.distractions import CORRUPTIONS, parse_distraction
from w2f_torchrl.envs.scenery.walks import CorruptionWalk

# isort: split
# MuJoCo after torch's compiler: the other order crashes with Mesa (see test_imports.py).
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

SIZE = 32
NONE = dict.fromkeys(CORRUPTIONS, 0.0)


def only(kind: str, amount: float | None = None, **settings: float) -> CorruptionConfig:
    """A corruption of one kind."""
    value = getattr(CorruptionConfig(), kind) if amount is None else amount
    return CorruptionConfig(**(NONE | {kind: value} | settings))


def disturbed(kind: str, amount: float | None = None, seed: int = 0) -> CorruptionWalk:
    """A walk that is disturbed at once."""
    walk, generator = CorruptionWalk(only(kind, amount, start=1.0)), np.random.default_rng(seed)
    walk.start(generator)
    while walk.kind is None:
        walk.step(generator)
    return walk


# ------------------------------------------------------------------ the chain


@pytest.mark.parametrize(("start", "stop"), [(0.05, 0.1), (0.4, 0.25), (1.0, 1.0)])
def test_the_chain_has_its_probabilities(start, stop):
    """Shares, durations and kinds against the stationary distribution and geometric laws."""
    walk = CorruptionWalk(CorruptionConfig(start=start, stop=stop))
    generator = np.random.default_rng(0)
    walk.start(generator)
    kinds = []
    for _ in range(40_000):
        kinds.append(walk.kind)
        walk.step(generator)
    active = np.array([kind is not None for kind in kinds])
    assert active.mean() == pytest.approx(start / (start + stop), abs=0.02)
    begins = np.flatnonzero(~active[:-1] & active[1:]) + 1
    ends = np.flatnonzero(active[:-1] & ~active[1:]) + 1
    ends = ends[ends > begins[0]]
    lengths = ends - begins[: len(ends)]
    assert lengths.mean() == pytest.approx(1 / stop, rel=0.08)
    assert (lengths == 1).mean() == pytest.approx(stop, abs=0.03)
    for begin, end in zip(begins, ends, strict=False):
        assert len(set(kinds[begin:end])) == 1  # a disturbance keeps its kind
    first = [kinds[begin] for begin in begins]
    for kind in CORRUPTIONS:
        assert first.count(kind) / len(first) == pytest.approx(0.25, abs=0.05)


def test_episodes_start_as_the_chain_is_in_the_long_run():
    walk, generator = CorruptionWalk(CorruptionConfig()), np.random.default_rng(0)
    started = []
    for _ in range(6000):
        walk.start(generator)
        started.append(walk.kind is not None)
    assert np.mean(started) == pytest.approx(1 / 3, abs=0.02)


def test_kinds_of_amount_zero_do_not_occur():
    config = CorruptionConfig(noise=0.0, brightness=0.0, start=0.5, stop=0.5)
    walk, generator = CorruptionWalk(config), np.random.default_rng(0)
    walk.start(generator)
    seen = set()
    for _ in range(300):
        walk.step(generator)
        seen.add(walk.kind)
    assert seen == {None, "blur", "occluder"}


# ------------------------------------------------------------------ what it does to a picture


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.default_rng(1).integers(256, size=(3, SIZE, SIZE), dtype=np.uint8)


def test_a_clear_view_is_the_picture_itself(picture):
    walk = CorruptionWalk(CorruptionConfig())
    assert corrupt(picture, walk) is picture


def test_noise_is_gaussian_and_new_at_every_step():
    grey = np.full((3, 128, 128), 128, dtype=np.uint8)
    walk = disturbed("noise", 20.0)
    noisy = corrupt(grey, walk)
    error = noisy.astype(float) - 128
    assert error.mean() == pytest.approx(0, abs=0.4)
    assert error.std() == pytest.approx(20, abs=0.4)
    assert (np.abs(error) < 20).mean() == pytest.approx(0.6827, abs=0.02)
    correlations = np.corrcoef([error[0].ravel(), error[1].ravel()])
    assert abs(correlations[0, 1]) < 0.03  # each channel has its own noise
    np.testing.assert_array_equal(noisy, corrupt(grey, walk))
    before = walk.noise_seed
    walk.step(np.random.default_rng(5))
    assert walk.noise_seed != before
    ends = corrupt(np.stack([np.full((8, 8), value, np.uint8) for value in (0, 255, 128)]), walk)
    assert (ends[0] == 0).any()  # clipped, not wrapped around
    assert (ends[1] == 255).any()


@pytest.mark.parametrize("amount", [0.02, 0.04, 0.3])
def test_blur_is_the_gaussian_filter(picture, amount):
    expected = np.stack(
        [gaussian_filter(plane.astype(float), amount * SIZE, mode="nearest") for plane in picture]
    )
    blurred = corrupt(picture, disturbed("blur", amount))
    np.testing.assert_allclose(blurred, expected, atol=0.51)
    assert blurred.std() < 0.7 * picture.std()


def test_brightness_is_a_factor_below_or_above_one(picture):
    seen = set()
    for seed in range(12):
        found = corrupt(picture, disturbed("brightness", 0.6, seed))
        for factor in (0.4, 1.6):
            expected = np.clip(np.rint(factor * picture.astype(float)), 0, 255)
            if np.abs(found - expected).max() <= 1:
                seen.add((factor, seed))
    assert {factor for factor, _ in seen} == {0.4, 1.6}
    assert len(seen) == 12


def test_an_occluder_is_a_square_of_one_colour_inside_the_picture(picture):
    places, colors = set(), set()
    for seed in range(40):
        walk = disturbed("occluder", 0.25, seed)
        covered = corrupt(picture, walk)
        rows, columns = occluded(walk, SIZE)
        assert rows.stop - rows.start == columns.stop - columns.start == 8
        assert 0 <= rows.start <= SIZE - 8
        assert 0 <= columns.start <= SIZE - 8
        inside = covered[:, rows, columns].reshape(3, -1)
        assert (inside == inside[:, :1]).all()
        outside = np.ones((SIZE, SIZE), dtype=bool)
        outside[rows, columns] = False
        np.testing.assert_array_equal(covered[:, outside], picture[:, outside])
        places.add((rows.start, columns.start))
        colors.add(tuple(inside[:, 0].tolist()))
    assert len(places) > 30
    assert len(colors) == 40
    assert min(row for row, _ in places) < 4
    assert max(row for row, _ in places) > SIZE - 8 - 4


# ------------------------------------------------------------------ in an env

OFTEN = CorruptionConfig(start=0.5, stop=0.3)


def make(domain="walker", task="walk", **settings) -> PixelDMControlEnv:
    defaults = {"image_size": SIZE, "distraction": DistractionConfig(corruption=OFTEN), "seed": 3}
    return PixelDMControlEnv(domain, task, **(defaults | settings))


def play(env: PixelDMControlEnv, steps: int = 30) -> list[TensorDict]:
    generator = torch.Generator().manual_seed(0)
    data = [env.reset()]
    for _ in range(steps):
        action = torch.rand(env.action_spec.shape, generator=generator) * 2 - 1
        data.append(env.step(TensorDict({"action": action}, []))["next"])
    return data


SCENES = {
    "none": {},
    "video": {"background": {"num_videos": 2}},
    "grid": {"reactive": {}},
    "all": {"background": {"num_videos": 2}, "camera": {}, "color": {}},
}


@pytest.mark.render
@pytest.mark.parametrize("render", ["fast", "reference"])
@pytest.mark.parametrize("scene", SCENES)
def test_pictures_are_disturbed_masks_and_rewards_are_not(scene, render):
    """Against the same env without a corruption: only an occluder takes something from a mask."""
    both = SCENES[scene] | {"corruption": {"start": 0.5, "stop": 0.3}}
    # The reference mode without distractions has rounder bodies, and its outlines are smooth.
    plain = SCENES[scene] or {"color": {"scale": 0.0}}
    clear, env = make(distraction=plain, render=render), make(distraction=both, render=render)
    generator, seen, hidden = torch.Generator().manual_seed(0), set(), 0
    data, expected = env.reset(), clear.reset()
    for _ in range(25):
        walk = env.distractor.corruption
        seen.add(walk.kind)
        picture = corrupt(expected["pixels"].numpy(), walk)
        np.testing.assert_array_equal(data["pixels"].numpy(), picture)
        visible = expected["foreground_mask"].clone()
        if walk.kind == "occluder":
            visible[:, *occluded(walk, SIZE)] = False
            hidden += int((expected["foreground_mask"] & ~visible).sum())
        assert torch.equal(data["foreground_mask"], visible)
        action = torch.rand(env.action_spec.shape, generator=generator) * 2 - 1
        data, expected = (
            each.step(TensorDict({"action": action}, []))["next"] for each in (env, clear)
        )
        assert torch.equal(data["reward"], expected["reward"])
    assert seen == {None, *CORRUPTIONS}
    assert hidden > 0
    np.testing.assert_array_equal(env.physics.get_state(), clear.physics.get_state())
    for each in (env, clear):
        each.close()


@pytest.mark.render
def test_a_mask_marks_what_is_visible():
    """With an occluder too a pixel is masked just when it changes with the foreground's colour."""
    config = only("occluder", 0.5, start=1.0, stop=0.01)
    env = make("cheetah", "run", distraction=DistractionConfig(corruption=config), image_size=64)
    env.physics.model.mat_reflectance[:] = 0.0
    play(env, 3)
    assert env.distractor.corruption.kind == "occluder"
    picture, mask = env._renderer.draw()
    np.testing.assert_array_equal(mask[0], where_the_foreground_shows(env, "cheetah"))
    np.testing.assert_array_equal(picture, env._renderer.draw()[0])
    env.close()


@pytest.mark.render
@pytest.mark.parametrize("render", ["fast", "reference"])
def test_frames_after_a_restore_are_the_same(render):
    distraction = DistractionConfig(reactive=ReactiveConfig("time"), corruption=OFTEN)
    settings = {"distraction": distraction, "render": render}
    first, second = make(**settings), make(**settings, seed=9)
    play(first, 7)
    second.reset()
    second.load_resume_state(pickle.loads(pickle.dumps(first.resume_state())))
    kinds = set()
    for _ in range(15):
        kinds.add(first.distractor.corruption.kind)
        action = torch.full(first.action_spec.shape, 0.3)
        one, other = (
            env.step(TensorDict({"action": action}, []))["next"] for env in (first, second)
        )
        assert all(torch.equal(one[key], other[key]) for key in ("pixels", "foreground_mask"))
    one, other = (env.distractor.state_dict() for env in (first, second))
    assert one == other  # the next episode's start too
    assert len(kinds) > 2
    for env in (first, second):
        env.close()


@pytest.mark.render
def test_other_distractions_are_the_same_with_and_without_it():
    both = DistractionConfig(camera=CameraConfig(0.3), corruption=OFTEN)
    alone = DistractionConfig(camera=CameraConfig(0.3))
    one, other = make(distraction=both), make(distraction=alone)
    for env in (one, other):
        play(env, 5)
    assert one.distractor.camera.state_dict() == other.distractor.camera.state_dict()
    labels = one.distractor.labels()["corruption"]
    assert labels.tolist() == [
        float(one.distractor.corruption.kind == kind) for kind in CORRUPTIONS
    ]
    for env in (one, other):
        env.close()


@pytest.mark.render
@pytest.mark.parametrize(("unit", "moves"), [("control", 3 * 4), ("agent", 3)])
def test_the_chain_moves_with_the_other_distractions(unit, moves, monkeypatch):
    env = make(distraction=DistractionConfig(corruption=OFTEN, step_unit=unit), action_repeat=4)
    steps = []
    monkeypatch.setattr(CorruptionWalk, "step", lambda walk, generator: steps.append(walk))
    play(env, 3)
    assert len(steps) == moves
    env.close()


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"corruption": {"rain": 1}}, "distraction.corruption.rain is unknown: must be one of noi"),
        ({"corruption": {"noise": 300}}, r"corruption.noise=300 must be in \[0, 255\]"),
        ({"corruption": {"blur": -0.1}}, r"corruption.blur=-0.1 must be in \[0, 1\]"),
        ({"corruption": {"start": 0}}, r"corruption.start=0 must be in \(0, 1\]"),
        ({"corruption": {"stop": 1.5}}, r"corruption.stop=1.5 must be in \(0, 1\]"),
        ({"corruption": NONE}, "one of corruption.noise, corruption.blur, .* must be above 0"),
        ({"corruption": "noise"}, "corruption='noise' must be a CorruptionConfig or null"),
    ],
)
def test_bad_settings_are_named(value, message):
    with pytest.raises(ValueError, match=message):
        parse_distraction(value)


def test_the_name_and_the_set_are_the_defaults():
    expected = DistractionConfig(corruption=CorruptionConfig())
    assert parse_distraction("corruption") == expected
    assert evaluation_sets()["corruption"].distraction == expected

"""Walks of camera, colours and video against the specification, without drawing anything."""

from __future__ import annotations

import json
import math

import numpy as np
import numpy.typing as npt
import pytest

from w2f_torchrl.config import EnvironmentConfig, RunConfig, config_to_dict
from w2f_torchrl.envs import (
    BackgroundConfig,
    CameraConfig,
    ColorConfig,
    DistractionConfig,
    evaluation_sets,
)
from w2f_torchrl.envs.protocols.dmcgb import MODES
from w2f_torchrl.envs.scenery.camera_walk import (
    CameraWalk,
    camera_box,
    look_along,
    to_cartesian,
    to_sphere,
)
from w2f_torchrl.envs.scenery.distractions import DIFFICULTIES, REACTIVE, parse_distraction
from w2f_torchrl.envs.scenery.walks import ColorWalk, VideoWalk

STARTS = {  # the paper's cameras, from the centre of the walk
    "ball_in_cup": (0.0, -1.0, 0.8),
    "cartpole": (0.0, -4.0, 1.0),
    "cheetah": (-0.04, -3.0, 0.16),
    "reacher": (0.0, 0.0, 0.75),
    "walker": (-0.02, -2.0, 1.22),
}
STEPS = 10_000
Array = npt.NDArray[np.float64]


class Constant:
    """A generator whose normal numbers are given."""

    def __init__(self, noise: Array) -> None:
        self.noise = iter(noise)

    def standard_normal(self, shape: object) -> Array:
        return next(self.noise)


def specified_limits(start: tuple[float, float, float], scale: float, quadrant: bool) -> Array:
    """[2, 3]: least and greatest radius, azimuth, polar angle, from the table of the paper."""
    x, y, z = start
    radius = np.sqrt(x**2 + y**2 + z**2)
    azimuth = np.arctan2(y, x)
    polar = np.arccos(z / radius)
    delta = np.pi / 2 * scale
    limits = np.array(
        [
            [radius * (1 - 0.5 * scale), azimuth - delta, polar - delta],
            [radius * (1 + 1.5 * scale), azimuth + delta, polar + delta],
        ]
    )
    if quadrant:
        limits[0] = np.maximum(limits[0], [0, -np.pi, 0])
        limits[1] = np.minimum(limits[1], [np.inf, 0, np.pi / 2])
    return limits


@pytest.mark.parametrize("scale", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("name", STARTS)
def test_camera_box_is_the_specified_one(name: str, scale: float) -> None:
    box = camera_box(STARTS[name], scale)
    expected = specified_limits(STARTS[name], scale, quadrant=name != "reacher")
    np.testing.assert_allclose([box.low, box.high], expected, atol=1e-9)
    assert box.roll == pytest.approx(np.pi / 2 * scale)
    assert box.upright == (name != "reacher")


@pytest.mark.parametrize("name", STARTS)
def test_camera_walk_is_the_straightforward_formula(name: str) -> None:
    """Vectors all along: noise, clipped norm, Cartesian move, clipped sphere, the move made."""
    scale, generator = 0.3, np.random.default_rng(5)
    walk = CameraWalk(scale)
    walk.start(camera_box(STARTS[name], scale), generator)
    limits = specified_limits(STARTS[name], scale, quadrant=name != "reacher")
    speed = np.linalg.norm(STARTS[name]) / 4
    velocity, roll, roll_velocity = np.array(walk.velocity), walk.roll, walk.roll_velocity
    r, h, v = walk.sphere
    noise = generator.standard_normal((500, 4))
    source = Constant(noise)
    for row in noise:
        walk.step(source)  # type: ignore[arg-type]
        before = r * np.array([np.sin(v) * np.cos(h), np.sin(v) * np.sin(h), np.cos(v)])
        velocity = velocity + 0.1 * scale * speed * row[:3]
        velocity *= min(1.0, 0.4 * scale * speed / np.linalg.norm(velocity))
        x, y, z = before + velocity
        moved = [np.sqrt(x * x + y * y + z * z), np.arctan2(y, x), np.arctan2(np.hypot(x, y), z)]
        r, h, v = np.clip(moved, *limits)
        after = r * np.array([np.sin(v) * np.cos(h), np.sin(v) * np.sin(h), np.cos(v)])
        velocity = after - before
        limit = np.pi / 50 * scale
        roll_velocity = np.clip(roll_velocity + np.pi / 300 * scale * row[3], -limit, limit)
        rolled = np.clip(roll + roll_velocity, -np.pi / 2 * scale, np.pi / 2 * scale)
        roll_velocity, roll = rolled - roll, rolled
        np.testing.assert_allclose(walk.position, after, atol=1e-9)
        np.testing.assert_allclose(walk.velocity, velocity, atol=1e-9)
        assert (walk.roll, walk.roll_velocity) == pytest.approx((roll, roll_velocity), abs=1e-9)


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_camera_walks_stay_in_their_ranges_and_reach_them(name: str, difficulty: str) -> None:
    scale, generator = DIFFICULTIES[difficulty][0], np.random.default_rng(0)
    limits = specified_limits(STARTS[name], scale, quadrant=name != "reacher")
    walk = CameraWalk(scale)
    spheres, rolls, moves = [], [], []
    for step in range(STEPS):
        if step % 500 == 0:
            walk.start(camera_box(STARTS[name], scale), generator)
        before = np.array(walk.position)
        walk.step(generator)
        moves.append(np.linalg.norm(np.array(walk.position) - before))
        spheres.append(walk.sphere)
        rolls.append(walk.roll)
    low, high = np.min(spheres, axis=0), np.max(spheres, axis=0)
    span = limits[1] - limits[0]
    assert (low >= limits[0] - 1e-9).all()
    assert (high <= limits[1] + 1e-9).all()
    if name == "reacher":
        span, low, high = span[:2], low[:2], high[:2]  # polar angles of a moved camera are positive
        assert np.max(spheres, axis=0)[2] > 0.9 * limits[1, 2]
    assert (low <= limits[0, : len(low)] + 0.05 * span).all()
    assert (high >= limits[1, : len(high)] - 0.05 * span).all()
    assert max(map(abs, rolls)) <= np.pi / 2 * scale + 1e-9
    assert np.ptp(rolls) > 0.9 * np.pi * scale
    fastest = 0.4 * scale * np.linalg.norm(STARTS[name]) / 4
    if name != "reacher":  # at the pole the box's wall can push further than the velocity
        assert max(moves) <= fastest * 1.5
    assert np.quantile(moves, 0.9) > 0.5 * fastest


def test_a_walk_across_the_negative_x_axis_does_not_jump() -> None:
    walk, generator = CameraWalk(0.3), np.random.default_rng(1)
    walk.start(camera_box((-3.0, 0.0, 1.0), 0.3), generator)
    azimuths = []
    for _ in range(3000):
        before = np.array(walk.position)
        walk.step(generator)
        assert np.linalg.norm(np.array(walk.position) - before) < 0.2
        azimuths.append(walk.sphere[1])
    assert min(azimuths) < math.pi - 0.3
    assert max(azimuths) > math.pi + 0.3


@pytest.mark.parametrize("upright", [True, False])
def test_look_along_is_a_rotation_that_looks_there(upright: bool) -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        direction, roll = generator.standard_normal(3), generator.uniform(-1, 1)
        frame = np.reshape(look_along(tuple(direction), roll, upright=upright), (3, 3))
        np.testing.assert_allclose(frame @ frame.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(frame) == pytest.approx(1)
        np.testing.assert_allclose(frame[:, 2], -direction / np.linalg.norm(direction), atol=1e-12)
        unrolled = frame @ np.array(
            [
                [math.cos(roll), math.sin(roll), 0],
                [-math.sin(roll), math.cos(roll), 0],
                [0, 0, 1],
            ]
        )
        if upright:
            assert unrolled[2, 0] == pytest.approx(0, abs=1e-12)  # the horizon is level
            assert unrolled[2, 1] > 0
        else:  # the axis of the turn from straight down is horizontal: the shortest way
            assert unrolled[0, 1] == pytest.approx(unrolled[1, 0], abs=1e-12)


def test_looking_straight_down() -> None:
    for upright in (True, False):
        frame = look_along((0.0, 0.0, -2.0), 0.0, upright=upright)
        np.testing.assert_allclose(np.reshape(frame, (3, 3)), np.eye(3), atol=1e-12)


def test_spheres_there_and_back() -> None:
    for start in STARTS.values():
        np.testing.assert_allclose(to_cartesian(to_sphere(start)), start, atol=1e-12)


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_colors_stay_in_their_ranges_and_reach_them(difficulty: str) -> None:
    scale, generator = DIFFICULTIES[difficulty][0], np.random.default_rng(0)
    original = np.array([[0.5, 0.05, 1.0], [0.7, 0.6, 0.3]])
    low, high = np.maximum(original - scale, 0), np.minimum(original + scale, 1)
    walk = ColorWalk(original, scale)
    seen, steps = [], []
    for step in range(STEPS):
        if step % 500 == 0:
            walk.start(generator)
        before = walk.colors
        walk.step(generator)
        steps.append(walk.colors - before)
        seen.append(walk.colors)
    seen = np.array(seen)
    assert (seen >= low - 1e-12).all()
    assert (seen <= high + 1e-12).all()
    assert (seen.min(axis=0) <= low + 0.05 * scale).all()
    assert (seen.max(axis=0) >= high - 0.05 * scale).all()
    inside = (seen > low + 0.2 * scale) & (seen < high - 0.2 * scale)
    assert np.std(np.array(steps)[inside]) == pytest.approx(0.03 * scale, rel=0.03)


def test_color_walk_is_the_straightforward_formula() -> None:
    original = np.array([[0.2, 0.9, 0.5]])
    noise = np.random.default_rng(3).standard_normal((400, 1, 3))
    walk, source, expected = ColorWalk(original, 0.2), Constant(noise), original
    for row in noise:
        walk.step(source)  # type: ignore[arg-type]
        expected = np.clip(expected + 0.2 * 0.03 * row, [0.0, 0.7, 0.3], [0.4, 1.0, 0.7])
        np.testing.assert_allclose(walk.colors, expected, atol=1e-12)


def test_what_is_static_stays_where_it_starts() -> None:
    generator = np.random.default_rng(0)
    camera, color = CameraWalk(0.3, dynamic=False), ColorWalk(np.ones((2, 3)), 0.3, dynamic=False)
    video = VideoWalk([9], dynamic=False)
    camera.start(camera_box(STARTS["walker"], 0.3), generator)
    color.start(generator)
    video.start(generator)
    saved = camera.position, camera.roll, color.colors.copy(), video.frame
    for _ in range(20):
        camera.step(generator)
        color.step(generator)
        video.step()
    assert (camera.position, camera.roll, video.frame) == (saved[0], saved[1], saved[3])
    np.testing.assert_array_equal(color.colors, saved[2])


def test_a_video_plays_to_and_fro_from_a_random_start() -> None:
    generator = np.random.default_rng(0)
    video, starts = VideoWalk([5, 3]), set()
    for _ in range(200):
        video.start(generator)
        length = [5, 3][video.clip]
        starts.add((video.clip, video.frame, video.direction))
        there_and_back = [*range(length), *range(length - 2, 0, -1)]
        position = video.frame if video.direction > 0 else -video.frame % len(there_and_back)
        for step in range(1, 20):
            video.step()
            assert video.frame == there_and_back[(position + step) % len(there_and_back)]
    assert len(starts) == 2 * (5 + 3)


# ------------------------------------------------------------------ settings


def test_difficulties_are_the_papers() -> None:
    easy, medium, hard = (parse_distraction(name) for name in ("easy", "medium", "hard"))
    for config, scale, videos in ((easy, 0.1, 4), (medium, 0.2, 8), (hard, 0.3, None)):
        assert config is not None
        assert config.camera == CameraConfig(scale)
        assert config.color == ColorConfig(scale)
        assert config.background == BackgroundConfig(videos)
        assert config.step_unit == "control"


def test_ground_alphas_are_the_papers() -> None:
    alphas = {"reacher": 0.0, "walker": 1.0, "cheetah": 1.0}
    alphas |= dict.fromkeys(("cartpole", "finger", "ball_in_cup"), 0.3)
    for domain, alpha in alphas.items():
        assert BackgroundConfig().alpha(domain) == alpha
        assert BackgroundConfig(ground_alpha=0.6).alpha(domain) == 0.6


def test_a_mapping_says_what_a_config_says() -> None:
    mapping = {
        "background": {"num_videos": None, "dynamic": False},
        "camera": {"scale": 0.25},
        "step_unit": "agent",
    }
    assert parse_distraction(mapping) == DistractionConfig(
        background=BackgroundConfig(None, dynamic=False),
        camera=CameraConfig(0.25),
        step_unit="agent",
    )
    assert parse_distraction("none") is None
    assert parse_distraction({}) is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("easier", "distraction is 'easier': must be one of none, easy, medium, hard"),
        (3, "distraction is 3: must be one of none"),
        ({"sound": 1}, "distraction.sound is unknown: must be one of background, camera, color"),
        ({"camera": {"zoom": 1}}, "distraction.camera.zoom is unknown: must be one of scale"),
        ({"camera": 0.3}, "camera=0.3 must be a CameraConfig or null"),
        ({"camera": {"scale": 1.5}}, r"camera.scale=1.5 must be in \[0, 1\]"),
        ({"color": {"scale": "0.1"}}, "color.scale='0.1' must be a number"),
        ({"color": {"dynamic": 1}}, "color.dynamic=1 must be true or false"),
        ({"background": {"num_videos": 0}}, "num_videos=0 must be at least 1, or null"),
        ({"background": {"ground_alpha": -1}}, r"ground_alpha=-1 must be in \[0, 1\]"),
        ({"step_unit": "frame"}, "step_unit='frame' is unknown; allowed: control, agent"),
    ],
)
def test_bad_distractions_are_named(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_distraction(value)  # type: ignore[arg-type]


def test_evaluation_sets_are_clean_and_six_at_each_difficulty() -> None:
    sets = evaluation_sets()
    kinds = ("train_videos", "unseen_videos", "unseen_procedural", "color", "camera", "all")
    names = [f"{kind}_{difficulty}" for difficulty in DIFFICULTIES for kind in kinds]
    reactive = [name for each in REACTIVE for name in (each, f"unseen_{each}")]
    dmcgb = [f"dmcgb_{mode}{end}" for mode in MODES for end in ("", "_stand_in")]
    assert list(sets) == ["clean", *names, *reactive, "corruption", "unseen", *dmcgb]
    assert sets["clean"].distraction is None
    for difficulty, (scale, videos) in DIFFICULTIES.items():
        for kind in kinds:
            each = sets[f"{kind}_{difficulty}"]
            assert each.distraction is not None
            parts = {
                "background": BackgroundConfig(videos) if kind[0] in "tua" else None,
                "camera": CameraConfig(scale) if kind in ("camera", "all") else None,
                "color": ColorConfig(scale) if kind in ("color", "all") else None,
            }
            assert each.distraction == DistractionConfig(**parts)
            assert each.split == ("val" if kind[0] == "u" or kind == "all" else "train")
            source = each.background_source("my/clips")
            expected = "my/clips" if kind[0] in "tua" else None
            assert source == ("procedural" if "procedural" in kind else expected)


@pytest.mark.parametrize(
    "distraction",
    [
        DistractionConfig.of_difficulty("easy"),
        DistractionConfig(background=BackgroundConfig(num_videos=2), step_unit="agent"),
        parse_distraction("reactive_action_time"),
        parse_distraction("corruption"),
    ],
)
def test_settings_from_python_are_kept_as_plain_values(distraction):
    config = RunConfig(environment=EnvironmentConfig("finger", "spin", distraction=distraction))
    saved = config_to_dict(config.validated())["environment"]["distraction"]
    assert json.loads(json.dumps(saved)) == saved
    assert parse_distraction(saved) == distraction

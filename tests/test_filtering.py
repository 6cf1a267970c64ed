"""Probes, episodes and measures of filtering."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from helpers.models import TINY

from w2f_torchrl.envs import PixelDMControlEnv
from w2f_torchrl.logging import MetricsLogger
from w2f_torchrl.modules import build_actor, build_critic, build_world_model
from w2f_torchrl.objectives import World2FilterLoss
from w2f_torchrl.trainers import ConfigError, to_run_config

pytest.importorskip("sklearn")

from w2f_torchrl.evaluation import (
    flat_metrics,
    measure_filtering,
    probe_class,
    probe_values,
    record_episodes,
    replace_backgrounds,
)
from w2f_torchrl.evaluation import run_filtering as filtering
from w2f_torchrl.evaluation.filtering import _encode_all

EPISODES, STEPS, CLASSES = 24, 12, 3


def rows(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.random.Generator]:
    generator = np.random.default_rng(seed)
    episodes = np.repeat(np.arange(EPISODES), STEPS)
    labels = episodes % CLASSES
    return generator.normal(size=(len(episodes), 8)), labels, episodes, generator


def test_a_class_that_is_there_is_found_by_every_probe():
    features, labels, episodes, _ = rows()
    features[:, :CLASSES] += 4 * np.eye(CLASSES)[labels]
    scores = probe_class(features, labels, episodes, seeds=(0, 1))
    for name in ("linear", "neighbours", "mlp"):
        assert scores[name].mean > 0.95
    assert scores["chance"].mean == pytest.approx(1 / CLASSES, abs=0.02)
    assert scores["shuffled"].mean < 0.6


def test_what_only_tells_episodes_apart_tells_no_class():
    """Each episode has a mark of its own: a split by frames would read the class from it."""
    features, labels, episodes, generator = rows()
    features += 10 * generator.normal(size=(EPISODES, 8))[episodes]
    by_frame = probe_class(features, labels, np.arange(len(labels)), probes=("neighbours",))
    assert by_frame["neighbours"].mean > 0.9
    scores = probe_class(features, labels, episodes, probes=("neighbours", "linear"))
    assert scores["neighbours"].mean < 0.6
    assert scores["linear"].mean < 0.6


def test_only_a_nonlinear_probe_finds_a_class_of_signs():
    features, _, episodes, _ = rows()
    labels = episodes % 2
    features[:, 0] = 3 * np.random.default_rng(1).choice([-1, 1], len(labels))
    features[:, 1] = features[:, 0] * np.where(labels, 1, -1)
    scores = probe_class(features[:, :3], labels, episodes, seeds=(0,))
    assert scores["linear"].mean < 0.7
    assert scores["mlp"].mean > 0.9
    assert scores["neighbours"].mean > 0.9


def test_values_are_explained_or_not():
    features, _, episodes, generator = rows()
    target = features @ generator.normal(size=(8, 2)) + 0.01 * generator.normal(
        size=(len(episodes), 2)
    )
    constant = np.ones((len(episodes), 1))
    found = probe_values(features, np.hstack([target, constant]), episodes, seeds=(0,))
    assert found["linear"].mean > 0.99
    assert found["chance"].mean == pytest.approx(0, abs=0.05)
    noise = probe_values(features, generator.normal(size=target.shape), episodes, seeds=(0,))
    assert noise["linear"].mean < 0.1
    assert probe_values(features, target[:, :1], episodes, seeds=(0,))["linear"].mean > 0.99


def test_probes_refuse_what_they_cannot_answer():
    features, labels, episodes, _ = rows()
    with pytest.raises(ValueError, match="at least two"):
        probe_class(features, np.zeros_like(labels), episodes)
    with pytest.raises(ValueError, match="at least 4 episodes, one has 3"):
        probe_class(features, (episodes < 3).astype(int), episodes)
    with pytest.raises(ValueError, match="one column that varies"):
        probe_values(features, np.ones((len(labels), 2)), episodes)


@pytest.fixture(scope="module")
def env():
    made = PixelDMControlEnv("cartpole", "swingup", image_size=16, distraction="easy", seed=0)
    yield made
    made.close()


@pytest.fixture(scope="module")
def episodes(env):
    return record_episodes(env, 16, seed=5, max_steps=8)


@pytest.mark.render
def test_episodes_hold_what_probes_ask_for_and_are_reproducible(env, episodes):
    first = episodes[0]
    assert first.pixels.shape == (9, 3, 16, 16)
    assert first.pixels.dtype is torch.uint8
    assert first.masks.shape == (9, 1, 16, 16)
    assert first.actions.shape == (9, 1)
    assert (first.actions[0] == 0).all()
    assert first.agent["pose"].shape == (9, 3)
    assert first.agent["velocity"].shape == (9, 2)
    assert first.scenery["camera"].shape == (9, 4)
    assert set(first.scenery) == {"clip", "frame", "camera", "color"}
    # The clips take turns, each in as many episodes.
    assert [int(e.scenery["clip"][0, 0]) for e in episodes] == [0, 1, 2, 3] * 4
    assert all(len(set(e.scenery["clip"][:, 0])) == 1 for e in episodes)
    again = record_episodes(env, 1, seed=5, max_steps=8)[0]
    assert torch.equal(again.pixels, first.pixels)
    assert np.array_equal(again.physics, first.physics)
    records = first.records()
    assert records.shape == (1, 9)
    assert records["is_init"].sum() == 1


@pytest.mark.render
def test_only_the_background_is_replaced(env, episodes):
    others = replace_backgrounds(env, episodes[:3])
    for other, episode in zip(others, episodes, strict=False):
        assert other.scenery["clip"][0, 0] != episode.scenery["clip"][0, 0]
        for key in ("camera", "color"):
            assert np.array_equal(other.scenery[key], episode.scenery[key])
        assert np.array_equal(other.physics, episode.physics)
        assert torch.equal(other.masks, episode.masks)
        inside = episode.masks.expand_as(episode.pixels)
        assert torch.equal(other.pixels[inside], episode.pixels[inside])
        assert not torch.equal(other.pixels, episode.pixels)


@pytest.mark.render
def test_an_agent_can_play_the_episodes(env):
    seen = []

    def act(pixels, is_first):
        seen.append((pixels.shape, is_first))
        return torch.full((1,), 0.5)

    episode = record_episodes(env, 1, seed=1, act=act, max_steps=4)[0]
    assert (episode.actions[1:] == 0.5).all()
    assert seen == [((3, 16, 16), True), *[((3, 16, 16), False)] * 3]


def test_a_background_is_replaced_only_where_there_is_one(episodes):
    plain = PixelDMControlEnv("cartpole", "swingup", image_size=16, seed=0)
    with pytest.raises(ValueError, match="needs an env with a background video"):
        replace_backgrounds(plain, episodes[:1])
    recorded = record_episodes(plain, 1, seed=0, max_steps=2)[0]
    assert recorded.scenery == {}
    plain.close()


@pytest.mark.render
@pytest.mark.parametrize("latent", ["split", "whole", "foreground"])
def test_measures_of_a_model(env, episodes, latent, tmp_path):
    model = make_model(latent)
    replaced = replace_backgrounds(env, episodes[:2])
    found = measure_filtering(
        model, episodes, replaced=replaced, untrained=model.world_model, seeds=(0,)
    )
    latents = {"foreground", "untrained"} | ({"background"} if latent == "split" else set())
    assert set(found["leakage"]) == set(found["content"]) == latents
    # The control is the same model here, so the probes find the same.
    assert found["leakage"]["foreground"] == found["leakage"]["untrained"]
    assert set(found["leakage"]["foreground"]) == {"clip", "camera", "color"}
    assert set(found["content"]["foreground"]) == {"pose", "velocity"}
    assert found["leakage"]["foreground"]["clip"]["chance"].mean == pytest.approx(0.25, abs=0.01)
    pictures = found["reconstruction"]
    assert (pictures["mask_iou"] is None) == (latent == "whole")
    assert (pictures["background_psnr"] is None) == (latent == "foreground")
    assert 0 < pictures["foreground_psnr"] < 40
    assert 0 < found["replacement"]["action_change"] <= 2
    flat = flat_metrics(found)
    assert flat["filtering/leakage/foreground/clip/chance"] == pytest.approx(0.25, abs=0.01)
    assert all(isinstance(value, float) for value in flat.values())
    with MetricsLogger(tmp_path) as log:  # an evaluation logs them: their group must be known
        assert log.log(flat, frames=1, updates=1).keys() == flat.keys()
    same = measure_filtering(model, episodes, replaced=episodes[:2], seeds=(0,), probes=("linear",))
    assert same["replacement"]["action_change"] == 0
    assert same["replacement"]["value_change_relative"] == 0


def make_model(latent: str) -> World2FilterLoss:
    torch.manual_seed(0)
    world_model = build_world_model(TINY, action_size=1, image_size=16, latent=latent)
    critic = build_critic(TINY)
    torch.nn.init.normal_(critic.model[-1].weight, std=0.3)
    return World2FilterLoss(world_model, build_actor(TINY, 1)[0].module, critic)


def test_psnr_is_its_definition(episodes):
    """A decoder that paints grey: the error inside the mask is the picture's own."""
    model = make_model("split").world_model
    for head in (model.decoder.foreground, model.decoder.background):
        torch.nn.init.zeros_(head.layers[-1].weight)
        torch.nn.init.zeros_(head.layers[-1].bias)
    torch.nn.init.zeros_(model.decoder.foreground.mask_head.weight)
    torch.nn.init.constant_(model.decoder.foreground.mask_head.bias, 0.5)
    _, found = _encode_all(model, episodes)
    pixels = torch.cat([e.pixels for e in episodes]) / 255
    masks = torch.cat([e.masks for e in episodes]).expand_as(pixels)
    for side, where in (("foreground", masks), ("background", ~masks)):
        expected = -10 * torch.log10((pixels[where] - 0.5).double().square().mean())
        assert found[f"{side}_psnr"] == pytest.approx(float(expected), abs=1e-4)
    # A logit of 0.5 everywhere is foreground everywhere: the IoU is the mask's share.
    share = torch.cat([e.masks for e in episodes]).float().mean((1, 2, 3)).mean()
    assert found["mask_iou"] == pytest.approx(float(share), abs=1e-5)


def test_settings_are_checked(monkeypatch):
    config = to_run_config({"evaluation": {"filtering": True}, "model": {"preset": "size1m"}})
    config.validate()
    config.evaluation.filtering_episodes = 3
    with pytest.raises(ConfigError, match=r"evaluation\.filtering_episodes=3 must be at least 8"):
        config.validate()
    config.evaluation.filtering_episodes = 24
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "sklearn" else find(name)
    )
    with pytest.raises(ConfigError, match=r"evaluation\.filtering=true needs scikit-learn"):
        config.validate()


@pytest.mark.render
def test_a_run_measures_its_model_on_its_own_episodes(monkeypatch):
    monkeypatch.setattr(filtering, "MAX_STEPS", 6)
    config = to_run_config(
        {
            "environment": {
                "domain": "cartpole",
                "task": "swingup",
                "image_size": 16,
                "distraction": "easy",
            },
            "model": vars(TINY),
            "evaluation": {"filtering": True, "filtering_episodes": 8},
        }
    )
    meter = filtering.FilteringMeter(config.environment, 8, seed=3)
    assert len(meter.episodes) == 8
    assert len(meter.replaced) == 4
    found = flat_metrics(meter.measure(make_model("split"), seeds=(0,), probes=("linear",)))
    assert 0 <= found["filtering/leakage/foreground/clip/linear"] <= 1
    assert "filtering/content/foreground/pose/linear" in found
    assert "filtering/replacement/action_change" in found
    model, untrained = make_model("split"), make_model("split").world_model
    controlled = meter.measure(model, untrained=untrained, seeds=(0,), probes=("linear",))
    assert "untrained" in controlled["leakage"]

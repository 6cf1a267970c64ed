"""How far latents of clean and disturbed histories part, and the measures of every method."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.models import SIZE, make_learner

from w2f_torchrl.config import METHODS
from w2f_torchrl.envs import PixelDMControlEnv
from w2f_torchrl.evaluation import Episode, latent_divergence, record_episodes, replay_in
from w2f_torchrl.evaluation import divergence as module
from w2f_torchrl.evaluation.divergence import partners
from w2f_torchrl.evaluation.imagination import observe, roll

ALL = ["world2filter", *METHODS]
STEPS, CONTEXT, HORIZON = 12, 5, 4


def learner_of(algorithm: str):
    latent = METHODS[algorithm].latent if algorithm in METHODS else "split"
    return make_learner(latent, algorithm=algorithm).eval()


def episode(seed: int, *, outside: int | None = None, clip: int = 0, steps: int = STEPS) -> Episode:
    """An episode of noise; with ``outside`` everything but the mask's pixels is of that seed."""
    generator = torch.Generator().manual_seed(seed)

    def picture(g: torch.Generator) -> torch.Tensor:
        return torch.randint(256, (steps, 3, SIZE, SIZE), generator=g, dtype=torch.uint8)

    pixels, actions = picture(generator), torch.rand(steps, 2, generator=generator)
    masks = torch.rand(steps, 1, SIZE, SIZE, generator=generator) < 0.3
    if outside is not None:
        pixels = torch.where(masks, pixels, picture(torch.Generator().manual_seed(outside)))
    random = np.random.default_rng(seed)
    scenery = {
        "clip": np.full((steps, 1), clip),
        "color": random.normal(size=(steps, 2)),
    }
    agent = {"pose": random.normal(size=(steps, 2))}
    return Episode(seed, pixels, masks, actions, agent, scenery, np.zeros((steps, 1)))


def measure(learner, clean, disturbed, windows: int = 3):
    return latent_divergence(
        learner.world_model, clean, disturbed, context=CONTEXT, horizon=HORIZON, windows=windows
    )


def test_equal_histories_stay_together_and_others_part():
    learner = learner_of("world2filter")
    clean = [episode(seed) for seed in range(3)]
    found = measure(learner, clean, clean)
    assert found["latent"] == found["reward"] == [0.0] * (HORIZON + 1)
    assert all(value > 0 for value in found["sampling"])
    disturbed = [episode(seed, outside=9 + seed) for seed in range(3)]
    assert all(value > 0 for value in measure(learner, clean, disturbed)["latent"])
    # What a blind model sees cannot part its latents, whatever it predicts.
    for parameter in learner.world_model.encoder.parameters():
        torch.nn.init.zeros_(parameter)
    assert measure(learner, clean, disturbed)["latent"] == [0.0] * (HORIZON + 1)


@pytest.mark.parametrize("count", [*range(2, 12), 64])
def test_no_window_is_compared_with_itself(count):
    others = partners(count)
    assert sorted(others.tolist()) == list(range(count))
    assert (others != torch.arange(count)).all()


def test_the_divergence_is_its_definition():
    learner = learner_of("dreamer_v3")
    clean = [episode(seed) for seed in range(2)]
    disturbed = [episode(seed, outside=9 + seed) for seed in range(2)]
    found = measure(learner, clean, disturbed, windows=2)
    starts = (0, STEPS - CONTEXT - HORIZON)
    latents = []
    for side in (clean, disturbed):
        torch.manual_seed(0)
        seen = [observe(learner.world_model, e.records()) for e in side]
        windows = torch.cat([each[:, s : s + CONTEXT + HORIZON] for each in seen for s in starts])
        rolled = roll(learner.world_model, windows, CONTEXT)
        latents.append(torch.cat((rolled["belief"], rolled["state"]), -1)[:, CONTEXT - 1 :])
    ours, theirs = (x.double().numpy() for x in latents)
    order = partners(4).tolist()
    for h in range(HORIZON + 1):
        apart = np.mean([np.sqrt(((ours[n, h] - theirs[n, h]) ** 2).sum()) for n in range(4)])
        others = [np.sqrt(((ours[n, h] - ours[order[n], h]) ** 2).sum()) for n in range(4)]
        assert found["latent"][h] == pytest.approx(apart / np.mean(others), rel=1e-4)


def test_the_pairs_of_windows_and_their_lengths_are_checked():
    learner, short = learner_of("dreamer_v3"), [episode(0, steps=8), episode(1, steps=8)]
    with pytest.raises(ValueError, match=r"pairs, got 2 and 1"):
        measure(learner, short, short[:1])
    with pytest.raises(ValueError, match="at least one episode must have 9 observations"):
        measure(learner, short, short)


@pytest.mark.parametrize("algorithm", ALL)
def test_every_method_has_the_same_measures(algorithm):
    pytest.importorskip("sklearn", reason="the probes need it: make extras")
    from w2f_torchrl.evaluation import flat_metrics, measure_filtering

    learner, steps = learner_of(algorithm), module.CONTEXT + module.HORIZON
    episodes = [episode(seed, clip=seed % 2, steps=steps) for seed in range(8)]
    others = [episode(seed, outside=50 + seed, steps=steps) for seed in range(4)]
    found = measure_filtering(
        learner.loss, episodes, replaced=others, clean=others, seeds=(0,), probes=("linear",)
    )
    assert set(found["leakage"]["foreground"]) == {"clip", "color"}
    assert ("background" in found["leakage"]) == (algorithm in ("world2filter", "tia"))
    flat = flat_metrics(found)
    wanted = {
        "filtering/content/foreground/pose/linear",
        "filtering/replacement/action_change_relative",
        "filtering/removal/value_change_relative",
        "filtering/divergence/latent/mean",
    }
    assert wanted <= set(flat)
    assert all(np.isfinite(value) for value in flat.values())
    pictures = found["reconstruction"]
    assert (pictures["foreground_psnr"] is None) == (algorithm in ("repo", "r2dreamer"))
    assert (pictures["background_psnr"] is None) == (
        algorithm in ("repo", "r2dreamer", "masked_input")
    )
    assert (pictures["mask_iou"] is None) == (algorithm not in ("world2filter", "tia"))
    if algorithm == "masked_input":  # only what is outside of the masks differs
        assert found["replacement"]["action_change"] == 0
        assert set(found["divergence"]["latent"]) == {0.0}
        seen = [replace(e, seen_masks=~e.masks) for e in episodes]
        changed = measure(learner, seen[:4], [replace(o, seen_masks=~o.masks) for o in others])
        assert changed["latent"][0] > 0
    else:
        assert found["replacement"]["action_change"] > 0


@pytest.mark.render
def test_episodes_are_replayed_without_scenery():
    background = {"background": {"num_videos": 2}}
    envs = [
        PixelDMControlEnv("cartpole", "swingup", image_size=16, distraction=each, seed=seed)
        for each, seed in ((background, 0), ("none", 3))
    ]
    episodes = record_episodes(envs[0], 2, seed=5, max_steps=6)
    clean = replay_in(envs[1], episodes)
    for one, other in zip(episodes, clean, strict=True):
        assert np.array_equal(one.physics, other.physics)
        assert torch.equal(one.actions, other.actions)
        assert torch.equal(one.masks, other.masks)
        inside = one.masks.expand_as(one.pixels)
        assert torch.equal(one.pixels[inside], other.pixels[inside])
        assert not torch.equal(one.pixels, other.pixels)
        assert other.scenery == {}
    wrong = PixelDMControlEnv("cartpole", "balance", image_size=16, seed=0)
    with pytest.raises(RuntimeError, match="did not repeat exactly"):
        replay_in(wrong, episodes)
    for env in (*envs, wrong):
        env.close()

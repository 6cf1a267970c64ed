"""The imagination's open loop: the right action at each step, start and pictures."""

from __future__ import annotations

import pytest
import torch
from helpers.models import LATENTS, SIZE, TINY
from helpers.models import make_learner as tiny_learner
from tensordict import TensorDict
from torchrl.modules.models.model_based import RSSMPriorV3

from w2f_torchrl.evaluation.imagination import cut_windows, decode, imagine_windows, observe, roll
from w2f_torchrl.logging.pictures.film import film, film_strip
from w2f_torchrl.modules import WorldModel
from w2f_torchrl.modules.rssm import BlockGRUStep
from w2f_torchrl.trainers import Learner

CONTEXT, TIME, WINDOWS = 5, 12, 3


def make_learner(latent: str) -> Learner:
    learner = tiny_learner(latent)
    with torch.no_grad():  # what starts at zero would hide a wrong action or a wrong latent
        for parameter in learner.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return learner.eval()


def make_episode(length: int) -> TensorDict:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (1, length, 3, SIZE, SIZE), generator=generator)
    mask = torch.rand(1, length, 1, SIZE, SIZE, generator=generator) < 0.3
    is_init = torch.zeros(1, length, 1, dtype=torch.bool)
    is_init[:, 0] = True
    action = torch.rand(1, length, 2, generator=generator) * 2 - 1
    following = {"pixels": pixels.to(torch.uint8), "foreground_mask": mask}
    return TensorDict(
        {"action": action * ~is_init, "is_init": is_init, "next": following}, [1, length]
    )


@torch.no_grad()
def make_windows(model: WorldModel, episode: TensorDict | None = None) -> TensorDict:
    observed = observe(model, make_episode(40) if episode is None else episode)
    return cut_windows(observed, WINDOWS, CONTEXT, TIME - CONTEXT)


def step_by_hand(prior: RSSMPriorV3, state, belief, action) -> torch.Tensor:
    """The belief after a step, by this package's block GRU instead of TorchRL's."""
    step = BlockGRUStep(prior)
    return step(state, belief, step.action_input(action))


@pytest.mark.parametrize("latent", LATENTS)
@torch.no_grad()
def test_each_imagined_step_takes_the_action_that_led_to_its_frame(latent):
    learner = make_learner(latent)
    model = learner.world_model
    windows = make_windows(model)
    assert windows.shape == (WINDOWS, TIME)
    rolled = roll(model, windows, CONTEXT)
    assert torch.equal(rolled["action"], windows["action"])
    for t in range(CONTEXT, TIME):
        before = rolled["state"][:, t - 1], rolled["belief"][:, t - 1]
        expected = step_by_hand(model.prior, *before, windows["action"][:, t])
        torch.testing.assert_close(rolled["belief"][:, t], expected, rtol=1e-5, atol=1e-6)
        for wrong in (t - 1, t + 1):
            if wrong < TIME:
                shifted = step_by_hand(model.prior, *before, windows["action"][:, wrong])
                assert not torch.allclose(rolled["belief"][:, t], shifted, atol=1e-4)
        groups = rolled["state"][:, t].unflatten(-1, (TINY.num_categoricals, -1))
        assert (groups.sum(-1) == 1).all()  # a draw, one class of each categorical


@pytest.mark.parametrize("latent", LATENTS)
@torch.no_grad()
def test_the_context_is_the_posterior_and_what_follows_sees_no_pixels(latent):
    model = make_learner(latent).world_model
    torch.manual_seed(3)
    windows = make_windows(model)
    rolled = roll(model, windows, CONTEXT)
    # A window in the middle continues from all that was seen before it.
    torch.manual_seed(3)
    posterior = model.infer(make_episode(40).select(*model.in_keys))["next"]
    keys = [key for key in rolled.keys() if key != "action"]
    assert len(keys) == (4 if latent == "split" else 2)
    for key in keys:
        for number, start in enumerate((0, 14, 28)):
            seen = posterior[key][0, start : start + CONTEXT]
            assert torch.equal(rolled[key][number, :CONTEXT], seen)
    torch.manual_seed(3)
    episode = make_episode(40)
    episode["next", "pixels"][:, 28 + CONTEXT :] = 0  # after the last window's context
    blind = roll(model, make_windows(model, episode), CONTEXT)
    for key in keys:
        assert torch.equal(blind[key][:, :CONTEXT], rolled[key][:, :CONTEXT])
        # The draws of the priors come after those of the whole episode.
        assert torch.equal(blind[key], rolled[key])


@torch.no_grad()
def test_the_background_goes_on_by_its_own_prior_whatever_the_agent_does():
    learner = make_learner("split")
    model = learner.world_model
    windows = make_windows(model)
    torch.manual_seed(3)
    rolled = roll(model, windows, CONTEXT)
    prior = model.background_rollout.rssm_prior.module
    for t in range(CONTEXT, TIME):
        before = (rolled[f"background_{key}"][:, t - 1] for key in ("state", "belief"))
        expected = step_by_hand(prior, *before, torch.zeros(WINDOWS, 1))
        torch.testing.assert_close(
            rolled["background_belief"][:, t], expected, rtol=1e-5, atol=1e-6
        )
    still = windows.clone()
    still["action"][:, CONTEXT:] = 0
    torch.manual_seed(3)
    other = roll(model, still, CONTEXT)
    assert torch.equal(other["background_belief"], rolled["background_belief"])
    assert not torch.equal(other["belief"], rolled["belief"])


@pytest.mark.parametrize("latent", LATENTS)
@torch.no_grad()
def test_the_policy_acts_from_the_state_before_its_action(latent):
    learner = make_learner(latent)
    model, actor = learner.world_model, learner.loss.actor
    windows = make_windows(model)
    rolled = roll(model, windows, CONTEXT, actor)
    assert torch.equal(rolled["action"][:, :CONTEXT], windows["action"][:, :CONTEXT])
    for t in range(CONTEXT, TIME):
        state, belief = rolled["state"][:, t - 1], rolled["belief"][:, t - 1]
        action = rolled["action"][:, t]
        torch.testing.assert_close(action, actor(state, belief)[0])
        expected = step_by_hand(model.prior, state, belief, action)
        torch.testing.assert_close(rolled["belief"][:, t], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("latent", LATENTS)
def test_pictures_are_truth_imagination_and_their_difference(latent):
    learner = make_learner(latent)
    episode = make_episode(60)
    made = imagine_windows(learner.world_model, learner.loss.actor, episode, count=2, seed=4)
    rows, shape = made.comparison, (2, 20, 3, SIZE, SIZE)
    extra = {
        "whole": set(),
        "split": {"foreground", "background", "mask"},
        "shared": {"foreground", "background", "mask"},
        "foreground": {"mask"},
    }[latent]
    assert set(rows) == {"truth", "imagined", "error"} | extra
    assert set(made.imagined) == {"imagined"} | extra
    windows = cut_windows(episode, 2)
    assert torch.equal(windows["next", "pixels"][0, 0], episode["next", "pixels"][0, 0])
    assert torch.equal(windows["next", "pixels"][1, -1], episode["next", "pixels"][0, -1])
    truth = windows["next", "pixels"].float() / 255
    if latent == "foreground":
        truth = truth * windows["next", "foreground_mask"]
    assert torch.equal(rows["truth"], truth)
    assert rows["imagined"].shape == shape
    difference = (rows["imagined"] - truth).abs()
    torch.testing.assert_close(rows["error"], difference.mean(2, keepdim=True))
    # The same seed draws the same.
    again = imagine_windows(learner.world_model, learner.loss.actor, episode, count=2, seed=4)
    assert torch.equal(again.comparison["imagined"], rows["imagined"])
    metrics = made.metrics
    mean = difference[:, 5:].mean().item()
    assert metrics["train/imagination/error"] == pytest.approx(mean, abs=1e-6)
    assert ("train/imagination/mask_iou" in metrics) == (latent != "whole")


def test_composed_pictures_are_foreground_over_background():
    learner = make_learner("split")
    rolled = roll(learner.world_model, make_windows(learner.world_model), CONTEXT)
    made = decode(learner.world_model, rolled)
    expected = made["foreground"] + made["background"] * (1 - made["mask"])
    torch.testing.assert_close(made["imagined"], expected.clamp(0, 1), atol=1e-5, rtol=0)


def test_imagining_leaves_the_random_state_alone_and_short_episodes_make_none():
    learner = make_learner("split")
    before = torch.get_rng_state()
    args = learner.world_model, learner.loss.actor
    assert imagine_windows(*args, make_episode(6), count=2) is not None
    assert torch.equal(torch.get_rng_state(), before)
    assert imagine_windows(*args, make_episode(5), count=2) is None


def test_a_film_says_what_was_seen_and_shows_every_cell():
    truth = torch.randint(0, 256, (2, 7, 3, 32, 32), dtype=torch.uint8)
    mask = torch.rand(2, 7, 1, 32, 32)
    video = film({"truth": truth, "mask": mask}, context=3)
    left, top = 84, 24
    assert video.shape == (7, 3, top + 2 * 100 - 4, left + 2 * 100 - 4)
    large = truth.repeat_interleave(3, -2).repeat_interleave(3, -1)
    assert torch.equal(video[:, :, top : top + 96, left : left + 96], large[0])
    assert torch.equal(video[:, :, top : top + 96, left + 100 : left + 196], large[1])
    bar = video[:, :, top - 4, left + 10]
    assert (bar[:3] == bar[0]).all()
    assert (bar[3:] == bar[3]).all()
    assert (bar[0] != bar[3]).any()
    strip = film_strip({"truth": truth, "mask": mask}, context=3, window=1, every=2)
    assert torch.equal(strip[:, top : top + 96, left : left + 96], large[1, 0])  # seen 1, 3, +2, +4
    assert torch.equal(strip[:, top : top + 96, left + 300 : left + 396], large[1, 6])

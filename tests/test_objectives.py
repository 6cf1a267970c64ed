"""The losses' mathematics against definitions, and where their gradients go."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from helpers.models import LATENTS, make_loss, make_sample
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch.nn import functional as F
from torchrl.modules import PercentileValueNorm, SymExpTwoHot
from torchrl.objectives import categorical_kl_terms

from w2f_torchrl.config.model import BACKGROUND_ENCODERS
from w2f_torchrl.objectives import (
    LossConfig,
    World2FilterLoss,
    background_loss,
    foreground_loss,
    image_loss,
    lambda_return,
    mask_loss,
)
from w2f_torchrl.objectives.terms import LossTerm
from w2f_torchrl.segmenters import mask_iou

# ------------------------------------------------------------------ returns


def quadratic_lambda_return(reward, continuation, value, lmbda, last):
    """The definition: a mixture of all n-step returns up to the sequence's or episode's end."""
    batch, time = reward.shape
    out = np.zeros((batch, time - 1))
    for b in range(batch):
        for t in range(time - 1):
            end = next((k for k in range(t + 1, time) if last[b, k]), time - 1)
            steps = []
            for n in range(1, end - t + 1):
                discounts = [np.prod(continuation[b, t + 1 : t + i]) for i in range(1, n + 2)]
                total = sum(discounts[i - 1] * reward[b, t + i] for i in range(1, n + 1))
                steps.append(total + discounts[n] * value[b, t + n])
            weights = [(1 - lmbda) * lmbda**i for i in range(len(steps) - 1)]
            weights.append(lmbda ** (len(steps) - 1))
            out[b, t] = np.dot(weights, steps)
    return out


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    time=st.integers(2, 12),
    lmbda=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    with_last=st.booleans(),
)
def test_lambda_return_is_its_quadratic_definition(seed, time, lmbda, with_last):
    generator = torch.Generator().manual_seed(seed)
    reward, value = torch.randn(2, 3, time, generator=generator, dtype=torch.float64)
    continuation = torch.rand(3, time, generator=generator, dtype=torch.float64)
    last = torch.rand(3, time, generator=generator) < 0.25
    got = lambda_return(reward, continuation, value, lmbda, last if with_last else None)
    if not with_last:
        last = torch.zeros_like(last)
    want = quadratic_lambda_return(*(x.numpy() for x in (reward, continuation, value)), lmbda, last)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------ two-hot


def test_two_hot_is_unbiased():
    two_hot = SymExpTwoHot(255).double()
    size = torch.logspace(-3, 5, 400, dtype=torch.float64)
    values = torch.cat((-size, torch.zeros(1, dtype=torch.float64), size))
    encoded = two_hot.encode(values)
    assert torch.equal((encoded > 0).sum(-1) <= 2, torch.ones(len(values), dtype=torch.bool))
    decoded = two_hot.decode(encoded.clamp_min(1e-300).log())
    upper = torch.searchsorted(two_hot.bins, values.abs()).clamp(1, 254)
    width = two_hot.bins[upper] - two_hot.bins[upper - 1]
    assert ((decoded - values).abs() <= 1e-6 * width).all()


def test_two_hot_optimum_is_the_mean_of_random_targets():
    two_hot = SymExpTwoHot(255).double()
    targets = torch.tensor([0.0, 0.0, 500.0, 541.0, -3.0], dtype=torch.float64)
    # Cross-entropy's optimum over the logits is the mean target distribution.
    optimum = two_hot.encode(targets).mean(0).clamp_min(1e-300).log()
    torch.testing.assert_close(two_hot.decode(optimum), targets.mean())
    logits = optimum.clone().requires_grad_()
    two_hot.loss(logits.expand(5, -1), targets).mean().backward()
    assert logits.grad.abs().max() < 1e-9


def test_critic_error_is_cross_entropy_to_both_targets():
    loss = make_loss("foreground", slow_critic_regularization=0.7)
    logits, returns, slow = torch.randn(5, 41), torch.randn(5) * 10, torch.randn(5) * 10
    two_hot = loss.world_model.two_hot
    want = two_hot.loss(logits, returns) + 0.7 * two_hot.loss(logits, slow)
    torch.testing.assert_close(loss._critic_error(logits, returns, slow), want)


# ------------------------------------------------------------------ KL


@pytest.mark.parametrize("free_nats", [0.0, 1.0, 3.0])
def test_kl_terms_are_the_closed_form(free_nats):
    torch.manual_seed(0)
    posterior, prior = (torch.randn(5, 7, 4, 6).mul_(0.4).requires_grad_() for _ in range(2))
    dynamics, representation = categorical_kl_terms(posterior, prior, free_nats, 0.01)

    def mixed(logits):
        return torch.distributions.Categorical(probs=0.99 * F.softmax(logits, -1) + 0.01 / 6)

    kl = torch.distributions.kl_divergence(mixed(posterior), mixed(prior)).sum(-1)
    want = kl.clamp_min(free_nats).mean()
    torch.testing.assert_close(dynamics, want)
    torch.testing.assert_close(representation, want)
    # The dynamics term teaches the prior only, the representation term the posterior only.
    assert torch.autograd.grad(dynamics, posterior, retain_graph=True, allow_unused=True)[0] is None
    assert torch.autograd.grad(representation, prior, allow_unused=True)[0] is None


def test_loss_uses_free_nats_on_the_sum_over_categoricals():
    loss, sample = make_loss("foreground", free_nats=2.5), make_sample()
    torch.manual_seed(0)
    model_td = loss.world_model(sample.select(*loss.in_keys))
    losses, metrics = loss.world_model_losses(model_td)
    post = model_td["next", "posterior_logits"]
    prior = model_td["next", "prior_logits"]
    p, q = (0.99 * F.softmax(x, -1) + 0.01 / 4 for x in (post, prior))
    kl = (p * (p.log() - q.log())).sum((-1, -2))
    torch.testing.assert_close(losses["dynamics"], kl.clamp_min(2.5).mean())
    torch.testing.assert_close(metrics["wm/kl_value"], kl.mean())


# ------------------------------------------------------------------ normalisation, slow critic


def test_return_normalisation_is_the_references():
    norm, rng = PercentileValueNorm(rate=0.01), np.random.default_rng(0)
    low = high = 0.0
    for scale in (0.1, 5.0, 40.0):
        for _ in range(50):
            returns = rng.normal(size=300) * scale
            norm.update(torch.tensor(returns, dtype=torch.float32).unsqueeze(-1))
            low = 0.99 * low + 0.01 * np.percentile(returns, 5)
            high = 0.99 * high + 0.01 * np.percentile(returns, 95)
        np.testing.assert_allclose(norm.scale().item(), max(1.0, high - low), rtol=1e-4)


def test_advantages_are_divided_by_the_return_range():
    torch.manual_seed(0)
    loss = make_loss("foreground")
    loss.return_norm.low.fill_(-50.0)
    loss.return_norm.high.fill_(50.0)
    loss.eval()  # statistics stay
    state, belief = torch.randn(8, 16), torch.randn(8, 16)
    torch.manual_seed(1)
    small = loss.actor_critic_losses(state, belief)[1]["ac/advantage_mean"]
    loss.return_norm.high.fill_(-49.5)  # a range of 0.5 counts as 1
    torch.manual_seed(1)
    large = loss.actor_critic_losses(state, belief)[1]["ac/advantage_mean"]
    torch.testing.assert_close(large, small * 100)


def test_slow_critic_follows_by_the_references_formula():
    loss = make_loss("foreground", slow_critic_rate=0.02)
    before = copy.deepcopy(loss.slow_critic)
    for parameter in loss.critic.parameters():
        torch.nn.init.normal_(parameter)
    loss.update_slow_critic()
    triples = zip(
        before.parameters(), loss.critic.parameters(), loss.slow_critic.parameters(), strict=True
    )
    for old, online, new in triples:
        torch.testing.assert_close(new, 0.98 * old + 0.02 * online)
        assert not new.requires_grad


# ------------------------------------------------------------------ masked reconstruction


def pictures(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (4, 3, 8, 8), generator=generator).to(torch.uint8)
    mask = torch.rand(4, 1, 8, 8, generator=generator) < 0.3
    prediction = torch.randn(4, 3, 8, 8, generator=generator).requires_grad_()
    return prediction, pixels, mask


def loss_and_grad(function, prediction, *args):
    value = function(prediction, *args)
    return value, torch.autograd.grad(value, prediction)[0]


@pytest.mark.parametrize("target", ["inside", "zero_outside"])
def test_background_pixels_reach_neither_foreground_loss_nor_gradient(target):
    prediction, pixels, mask = pictures()
    other = torch.where(mask, pixels, 255 - pixels)
    assert not torch.equal(pixels, other)
    value, grad = loss_and_grad(foreground_loss, prediction, pixels, mask, target)
    value2, grad2 = loss_and_grad(foreground_loss, prediction, other, mask, target)
    assert torch.equal(value, value2)
    assert torch.equal(grad, grad2)
    value3, grad3 = loss_and_grad(foreground_loss, prediction, pixels, ~mask, target)
    assert value3 != value
    assert not torch.equal(grad3, grad)


def test_foreground_pixels_reach_neither_background_loss_nor_gradient():
    prediction, pixels, mask = pictures()
    other = torch.where(mask, 255 - pixels, pixels)
    value, grad = loss_and_grad(background_loss, prediction, pixels, mask)
    value2, grad2 = loss_and_grad(background_loss, prediction, other, mask)
    assert torch.equal(value, value2)
    assert torch.equal(grad, grad2)
    assert (grad * mask == 0).all()
    assert not torch.equal(grad, loss_and_grad(background_loss, prediction, pixels, ~mask)[1])


@pytest.mark.parametrize("latent", ["split", "shared", "foreground"])
def test_background_values_change_no_foreground_gradient_of_any_parameter(latent):
    """End to end below the latents: decoder, RSSM and encoder get identical gradients."""
    loss, sample = make_loss(latent), make_sample()
    grads = []
    for invert in (False, True):
        torch.manual_seed(0)
        td = loss.world_model(sample.select(*loss.in_keys)).get("next")
        pixels = sample["next", "pixels"]
        if invert:  # the target only: what the encoder saw stays
            pixels = torch.where(sample["next", "foreground_mask"], pixels, 255 - pixels)
        value = foreground_loss(td["foreground_pixels"], pixels, td["foreground_mask"])
        parameters = list(loss.world_model.parameters())
        grads.append((value, *torch.autograd.grad(value, parameters, allow_unused=True)))
    assert sum(g is not None for g in grads[0]) > 10
    for a, b in zip(*grads, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_soft_masks_weigh_linearly():
    prediction, pixels, _ = pictures()
    mask, logits = torch.rand(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    ones, zeros = torch.ones_like(mask), torch.zeros_like(mask)
    for function, args in (
        (foreground_loss, ("inside",)),
        (foreground_loss, ("zero_outside",)),
        (background_loss, ()),
    ):

        def at(m, function=function, args=args):
            return function(prediction, pixels, m, *args)

        # A constant confidence mixes the two hard masks' losses, and each pixel by its own.
        torch.testing.assert_close(at(0.3 * ones), 0.3 * at(ones) + 0.7 * at(zeros))
        # The picture's target is masked by weight > 0, so compare inside (0, 1).
        a, b = mask.clamp(0.1, 0.9), mask.flip(0).clamp(0.1, 0.9)
        torch.testing.assert_close(at(0.5 * a + 0.5 * b), 0.5 * at(a) + 0.5 * at(b))
    mixed = mask_loss(logits, 0.3 * mask + 0.7 * mask.flip(0))
    torch.testing.assert_close(
        mixed, 0.3 * mask_loss(logits, mask) + 0.7 * mask_loss(logits, mask.flip(0))
    )


def test_reconstruction_losses_are_their_formulas():
    prediction, pixels, mask = pictures()
    target, m = pixels.double() / 255, mask.double()
    error = (prediction.double() - target) ** 2
    double = {"rtol": 1e-5, "atol": 1e-5}
    total = error.sum((1, 2, 3)).mean()
    torch.testing.assert_close(image_loss(prediction, pixels).double(), total, **double)
    inside, outside = (
        foreground_loss(prediction, pixels, mask),
        background_loss(prediction, pixels, mask),
    )
    torch.testing.assert_close(inside.double(), (m * error).sum((1, 2, 3)).mean(), **double)
    # Both parts together have DreamerV3's scale: the whole picture's squared error.
    torch.testing.assert_close((inside + outside).double(), total, **double)
    black = ((prediction.double() - m * target) ** 2).sum((1, 2, 3)).mean()
    got = foreground_loss(prediction, pixels, mask, "zero_outside").double()
    torch.testing.assert_close(got, black, **double)


def test_one_coloured_agent_painted_everywhere_is_punished():
    pixels = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    mask = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    mask[:, :, 2:4, 2:4] = True
    pixels[:] = 200
    everywhere = torch.full((2, 3, 8, 8), 200 / 255)
    assert foreground_loss(everywhere, pixels, mask, "inside") < 1e-9  # why a mask loss is needed
    assert foreground_loss(everywhere, pixels, mask, "zero_outside") > 10
    with pytest.raises(ValueError, match=r"loss\.mask=0"):
        LossConfig(mask=0.0, foreground_target="inside").validate()


def test_wrong_masks_and_pixels_are_refused():
    prediction, pixels, mask = pictures()
    with pytest.raises(ValueError, match=r"foreground_mask must have shape \(4, 1, 8, 8\)"):
        foreground_loss(prediction, pixels, mask[:, :, :4])
    with pytest.raises(TypeError, match="uint8"):
        background_loss(prediction, pixels.float(), mask)


def test_mask_iou():
    a = torch.zeros(3, 1, 4, 4, dtype=torch.bool)
    b = a.clone()
    a[0, 0, 0, :2] = b[0, 0, 0, 1:3] = True  # 1 shared of 3
    a[1, 0, 0, 0] = True
    torch.testing.assert_close(mask_iou(a, b), torch.tensor([1 / 3, 0.0, 1.0]))
    with pytest.raises(TypeError, match="bool"):
        mask_iou(a.float(), b)
    with pytest.raises(ValueError, match="shape"):
        mask_iou(a, b[:, :, :2])


# ------------------------------------------------------------------ gradient routing


def gradients(loss: World2FilterLoss, entries: list[str], sample: TensorDict) -> dict[str, float]:
    loss.zero_grad()
    torch.manual_seed(0)
    sum(loss(sample)[name] for name in entries).backward()
    return {
        name: 0.0 if p.grad is None else float(p.grad.abs().sum())
        for name, p in loss.named_parameters()
    }


BACKGROUND = ("world_model.background_", "world_model.decoder.background")
# The scenery sees no action: TorchRL's cell gets a constant zero in its place, from which only the
# bias can learn.
IDLE = "background_rollout.rssm_prior.module.rnn.action_projection"


def test_actor_critic_reward_and_continuation_never_touch_the_background():
    loss, sample = make_loss("split"), make_sample()
    entries = [
        "loss_actor",
        "loss_critic",
        "loss_replay_critic",
        "loss_reward",
        "loss_continuation",
    ]
    got = gradients(loss, entries, sample)
    background = [v for k, v in got.items() if k.startswith(BACKGROUND)]
    assert len(background) > 10
    assert not any(background)
    assert got["world_model.reward.model.0.weight"] > 0


@pytest.mark.parametrize("encoder", BACKGROUND_ENCODERS)
def test_background_losses_never_touch_the_foreground_latent(encoder):
    loss, sample = make_loss("split", encoder, free_nats=0.0), make_sample()
    entries = [f"loss_background{s}" for s in ("", "_dynamics", "_representation")]
    got = gradients(loss, entries, sample)
    reached = (*BACKGROUND, "world_model.encoder") if encoder == "shared" else BACKGROUND
    for name, value in got.items():
        if IDLE not in name:
            assert (value > 0) == name.startswith(reached), name


@pytest.mark.parametrize("latent", LATENTS)
def test_actor_and_imagined_critic_losses_train_only_themselves(latent):
    loss, sample = make_loss(latent), make_sample()
    for entry, owner in (("loss_actor", "actor."), ("loss_critic", "critic.")):
        for name, value in gradients(loss, [entry], sample).items():
            assert (value > 0) == name.startswith(owner), (entry, name)


def test_replayed_critic_loss_reaches_the_foreground_latent():
    got = gradients(make_loss("split"), ["loss_replay_critic"], make_sample())
    assert got["world_model.encoder.layers.0.weight"] > 0
    assert got["world_model.rollout.rssm_prior.module.rnn.gates.weight"] > 0
    assert not any(v for k, v in got.items() if k.startswith(("actor.", "slow_critic")))


@pytest.mark.parametrize("latent", LATENTS)
def test_every_trained_parameter_gets_a_gradient(latent):
    loss = make_loss(latent, free_nats=0.0)
    got = gradients(loss, loss.out_keys, make_sample())
    for name, parameter in loss.named_parameters():
        if IDLE not in name:
            assert (got[name] > 0) == parameter.requires_grad, name


@pytest.mark.parametrize("latent", LATENTS)
def test_the_set_of_losses_is_asserted_and_finite(latent):
    loss = make_loss(latent)
    out = loss(make_sample())
    assert {k for k in out.keys() if k.startswith("loss_")} == set(loss.loss_names())
    assert all(torch.isfinite(v).all() for v in out.values())
    assert ("wm/mask_iou" in out.keys()) == (latent != "whole")


@dataclasses.dataclass
class OwnConfig(LossConfig):
    mask_area: float = 0.5
    bonus: float = 2.0


class OwnLosses(World2FilterLoss):
    """A loss of the world model and one of the actor, as docs/howto/loss.md adds them."""

    terms = World2FilterLoss.terms | {"bonus": LossTerm(("ac/bonus_loss",))}

    def loss_names(self):
        return [*super().loss_names(), "loss_mask_area"]

    def world_model_losses(self, model_td):
        losses, metrics = super().world_model_losses(model_td)
        area = model_td["next", "mask_logits"].sigmoid().sum((-3, -2, -1)).mean()
        return losses | {"mask_area": area}, metrics

    def actor_critic_losses(self, state, belief):
        losses, metrics, returns = super().actor_critic_losses(state, belief)
        return losses | {"bonus": belief.sum() * 0 + 3.0}, metrics, returns


def with_own_losses(kind=OwnLosses, latent="shared", config=None):
    plain = make_loss(latent)
    parts = plain.world_model, plain.actor, plain.critic
    return kind(*parts, config or OwnConfig())


@pytest.mark.parametrize("latent", ["shared", "foreground", "split"])
def test_a_loss_of_ones_own_is_in_the_total_and_has_a_metric(latent):
    loss = with_own_losses(latent=latent)
    out = loss(make_sample()).detach()
    own = float(out["loss_mask_area"])
    assert own > 1.0
    assert float(out["wm/mask_area_loss"]) == own
    assert float(out["ac/bonus_loss"]) == float(out["loss_bonus"]) == 6.0
    # The minimised sum is the world model's total and the actor's and critic's.
    minimised = sum(float(out[name]) for name in loss.out_keys)
    parts = ("wm/total_loss", "ac/actor_loss", "ac/critic_loss", "ac/bonus_loss")
    assert sum(float(out[name]) for name in parts) == pytest.approx(minimised, rel=1e-6)
    plain = make_loss(latent)(make_sample())
    assert float(out["wm/total_loss"] - plain["wm/total_loss"]) == pytest.approx(own, rel=1e-4)


@pytest.mark.parametrize("latent", LATENTS)
def test_each_metric_of_losses_is_the_sum_of_its_own(latent):
    out = make_loss(latent, dynamics=0.7)(make_sample())
    losses = {k.removeprefix("loss_"): float(v) for k, v in out.items() if k.startswith("loss_")}
    kl = [k for k in losses if k.endswith(("dynamics", "representation"))]
    images = {"image", "foreground", "mask", "background"} & losses.keys()
    assert len(kl) == (4 if latent == "split" else 2)
    expected = {
        "wm/kl_loss": kl,
        "wm/image_loss": images,
        "wm/total_loss": [*kl, *images, "reward", "continuation"],
        "ac/critic_loss": ["critic", "replay_critic"],
    }
    if latent != "whole":
        expected["wm/fg_loss"] = ["foreground", "mask"]
    for metric, names in expected.items():
        wanted = sum(losses[name] for name in names)
        assert float(out[metric]) == pytest.approx(wanted, rel=1e-6), metric
    assert ("wm/fg_loss" in out.keys()) == (latent != "whole")
    assert ("wm/bg_loss" in out.keys()) == (latent in ("split", "shared"))


def test_a_loss_without_a_weight_and_one_of_the_actor_without_a_row_are_errors():
    with pytest.raises(ValueError, match=r"loss_bonus has no weight: set loss.extra.bonus, "):
        with_own_losses(config=LossConfig())

    class Unlisted(OwnLosses):
        terms = World2FilterLoss.terms

        def loss_names(self):
            return [*super().loss_names(), "loss_bonus"]

    with pytest.raises(RuntimeError, match=r"add a row 'bonus' to Unlisted.terms"):
        with_own_losses(Unlisted)(make_sample())


def test_terminal_records_teach_the_continuation_zero():
    loss, sample = make_loss("whole"), make_sample()
    torch.manual_seed(0)
    model_td = loss.world_model(sample.select(*loss.in_keys))
    got = loss.world_model_losses(model_td)[0]["continuation"]
    target = torch.where(sample["next", "terminated"], 0.0, 1 - 1 / 333)
    p = model_td["next", "continue_logits"].sigmoid()
    want = -(target * p.log() + (1 - target) * (1 - p).log()).mean()
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"foreground_target": "everywhere"}, "loss.foreground_target='everywhere'"),
        ({"lmbda": 1.5}, "loss.lmbda=1.5"),
        ({"reward": -1.0}, "loss.reward=-1.0"),
        ({"imagination_horizon": 0}, "loss.imagination_horizon=0"),
    ],
)
def test_bad_loss_settings_are_named(setting, match):
    with pytest.raises(ValueError, match=match):
        LossConfig(**setting).validate()

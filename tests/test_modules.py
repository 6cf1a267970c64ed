"""The networks: parity with TorchRL's parts, causality, and shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.models import SIZE, TINY, filled, make_sample
from tensordict import TensorDict
from torch.nn import functional as F
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import RSSMRolloutV3
from torchrl.modules.models import model_based
from torchrl_reference import torchrl_loss, with_torchrls_pictures

from w2f_torchrl.modules import (
    LATENTS,
    PRESETS,
    DualImageDecoder,
    build_actor,
    build_critic,
    build_policy,
    build_world_model,
    compose,
    latent_sizes,
    sample_one_hot,
)
from w2f_torchrl.objectives import World2FilterLoss


@pytest.fixture
def no_noise(monkeypatch):
    """Make every draw of the RSSM and of the policy a constant, in our code and in TorchRL's."""
    monkeypatch.setattr(torch, "rand", lambda *a, **k: filled(0.37, a, k))
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    for module in (torch.distributions.utils, torch.distributions.normal):
        monkeypatch.setattr(
            module, "_standard_normal", lambda shape, dtype, device: torch.zeros(shape, dtype=dtype)
        )


def make_world_model(latent: str = "whole", seed: int = 0, config=TINY):
    torch.manual_seed(seed)
    return build_world_model(config, action_size=2, image_size=SIZE, latent=latent)


# ------------------------------------------------------------------ RSSM


@pytest.fixture
def norm_in_float64(monkeypatch):
    """TorchRL's RMS norm in its input's precision: it rounds to float32 whatever the input."""
    monkeypatch.setattr(
        model_based,
        "_dreamer_v3_rms_norm",
        lambda value, weight, eps: F.rms_norm(value, weight.shape, weight, eps),
    )


@pytest.mark.parametrize("layers", [1, 2])
def test_rollout_equals_torchrls_in_float64(layers, norm_in_float64):
    """Same state dict, same random stream, same outputs and gradients."""
    config = TINY.__class__(**vars(TINY) | {"dynamics_layers": layers, "posterior_layers": layers})
    torch.manual_seed(0)
    ours = build_world_model(
        config, action_size=2, image_size=SIZE, latent="whole"
    ).rollout.double()
    theirs = RSSMRolloutV3(ours.rssm_prior, ours.rssm_posterior, action_key="action")
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert isinstance(ours, RSSMRolloutV3)

    torch.manual_seed(1)
    batch, time = 3, 7
    reset = torch.zeros(batch, time, 1, dtype=torch.bool)
    reset[0, 0] = reset[1, 4] = reset[2, 6] = True
    features = config.cnn_depth * 4
    embedding = torch.randn(batch, time, features, dtype=torch.float64, requires_grad=True)
    data = TensorDict(
        {
            "action": 3 * torch.randn(batch, time, 2, dtype=torch.float64),
            "is_init": reset,
            "state": torch.randn(batch, time, 16, dtype=torch.float64, requires_grad=True),
            "belief": torch.randn(batch, time, 16, dtype=torch.float64, requires_grad=True),
            "next": TensorDict(
                {"encoded_latents": embedding},
                [batch, time],
            ),
        },
        [batch, time],
    )
    results = []
    for module in (ours, theirs):
        torch.manual_seed(2)
        out = module(data.clone())["next"].exclude("encoded_latents")
        loss = sum((i + 1) * v.square().sum() for i, (_, v) in enumerate(sorted(out.items())))
        inputs = [data["state"], data["belief"], embedding]
        results.append((out, torch.autograd.grad(loss, [*ours.parameters(), *inputs])))
    (out, grads), (want, want_grads) = results
    assert set(out.keys()) == set(want.keys())
    for key in want.keys():
        torch.testing.assert_close(out[key], want[key], rtol=1e-10, atol=1e-10)
    for grad, want_grad in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(grad, want_grad, rtol=1e-9, atol=1e-9)


def test_sampled_states_follow_the_mixed_probabilities():
    logits = torch.tensor([[4.0, 0.0, -4.0]]).expand(1, 3)
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    samples = sample_one_hot(logits.expand(20_000, 1, 3), 0.3, uniform.unsqueeze(-1))
    want = 0.7 * logits[0].softmax(-1) + 0.1
    torch.testing.assert_close(samples.mean((0, 1)), want, atol=1e-3, rtol=0)
    # The rounding of the last cumulative probability must not lose a sample.
    top = sample_one_hot(torch.zeros(1, 1, 7), 0.01, torch.tensor([[1 - 1e-8]]))
    assert top.sum() == 1


def test_resets_hide_everything_before_an_episode(no_noise):
    world_model = make_world_model()
    sample = make_sample()  # sequence 1 starts an episode at t = 3
    other = sample.clone()
    other["next", "pixels"][1, :3] = 255 - other["next", "pixels"][1, :3]
    other["action"][1, :4] += 5.0  # the action that led to a first observation counts for nothing
    a, b = (world_model.infer(s.select(*world_model.in_keys))["next"] for s in (sample, other))
    assert not torch.equal(a["belief"][1, 2], b["belief"][1, 2])
    assert torch.equal(a["belief"][1, 3:], b["belief"][1, 3:])
    assert torch.equal(a["state"][1, 3:], b["state"][1, 3:])


def test_the_future_never_reaches_the_past_and_the_last_action_reaches_the_belief(no_noise):
    world_model = make_world_model("split")
    sample = make_sample()
    later = sample.clone()
    later["next", "pixels"][0, 4:] = 255 - later["next", "pixels"][0, 4:]
    later["action"][0, 4] += 0.5
    a, b = (world_model.infer(s.select(*world_model.in_keys))["next"] for s in (sample, later))
    for key in ("belief", "state", "background_belief", "background_state"):
        assert torch.equal(a[key][0, :4], b[key][0, :4])
    # The action at t leads to the observation at t: the belief there already knows it.
    assert not torch.equal(a["belief"][0, 4], b["belief"][0, 4])
    # The scenery sees no action, so before its posterior has seen the pixels it is unchanged.
    assert torch.equal(a["background_belief"][0, 4], b["background_belief"][0, 4])


def test_the_backgrounds_latent_ignores_actions(no_noise):
    world_model = make_world_model("split")
    sample = make_sample()
    other = sample.clone().set("action", sample["action"] + 1.0)
    a, b = (world_model.infer(s.select(*world_model.in_keys))["next"] for s in (sample, other))
    assert torch.equal(a["background_belief"], b["background_belief"])
    assert not torch.equal(a["belief"], b["belief"])


# ------------------------------------------------------------------ acting equals training


def test_acting_step_by_step_gives_the_replayed_beliefs(no_noise):
    """The policy, fed record by record, carries the latents that the rollout computes."""
    world_model = make_world_model("split")
    actor = build_actor(TINY, 2)
    policy = build_policy(world_model, actor)
    sample = make_sample()
    want = world_model.infer(sample.select(*world_model.in_keys))["next"]
    carried = {
        k: torch.zeros(3, n) for k, n in latent_sizes(TINY, 2).items() if k != "previous_action"
    }
    for t in range(sample.shape[1]):
        step = TensorDict(
            {
                "pixels": sample["next", "pixels"][:, t],
                "is_init": sample["is_init"][:, t],
                "previous_action": sample["action"][:, t],
                **carried,
            },
            [3],
        )
        with torch.no_grad(), set_exploration_type(ExplorationType.MODE):
            acted = policy(step)
        carried = {key: acted["next", key] for key in carried}
        for key in carried:
            torch.testing.assert_close(carried[key], want[key][:, t], rtol=1e-5, atol=1e-6)
        assert torch.equal(acted["next", "previous_action"], acted["action"])
        torch.testing.assert_close(acted["action"], acted["loc"])


def test_acting_computes_neither_mask_nor_background():
    world_model = make_world_model("split")
    policy = build_policy(world_model, build_actor(TINY, 2))
    names = [name for name, _ in policy.named_parameters()]
    owned = {id(p) for p in policy.parameters()}
    branches = [world_model.background_rollout, world_model.decoder, world_model.reward]
    assert names
    assert not any(id(p) in owned for branch in branches for p in branch.parameters())
    assert "foreground_mask" not in policy.in_keys


# ------------------------------------------------------------------ all losses against TorchRL's


def test_all_losses_and_gradients_equal_torchrls(no_noise):
    """An independent implementation of the whole objective, on the same modules and data."""
    world_model = make_world_model(config=with_torchrls_pictures(TINY))
    actor, critic = build_actor(TINY, 2), build_critic(TINY)
    for head in (world_model.reward, critic):
        torch.nn.init.normal_(head.model[-1].weight, std=0.05)
    ours = World2FilterLoss(world_model, actor[0].module, critic)
    theirs = torchrl_loss(ours, actor)
    sample = make_sample()
    modules = [world_model, actor, critic]
    parameters = [p for module in modules for p in module.parameters()]
    out = ours(sample.clone())
    ours.return_norm.low.zero_()
    ours.return_norm.high.zero_()
    want = theirs(sample.exclude(("next", "foreground_mask")))
    pairs = {
        "loss_image": "loss_model_reco",
        "loss_reward": "loss_model_reward",
        "loss_dynamics": "loss_model_dynamic",
        "loss_representation": "loss_model_representation",
        "loss_continuation": "loss_model_continue",
        "loss_actor": "loss_actor",
        "loss_critic": "loss_value",
        "loss_replay_critic": "loss_replay_value",
    }
    assert set(pairs) == set(ours.out_keys)
    for name, reference in pairs.items():
        torch.testing.assert_close(out[name], want[reference].squeeze(), rtol=1e-4, atol=1e-6)
    assert out["loss_actor"].abs() > 1e-4  # there is something to compare
    sums = (sum(out[k] for k in pairs), sum(want[k].squeeze() for k in pairs.values()))
    grads = [torch.autograd.grad(s, parameters, allow_unused=True) for s in sums]
    for a, b in zip(*grads, strict=True):
        assert a is not None
        if b is not None:
            torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-5)


# ------------------------------------------------------------------ shapes, sizes, errors


@pytest.mark.parametrize("latent", ["whole", *LATENTS])
def test_the_world_model_writes_what_it_says(latent):
    world_model = make_world_model(latent)
    out = world_model(make_sample().select(*world_model.in_keys))
    for key in world_model.out_keys:
        assert out[key].shape[:2] == (3, 6), key
    if latent != "whole":
        assert out["next", "mask_logits"].shape == (3, 6, 1, SIZE, SIZE)
        # The mask head starts near an agent's share of a picture instead of at one half.
        assert out["next", "mask_logits"].sigmoid().mean() < 0.15
    has_background = ("next", "background_pixels") in world_model.out_keys
    assert has_background == (latent in ("split", "shared"))


def test_dual_decoder_composes_by_the_mask():
    decoder = DualImageDecoder((2, 4), (2, 2), (3, 16, 16), depth=4, mults=(1, 2), num_blocks=2)
    latent = {"state": torch.randn(2, 2), "belief": torch.randn(2, 4)}
    latent |= {"background_state": torch.randn(2, 2), "background_belief": torch.randn(2, 2)}
    td = decoder(TensorDict({"next": TensorDict(latent, [2])}, [2]))["next"]
    logits = torch.full((2, 1, 16, 16), -40.0)
    logits[..., :8, :] = 40.0
    out = compose(td["foreground_pixels"], logits, td["background_pixels"])
    torch.testing.assert_close(out[..., :8, :], td["foreground_pixels"][..., :8, :])
    torch.testing.assert_close(out[..., 8:, :], td["background_pixels"][..., 8:, :])


def test_presets_are_the_papers():
    widths = {
        name: (p.belief_size, p.hidden_size, p.num_classes, p.cnn_depth, p.units)
        for name, p in PRESETS.items()
    }
    assert widths["size1m"] == (512, 64, 4, 4, 64)
    assert widths["size12m"] == (2048, 256, 16, 16, 256)
    assert widths["size200m"] == (8192, 1024, 64, 64, 1024)
    for preset in PRESETS.values():
        preset.validate(64)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"config": "size2m"}, "model='size2m' is unknown; presets: size1m"),
        ({"latent": "both"}, "latent='both' is unknown; allowed: whole, split"),
        ({"image_size": 50}, "environment.image_size=50 must be a multiple of 16"),
        (
            {"config": replace(PRESETS["size1m"], decoder="linear")},
            "model.decoder='linear' is unknown; allowed: reference, torchrl",
        ),
        (
            {"config": replace(PRESETS["size1m"], resample="pool")},
            "model.resample='pool' is unknown; allowed: stride, nearest, reference",
        ),
        ({"config": replace(PRESETS["size1m"], kernel_size=1)}, "model.kernel_size=1 must be odd"),
        ({"config": replace(PRESETS["size1m"], kernel_size=4)}, "model.kernel_size=4 must be odd"),
    ],
)
def test_bad_settings_are_named(kwargs, match):
    with pytest.raises(ValueError, match=match):
        build_world_model(**{"config": "size1m", "action_size": 1} | kwargs)

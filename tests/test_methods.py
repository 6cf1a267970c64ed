"""The methods to compare with: their papers' formulas, their gradients, and whole runs of each."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from execution_equality import compare
from fake_cuda import Watch, fake_cuda, fake_like, why_not
from helpers.models import SIZE, TINY, make_learner, make_sample
from helpers.runs import tiny_run
from helpers.short_runs import differences
from helpers.streams import Streams
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

from w2f_torchrl.algorithms import barlow_twins_loss, reverse_gradient
from w2f_torchrl.algorithms.masked_input import act_on_student, masked
from w2f_torchrl.algorithms.repo import RepoLoss
from w2f_torchrl.checkpoint import latest_checkpoint
from w2f_torchrl.config import METHODS, ConfigError, LossConfig, RepoConfig, TiaConfig
from w2f_torchrl.evaluation.evaluator import reconstruct
from w2f_torchrl.evaluation.export import export_policy
from w2f_torchrl.evaluation.imagination import imagine_windows, observe, roll
from w2f_torchrl.kernels import switch
from w2f_torchrl.learner.optimizer import CapturableOptimizer
from w2f_torchrl.modules import latent_sizes
from w2f_torchrl.segmenters import StudentNetwork, StudentSegmenter
from w2f_torchrl.trainers import Learner, Trainer, load_policy

NEW = [name for name in METHODS if name != "dreamer_v3"]
WITHOUT_DECODER = ["repo", "r2dreamer"]
fake = pytest.mark.skipif(why_not() is not None, reason=f"no fake CUDA tensors: {why_not()}")


def learner_of(algorithm: str, **settings: Any) -> Learner:
    """A tiny learner whose heads don't start at zero, which would hide gradients."""
    learner = make_learner(METHODS[algorithm].latent, algorithm=algorithm, **settings)
    heads = [learner.world_model.reward, learner.loss.critic]
    heads += [learner.loss.background_reward] if algorithm == "tia" else []
    for head in heads:
        nn.init.normal_(head.model[-1].weight, std=0.3)
    return learner


def model_td(learner: Learner, sample: TensorDict | None = None) -> Any:
    torch.manual_seed(3)
    sample = make_sample() if sample is None else sample
    return learner.world_model(sample.select(*learner.loss.in_keys))


def reached(loss: Tensor, learner: Learner) -> set[str]:
    """The parts that a loss sends a gradient to, by the first names of their parameters."""
    names, parameters = zip(*learner.loss.named_parameters(), strict=True)
    trained = [(n, p) for n, p in zip(names, parameters, strict=True) if p.requires_grad]
    found = torch.autograd.grad(loss, [p for _, p in trained], allow_unused=True, retain_graph=True)
    parts = set()
    for (name, _), gradient in zip(trained, found, strict=True):
        if gradient is not None and gradient.abs().sum() > 0:
            first, second, *_ = [*name.split("."), ""]
            parts.add(second if first == "world_model" else first)
    return parts


# ------------------------------------------------------------------ masked_input


def test_nothing_outside_the_mask_reaches_a_model_of_masked_input():
    # In evaluation mode the percentiles of the returns stay.
    learner, sample = learner_of("masked_input").eval(), make_sample()
    mask = sample["next", "foreground_mask"]
    inside, outside = sample.clone(), sample.clone()
    for other, where in ((inside, mask), (outside, ~mask)):
        noise = torch.randint_like(other["next", "pixels"], 256)
        other["next", "pixels"] = torch.where(where, noise, other["next", "pixels"])
    results = []
    for each in (sample, outside, inside):
        torch.manual_seed(5)
        results.append(learner.loss(each))
    same = {key: torch.equal(results[0][key], results[1][key]) for key in results[0].keys()}
    assert all(same.values()), same
    assert not torch.equal(results[0]["loss_image"], results[2]["loss_image"])


def test_the_picture_of_masked_input_is_pixels_times_mask():
    learner, sample = learner_of("masked_input"), make_sample()
    td = model_td(learner, sample)
    losses, _ = learner.loss.world_model_losses(td)
    pixels = sample["next", "pixels"].double() / 255 * sample["next", "foreground_mask"].double()
    error = (td["next", "reconstructed_pixels"].double() - pixels).pow(2).sum((-3, -2, -1)).mean()
    torch.testing.assert_close(losses["image"].double(), error, rtol=1e-5, atol=0)
    # The encoder's input, written independently.
    seen = (sample["next", "pixels"].float() * sample["next", "foreground_mask"]).byte()
    plain = learner.world_model.encoder.encoder(seen)
    torch.testing.assert_close(td["next", "encoded_latents"], plain)
    with pytest.raises(TypeError, match="foreground_mask must be bool"):
        masked(sample["next", "pixels"], sample["next", "foreground_mask"].float())


def acting_td(sample: TensorDict, t: int, mask: bool = True) -> TensorDict:
    keys = ["pixels", *(["foreground_mask"] if mask else [])]
    sizes = latent_sizes(TINY, 2)
    return TensorDict(
        {
            "is_init": torch.ones(len(sample), 1, dtype=torch.bool),
            **{key: sample["next", key][:, t] for key in keys},
            **{key: torch.zeros(len(sample), size) for key, size in sizes.items()},
        },
        [len(sample)],
    )


def test_acting_masks_as_training_does():
    learner, sample = learner_of("masked_input"), make_sample()
    acted = learner.policy.module[0](acting_td(sample, 0))
    torch.testing.assert_close(
        acted["encoded_latents"], model_td(learner, sample)["next", "encoded_latents"][:, 0]
    )


def test_a_student_in_the_policy_gives_the_replays_masks_and_follows_its_weights():
    torch.manual_seed(0)
    learner, sample = learner_of("masked_input"), make_sample()
    network = StudentNetwork()
    with torch.no_grad():
        network.head.bias.fill_(0.05)
    policy = act_on_student(learner.policy, StudentSegmenter(network))
    policy.train()  # as a learner's .train() does; it must not change the masks
    assert "foreground_mask" not in policy.in_keys
    assert {name for name, _ in policy.named_parameters() if "network" in name}
    for _ in range(2):
        acted = policy(acting_td(sample, 1, mask=False))
        mask = StudentSegmenter(network)(sample["next", "pixels"][:, 1])
        assert 0 < mask.float().mean() < 1
        assert torch.equal(acted["acting_mask"], mask)
        shown = sample["next", "pixels"][:, 1] * mask
        want = learner.world_model.encoder.encoder(shown)
        torch.testing.assert_close(acted["encoded_latents"], want)
        for parameter in network.parameters():  # as new weights arrive in a worker
            parameter.data.add_(0.02 * torch.randn_like(parameter))
    assert acted["action"].shape == (len(sample), 2)


# ------------------------------------------------------------------ RePo


def kl_of(td: Any, posterior: Tensor, prior: Tensor) -> Tensor:
    """KL of the mixtures with 1 % of the uniform distribution, summed over categoricals."""
    mixed = [0.99 * x.softmax(-1) + 0.01 / x.shape[-1] for x in (posterior, prior)]
    parts = [torch.distributions.Categorical(probs=p) for p in mixed]
    return torch.distributions.kl_divergence(*parts).sum(-1).mean()


@pytest.mark.parametrize("target", [0.05, 50.0])
def test_repos_losses_are_the_lagrangian(target):
    repo = RepoConfig(target_kl=target, initial_dual=0.2, dual_slowdown=2, prior_weight=3)
    learner = learner_of("repo", method=repo)
    loss = learner.loss
    assert isinstance(loss, RepoLoss)
    td = model_td(learner)
    losses, metrics = loss.world_model_losses(td)
    prior, posterior = (td["next", f"{kind}_logits"] for kind in ("prior", "posterior"))
    kl = kl_of(td, posterior, prior)
    assert 0.05 < kl < 50
    torch.testing.assert_close(losses["budget"], 0.2 * (kl - target), rtol=1e-4, atol=1e-6)
    log_dual = math.log(0.2)
    torch.testing.assert_close(losses["dual"], -log_dual * (kl - target), rtol=1e-4, atol=1e-6)
    assert float(metrics["wm/dual"]) == pytest.approx(0.2)
    # A share of the KL's gradient for the prior, the rest for the posterior.
    inputs = (prior, posterior)
    whole = torch.autograd.grad(kl, inputs, retain_graph=True)
    got = torch.autograd.grad(losses["budget"], inputs, retain_graph=True)
    for part, gradient, share in zip(got, whole, (0.75, 0.25), strict=True):
        torch.testing.assert_close(part, 0.2 * share * gradient, rtol=1e-3, atol=1e-8)
    assert reached(losses["dual"], learner) == {"scaled_log_dual"}
    assert "scaled_log_dual" not in reached(losses["budget"], learner)
    (gradient,) = torch.autograd.grad(losses["dual"], [loss.scaled_log_dual])
    torch.testing.assert_close(gradient, -0.5 * (kl - target).detach(), rtol=1e-4, atol=1e-6)
    assert "image" not in losses
    assert {"loss_dynamics", "loss_representation", "loss_image"}.isdisjoint(loss.out_keys)


@pytest.mark.parametrize(("target", "sign"), [(1e-3, 1), (50.0, -1)])
def test_the_dual_variable_rises_above_the_budget_and_falls_below_it(target, sign):
    repo = RepoConfig(target_kl=target, dual_slowdown=2)
    learner = learner_of("repo", method=repo, lr=1e-3)
    for _ in range(12):
        learner.update(make_sample())
    moved = float(learner.loss.log_dual) - math.log(repo.initial_dual)
    # By about rate times learning rate per update, three of which warm up.
    assert 0.003 < sign * moved < 0.012 * 0.5 * 1.1
    again = learner_of("repo", method=repo, lr=1e-3)
    again.load_state_dict(learner.state_dict())
    assert torch.equal(again.loss.scaled_log_dual, learner.loss.scaled_log_dual)


def test_the_dual_variable_passes_one_as_fast_as_it_moves_elsewhere():
    """Clipping relative to a parameter must not stop its logarithm where it is zero."""
    repo = RepoConfig(target_kl=1e-3, initial_dual=0.995, dual_slowdown=1)
    learner = learner_of("repo", method=repo, lr=1e-3)
    path = []
    for _ in range(30):
        learner.update(make_sample())
        path.append(float(learner.loss.log_dual))
    assert path[3] < 0 < path[-1]
    moved = np.diff(path[5:])
    assert moved.min() > 0.5 * moved.max() > 0


# ------------------------------------------------------------------ R2-Dreamer


def test_the_barlow_twins_loss_is_its_definition():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(7, 4)), rng.normal(size=(7, 4))
    first[:, 1] += second[:, 1]
    want = 0.0
    for i in range(4):
        for j in range(4):
            products = [
                (first[n, i] - first[:, i].mean())
                / first[:, i].std(ddof=1)
                * (second[n, j] - second[:, j].mean())
                / second[:, j].std(ddof=1)
                for n in range(7)
            ]
            entry = sum(products) / 7
            want += (entry - 1) ** 2 if i == j else 0.3 * entry**2
    got = barlow_twins_loss(torch.tensor(first), torch.tensor(second), 0.3)
    assert float(got) == pytest.approx(want, rel=1e-5)
    constant = torch.zeros(7, 4)  # as features of an embedding that never fire
    assert float(barlow_twins_loss(constant, torch.tensor(second), 0.3)) == pytest.approx(4)


def test_r2dreamers_loss_reads_latents_and_stops_the_embedding():
    learner = learner_of("r2dreamer")
    td = model_td(learner)
    following = td["next"]
    embedding = following["encoded_latents"]
    losses, _ = learner.loss.world_model_losses(td)
    features = torch.cat((following["belief"], following["state"]), -1).flatten(0, 1)
    want = barlow_twins_loss(
        features @ learner.loss.projector.weight.T, embedding.flatten(0, 1), 5e-4
    )
    torch.testing.assert_close(losses["barlow"], want)
    # Without the way through the posterior nothing reaches the embedding.
    alone = following.clone(recurse=False)
    for key in ("belief", "state"):
        alone[key] = alone[key].detach()
    loss = learner.loss.reconstruction_losses(alone)[0]["barlow"]
    assert reached(loss, learner) == {"projector"}
    assert reached(losses["barlow"], learner) == {"projector", "encoder", "rollout"}
    total = learner.loss(make_sample())
    assert float(total["wm/barlow_loss"]) == pytest.approx(float(total["loss_barlow"]))
    assert "loss_image" not in learner.loss.out_keys


# ------------------------------------------------------------------ TIA

BACKGROUND = {"background_encoder", "background_rollout"}


def test_tias_pictures_are_joined_by_a_mask_of_both_decoders():
    learner, sample = learner_of("tia"), make_sample()
    td = model_td(learner, sample)
    following, decoder = td["next"], learner.world_model.decoder
    foreground, first = decoder.foreground(following["state"], following["belief"])
    latent = following["background_state"], following["background_belief"]
    background, second = decoder.background(*latent)
    weight, bias = decoder.joint_mask.weight.flatten(), decoder.joint_mask.bias
    mask = torch.sigmoid(weight[0] * first + weight[1] * second + bias)
    joint = mask * foreground + (1 - mask) * background
    pixels = sample["next", "pixels"].float() / 255
    losses, _ = learner.loss.world_model_losses(td)

    def error(picture: Tensor) -> Tensor:
        return (picture - pixels).pow(2).sum((-3, -2, -1)).mean()

    torch.testing.assert_close(losses["image"], error(joint), rtol=1e-4, atol=0)
    alone = error(decoder.distractor(*latent))
    torch.testing.assert_close(losses["background_image"], alone, rtol=1e-4, atol=0)
    weighted = learner.loss(sample)
    ratio = weighted["loss_background_image"] / weighted["loss_image"]
    assert 0.5 < float(ratio) / 1.5 < 2  # at the start both are grey
    assert reached(losses["image"], learner) == {"encoder", "rollout", "decoder", *BACKGROUND}
    assert reached(losses["background_image"], learner) == {"decoder", *BACKGROUND}
    assert ("next", "foreground_mask") not in learner.loss.in_keys


def test_tias_distractor_unlearns_the_reward_that_its_head_learns():
    factor = 2.5
    learner = learner_of("tia", method=TiaConfig(dissociation=factor))
    td = model_td(learner)
    following, loss = td["next"], learner.loss
    losses, _ = loss.world_model_losses(td)
    names = ("background_belief", "background_state")
    features = torch.cat([following[name] for name in names], -1)
    # The symlog two-hot cross-entropy, with the head on the latent as it is.
    logits = loss.background_reward(features)
    plain = learner.world_model.two_hot.loss(logits, following["reward"]).mean()
    torch.testing.assert_close(losses["dissociation"], plain)
    head = list(loss.background_reward.parameters())
    latent = list(learner.world_model.background_encoder.parameters())
    for parameters, sign in ((head, 1.0), (latent, -factor)):
        want = torch.autograd.grad(plain, parameters, retain_graph=True)
        got = torch.autograd.grad(losses["dissociation"], parameters, retain_graph=True)
        assert sum(float(g.abs().sum()) for g in want) > 0
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, sign * other, rtol=1e-3, atol=1e-7)
    assert reached(losses["dissociation"], learner) == {"background_reward", *BACKGROUND}
    for name in ("reward", "continuation"):
        assert BACKGROUND.isdisjoint(reached(losses[name], learner)), name
    out = loss(make_sample())
    for name in ("actor", "critic", "replay_critic"):
        parts = reached(out[f"loss_{name}"], learner)
        assert BACKGROUND.isdisjoint(parts), name


def test_a_reversed_gradient_leaves_the_value():
    x = torch.randn(5, requires_grad=True)
    y = reverse_gradient(x, 3.0)
    assert torch.equal(x, y)
    (y * torch.arange(5)).sum().backward()
    torch.testing.assert_close(x.grad, -3 * torch.arange(5.0))


def test_tias_distractor_sees_the_actions():
    learner, sample = learner_of("tia").eval(), make_sample()
    other = sample.clone()
    other["action"] = other["action"] + 1
    beliefs = [model_td(learner, each)["next", "background_belief"] for each in (sample, other)]
    assert not torch.equal(*beliefs)
    records = observe(learner.world_model, make_sample(2, 12))
    rolled = []
    for actor in (None, learner.loss.actor):
        torch.manual_seed(0)
        rolled.append(roll(learner.world_model, records, 5, actor))
    # With the actor, the distractor's prior gets the actions that the actor chose from s+.
    assert not torch.equal(rolled[0]["action"][:, 5:], rolled[1]["action"][:, 5:])
    assert not torch.equal(*(each["background_belief"][:, 6:] for each in rolled))


def test_tia_refuses_parts_that_it_cannot_have():
    for setting, value in (("background_encoder", "shared"), ("decoder", "mine")):
        model = TINY.thawed(**{setting: value})
        with pytest.raises(ValueError, match=rf"model\.{setting}='{value}' "):
            Learner(model, action_size=2, image_size=SIZE, latent="split", algorithm="tia")


# ------------------------------------------------------------------ all of them


@pytest.mark.parametrize("method", NEW)
def test_total_and_gradients_of_a_method_are_complete(method):
    learner = learner_of(method, lr=1e-3)
    before = [p.detach().clone() for p in learner.parameters_trained]
    metrics = learner.update(make_sample())
    terms = learner.loss.out_keys
    own = [key for key in terms if "wm/total_loss" in learner.loss.term(key[5:]).metrics]
    assert float(metrics["wm/total_loss"]) == pytest.approx(sum(float(metrics[k]) for k in own))
    assert float(metrics["finite"]) == 1
    for _ in range(3):
        learner.update(make_sample())
    names = [n for n, p in learner.loss.named_parameters() if p.requires_grad]
    pairs = zip(names, before, learner.parameters_trained, strict=True)
    assert not {name for name, old, new in pairs if new.grad is None or torch.equal(old, new)}


@pytest.mark.parametrize("method", NEW)
def test_a_method_learns_discrete_actions(method):
    learner = learner_of(method, actions=3, lr=1e-3)
    assert type(learner.loss.actor).__name__ == "CategoricalActor"
    for _ in range(2):
        assert float(learner.update(make_sample(actions=3))["finite"]) == 1
    assert all(p.grad is not None for p in learner.parameters_trained)


@pytest.mark.parametrize("method", NEW)
def test_a_method_computes_the_same_without_cpu_kernels(method, monkeypatch):
    results = []
    for kernels in (True, False):
        monkeypatch.setattr(switch, "use_cpu_kernels", lambda x, k=kernels: k)
        learner = learner_of(method)
        torch.manual_seed(2)
        losses = dict(learner.update(make_sample()).items())
        gradients = {n: p.grad for n, p in learner.loss.named_parameters() if p.grad is not None}
        results.append(losses | gradients)
    for name, value in results[1].items():
        torch.testing.assert_close(
            results[0][name], value, rtol=1e-3, atol=3e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@fake
@pytest.mark.parametrize("method", NEW)
def test_an_update_and_acting_of_a_method_stay_on_the_device(method):
    with fake_cuda():
        learner = make_learner(
            METHODS[method].latent,
            algorithm=method,
            lr=1e-3,
            device="cuda",
            loss=LossConfig(imagination_horizon=3),
        )
        sample = fake_like(make_sample(2, 4), "cuda")
        for group in learner.optimizer.param_groups:  # as a first update does
            group["step"] = torch.zeros((), device="cuda")
        with Watch() as watch:
            metrics = learner.update(sample)
            state = fake_like(acting_td(make_sample(2, 4), 0), "cuda")
            with torch.no_grad(), set_exploration_type(ExplorationType.MODE):
                learner.policy(state)
        assert not watch.found
        assert {v.device for v in metrics.values()} == {torch.device("cuda", 0)}
        assert all(p.grad is not None for p in learner.parameters_trained)
        with Watch(reads_are_allowed=True) as watch:
            records = fake_like(make_sample(3, 16)[:1, :8], "cuda")
            columns, _ = reconstruct(learner.world_model, records)
        assert not watch.found
        assert {x.device.type for x in columns.values()} == {"cpu"}


def capturable(learner: Learner, *, graphed: bool) -> Streams:
    """Let a learner on the CPU, with real numbers, believe that it captures a graph, or not."""
    eager = learner._eager_update
    learner.optimizer = CapturableOptimizer(learner.parameters_trained, warmup_steps=3, lr=1e-3)
    learner._modes.optimizer = learner.optimizer
    if not graphed:
        return Streams()
    update = learner._update = learner._modes.graphed()
    return Streams(lambda: update._metrics.update_(eager(update._sample)))


@pytest.mark.parametrize("method", NEW)
def test_a_captured_update_of_a_method_is_eagers(method):
    results = []
    for graphed in (True, False):
        learner = learner_of(method)
        streams = capturable(learner, graphed=graphed)
        torch.manual_seed(3)
        with streams.installed():
            metrics = [learner.update(make_sample()) for _ in range(2)]
        assert len(streams.captured) == int(graphed)
        results.append((metrics, learner.loss.state_dict()))
    (captured, state), (plain, wanted) = results
    for one, two in zip(captured, plain, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in two.keys())
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


@fake
def test_tias_second_latent_can_be_a_branch_of_the_graph():
    with fake_cuda():
        model = make_learner("split", algorithm="tia", device="cuda").world_model
        sample = fake_like(make_sample(2, 4), "cuda")
        with Streams().installed() as streams, Watch(note=streams.note):
            streams.stream()
            model.side_stream = torch.cuda.Stream(torch.device("cuda"))
            model(sample.select(*model.in_keys))
        assert not streams.races
        assert not streams.not_kept()
        assert model.side_stream.knows[model.side_stream] > 100


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode", ["compile", "compile_all"])
@pytest.mark.parametrize("method", NEW)
def test_compiled_updates_of_a_method_are_eagers(method, mode):
    def make(execution: str) -> Learner:
        return learner_of(method, lr=1e-3, execution=execution)

    row = compare(make, mode, lambda number: make_sample(), 4)
    assert row["passed"], row


@pytest.mark.parametrize("method", NEW)
def test_pictures_of_a_method_show_what_it_decodes(method):
    learner, records = learner_of(method).eval(), make_sample(3, 32)[:1]
    if not METHODS[method].trains_on_masks:
        del records["next", "foreground_mask"]
    columns, iou = reconstruct(learner.world_model, records)
    film = imagine_windows(learner.world_model, learner.loss.actor, records)
    assert iou is None
    if method in WITHOUT_DECODER:
        assert list(columns) == ["frame"]
        assert film is None
        return
    names = ["mask", "foreground", "background", "composed"]
    assert list(columns) == ["frame", *(names if method == "tia" else ["reconstruction"])]
    assert film is not None
    shown = records["next", "pixels"][0]
    if method == "masked_input":
        shown = shown * records["next", "foreground_mask"][0]
    assert torch.equal(columns["frame"], shown)
    assert set(film.metrics) == {f"train/imagination/{m}error" for m in ("context_", "", "last_")}


# ------------------------------------------------------------------ runs


def run_of(method: str, run_dir: Path, frames: int = 192, **settings: Any) -> Any:
    settings.setdefault("training", {})["total_frames"] = frames
    settings["logging"] = {
        "every_updates": 1,
        "images_every_updates": 6,
        "histograms_every_updates": 6,
    }
    algo = {"name": method, "latent": None}
    return tiny_run(run_dir, algo=algo, resume="auto", **settings)


@pytest.mark.parametrize("method", NEW)
def test_a_run_of_a_method_resumes_exactly_and_acts(method, tmp_path, no_curves):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    Trainer(run_of(method, whole)).train()
    Trainer(run_of(method, cut, frames=128)).train()
    Trainer(run_of(method, cut)).train()
    assert [d for d in differences(whole, cut) if d != "metrics"] == []
    path = latest_checkpoint(whole / "checkpoints")
    policy = load_policy(path)
    env = policy.make_env(seed=1)
    episode = env.rollout(3, policy)
    assert episode["action"].abs().max() <= 1
    assert policy.acts_on_masks == (method == "masked_input")
    if policy.acts_on_masks:
        blind = env.reset().exclude("foreground_mask")
        with pytest.raises(KeyError, match=r"acts on pixels x mask: append a Foreground"):
            policy(blind)
    env.close()


def test_a_run_of_masked_input_acts_on_its_students_masks(tmp_path, no_curves, caplog):
    run_dir = tmp_path / "run"
    settings = {"source": "student", "teacher_frames": 24, "train_steps": 12, "teacher_every": 4}
    trainer = Trainer(run_of("masked_input", run_dir, frames=128, segmentation=settings))
    trainer.train()
    student = trainer.masks.student
    policy = load_policy(path := latest_checkpoint(run_dir / "checkpoints"))
    assert "from its own student" in caplog.text
    assert "foreground_mask" not in policy.in_keys
    env = policy.make_env(seed=1)
    acted = policy(env.reset().exclude("foreground_mask"))
    assert torch.equal(acted["acting_mask"], student(acted["pixels"][None])[0])
    exported = load_policy(export_policy(path, tmp_path / "small.pt"))
    again = exported(env.reset().exclude("foreground_mask"))
    assert again["action"].shape == acted["action"].shape
    env.close()


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algo": {"name": "tia", "latent": "split"}}, r"algo\.latent='split' must be null"),
        ({"algo": {"name": "repo", "latent": None}, "repo": {"target_kl": 0}}, r"repo\.target_kl"),
        (
            {"algo": {"name": "masked_input", "latent": None}, "segmentation": {"source": "auto"}},
            r"segmentation with algo=masked_input.*simulator, student",
        ),
        (
            {
                "algo": {"name": "masked_input", "latent": None},
                "segmentation": {"mask_dropout": 0.1},
            },
            r"segmentation\.mask_dropout=0\.1 must be 0",
        ),
        (
            {"algo": {"name": "tia", "latent": None}, "segmentation": {"source": "median"}},
            "has no masks",
        ),
    ],
)
def test_settings_that_a_method_cannot_have_are_named(settings, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        tiny_run(tmp_path, **settings).validate()


def test_a_method_knows_its_latent_and_masks(tmp_path):
    facts = {}
    for method in METHODS:
        config = tiny_run(tmp_path, algo={"name": method, "latent": None})
        config.validate()
        facts[method] = (config.latent, config.needs_masks, config.acts_on_masks)
    assert facts == {name: tuple(method) for name, method in METHODS.items()}
    # A registered algorithm may be called like a group of settings, which is not its own.
    assert tiny_run(tmp_path, algo={"name": "optimizer", "latent": None}).method is None
    assert tiny_run(tmp_path, algo={"name": "tia", "latent": None}).method == TiaConfig()
    with pytest.raises(ValueError, match=r"loss\.extra=\{'mine': 1\.0\} must be empty"):
        learner_of("r2dreamer", loss=LossConfig(extra={"mine": 1.0}))

"""Discrete actions: the actor against TorchRL's and the reference's formulas, and whole runs."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from execution_equality import run
from helpers.choice_env import ChoiceEnv, led_to, step_of
from helpers.models import LATENTS, TINY, make_learner, make_loss, make_sample
from helpers.runs import tiny_run
from helpers.short_runs import Crash, differences
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch.nn import functional as F
from torchrl.data import Binary, Categorical, MultiCategorical, MultiOneHot, OneHot
from torchrl.envs import ExplorationType, set_exploration_type
from torchrl.envs.utils import check_env_specs
from torchrl.modules import DreamerV3DiscreteActor

from w2f_torchrl.algorithms import build_algorithm
from w2f_torchrl.checkpoint import latest_checkpoint
from w2f_torchrl.data import make_collector, records_from_rollout
from w2f_torchrl.envs import make_env, register_env, tasks
from w2f_torchrl.envs.actions import random_action
from w2f_torchrl.envs.discrete_actions import DiscreteActions, is_discrete
from w2f_torchrl.evaluation.export import export_policy
from w2f_torchrl.evaluation.imagination import observe, roll
from w2f_torchrl.kernels.imagination import CastActor, prepare
from w2f_torchrl.learner import Algorithm, AlgorithmSettings, register_algorithm
from w2f_torchrl.masks.prepare import collect_frames
from w2f_torchrl.modules import (
    CategoricalActor,
    build_actor,
    build_critic,
    build_discrete_actor,
    build_policy,
    build_world_model,
    imagine,
    imagine_step,
    latent_sizes,
)
from w2f_torchrl.objectives import World2FilterLoss
from w2f_torchrl.registry import algorithms
from w2f_torchrl.trainers import ConfigError, Trainer, load_policy

A = 4
FEATURES = TINY.state_size + TINY.belief_size
SPECS = {
    "categorical": Categorical(A),
    "categorical of one": Categorical(A, shape=(1,)),
    "one-hot": OneHot(A),
    "float one-hot": OneHot(A, dtype=torch.float32),
}


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(tasks, "_REGISTRY", dict(tasks._REGISTRY))
    monkeypatch.setattr(algorithms, "_parts", dict(algorithms._parts))


def latents(rows: int) -> TensorDict:
    state, belief = torch.randn(rows, TINY.state_size), torch.randn(rows, TINY.belief_size)
    return TensorDict({"state": state, "belief": belief}, [rows])


# ------------------------------------------------------------------ the actor


def test_the_actor_is_torchrls_with_its_parameters_and_draws():
    torch.manual_seed(0)
    theirs = DreamerV3DiscreteActor(
        FEATURES, A, depth=TINY.actor_critic_layers, num_cells=TINY.units, unimix=0.01
    )
    torch.manual_seed(0)
    ours = build_discrete_actor(TINY, A)
    one, other = theirs[0].module.state_dict(), ours[0].module.state_dict()
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    with torch.no_grad():  # an untrained head is nearly uniform, which would hide a wrong one
        for actor in (theirs, ours):
            torch.manual_seed(1)
            actor[0].module.logits_head.weight.normal_(std=2)
    for kind in (ExplorationType.RANDOM, ExplorationType.MODE):
        made = []
        for actor in (theirs, ours):
            torch.manual_seed(2)
            with set_exploration_type(kind), torch.no_grad():
                made.append(actor(latents(50)))
        torch.testing.assert_close(made[1]["logits"], made[0]["logits"])
        assert torch.equal(made[1]["action"], made[0]["action"].float())
        assert made[1]["action"].dtype is torch.float32


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-60, 60, width=32), min_size=2, max_size=12))
def test_log_probability_and_entropy_are_the_references(logits):
    """danijar/dreamerv3, embodied/jax/outs.py: a categorical mixed with 1 % of the uniform one."""
    values, size = torch.tensor(logits), len(logits)
    exact = [math.exp(x - max(logits)) for x in map(float, values)]
    probs = [0.99 * x / sum(exact) + 0.01 / size for x in exact]
    actor = CategoricalActor(FEATURES, size, TINY)
    distribution = actor.distribution(*actor.squash(values))
    for index, prob in enumerate(probs):
        action = F.one_hot(torch.tensor(index), size).float()
        assert float(distribution.log_prob(action)) == pytest.approx(math.log(prob), abs=1e-5)
        assert prob >= 0.01 / size
    entropy = -sum(p * math.log(p) for p in probs)
    assert float(distribution.entropy()) == pytest.approx(entropy, abs=1e-5)
    assert probs[int(distribution.mode.argmax())] == pytest.approx(max(probs), abs=1e-6)
    assert float(distribution.mode.sum()) == 1


def test_equal_logits_have_one_mode():
    actor = CategoricalActor(FEATURES, 3, TINY)
    (parameters,) = actor.squash(torch.zeros(5, 3))
    assert actor.distribution(parameters).mode.sum(-1).tolist() == [1] * 5


def test_draws_invert_the_distribution_function():
    actor = CategoricalActor(FEATURES, 3, TINY)
    probs = torch.tensor([0.125, 0.5, 0.375])
    log_probs = probs.log().expand(1000, -1)
    uniform = (torch.arange(1000).unsqueeze(-1) + 0.5) / 1000
    drawn = actor.draw(log_probs, uniform)
    assert drawn.sum(0).tolist() == [125, 500, 375]
    assert (drawn.argmax(-1).diff() >= 0).all()
    assert actor.noise(torch.zeros(5, 7, 3)).shape == (5, 7, 1)


def test_imagination_calls_the_cast_actor_under_autocast():
    world_model = build_world_model(TINY, action_size=A, image_size=16, latent="whole")
    actor = CategoricalActor(FEATURES, A, TINY)
    features = torch.randn(9, FEATURES)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        acting = prepare(world_model.prior, actor, torch.zeros(1, TINY.belief_size)).actor
        assert isinstance(acting, CastActor)
        (cast,) = acting.from_features(features.bfloat16())
        (plain,) = actor.from_features(features)
    assert cast.dtype is torch.float32
    torch.testing.assert_close(cast, plain, atol=0.02, rtol=0.02)


def test_a_gradient_can_go_straight_through_a_drawn_action_into_the_recurrence():
    world_model = build_world_model(TINY, action_size=A, image_size=16, latent="whole")
    actor = build_discrete_actor(TINY, A)
    start = latents(6)
    distribution = actor.get_dist(start)
    action = distribution.rsample()
    assert set(action.detach().round(decimals=4).unique().tolist()) == {0.0, 1.0}
    _, _, belief = world_model.prior(start["state"], start["belief"], action)
    (through,) = torch.autograd.grad(belief.square().sum(), actor[0].module.logits_head.weight)
    assert through.abs().sum() > 0


# ------------------------------------------------------------------ imagination and losses


@pytest.mark.parametrize("latent", LATENTS)
def test_each_imagined_action_is_drawn_from_the_state_before_it_and_leads_to_the_next(latent):
    loss = make_loss(latent, actions=A)
    with torch.no_grad():
        loss.actor.logits_head.weight.normal_(std=3)
    start, horizon = latents(30), 3
    torch.manual_seed(5)
    features, actions = imagine(loss.world_model.prior, loss.actor, *start.values(), horizon)
    assert actions.shape == (horizon, 30, A)
    assert torch.equal(actions, F.one_hot(actions.argmax(-1), A).float())
    torch.manual_seed(5)  # the states' draws come first
    torch.rand(horizon, 30, TINY.num_categoricals)
    uniform = torch.rand(horizon, 30, 1)
    prior, size = loss.world_model.prior, TINY.belief_size
    for t in range(horizon):
        (log_probs,) = loss.actor.from_features(features[t])
        below = (uniform[t] > log_probs.exp().cumsum(-1)).sum(-1)
        assert torch.equal(actions[t].argmax(-1), below.clamp(max=A - 1))
        belief, state = features[t].split([size, TINY.state_size], -1)
        for shift in (0, 1):
            after = prior(state, belief, actions[t].roll(shift, -1))[2]
            close = torch.allclose(after, features[t + 1][:, :size], atol=1e-5)
            assert close == (shift == 0)


def test_the_actors_loss_is_reinforce_with_the_references_weights():
    """DreamerV3, eq. 6 and "Actor learning": -sg(w) (log pi(sg(a)) sg(adv) + eta H).

    Written out in double precision from the network's raw outputs; gradients too.
    """
    loss = make_loss("whole", actions=A, entropy=0.3)
    loss.eval()  # the return's statistics stay
    loss.return_norm.low.fill_(-1.0)
    loss.return_norm.high.fill_(2.5)
    with torch.no_grad():
        loss.actor.logits_head.weight.normal_(std=1)
    start, horizon = latents(40), loss.config.imagination_horizon
    torch.manual_seed(7)
    got = loss.actor_critic_losses(*start.values())[0]["actor"]
    torch.manual_seed(7)
    features, actions = imagine(loss.world_model.prior, loss.actor, *start.values(), horizon)
    with torch.no_grad():
        reward, continuation = (x.double() for x in loss.world_model.predict(features))
        value = loss.world_model.two_hot.decode(loss.critic(features)).double()
    returns = [value[-1]]
    for t in reversed(range(horizon)):
        mixed = (1 - loss.config.lmbda) * value[t + 1] + loss.config.lmbda * returns[0]
        returns.insert(0, reward[t + 1] + continuation[t + 1] * mixed)
    want, weight = 0.0, torch.ones(40, dtype=torch.float64)
    for t in range(horizon):
        hidden = loss.actor.backbone(features[t])
        logits = F.linear(hidden, loss.actor.logits_head.weight, loss.actor.logits_head.bias)
        probs = 0.99 * torch.softmax(logits.double(), -1) + 0.01 / A
        log_prob = (probs.log() * actions[t]).sum(-1)
        entropy = -(probs * probs.log()).sum(-1)
        weight = weight * continuation[t]
        advantage = (returns[t] - value[t]) / 3.5
        want = want - (weight * (log_prob * advantage + 0.3 * entropy)).sum()
    want = want / (horizon * 40)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)
    parameters = list(loss.actor.parameters())
    ours, theirs = (torch.autograd.grad(x, parameters) for x in (got, want))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_the_actors_gradient_raises_what_pays():
    """With an advantage of +1 for one action and -1 for the others, that one becomes likelier."""
    loss, start = make_loss("whole", actions=A), latents(64)
    features = torch.cat((start["belief"], start["state"]), -1)
    optimizer = torch.optim.SGD(loss.actor.parameters(), lr=0.3)
    for _ in range(60):
        parameters = loss.actor.from_features(features)
        with torch.no_grad():
            actions = loss.actor.draw(*parameters, loss.actor.noise(features[:, :A]))
        advantage = 2 * actions[:, 2] - 1
        log_prob = loss.actor.distribution(*parameters).log_prob(actions)
        optimizer.zero_grad()
        (-(log_prob * advantage).mean()).backward()
        optimizer.step()
    with torch.no_grad():
        assert loss.actor.from_features(features)[0].exp()[:, 2].mean() > 0.6


@pytest.mark.parametrize("latent", LATENTS)
def test_gradients_go_where_they_go_for_continuous_actions(latent):
    loss, sample = make_loss(latent, actions=A, free_nats=0.0), make_sample(actions=A)
    owners = {"loss_actor": "actor.", "loss_critic": "critic."}
    for entry in loss.out_keys:
        loss.zero_grad()
        torch.manual_seed(0)
        loss(sample)[entry].backward()
        reached = {n for n, p in loss.named_parameters() if p.grad is not None and p.grad.any()}
        if entry in owners:
            assert reached == {n for n, _ in loss.named_parameters() if n.startswith(owners[entry])}
        else:
            assert not any(name.startswith("actor.") for name in reached), entry


def test_a_compiled_imagined_step_draws_the_eager_ones_actions():
    loss, start = make_loss("whole", actions=A), latents(30)
    with torch.no_grad():
        loss.actor.logits_head.weight.normal_(std=3)
    made = []
    for step in (imagine_step, torch.compile(imagine_step, dynamic=False)):
        torch.manual_seed(3)
        made.append(imagine(loss.world_model.prior, loss.actor, *start.values(), 3, step))
    assert torch.equal(made[1][1], made[0][1])
    torch.testing.assert_close(made[1][0], made[0][0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("mode", "latent"), [("compile", "split"), ("compile_all", "whole")])
def test_every_update_is_eagers(mode, latent):
    (row,) = run([mode], latents=[latent], updates=20, actions=A).values()
    assert row["passed"], row


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("mode", "latent"),
    [("cuda_graph", "whole"), ("cuda_graph", "split"), ("cuda_graph_parallel", "split")],
)
@pytest.mark.timeout(900)
def test_every_captured_update_is_eagers(mode, latent):
    (row,) = run([mode], latents=[latent], updates=50, device="cuda", actions=A).values()
    assert row["passed"], row


def test_films_of_imagination_act_by_the_mode():
    learner = make_learner("whole", actions=A).eval()
    with torch.no_grad():
        learner.loss.actor.logits_head.weight.normal_(std=3)
    records = observe(learner.world_model, make_sample(actions=A))
    rolled = roll(learner.world_model, records, 3, learner.loss.actor)
    assert torch.equal(rolled["action"][:, :3], records["action"][:, :3])
    for t in range(3, records.shape[1]):
        before = torch.cat((rolled["belief"][:, t - 1], rolled["state"][:, t - 1]), -1)
        (log_probs,) = learner.loss.actor.from_features(before)
        expected = F.one_hot(log_probs.argmax(-1), A).float()
        assert torch.equal(rolled["action"][:, t], expected)


# ------------------------------------------------------------------ envs and records


@pytest.mark.parametrize("name", SPECS)
def test_an_env_gets_the_action_of_its_spec_and_the_tensordict_keeps_the_one_hot(name):
    register_env("choice", partial(ChoiceEnv, action=SPECS[name]))
    env = make_env("choice", "any", image_size=16)
    check_env_specs(env)
    assert env.action_spec == OneHot(A, dtype=torch.float32)
    for index in range(A):
        action = F.one_hot(torch.tensor(index), A).float()
        after = env.step(env.reset().set("action", action))
        assert torch.equal(after["action"], action)
        assert int(led_to(after["next", "pixels"])) == index
    # A record that begins an episode has the action 0, as an index.
    after = env.step(env.reset().set("action", torch.zeros(A)))
    assert int(led_to(after["next", "pixels"])) == 0


@pytest.mark.parametrize("spec", [Categorical(A, (3,)), OneHot(A, (3, A)), Categorical(A, (3, 1))])
def test_a_batch_of_envs_gets_a_batch_of_actions(spec):
    transform = DiscreteActions(spec, batch_dims=1)
    proposed = torch.tensor([[0.0, 1, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]])
    made = transform._inv_apply_transform(proposed)
    assert spec.is_in(made)
    index = made.long().argmax(-1) if isinstance(spec, OneHot) else made.reshape(-1)
    assert index.tolist() == [1, 3, 0]


def test_what_is_no_single_choice_is_not_discrete():
    assert all(is_discrete(spec) for spec in SPECS.values())
    for spec in (Binary(3), MultiCategorical([2, 3]), MultiOneHot([2, 3])):
        assert not is_discrete(spec)


def test_a_range_of_discrete_actions_is_refused():
    register_env("choice", ChoiceEnv)
    with pytest.raises(ValueError, match=r"action_range=\[-1, 1\] must be null .* discrete"):
        make_env("choice", "any", image_size=16, action_range=[-1, 1])


def test_random_actions_are_uniform_and_repeat():
    spec, generator = OneHot(A, dtype=torch.float32), torch.Generator().manual_seed(0)
    drawn = torch.stack([random_action(spec, generator) for _ in range(400)])
    assert torch.equal(drawn, F.one_hot(drawn.argmax(-1), A).float())
    assert drawn.mean(0).min() > 0.18
    register_env("choice", ChoiceEnv)
    first, again = (
        collect_frames(make_env("choice", "any", image_size=16), 12, seed=4)["pixels"]
        for _ in range(2)
    )
    assert torch.equal(first, again)
    assert len(led_to(first).unique()) > 2


@pytest.mark.parametrize("name", SPECS)
def test_the_recorded_action_led_to_the_recorded_observation(name):
    register_env("choice", partial(ChoiceEnv, action=SPECS[name]))
    config = tiny_run(Path("unused")).model
    world_model = build_world_model(config, action_size=A, image_size=16, latent="whole")
    policy = build_policy(world_model, build_discrete_actor(config, A))
    collector = make_collector(
        lambda index, seed: make_env("choice", "any", image_size=16, seed=seed),
        policy,
        primers=latent_sizes(config, A),
        num_envs=2,
        num_workers=0,
        frames_per_batch=46,
    )
    records = records_from_rollout(next(iter(collector)))
    collector.shutdown()
    begins, pixels = records["is_init"][:, 0], records["next", "pixels"]
    assert begins.sum() == 6  # 23 steps each, episodes of 10
    assert torch.equal(begins, step_of(pixels) == 0)
    assert not records["action"][begins].any()
    taken = records["action"][~begins]
    assert torch.equal(taken.argmax(-1), led_to(pixels[~begins]))
    assert torch.equal(taken.sum(-1), torch.ones(len(taken)))
    assert torch.equal(records["next", "reward"][~begins, 0], taken[:, 1])
    assert len(taken.argmax(-1).unique()) == A


# ------------------------------------------------------------------ runs


def choice_run(run_dir: Path, **changes):
    environment = {"domain": "choice", "task": "any"} | changes.pop("environment", {})
    return tiny_run(run_dir, environment=environment, resume="auto", **changes)


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize(
    "algo",
    [{"latent": latent} for latent in ("split", "shared", "foreground")]
    + [{"name": "dreamer_v3", "latent": None}],
    ids=LATENTS[1:] + LATENTS[:1],
)
def test_a_run_trains_evaluates_and_its_policy_acts(tmp_path, algo):
    register_env("choice", ChoiceEnv)
    trainer = Trainer(choice_run(tmp_path / "run", algo=algo))
    trainer.train()
    assert trainer.updates > 0
    path = latest_checkpoint(tmp_path / "run" / "checkpoints")
    for file in (path, export_policy(path, tmp_path / "policy.pt")):
        policy = load_policy(file)
        env = policy.make_env()
        played = env.rollout(9, policy)
        assert torch.equal(played["action"].sum(-1), torch.ones(9))
        assert torch.equal(played["action"].argmax(-1), led_to(played["next", "pixels"]))


@pytest.mark.usefixtures("no_curves")
def test_a_run_that_was_killed_resumes_exactly(tmp_path):
    register_env("choice", ChoiceEnv)

    def train(name: str, crash_at: int | None = None) -> None:
        trainer = Trainer(choice_run(tmp_path / name))
        update = trainer.learner.update

        def interrupted(sample):
            if trainer.updates == crash_at:
                trainer.writer.wait()
                trainer.started = False
                raise Crash
            return update(sample)

        trainer.learner.update = interrupted
        trainer.train()

    train("whole")
    with pytest.raises(Crash):
        train("crashed", 13)
    train("crashed")
    assert differences(tmp_path / "whole", tmp_path / "crashed") == []


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("action", ["mode", "sample"])
def test_evaluations_take_the_mode_or_draw(tmp_path, action):
    register_env("choice", ChoiceEnv)
    config = choice_run(tmp_path / "run", evaluation={"action": action, "every_frames": 0})
    trainer = Trainer(config)
    trainer.train()
    policy = load_policy(latest_checkpoint(tmp_path / "run" / "checkpoints"))
    with torch.no_grad():  # two actions that are about equally likely
        policy.policy[2][0].module.logits_head.weight.zero_()
        policy.policy[2][0].module.logits_head.bias.copy_(torch.tensor([0.0, 2.1, 2.0, 0.0]))
    env = policy.make_env()
    torch.manual_seed(0)
    taken = torch.cat([env.rollout(10, policy)["action"].argmax(-1) for _ in range(4)])
    assert set(taken.tolist()) == {1} if action == "mode" else {1, 2} <= set(taken.tolist())
    trainer = Trainer(choice_run(tmp_path / "run", evaluation={"action": action}))
    evaluator = trainer.evaluator
    evaluator.policy = policy.policy
    torch.manual_seed(0)
    episode, total, length = evaluator._play(evaluator.envs["run"])
    assert length == 10
    assert (total == 10) == (action == "mode")
    assert (len(episode["action"].argmax(-1).unique()) > 1) == (action == "sample")
    evaluator.close()


def test_an_unknown_way_to_act_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"evaluation.action='best' .*mode, sample"):
        choice_run(tmp_path, evaluation={"action": "best"}, device="cpu").validated()


def build_with_a_gaussian_actor(settings: AlgorithmSettings) -> Algorithm:
    model, size = settings.model, settings.action_size
    world_model = build_world_model(model, action_size=size, image_size=16, latent="whole")
    actor = build_actor(model, size)
    loss = World2FilterLoss(world_model, actor[0].module, build_critic(model), settings.loss)
    return Algorithm(loss, build_policy(world_model, actor))


def test_an_algorithm_with_a_continuous_actor_is_refused_for_discrete_actions():
    register_algorithm("gaussian", build_with_a_gaussian_actor)
    parts = AlgorithmSettings(TINY, make_loss("whole").config, "whole", A, 16)
    build_algorithm("gaussian", parts)
    parts = AlgorithmSettings(
        TINY, make_loss("whole").config, "whole", A, 16, discrete_actions=True
    )
    with pytest.raises(ConfigError, match=r"algo=gaussian .*use settings.build_actor\(\)"):
        build_algorithm("gaussian", parts)
    assert isinstance(build_algorithm("world2filter", parts).loss.actor, CategoricalActor)

"""What a registered env is given and what it must offer: actions, specs, rewards."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.box_env import BoxEnv
from helpers.runs import tiny_run
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.data import (
    Binary,
    Bounded,
    Categorical,
    Composite,
    MultiCategorical,
    OneHot,
    Unbounded,
)
from torchrl.envs.utils import check_env_specs

from w2f_torchrl.checkpoint import list_checkpoints
from w2f_torchrl.data import make_collector, records_from_rollout
from w2f_torchrl.data.environments import probe_env
from w2f_torchrl.envs import make_env, register_env, tasks
from w2f_torchrl.logging.metrics import read_metrics
from w2f_torchrl.modules import build_actor, build_policy, build_world_model, latent_sizes
from w2f_torchrl.trainers import ConfigError, Trainer, load_policy
from w2f_torchrl.trainers.collecting import TransitionError, check_finite

PICTURE = (3, 16, 16)


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(tasks, "_REGISTRY", {})


def box_run(run_dir: Path, **changes):
    """A whole run on a BoxEnv, in this process."""
    env = {"domain": "box", "task": "any"} | changes.pop("environment", {})
    return tiny_run(run_dir, environment=env, **changes)


def step(env, action):
    td = env.reset()
    return env.step(td.set("action", torch.as_tensor(action, dtype=torch.float32)))


# ------------------------------------------------------------------ actions


def test_an_action_outside_the_spec_is_clipped_and_the_tensordict_keeps_it():
    register_env("box", BoxEnv)
    env = make_env("box", "any", image_size=16)
    after = step(env, [3.4, -0.25])
    [received] = env.base_env.received
    assert received.tolist() == [1.0, -0.25]
    assert torch.equal(after["action"], torch.tensor([3.4, -0.25]))
    assert env.action_spec == Bounded(-1, 1, (2,))


@settings(max_examples=40, deadline=None)
@given(
    low=st.floats(-1e6, 1e6, width=32),
    width=st.floats(0.0078125, 1e6, width=32),
    proposed=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=8),
)
def test_any_box_gets_actions_within_it_and_both_of_its_ends(low, width, proposed):
    high = float(torch.tensor(low) + width)
    if not low < high:
        return
    tasks._REGISTRY.clear()
    register_env("box", partial(BoxEnv, action=Bounded(low, high, (1,))))
    env = make_env("box", "any", image_size=16)
    for value in [*proposed, -1.0, 1.0, -math.inf, math.inf]:
        step(env, [value])
    received = torch.stack(env.base_env.received)[:, 0]
    low, high = env.base_env.action_spec.space.low, env.base_env.action_spec.space.high
    assert (low <= received).all()
    assert (received <= high).all()
    assert received[-4:].tolist() == [float(low), float(high)] * 2
    expected = low + (torch.tensor(proposed).clamp(-1, 1) + 1) / 2 * (high - low)
    torch.testing.assert_close(received[:-4], expected, rtol=1e-4, atol=1e-3 * width)


def test_each_component_has_its_own_ends_also_in_a_batch():
    box = Bounded(torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 1.0]), (2,))
    register_env("box", partial(BoxEnv, action=box))
    env = make_env("box", "any", image_size=16)
    check_env_specs(env)
    env.base_env.received.clear()
    step(env, [1.5, 0.0])
    assert env.base_env.received[0].tolist() == [2.0, 0.5]


def test_double_actions_are_cast():
    register_env("box", partial(BoxEnv, action=Bounded(-2, 2, (2,), dtype=torch.float64)))
    env = make_env("box", "any", image_size=16)
    step(env, [0.5, 9.0])
    assert env.base_env.received[0].dtype is torch.float64
    assert env.base_env.received[0].tolist() == [1.0, 2.0]


def collect():
    """A batch of an untrained policy, and the actions that its env got."""
    config = tiny_run(Path("unused")).model
    world_model = build_world_model(config, action_size=2, image_size=16, latent="whole")
    actor = build_actor(config, 2)
    policy = build_policy(world_model, actor)
    env = make_env("box", "any", image_size=16)
    collector = make_collector(
        lambda index, seed: env,
        policy,
        primers=latent_sizes(config, 2),
        num_envs=1,
        num_workers=0,
        frames_per_batch=20,
    )
    batch = next(iter(collector))
    collector.shutdown()
    return batch, env.base_env.received


def test_the_record_keeps_what_the_policy_proposed_as_the_reference_does():
    """danijar/dreamerv3 e3f0224: the driver stores the policy's sample, ClipAction
    (embodied/core/wrappers.py:84-86) clips on the way to the env, rssm.py:137 scales by
    max(1, |a|)."""
    register_env("box", partial(BoxEnv, action=Bounded(0, 10, (2,))))
    torch.manual_seed(0)
    batch, received = collect()
    received = torch.stack(received)
    proposed = batch["action"][0]
    assert proposed.abs().max() > 1.2
    torch.testing.assert_close(received, 5 + 5 * proposed.clamp(-1, 1))
    assert {0.0, 10.0} <= set(received.flatten().tolist())  # a sample reaches both ends
    records = records_from_rollout(batch)
    kept = records["action"][~records["is_init"][:, 0]]
    torch.testing.assert_close(kept, proposed)


@pytest.mark.parametrize(("bias", "end"), [(20.0, 10.0), (-20.0, -4.0)])
def test_the_mode_reaches_the_ends(bias, end):
    register_env("box", partial(BoxEnv, action=Bounded(-4, 10, (2,))))
    env = make_env("box", "any", image_size=16)
    mean = torch.tensor([bias, bias]).tanh()  # what GaussianActor.squash makes of it
    step(env, mean)
    assert env.base_env.received[0].tolist() == [end, end]


@pytest.mark.parametrize(
    "spec",
    [
        Unbounded((2,)),
        Bounded(-math.inf, math.inf, (2,)),
        Bounded(torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 3e38]), (2,)),
    ],
)
def test_an_action_without_limits_needs_a_declared_range(tmp_path, spec):
    register_env("box", partial(BoxEnv, action=spec))
    with pytest.raises(ConfigError, match=r"'box'.*no limits.*environment.action_range=\[-1,1\]"):
        probe_env(box_run(tmp_path))
    config = box_run(tmp_path, environment={"action_range": [-3.0, 5.0]})
    assert probe_env(config).action_size == 2
    env = make_env("box", "any", image_size=16, action_range=config.environment.action_range)
    step(env, [1.0, 1.0])
    finite = isinstance(spec, Bounded) and spec.space.low[0] == -1.0
    assert env.base_env.received[0].tolist() == ([1.0, 5.0] if finite else [5.0, 5.0])


@pytest.mark.parametrize(
    ("domain", "range_", "match"),
    [
        ("box", [-1.0, 1.0], r"action_range=\[-1.0, 1.0\] must be null for domain 'box'"),
        ("box", [1.0], r"action_range=\[1.0\] must be \[lowest, highest\]"),
        ("box", [1.0, 1.0], r"must be \[lowest, highest\]"),
        ("box", [math.nan, 1.0], r"action_range=nan must be a finite number"),
        ("cartpole", [-1.0, 1.0], r"must be null for 'cartpole'"),
    ],
)
def test_a_range_that_means_nothing_is_refused(tmp_path, domain, range_, match):
    register_env("box", BoxEnv)
    task = "balance" if domain == "cartpole" else "any"
    environment = {"domain": domain, "task": task, "action_range": range_}
    with pytest.raises(ConfigError, match=match):
        Trainer(box_run(tmp_path / "run", environment=environment))


# ------------------------------------------------------------------ specs

FAULTS = {
    "one-hots": ({"action": OneHot(3, (2, 3))}, r"action is OneHot of 3 with the shape \[2, 3\]"),
    "two choices": (
        {"action": Categorical(3, shape=(2,))},
        r"action is Categorical of 3 with the shape \[2\]",
    ),
    "one action": ({"action": Categorical(1)}, "one choice among 2 to 4096 actions"),
    "masked": (
        {"action": OneHot(3, mask=torch.tensor([True, True, False]))},
        "the action spec has a mask",
    ),
    "multi": ({"action": MultiCategorical([2, 3])}, "action is MultiCategorical"),
    "binary": ({"action": Binary(shape=(2,))}, "action is Binary"),
    "integers": ({"action": Bounded(0, 5, (2,), dtype=torch.int64)}, "action is Bounded int64"),
    "scalar": ({"action": Bounded(-1, 1, ())}, r"action is Bounded float32 \[\]"),
    "empty": ({"action": Bounded(-1, 1, (0,))}, r"action is Bounded float32 \[0\]"),
    "matrix": ({"action": Bounded(-1, 1, (2, 2))}, r"action is Bounded float32 \[2, 2\]"),
    "no width": ({"action": Bounded(1, 1, (2,))}, "lower end below the upper"),
    "two actions": (
        {"action": Composite(a=Bounded(-1, 1, (1,)), b=Bounded(-1, 1, (1,)))},
        r"the actions are \['a', 'b'\]",
    ),
    "not square": (
        {"entries": {"pixels": Bounded(0, 255, (3, 16, 32), dtype=torch.uint8)}},
        r"pixels must be uint8 \[3, 16, 16\].*\[3, 16, 32\]",
    ),
    "another size": (
        {"entries": {"pixels": Bounded(0, 255, (3, 32, 32), dtype=torch.uint8)}},
        r"pixels must be.*\[3, 32, 32\]",
    ),
    "channels last": (
        {"entries": {"pixels": Bounded(0, 255, (16, 16, 3), dtype=torch.uint8)}},
        r"pixels must be.*channels first.*\[16, 16, 3\]",
    ),
    "grey": (
        {"entries": {"pixels": Bounded(0, 255, (1, 16, 16), dtype=torch.uint8)}},
        r"pixels must be.*\[1, 16, 16\]",
    ),
    "float pixels": (
        {"entries": {"pixels": Bounded(0, 1, PICTURE)}},
        r"pixels must be uint8.*the spec says float32 \[3, 16, 16\]",
    ),
    "no pixels": (
        {
            "entries": {"pixels": None, "foreground_mask": None, "state": Unbounded((3,))},
            "given": {"pixels": torch.zeros(PICTURE, dtype=torch.uint8)},
        },
        "pixels is missing",
    ),
    "float mask": (
        {"entries": {"foreground_mask": Bounded(0, 1, (1, 16, 16))}},
        r"foreground_mask must be bool \[1, 16, 16\], the spec says float32",
    ),
    "flat mask": (
        {"entries": {"foreground_mask": Binary(shape=(16, 16), dtype=torch.bool)}},
        r"foreground_mask must be bool \[1, 16, 16\], the spec says bool \[16, 16\]",
    ),
    "long reward": ({"reward_spec": Unbounded((2,))}, r"reward must be float32 \[1\]"),
    "double reward": (
        {"reward_spec": Unbounded((1,), dtype=torch.float64)},
        r"reward must be float32 \[1\], the spec says float64",
    ),
    "nan reward": ({"reward": math.nan}, "step.. returns reward nan"),
    "not what the spec says": (
        {"given": {"pixels": torch.zeros(PICTURE)}},
        r"pixels must be uint8.*reset\(\) gives float32",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_run_cannot_use_is_named_before_training(tmp_path, fault):
    changes, match = FAULTS[fault]
    register_env("box", partial(BoxEnv, **changes))
    with pytest.raises(ConfigError, match=match) as error:
        Trainer(box_run(tmp_path / "run"))
    assert "domain 'box'" in str(error.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_probing_leaves_torchs_random_state(tmp_path):
    register_env("box", BoxEnv)
    torch.manual_seed(3)
    probe_env(box_run(tmp_path))
    after = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(3))


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("num_envs", [1, 2])
def test_an_env_without_truncated_trains_and_its_policy_acts_within_the_box(tmp_path, num_envs):
    box = Bounded(0, 10, (2,))
    register_env("box", partial(BoxEnv, flags=("done", "terminated"), action=box))
    run = tmp_path / "run"
    config = box_run(
        run,
        environment={"num_envs": num_envs},
        training={"total_frames": 128},
        evaluation={"every_frames": 64, "video": False},
    )
    trainer = Trainer(config)
    trainer.train()
    assert trainer.updates > 0
    row = next(row for row in read_metrics(run) if "eval/return_mean" in row)
    assert row["eval/length_mean"] == 10
    policy = load_policy(list_checkpoints(run / "checkpoints")[-1])
    env = policy.make_env()
    env.rollout(8, policy)
    received = torch.stack(env.base_env.received)
    assert (received >= 0).all()
    assert (received <= 10).all()


# ------------------------------------------------------------------ rewards that are not numbers


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_reward_that_is_no_number_is_named_and_a_resume_gets_past_it(tmp_path, reward):
    register_env("box", partial(BoxEnv, reward=reward, bad_after=40))
    run = tmp_path / "run"
    quiet = {"every_frames": 0}
    with pytest.raises(FloatingPointError, match=rf"reward is \[{reward}\] in env 0, step \d+"):
        Trainer(box_run(run, evaluation=quiet)).train()
    tasks._REGISTRY["box"] = BoxEnv  # the cause is mended
    trainer = Trainer(box_run(run, evaluation=quiet, resume="auto"))
    assert trainer.steps > 0
    trainer.train()
    assert trainer.frames == 256
    heads = trainer.replay.heads  # slots without a record hold what was in memory before
    written = [
        heads.slots(torch.tensor(stream), torch.arange(heads.first[stream], heads.written[stream]))
        for stream in range(len(heads.written))
    ]
    rewards = trainer.replay[torch.cat(written)]["next", "reward"]
    assert len(rewards) > 100
    assert rewards.isfinite().all()


def test_an_action_that_is_no_number_blames_the_policy():
    batch = TensorDict(
        {"action": torch.zeros(2, 3, 1), "next": {"reward": torch.zeros(2, 3, 1)}}, [2, 3]
    )
    check_finite(batch)
    batch["action"][1, 2] = math.nan
    with pytest.raises(FloatingPointError, match=r"action is \[nan\] in env 1, step 2.*policy"):
        check_finite(batch)


def test_a_vector_that_is_no_number_blames_the_environment():
    def part() -> dict[str, torch.Tensor]:
        return {"position": torch.zeros(2, 3, 4), "camera": torch.zeros(2, 3, 2, dtype=torch.uint8)}

    transition = {"action": torch.zeros(2, 3, 1), "next": {"reward": torch.zeros(2, 3, 1)}}
    batch = TensorDict(part() | transition, [2, 3])
    batch["next"].update(part())
    names = ["position", "camera"]
    check_finite(batch, names)
    batch["next", "position"][0, 2, 1] = math.inf  # of an observation that is not acted on
    with pytest.raises(TransitionError, match=r"position is .* in env 0, step 2.*environment"):
        check_finite(batch, names)
    batch["position"][1, 0], batch["action"][1, 0] = math.nan, math.nan  # the action follows
    with pytest.raises(TransitionError, match=r"position is .* in env 1, step 0.*environment"):
        check_finite(batch, names)


@pytest.mark.parametrize(("error", "saves"), [(TransitionError, False), (FloatingPointError, True)])
def test_only_what_all_ranks_see_makes_them_write_a_checkpoint(tmp_path, error, saves):
    saved = []
    learner = SimpleNamespace(intact=True, is_finite=lambda: True)
    trainer = SimpleNamespace(
        ranks=SimpleNamespace(size=2, rank=0), run_dir=tmp_path, frames=8, updates=2, started=True
    )
    trainer.learner, trainer.save = learner, lambda exception: saved.append(exception)
    Trainer._fail(trainer, error("not finite"))
    assert bool(saved) is saves

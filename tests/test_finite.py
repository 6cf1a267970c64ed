"""Gradients that are not finite change nothing: no weight, no moment, no statistic."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from helpers.models import make_learner as tiny_learner
from helpers.models import make_sample
from helpers.short_runs import rows as metrics
from helpers.short_runs import short_run
from torch import nn

from w2f_torchrl.checkpoint import latest_checkpoint, load_checkpoint
from w2f_torchrl.learner.optimizer import CapturableOptimizer
from w2f_torchrl.trainers import Learner, Trainer


def make_learner(on_nan: str, optimizer_class: type | None = None) -> Learner:
    learner = tiny_learner(on_nan=on_nan)
    if optimizer_class is not None:
        learner.optimizer = optimizer_class(learner.parameters_trained, warmup_steps=2, lr=1e-3)
    return learner


def state_of(learner: Learner) -> dict[str, torch.Tensor]:
    state = {f"loss.{k}": v for k, v in learner.loss.state_dict().items()}
    for i, moments in enumerate(learner.optimizer.state.values()):
        state |= {f"optimizer.{i}.{k}": v for k, v in moments.items()}
    state["step"] = torch.as_tensor(learner.optimizer.param_groups[0]["step"])
    return copy.deepcopy(state)


@pytest.mark.parametrize("optimizer", [None, CapturableOptimizer], ids=["host", "device"])
@pytest.mark.parametrize("first", [True, False], ids=["at_once", "later"])
def test_a_bad_update_changes_nothing_and_skip_goes_on(optimizer, first):
    sample = make_sample()
    bad = sample.clone()
    bad["next", "reward"][0, 3] = math.nan
    learner, other = make_learner("skip", optimizer), make_learner("skip", optimizer)
    if not first:
        for one in (learner, other):
            torch.manual_seed(3)
            assert one.update(sample)["finite"] == 1
    before = state_of(learner)
    made = learner.update(bad)
    assert made["finite"] == 0
    assert all(torch.isfinite(v).all() for v in made.values())
    after = state_of(learner)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    for one in (learner, other):
        torch.manual_seed(5)
        assert one.update(sample)["finite"] == 1
    for one, two in zip(state_of(learner).values(), state_of(other).values(), strict=True):
        assert torch.equal(one, two)


def test_stop_applies_nothing_after_the_first_bad_update():
    sample = make_sample()
    bad = sample.clone()
    bad["next", "reward"][0, 3] = math.nan
    learner = make_learner("stop")
    learner.update(sample)
    before = state_of(learner)
    assert [float(learner.update(s)["finite"]) for s in (bad, sample, sample)] == [0, 0, 0]
    assert all(torch.equal(v, before[k]) for k, v in state_of(learner).items())


def test_the_capturable_optimizer_is_the_same_with_and_without_a_gate():
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5))]
    others = copy.deepcopy(parameters)
    plain, gated = (CapturableOptimizer(p, warmup_steps=3, lr=0.1) for p in (parameters, others))
    for step in range(6):
        for one, two in zip(parameters, others, strict=True):
            one.grad = torch.randn_like(one)
            two.grad = one.grad.clone()
        plain.step()
        if step == 2:  # a step that isn't applied in between
            for two in others:
                two.grad.fill_(math.nan)
            gated.applied = torch.tensor(False)
            gated.step()
            for one, two in zip(parameters, others, strict=True):
                two.grad = one.grad.clone()
        gated.applied = torch.tensor(True)
        gated.step()
        for one, two in zip(parameters, others, strict=True):
            assert torch.equal(one, two)


def poisoned(run_dir: Path, on_nan: str, updates: range, **settings) -> Trainer:
    """A run whose samples hold a reward that is not a number in some of its updates.

    The images of the first of them are kept as ``trainer.poisoned``.
    """
    quiet = {"every_frames": 0}
    settings |= {"training": {"on_nan": on_nan}, "evaluation": quiet}
    trainer = Trainer(short_run(run_dir, **settings))
    update = trainer.learner.update

    def poison(sample):
        if trainer.updates in updates:
            sample["next", "reward"][0, 2] = math.nan
            if trainer.updates == updates.start:
                trainer.poisoned = sample["next", "pixels"].clone()
        return update(sample)

    trainer.learner.update = poison
    return trainer


@pytest.mark.render
@pytest.mark.usefixtures("no_curves")
def test_a_run_stops_with_the_batch_and_the_state_of_before(tmp_path):
    trainer = poisoned(tmp_path, "stop", range(12, 48))
    with pytest.raises(FloatingPointError, match=r"after update 12 .*loss_reward"):
        trainer.train()
    batch = torch.load(tmp_path / "not_finite_after_000000000012_rank_0.pt", weights_only=True)
    assert batch["next/pixels"].shape == (2, 8, 3, 16, 16)
    assert batch["next/foreground_mask"].dtype is torch.bool
    saved = load_checkpoint(latest_checkpoint(tmp_path / "checkpoints"))
    assert saved.updates == saved.payload["counters"]["schedule"]["updates"] == 12
    assert "FloatingPointError" in saved.payload["exception"]
    assert all(torch.isfinite(v).all() for v in saved.payload["learner"]["loss"].values())
    resumed = Trainer(short_run(tmp_path, evaluation={"every_frames": 0}))
    resumed.train()
    assert resumed.updates == 48
    assert all(v is not None for row in metrics(tmp_path) for v in row.values())


@pytest.mark.render
@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_the_batch_has_the_scenery_that_the_update_saw(tmp_path, on_nan):
    # Rows of metrics are logged every five updates: all of the second row's are bad.
    settings = {"augmentation": {"scenery": 0.8}}
    trainer = poisoned(tmp_path, on_nan, range(10, 48), **settings)
    with pytest.raises(FloatingPointError, match="are not finite"):
        trainer.train()
    [path] = tmp_path.glob("not_finite_after_*.pt")
    batch = torch.load(path, weights_only=True)
    assert torch.equal(batch["next/pixels"], trainer.poisoned)


@pytest.mark.render
@pytest.mark.usefixtures("no_curves")
def test_a_run_skips_bad_updates_unless_all_are(tmp_path):
    trainer = poisoned(tmp_path / "some", "skip", range(11, 14))
    trainer.train()
    assert trainer.updates == 48
    rows = metrics(tmp_path / "some")
    assert [
        (r["updates"], r["train/skipped_updates"]) for r in rows if "train/skipped_updates" in r
    ] == [(15, 3.0)]
    assert all(v is not None for row in rows for v in row.values())
    trainer = poisoned(tmp_path / "all", "skip", range(11, 48))
    with pytest.raises(FloatingPointError, match=r"training\.on_nan=skip"):
        trainer.train()
    assert trainer.updates == 20


def test_the_slow_critic_follows_on_the_device_as_on_the_host():
    on_host, on_device, held = (make_learner("skip").loss for _ in range(3))
    for loss in (on_host, on_device, held):
        torch.manual_seed(1)
        for parameter in loss.critic.parameters():
            nn.init.normal_(parameter)
    start = copy.deepcopy(list(held.slow_critic.parameters()))
    on_host.update_slow_critic()
    on_device.update_slow_critic(torch.tensor(True))
    held.update_slow_critic(torch.tensor(False))
    parameters = (x.slow_critic.parameters() for x in (on_host, on_device, held))
    for host, device, still, old in zip(*parameters, start, strict=True):
        torch.testing.assert_close(device, host)
        assert not torch.equal(device, old)
        assert torch.equal(still, old)

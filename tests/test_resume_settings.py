"""The table of settings that may change at a resume: complete, true, and what the page shows."""

from __future__ import annotations

import copy
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.short_runs import rows, short_run
from torch.utils import _pytree as pytree

from w2f_torchrl.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint
from w2f_torchrl.checkpoint.rules import (
    RULES,
    flat_settings,
    forbidden_changes,
    resume_table,
    rule_of,
)
from w2f_torchrl.config import OptimizerConfig, config_to_dict
from w2f_torchrl.learner import optimizer as optimizer_module
from w2f_torchrl.learner.optimizer import CapturableOptimizer
from w2f_torchrl.trainers import Learner, RunConfig, Trainer
from w2f_torchrl.trainers.run import build_counters

ALL = sorted(flat_settings(config_to_dict(RunConfig())))


def changed(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of which one has another value of its kind."""
    settings = copy.deepcopy(settings)
    *groups, last = name.split(".")
    place = settings
    for group in groups:
        place = place[group]
    value = place[last]
    if isinstance(value, bool):
        place[last] = not value
    elif isinstance(value, (int, float)):
        place[last] = value * 3 + 1
    elif isinstance(value, list):
        place[last] = [*value, *value, 1]
    else:
        place[last] = f"{value}x"
    assert place[last] != value
    return settings


@pytest.mark.parametrize("name", ALL)
def test_every_setting_has_a_rule_that_a_resume_obeys(name):
    saved = config_to_dict(RunConfig())
    found = forbidden_changes(saved, changed(name, saved))
    if rule_of(name).may_change or name == "segmentation.source":  # test_segmentation has that one
        assert found == []
    else:
        [said] = found
        assert said.startswith(f"{name}=")
        assert " must stay " in said
        assert rule_of(name).why in said


def test_no_rule_is_about_nothing_or_hidden_by_another():
    for rule in RULES:
        for name in rule.names:
            members = [s for s in ALL if s == name or (name.endswith(".") and s.startswith(name))]
            assert any(rule_of(member) is rule for member in members), name


def test_a_ratio_that_stays_may_have_other_parts_and_ranks_may_have_another_ratio():
    saved = config_to_dict(RunConfig())
    now = copy.deepcopy(saved)
    now["training"] |= {"train_ratio": 1024.0, "batch_size": 32}
    assert forbidden_changes(saved, now) == []
    now["training"]["batch_size"] = 16
    assert len(forbidden_changes(saved, now)) == 1
    now["distributed"]["ranks"] = 2
    assert forbidden_changes(saved, now) == []


def test_settings_that_one_version_lacks_are_left_out():
    saved, now = (config_to_dict(RunConfig()) for _ in range(2))
    del saved["model"]["unimix"]
    saved["algo"]["gone"] = 3
    assert forbidden_changes(saved, now) == []


def test_the_page_shows_the_table():
    page = Path(__file__).parents[1] / "docs" / "howto" / "resume.md"
    assert resume_table() in page.read_text()


def test_frames_are_counted_and_not_recomputed():
    config = RunConfig()
    config.environment.action_repeat = 4
    counters = build_counters(config)
    counters.steps = 120
    state = counters.state_dict()
    assert state["frames"] == 480
    config.environment.action_repeat = 1
    resumed = build_counters(config)
    resumed.load_state_dict(state)
    assert resumed.frames == 480
    resumed.steps += 10
    assert resumed.frames == 490
    del state["frames"]  # an older checkpoint
    resumed.load_state_dict(state)
    assert resumed.frames == 120


def test_an_optimizers_settings_are_the_runs_and_its_moments_the_checkpoints():
    from helpers.models import make_learner, make_sample

    first, sample = (
        make_learner(optimizer=OptimizerConfig(lr=1e-3, warmup_updates=5)),
        make_sample(),
    )
    first.update(sample)
    saved = first.state_dict()
    other: Learner = make_learner(optimizer=OptimizerConfig(lr=2e-3, warmup_updates=0, agc=0.1))
    other.load_state_dict(saved)
    [group] = other.optimizer.param_groups
    assert (group["lr"], group["agc"], group["warmup_steps"]) == (2e-3, 0.1, 0)
    assert float(group["step"]) == 1


@pytest.mark.parametrize(
    ("rates", "factors"),
    [
        ({"actor_lr": 4e-3}, {"actor": 4}),
        ({"critic_lr": 5e-4}, {"critic": 0.5}),
        ({"actor_lr": 4e-3, "critic_lr": 5e-4}, {"actor": 4, "critic": 0.5}),
    ],
)
def test_actor_and_critic_can_have_learning_rates_of_their_own(rates, factors):
    from helpers.models import make_learner, make_sample

    sample, steps = make_sample(), []
    for chosen in ({}, rates):
        settings = OptimizerConfig(lr=1e-3, warmup_updates=0, **chosen)
        learner = make_learner(optimizer=settings)
        before = {name: p.detach().clone() for name, p in learner.loss.named_parameters()}
        torch.manual_seed(1)
        learner.update(sample)
        after = learner.loss.named_parameters()
        steps.append({name: p.detach() - before[name] for name, p in after if p.requires_grad})
    for name, step in steps[0].items():
        factor = factors.get(name.split(".")[0], 1)
        torch.testing.assert_close(steps[1][name], factor * step, rtol=1e-3, atol=1e-6)
    for module in ("actor.", "critic.", "world_model."):
        assert max(s.abs().max() for n, s in steps[0].items() if n.startswith(module)) > 1e-4


@pytest.mark.parametrize(
    ("algorithm", "latent"), [("world2filter", "split"), ("tia", "split"), ("repo", "whole")]
)
@pytest.mark.parametrize("on_device", [False, True])
def test_an_optimizer_with_three_groups_continues_one_with_one_and_back(
    algorithm, latent, on_device, monkeypatch
):
    """With equal rates the groups must make no difference, wherever they are handed over."""
    from helpers.models import make_learner, make_sample

    if on_device:
        monkeypatch.setattr(optimizer_module, "DreamerV3Optimizer", CapturableOptimizer)
    sample = make_sample()

    def learner_of(rate: float | None) -> Learner:
        settings = OptimizerConfig(lr=1e-3, actor_lr=rate, critic_lr=rate, warmup_updates=3)
        return make_learner(latent, optimizer=settings, algorithm=algorithm)

    def train(rates: list[float | None]) -> dict[str, Any]:
        learner = learner_of(rates[0])
        for number, rate in enumerate(rates):
            if number:
                state, learner = learner.state_dict(), learner_of(rate)
                learner.load_state_dict(copy.deepcopy(state))
            torch.manual_seed(number)
            learner.update(sample)
        return learner.state_dict()

    wanted = train([None, None, None])
    for rates in ([1e-3, None, 1e-3], [None, 1e-3, None]):
        found = train(rates)
        assert torch.equal(_flat(found["loss"]), _flat(wanted["loss"]))
        moments = [state["optimizer"]["state"] for state in (found, wanted)]
        assert list(moments[0]) == list(moments[1])
        assert torch.equal(*(_flat(each) for each in moments))
        [group] = found["optimizer"]["param_groups"]
        assert float(group["step"]) == 3


def _flat(tree: Any) -> torch.Tensor:
    leaves = pytree.tree_leaves(tree)
    return torch.cat([leaf.flatten() for leaf in leaves if isinstance(leaf, torch.Tensor)])


@pytest.mark.render
@pytest.mark.usefixtures("no_curves")
def test_what_changes_at_a_resume_is_said_or_obeyed(tmp_path):
    Trainer(short_run(tmp_path / "run")).train()
    for settings, said in (
        ({"environment": {"action_repeat": 4}}, "environment.action_repeat=4 must stay 2"),
        ({"seed": 7}, "seed=7 must stay 0"),
    ):
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        with pytest.raises(CheckpointError, match=said):
            Trainer(short_run(tmp_path / "copy", **settings))
        shutil.rmtree(tmp_path / "copy")
    longer = {"training": {"total_frames": 384}, "optimizer": {"lr": 1e-3}}
    trainer = Trainer(short_run(tmp_path / "run", **longer))
    trainer.train()
    assert trainer.frames == 384
    assert trainer.learner.optimizer.param_groups[0]["lr"] == 1e-3
    saved = load_checkpoint(latest_checkpoint(tmp_path / "run" / "checkpoints"))
    assert saved.payload["counters"]["frames"] == saved.frames == 384
    assert [r["frames"] for r in rows(tmp_path / "run")][-1] == 384
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

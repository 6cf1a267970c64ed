"""training.execution=auto takes the fastest mode that works and gives eager's update."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers.models import make_learner, make_sample
from helpers.ranks import run_ranks
from torch import nn

from w2f_torchrl.config import OptimizerConfig
from w2f_torchrl.learner.auto_execution import AutoUpdate
from w2f_torchrl.learner.graphed_update import UpdateState
from w2f_torchrl.learner.optimizer import CapturableOptimizer
from w2f_torchrl.trainers import Learner


@pytest.fixture(autouse=True)
def _the_cpu_stands_in_for_cuda(monkeypatch):
    stand_in_for_cuda(monkeypatch.setattr)


def stand_in_for_cuda(replace) -> None:
    replace(torch.cuda, "get_rng_state", lambda device: torch.get_rng_state())
    replace(torch.cuda, "set_rng_state", lambda state, device: torch.set_rng_state(state))
    replace(torch.cuda, "empty_cache", lambda: None)


def make_cuda_learner() -> Learner:
    """A learner whose optimizer is CUDA's."""
    learner = make_learner()
    settings = OptimizerConfig(lr=1e-3, warmup_updates=2)
    learner.optimizer = CapturableOptimizer(
        learner.parameters_trained, lr=settings.lr, warmup_steps=settings.warmup_updates
    )
    return learner


def auto(learner: Learner, **modes) -> tuple[AutoUpdate, list[str]]:
    """Modes by name, each what makes its update; and a list that says when one was undone."""
    undone: list[str] = []
    state = UpdateState(
        nn.ModuleList([learner.loss, learner.guard]), learner.optimizer, torch.device("cpu")
    )
    update = AutoUpdate(
        modes,
        eager=learner.update,
        undo=lambda: undone.append("undone"),
        state=state,
        parameters=learner.parameters_trained,
        precision="float32",
    )
    return update, undone


def broken_at_making():
    raise RuntimeError("no compiler")


def broken_at_running():
    def update(sample):
        raise torch.OutOfMemoryError("too large")

    return update


def another(learner: Learner, factor: float):
    """Make updates whose reward loss has another weight."""

    def make():
        def update(sample):
            old = learner.loss.config.reward
            learner.loss.config.reward = old * factor
            try:
                return learner.update(sample)
            finally:
                learner.loss.config.reward = old

        return update

    return make


def test_the_first_mode_that_works_is_taken_and_the_trial_leaves_no_trace(caplog):
    caplog.set_level(logging.INFO)
    learner, plain = make_cuda_learner(), make_cuda_learner()
    calls = []

    def make():
        def update(sample):
            calls.append(1)
            return learner.update(sample)

        return update

    update, undone = auto(learner, graph=make, other=broken_at_making)
    assert update.mode == "auto"
    torch.manual_seed(1)
    got = [update(make_sample(3 + number)) for number in range(3)]
    torch.manual_seed(1)
    want = [plain.update(make_sample(3 + number)) for number in range(3)]
    assert (update.mode, len(calls), undone) == ("graph", 4, [])  # the trial's and three
    for mine, theirs in zip(got, want, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs.keys())
    for mine, theirs in zip(learner.parameters_trained, plain.parameters_trained, strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(
        learner.optimizer.param_groups[0]["step"], plain.optimizer.param_groups[0]["step"]
    )
    assert "auto: graph (from eager: losses 0.0e+00, gradients 0.0e+00)" in caplog.text


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (broken_at_making, "RuntimeError: no compiler"),
        (broken_at_running, "OutOfMemoryError: too large"),
    ],
)
def test_a_mode_that_fails_is_left_with_one_warning(first, words, caplog):
    learner = make_cuda_learner()
    update, undone = auto(learner, graph=first, compiled=lambda: learner.update)
    update(make_sample())
    assert (update.mode, undone) == ("compiled", ["undone"])
    (warning,) = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert warning == f"training.execution=auto: graph is not used: {words}"


def test_an_update_that_differs_by_more_than_rounding_is_not_trusted(caplog):
    learner, plain = make_cuda_learner(), make_cuda_learner()
    update, _ = auto(learner, graph=another(learner, 5.0), close=another(learner, 1 + 1e-6))
    torch.manual_seed(1)
    update(make_sample())
    assert update.mode == "close"
    assert "graph is not used: its update differs from eager's by more than rounding" in caplog.text
    torch.manual_seed(1)
    plain.update(make_sample())
    pairs = zip(learner.parameters_trained, plain.parameters_trained, strict=True)
    assert all(torch.allclose(mine, theirs) for mine, theirs in pairs)


def test_eager_remains_where_nothing_else_works(caplog):
    learner, plain = make_cuda_learner(), make_cuda_learner()
    update, undone = auto(learner, graph=broken_at_running, compiled=broken_at_making)
    torch.manual_seed(1)
    got = update(make_sample())
    torch.manual_seed(1)
    want = plain.update(make_sample())
    assert (update.mode, undone) == ("eager", ["undone", "undone"])
    assert all(torch.equal(got[name], want[name]) for name in want.keys())


def test_a_nan_update_is_no_rounding():
    learner = make_cuda_learner()
    update, _ = auto(learner, graph=another(learner, float("nan")))
    update(make_sample())
    assert update.mode == "eager"


def _decide(rank: int, size: int) -> tuple[str, int]:
    stand_in_for_cuda(setattr)
    learner = make_cuda_learner()
    first = broken_at_making if rank == size - 1 else (lambda: learner.update)
    update, undone = auto(learner, graph=first, compiled=lambda: learner.update)
    update(make_sample())
    return update.mode, len(undone)


@pytest.mark.distributed
def test_ranks_decide_together():
    assert run_ranks(2, _decide) == [("compiled", 1)] * 2


@pytest.mark.parametrize("mode", ["auto", "eager"])
def test_a_cpu_runs_eager(mode):
    learner = make_learner("whole", execution=mode)
    assert learner.mode == "eager"
    assert learner.precision == "float32"

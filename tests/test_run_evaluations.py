"""Evaluations: episodes that end, memory that doesn't grow, and errors that end no run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.counting_env import make_counting_env
from helpers.runs import tiny_run
from helpers.short_runs import rows, short_run
from torchrl.envs import StepCounter, TransformedEnv

from w2f_torchrl.checkpoint import latest_checkpoint, load_checkpoint
from w2f_torchrl.data.environments import control_steps
from w2f_torchrl.envs import make_env
from w2f_torchrl.evaluation import evaluator as module
from w2f_torchrl.trainers import ConfigError, Trainer
from w2f_torchrl.trainers.run import make_evaluator
from w2f_torchrl.trainers.tolerance import Tolerance

pytestmark = [pytest.mark.render, pytest.mark.usefixtures("no_curves")]


def play(tmp_path: Path, domain: str, task: str, **evaluation):
    environment = {"domain": domain, "task": task, "image_size": 16, "action_repeat": 4}
    trainer = Trainer(tiny_run(tmp_path / "run", environment=environment, evaluation=evaluation))
    evaluator = make_evaluator(
        trainer.config, trainer.learner.policy, 1, seed=3, segment=trainer.masks.segment
    )
    torch.manual_seed(0)
    evaluator.seed(0)
    trainer.run.lock.release()
    return evaluator, *evaluator._play(evaluator.envs["run"])


def test_an_episode_without_end_is_cut():
    names_none = make_env("lqr", "lqr_2_1", image_size=16)
    assert control_steps(names_none, 2) is None
    assert control_steps(make_env("cartpole", "balance", image_size=16), 2) == 1000
    assert control_steps(TransformedEnv(make_counting_env(0, 0), StepCounter(7)), 2) == 14
    assert control_steps(make_counting_env(0, 0), 2) is None
    assert module.CONTROL_STEPS == 1000


def test_the_setting_bounds_an_episode_and_what_is_kept_of_a_long_one_is_bounded(
    tmp_path, monkeypatch
):
    _, whole, total, length = play(tmp_path / "a", "lqr", "lqr_2_1", max_control_steps=201)
    assert len(whole) == length == 51  # of four control steps each
    assert total == float(whole["next", "reward"].sum())
    monkeypatch.setattr(module, "KEPT_STEPS", 10)
    monkeypatch.setattr(module, "PART", 16)
    _, kept, in_parts, again = play(tmp_path / "b", "lqr", "lqr_2_1", max_control_steps=201)
    assert len(kept) == 10
    assert again == 51
    assert in_parts == pytest.approx(total, rel=1e-6)  # the same episode, latents and all
    assert torch.equal(kept["action"], whole["action"][:10])


def test_an_episode_that_ends_by_itself_is_not_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "KEPT_STEPS", 100)
    _, kept, total, length = play(tmp_path, "cartpole", "balance", max_control_steps=2000)
    assert (len(kept), length) == (100, 250)
    assert 0 < total <= 1000


def test_bad_bounds_are_named(tmp_path):
    for name in ("max_control_steps", "max_failures"):
        with pytest.raises(ConfigError, match=rf"evaluation\.{name}=0 must be at least 1"):
            Trainer(tiny_run(tmp_path / "run", evaluation={name: 0}))


# ------------------------------------------------------------------ errors


def test_only_failures_in_a_row_count(tmp_path):
    tolerance = Tolerance(tmp_path, max_failures=2)

    def fails() -> None:
        raise ZeroDivisionError("none left")

    def attempt(work: str, action=fails):
        return tolerance.attempt(work, action, frames=3, updates=1)

    assert attempt("a") is None
    assert attempt("b") is None  # each kind by itself
    assert attempt("a", lambda: 5) == 5
    assert attempt("a") is None
    with pytest.raises(ZeroDivisionError):
        attempt("a")
    assert (tmp_path / "exceptions.txt").read_text().count("ZeroDivisionError: none left") == 3
    assert attempt("a") is None  # a resume may fail as often


def broken_run(run_dir: Path, failures: int, **settings) -> Trainer:
    """A run whose evaluations fail so often."""
    trainer = Trainer(short_run(run_dir, **settings))
    evaluate, left = module.Evaluator.evaluate, [failures]

    def fail(self, world_model, episodes):
        if left[0]:
            left[0] -= 1
            raise RuntimeError("the renderer is lost")
        return evaluate(self, world_model, episodes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Evaluator, "evaluate", fail)
        trainer.train()
    return trainer


def test_an_error_in_an_evaluation_is_written_down_and_training_goes_on(tmp_path):
    trainer = broken_run(tmp_path, 2)
    assert trainer.updates == 48
    assert (tmp_path / "exceptions.txt").read_text().count("the renderer is lost") == 4  # twice
    assert [r["frames"] for r in rows(tmp_path) if "eval/return_mean" in r] == [320]
    saved = load_checkpoint(latest_checkpoint(tmp_path / "checkpoints"))
    assert saved.payload["failures"]["the evaluation"] == 0


def test_a_few_in_a_row_end_the_run_and_a_resume_may_try_again(tmp_path):
    with pytest.raises(RuntimeError, match="renderer is lost"):
        broken_run(tmp_path, 9, evaluation={"every_frames": 64, "max_failures": 2})
    saved = load_checkpoint(latest_checkpoint(tmp_path / "checkpoints"))
    assert saved.frames == 128
    assert "renderer is lost" in saved.payload["exception"]
    trainer = broken_run(tmp_path, 1, evaluation={"every_frames": 64, "max_failures": 2})
    assert trainer.updates == 48


@pytest.mark.parametrize("what", ["after_evaluation", "after_update"])
def test_videos_and_pictures_that_fail_end_no_run(tmp_path, what):
    trainer = Trainer(short_run(tmp_path))
    calls = []

    def fail(*args, **kwargs):
        calls.append(what)
        if len(calls) <= 2:
            raise ValueError("no such font")

    setattr(trainer.diagnostics, what, fail)
    trainer.train()
    assert trainer.updates == 48
    assert len(calls) > 2
    assert "no such font" in (tmp_path / "exceptions.txt").read_text()

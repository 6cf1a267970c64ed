"""Settings at and beyond their limits, and numbers that are none: in settings, weights, scores."""

from __future__ import annotations

import dataclasses
import math
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.box_env import BoxEnv
from helpers.checkout import ROOT
from helpers.models import make_learner
from helpers.runs import tiny_run
from hypothesis import given
from hypothesis import strategies as st

from w2f_torchrl.checkpoint import BEST_NAME, list_checkpoints, load_checkpoint
from w2f_torchrl.config import (
    EnvironmentConfig,
    EvaluationConfig,
    OptimizerConfig,
    config_to_dict,
    to_run_config,
)
from w2f_torchrl.envs import register_env, tasks
from w2f_torchrl.evaluation.run_evaluations import RunEvaluations
from w2f_torchrl.modules import ModelConfig
from w2f_torchrl.objectives import LossConfig
from w2f_torchrl.trainers import ConfigError, RunConfig, Trainer
from w2f_torchrl.utils.checks import check_number
from w2f_torchrl.utils.settings import check_fields


def number_fields():
    """Every setting of a run that is a number, by group and name, with its declared type."""
    for group in dataclasses.fields(RunConfig):
        config = getattr(RunConfig(), group.name)
        if dataclasses.is_dataclass(config):
            for field in dataclasses.fields(config):
                if {"int", "float"} & set(str(field.type).split(" | ")):
                    yield group.name, field.name, str(field.type)


NUMBERS = list(number_fields())


def test_the_numbers_are_found():
    assert len(NUMBERS) > 60
    assert {("optimizer", "lr", "float"), ("training", "prefill_steps", "int | None")} < {*NUMBERS}


@pytest.mark.parametrize(("group", "name", "declared"), NUMBERS)
def test_no_number_of_a_run_is_nan_infinite_a_flag_or_a_text(tmp_path, group, name, declared):
    # Wrong numbers that Python's own comparisons let through, or that are of another type.
    wrong = [math.nan, math.inf, -math.inf, True, "7", 2**64]
    if "float" not in declared:
        wrong.append(2.5)
    for value in wrong:
        config = tiny_run(tmp_path / "run")
        setattr(getattr(config, group), name, value)
        with pytest.raises(ConfigError, match=rf"{group}\.{name}\b"):
            config.validate()


def test_flags_are_flags(tmp_path):
    config = tiny_run(tmp_path / "run")
    config.collection.overlap = "no"
    with pytest.raises(ConfigError, match=r"collection.overlap='no' must be true or false"):
        config.validate()


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e-9])
@pytest.mark.parametrize("name", ["reward", "entropy", "free_nats", "lmbda", "return_rate"])
def test_loss_settings_are_numbers_for_callers_from_python_too(name, value):
    with pytest.raises(ValueError, match=rf"loss\.{name}="):
        LossConfig(**{name: value}).validate()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"optimizer": OptimizerConfig(lr=math.nan)}, "optimizer.lr=nan must be a finite number"),
        ({"optimizer": OptimizerConfig(lr=-1.0)}, "optimizer.lr=-1.0 must be above 0"),
        ({"optimizer": OptimizerConfig(eps=-1.0)}, "optimizer.eps=-1.0 must be at least 0"),
        ({"optimizer": OptimizerConfig(beta2=1.0)}, r"optimizer.beta2=1.0 must be in \[0, 1\)"),
        ({"optimizer": OptimizerConfig(precision="float16")}, "precision='float16'.*bfloat16"),
        ({"execution": "fast"}, "execution='fast' is unknown; allowed: eager, compile"),
        ({"on_nan": "explode"}, "on_nan='explode' is unknown; allowed: stop, skip"),
        ({"gradients": "mean"}, "gradients='mean' is unknown; allowed: none, ddp, flat"),
        ({"loss": LossConfig(actor=math.inf)}, "loss.actor=inf must be a finite number"),
    ],
)
def test_a_learner_refuses_what_it_would_not_heed(settings, match):
    with pytest.raises(ValueError, match=match):
        make_learner(**settings)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"cnn_multipliers": ()}, "cnn_multipliers=.. must hold at least one factor"),
        ({"cnn_multipliers": (2, 0)}, "cnn_multipliers=0 must be at least 1"),
        ({"cnn_multipliers": (2, 1.5)}, "cnn_multipliers=1.5 must be an integer"),
        ({"num_bins": 1}, "num_bins=1 must be odd and at least 3"),
        ({"unimix": math.nan}, "unimix=nan must be a finite number"),
        ({"belief_size": 2.0}, "belief_size=2.0 must be an integer"),
    ],
)
def test_sizes_that_cannot_be_built_are_named(changes, match):
    with pytest.raises(ValueError, match=match):
        ModelConfig(**changes).validate(64)


@given(
    value=st.one_of(st.floats(), st.integers(), st.booleans(), st.text(), st.none()),
    low=st.floats(-100, 100),
    width=st.floats(0, 100),
)
def test_the_check_of_a_number_agrees_with_its_definition(value, low, width):
    high = low + width
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    finite = is_number and math.isfinite(value) and abs(value) < 2**63
    for closed in (True, False):
        limits = {"minimum": low, "maximum": high} if closed else {"above": low, "below": high}
        inside = finite and (low <= value <= high if closed else low < value < high)
        if inside:
            check_number("it", value, **limits)
        else:
            with pytest.raises(ValueError, match=r"^it"):
                check_number("it", value, **limits)


def test_annotations_that_are_types_are_checked_too():
    Made = dataclasses.make_dataclass("Made", [("rate", float, 1.0), ("on", bool, True)])
    check_fields("own", Made())
    with pytest.raises(ValueError, match=r"own.rate=nan"):
        check_fields("own", Made(rate=math.nan))
    with pytest.raises(ValueError, match=r"own.on=1"):
        check_fields("own", Made(on=1))


# ------------------------------------------------------------------ the command line


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"device": "cuda:99999999999999999999"}, "device='cuda:9+'"),
        ({"device": "cuda:300"}, "device='cuda:300'.*CUDA devices"),
        ({"environment": {"distraction": [1, 2]}}, r"distraction is \[1, 2\]: must be one of"),
        ({"segmentation": {"labels": "é" * 300}}, "segmentation.labels=.* is not a file"),
        ({"segmentation": {"student_checkpoint": "a\0b"}}, "student_checkpoint=.* is not a file"),
        ({"environment": {"distraction": 3}}, "distraction is 3: must be one of"),
        ({"environment": {"image_size": 1048576}}, r"image_size=1048576 must be in \[16, 1024\]"),
        ({"model": {"cnn_multipliers": []}}, "model.cnn_multipliers"),
        ({"model": {"num_bins": 1}}, "model.num_bins=1 must be odd"),
        ({"distributed": {"timeout_seconds": 1e300}}, "distributed.timeout_seconds=1e.300 must be"),
        (
            {"training": {"prefill_steps": 500, "total_frames": 256}},
            "training.total_frames=256 ends the run before its first update.*prefill_steps=500",
        ),
        (
            {"training": {"train_ratio": 1e-6}},
            "total_frames=256 ends the run before its first update.*train_ratio=1e-06",
        ),
    ],
)
def test_bad_settings_of_the_command_line_are_named(tmp_path, monkeypatch, settings, match):
    monkeypatch.chdir(tmp_path)
    config = tiny_run(tmp_path / "run", **settings)
    with pytest.raises(ConfigError, match=match):
        config.validate()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("run_dir", "match"),
    [
        ("", "run_dir='' must name a directory"),
        ("  ", "run_dir='  ' must name a directory"),
        ("a\0b", "run_dir=.* must name a directory"),
        ("a/" + "b" * 300, "run_dir=a/bbb.* is too long"),
        ("/".join(["b" * 100] * 50), "run_dir=bbb.* is too long"),
    ],
)
def test_a_run_dir_that_no_directory_can_have(tmp_path, run_dir, match):
    config = tiny_run(tmp_path / "run")
    config.run_dir = run_dir
    with pytest.raises(ConfigError, match=match):
        config.validate()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"environment": {"action_range": {"a": 1}}}, r"^environment.action_range: Cannot merge"),
        ({"segmentation": {"prompts": {"a": 1}}}, r"^segmentation.prompts: Cannot merge"),
        ({"loss": {"reward": "much"}}, r"^loss.reward: Value 'much' of type 'str'[^\n]*$"),
        ({"loss": {"rewards": 1.0}}, r"^loss.rewards: Key 'rewards' not in 'LossConfig'$"),
    ],
)
def test_a_setting_of_another_kind_is_named_in_one_line(settings, match):
    with pytest.raises(ConfigError, match=match):
        to_run_config(settings)


def test_a_run_dir_that_is_or_lies_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run_dir=.*file is a file"):
        tiny_run(tmp_path / "file").validate()
    with pytest.raises(ConfigError, match=r"run_dir=.*lies below .*file, which is a file"):
        tiny_run(tmp_path / "file" / "a" / "b").validate()
    tiny_run(tmp_path / "folder" / "a").validate()


def test_as_many_frames_as_the_first_update_needs_are_enough(tmp_path):
    # 32 steps to begin with, then 16 records at 4 a step: due at step 36, in the third batch of 16.
    training = {"prefill_steps": 32, "train_ratio": 4}
    for frames, enough in ((64, False), (65, True)):
        config = tiny_run(tmp_path / "run", training=training | {"total_frames": frames})
        if enough:
            config.validate()
        else:
            with pytest.raises(ConfigError, match="before its first update"):
                config.validate()


@pytest.mark.parametrize(
    "override",
    ["run_dir=FILE/x", "run_dir=''", "environment.distraction=[1,2]", "device=cuda:12345678901"],
)
def test_the_command_line_says_it_in_one_line(tmp_path, override):
    (tmp_path / "file").write_text("")
    override = override.replace("FILE", str(tmp_path / "file"))
    done = subprocess.run(
        [sys.executable, ROOT / "sota_configs" / "world2filter.py", override],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert override.partition("=")[0].split(".")[-1] in line


# ------------------------------------------------------------------ weights and scores


@pytest.fixture
def boxes(monkeypatch):
    monkeypatch.setattr(tasks, "_REGISTRY", {})
    register_env("box", BoxEnv)
    return {"environment": {"domain": "box", "task": "any"}, "evaluation": {"every_frames": 0}}


def finite_weights(path: Path) -> bool:
    tensors = load_checkpoint(path).payload["learner"]["loss"].values()
    return all(bool(t.isfinite().all()) for t in tensors)


@pytest.mark.usefixtures("no_curves")
def test_weights_that_overflow_never_replace_a_good_checkpoint(tmp_path, boxes):
    run = tmp_path / "run"
    trainer = Trainer(tiny_run(run, **boxes, checkpoint={"every_updates": 4, "keep": 1}))
    update = trainer.learner.update

    def overflow(sample):
        metrics = update(sample)
        if trainer.updates == 9:  # after the second checkpoint; losses and gradients stay finite
            next(iter(trainer.learner.loss.critic.parameters())).data.fill_(math.inf)
        return metrics

    trainer.learner.update = overflow
    with pytest.raises(FloatingPointError, match="not finite"):
        trainer.train()
    [kept] = list_checkpoints(run / "checkpoints")
    assert load_checkpoint(kept).updates == 8
    assert finite_weights(kept)


def test_the_message_about_gradients_does_not_claim_that_spoiled_weights_are_unchanged(
    tmp_path, boxes
):
    never = {"every_updates": 1000}
    trainer = Trainer(tiny_run(tmp_path / "run", **boxes, checkpoint=never))
    update = trainer.learner.update

    def spoil(sample):
        if trainer.updates == 6:
            trainer.learner.loss.critic.model[-1].weight.data.fill_(math.nan)
        return update(sample)

    trainer.learner.update = spoil
    with pytest.raises(FloatingPointError, match="The weights are not finite either"):
        trainer.train()
    for path in list_checkpoints(tmp_path / "run" / "checkpoints"):
        assert finite_weights(path)


def test_weights_are_finite_at_any_finite_size():
    learner = make_learner()
    assert learner.is_finite()
    parameter = learner.parameters_trained[0]
    parameter.data.fill_(3e38)  # their sum overflows float32
    assert learner.is_finite()
    parameter.data.view(-1)[-1] = -math.inf
    assert not learner.is_finite()


def test_a_nan_evaluation_is_not_the_best_and_does_not_freeze_it():
    evaluations = RunEvaluations(EvaluationConfig(), EnvironmentConfig(), make_learner())

    def is_best(score: float) -> bool:
        return evaluations.is_best(SimpleNamespace(metrics={"eval/return_mean": score}))

    assert not is_best(math.nan)
    assert is_best(1.0)
    assert not is_best(math.inf)
    assert not is_best(math.nan)
    assert is_best(2.0)
    assert not is_best(1.5)
    evaluations.load_state_dict({"last": 0, "best": math.nan})  # of an older version
    assert is_best(-5.0)


@pytest.mark.usefixtures("no_curves")
def test_the_best_checkpoint_is_never_one_that_is_not_finite(tmp_path, boxes):
    run = tmp_path / "run"
    trainer = Trainer(tiny_run(run, **boxes))
    trainer.start()
    trainer.learner.loss.critic.model[-1].weight.data.fill_(torch.nan)
    trainer._save_best()
    trainer.writer.wait()
    assert not (run / "checkpoints" / BEST_NAME).exists()
    trainer._close()


# ------------------------------------------------------------------ frozen settings


def test_validated_settings_cannot_be_set_and_copies_can(tmp_path):
    config = tiny_run(tmp_path / "run")
    frozen = config.validated(ranks=2)
    assert (config.frozen, config.distributed.ranks) == (False, 1)
    assert (frozen.frozen, frozen.distributed.ranks) == (True, 2)
    assert frozen.validated(ranks=2) is frozen
    for settings, name in ((frozen, "seed"), (frozen.training, "batch_size"), (frozen.loss, "kl")):
        with pytest.raises(FrozenInstanceError, match=f"cannot set {name}"):
            setattr(settings, name, 3)
    changed = frozen.thawed(seed=7)
    changed.training.batch_size = 3
    assert (changed.seed, frozen.seed, config.seed) == (7, config.seed, 0)
    assert frozen.training.batch_size == config.training.batch_size != 3
    copied = pickle.loads(pickle.dumps(frozen))
    assert copied == frozen
    assert copied.frozen  # in worker processes too


@pytest.mark.usefixtures("no_curves")
def test_a_run_writes_to_no_setting(tmp_path, boxes):
    config = tiny_run(tmp_path / "run", **boxes, segmentation={"source": "auto"})
    before = config_to_dict(config)
    trainer = Trainer(config)
    trainer.train()
    assert config_to_dict(config) == before
    assert trainer.config.frozen
    assert trainer.config.segmentation.chosen == trainer.masks.name

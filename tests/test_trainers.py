"""The learner, whole runs, the command line, and policies loaded from a checkpoint."""

from __future__ import annotations

import copy
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.checkout import ROOT
from helpers.models import LATENTS as ALL_LATENTS
from helpers.models import SIZE, TINY, make_learner, make_sample
from helpers.runs import tiny_run
from torchrl.envs.utils import check_env_specs

from w2f_torchrl.checkpoint import (
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from w2f_torchrl.config import OptimizerConfig, to_run_config
from w2f_torchrl.envs import make_env
from w2f_torchrl.logging.metrics import read_metrics
from w2f_torchrl.logging.pictures.video import read_video
from w2f_torchrl.modules import LATENTS, ModelConfig
from w2f_torchrl.objectives import LossConfig
from w2f_torchrl.trainers import ConfigError, Learner, RunConfig, Trainer, load_policy

# ------------------------------------------------------------------ learner


@pytest.mark.parametrize("latent", ALL_LATENTS)
def test_an_update_trains_everything_and_fits_a_batch(latent):
    optimizer = OptimizerConfig(lr=3e-3, warmup_updates=0)
    learner = make_learner(latent, optimizer=optimizer)
    sample = make_sample()
    before = copy.deepcopy(learner.loss.state_dict())
    first = learner.update(sample)
    assert first["wm/grad_norm"] > 0
    for _ in range(30):
        last = learner.update(sample)
    assert last["wm/image_loss"] < 0.9 * first["wm/image_loss"]
    after = learner.loss.state_dict()
    still = [k for k in before if torch.equal(before[k], after[k])]
    assert all("two_hot" in k or "action_projection.0.weight" in k for k in still), still


def test_a_restored_learner_goes_on_bit_for_bit():
    learner, sample = make_learner(), make_sample()
    for _ in range(3):
        learner.update(sample)
    other = make_learner(seed=7)
    other.load_state_dict(copy.deepcopy(learner.state_dict()))
    for one in (learner, other):
        torch.manual_seed(5)
        one.update(sample)
    for a, b in zip(
        learner.loss.state_dict().values(), other.loss.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)
    wide = Learner(ModelConfig(**vars(TINY) | {"belief_size": 32}), action_size=2, image_size=SIZE)
    with pytest.raises(CheckpointError, match="another model"):
        wide.load_state_dict(learner.state_dict())


def test_bfloat16_keeps_float32_parameters_and_close_losses():
    settings = OptimizerConfig(precision="bfloat16")
    sample, results = make_sample(), []
    for learner in (make_learner(), make_learner(optimizer=settings)):
        torch.manual_seed(1)
        results.append(learner.update(sample))
        assert all(p.dtype is torch.float32 for p in learner.loss.parameters())
    full, mixed = results
    assert full["wm/image_loss"] != mixed["wm/image_loss"]
    for name in ("wm/image_loss", "wm/reward_loss", "ac/critic_loss"):
        torch.testing.assert_close(full[name], mixed[name].float(), rtol=0.05, atol=0.05)


def test_acting_weights_are_the_learners():
    learner = make_learner()
    trained = {id(p) for p in learner.parameters_trained}
    acting = {id(p) for p in learner.policy.parameters()}
    assert acting
    assert acting < trained
    assert {id(p) for p in learner.loss.actor.parameters()} < acting


# ------------------------------------------------------------------ whole runs


@pytest.mark.render
@pytest.mark.parametrize("latent", [None, *LATENTS])
def test_a_run_leaves_what_it_promises(tmp_path, latent):
    name = "world2filter" if latent else "dreamer_v3"
    run = tmp_path / "run"
    trainer = Trainer(tiny_run(run, algo={"name": name, "latent": latent}))
    trainer.train()
    # Updates counted against frames: 4 replayed records a step, 16 a batch, after the prefill.
    assert trainer.frames == 256
    assert trainer.updates == (128 - 32) * 4 // 16
    rows = read_metrics(run)
    frames = [row["frames"] for row in rows]
    assert frames == sorted(frames)
    names = {name for row in rows for name in row}
    wanted = "wm/total_loss wm/image_loss wm/kl_loss wm/kl_value wm/reward_loss wm/continue_loss "
    wanted += "wm/grad_norm ac/actor_loss ac/critic_loss ac/entropy ac/value_mean "
    wanted += "ac/advantage_mean eval/return_mean eval/return_std eval/length_mean"
    wanted += " wm/fg_loss wm/mask_iou" if latent else ""
    wanted += " wm/bg_loss" if latent in ("split", "shared") else ""
    assert set(wanted.split()) <= names
    assert all(math.isfinite(v) for row in rows for v in row.values())
    assert sum("eval/return_mean" in row for row in rows) == 2
    assert (run / "config.yaml").exists()
    assert (run / "curves.png").stat().st_size > 10_000
    assert len(list_checkpoints(run / "checkpoints")) == 2
    videos = sorted((run / "videos").iterdir())
    assert len(videos) == 8  # two of an episode and two of imagination, at two evaluations
    videos = [path for path in videos if "observation" in path.name]
    assert len(read_video(videos[0])) == 501  # first and last observation of the episode


@pytest.mark.render
def test_a_run_resumes_where_it_was(tmp_path):
    run = tmp_path / "run"
    Trainer(tiny_run(run)).train()
    with pytest.raises(CheckpointError, match="resume=auto"):
        Trainer(tiny_run(run))
    longer = tiny_run(run, resume="auto", training={"total_frames": 512})
    trainer = Trainer(longer)
    assert (trainer.frames, trainer.updates) == (256, 24)
    saved = load_checkpoint(list_checkpoints(run / "checkpoints")[-1]).payload["learner"]["loss"]
    for key, value in trainer.learner.loss.state_dict().items():
        assert torch.equal(value, saved[key])
    trainer.train()
    assert trainer.frames == 512
    assert trainer.updates == (256 - 32) * 4 // 16
    rows = read_metrics(run)
    counters = [(row["frames"], row["updates"]) for row in rows]
    assert counters == sorted(counters)
    other = tiny_run(run, resume="auto", model={"belief_size": 32})
    with pytest.raises(CheckpointError, match="another model"):
        Trainer(other)


@pytest.mark.render
def test_a_run_that_ends_while_its_replay_fills_resumes_again_and_again(tmp_path):
    run, quiet = tmp_path / "run", {"every_frames": 0}
    Trainer(tiny_run(run, evaluation=quiet)).train()
    for frames in (288, 320, 512):  # 16 agent steps a time, half of what fills the replay; then all
        shutil.rmtree(run / "replay")  # without its records a run fills its replay again
        settings = {"total_frames": frames}
        trainer = Trainer(tiny_run(run, resume="auto", evaluation=quiet, training=settings))
        before = trainer.updates
        trainer.train()
        owed = (trainer.steps - trainer.counters.first_steps) * 4 // 16
        assert trainer.updates - before == max(owed, 0)
    assert trainer.updates == 24 + (256 - 160 - 32) * 4 // 16


@pytest.mark.render
def test_a_loss_that_is_not_finite_ends_the_run_and_spoils_no_checkpoint(tmp_path):
    trainer = Trainer(tiny_run(tmp_path / "run", evaluation={"every_frames": 0}))
    update = trainer.learner.update

    def poisoned(sample):
        metrics = update(sample)
        if trainer.updates == 12:
            metrics["wm/kl_value"].fill_(math.nan)
            for p in trainer.learner.parameters():
                p.data.fill_(math.nan)
        return metrics

    trainer.learner.update = poisoned
    with pytest.raises(FloatingPointError, match="wm/kl_value"):
        trainer.train()
    for path in list_checkpoints(tmp_path / "run" / "checkpoints"):
        saved = load_checkpoint(path).payload["learner"]["loss"]
        assert all(torch.isfinite(v).all() for v in saved.values())


@pytest.mark.render
def test_a_loaded_policy_plays_in_three_lines(tmp_path):
    Trainer(tiny_run(tmp_path / "run", evaluation={"every_frames": 0})).train()
    checkpoint = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    policy = load_policy(checkpoint)
    env = policy.make_env(seed=3)
    episode = env.rollout(20, policy)
    check_env_specs(env)
    assert torch.equal(episode["next", "belief"], episode["belief"])  # carried from step to step
    forgetful = episode[10].clone().set("is_init", torch.ones(1, dtype=torch.bool))
    assert not torch.equal(policy(forgetful)["belief"], episode["belief"][10])
    torch.testing.assert_close(episode["action"], episode["loc"])  # the mode
    bare = make_env("cartpole", "balance", image_size=16)
    with pytest.raises(KeyError, match="make_tensordict_primer"):
        bare.rollout(2, policy)


@pytest.mark.render
def test_a_checkpoint_from_before_the_models_newer_settings_loads(tmp_path):
    before = {"background_encoder": "shared", "decoder": "torchrl", "resample": "stride"}
    config = tiny_run(tmp_path / "run", evaluation={"every_frames": 0})
    for name, value in before.items():
        setattr(config.model, name, value)
    Trainer(config).train()
    saved = load_checkpoint(list_checkpoints(tmp_path / "run" / "checkpoints")[-1])
    for name in before:
        del saved.payload["config"]["model"][name]
    old = save_checkpoint(tmp_path / "old", saved.payload, updates=1, frames=1)
    model = load_policy(old).world_model
    assert model.background_encoder is None
    assert (model.config.decoder, model.config.resample) == ("torchrl", "stride")
    other = tiny_run(tmp_path / "run", resume="auto", evaluation={"every_frames": 0})
    with pytest.raises(CheckpointError, match=r"model.decoder=reference must stay torchrl"):
        Trainer(other)
    other.model.decoder, other.model.resample = "torchrl", "stride"
    with pytest.raises(CheckpointError, match=r"background_encoder=own must stay shared"):
        Trainer(other)


@pytest.mark.render
def test_a_distracted_run_is_evaluated_in_named_sets(tmp_path):
    run = tmp_path / "run"
    sets = ["clean", "color_hard", "unseen_videos_easy"]
    distraction = {"background": {"num_videos": 1}, "camera": {"scale": 0.2}, "step_unit": "agent"}
    config = tiny_run(
        run,
        environment={"distraction": distraction, "action_repeat": 4},
        training={"total_frames": 512},
        evaluation={"every_frames": 512, "sets": sets, "video": False},
    )
    Trainer(config).train()
    [row] = [row for row in read_metrics(run) if "eval/return_mean" in row]
    for name in sets:
        of_set = {key for key in row if key.startswith(f"eval/{name}/")}
        names = ("return_mean", "return_std", "length_mean", "mask_iou")
        assert of_set == {f"eval/{name}/{last}" for last in names}
    policy = load_policy(list_checkpoints(run / "checkpoints")[-1])
    assert policy.make_env().base_env.distractor.config.camera.scale == 0.2
    env = policy.make_env(seed=1, evaluation_set="color_hard")
    assert env.base_env.distractor.config.color.scale == 0.3
    assert env.rollout(3, policy)["action"].isfinite().all()
    with pytest.raises(ValueError, match="evaluation_set is 'dirty': must be clean, train_videos"):
        policy.make_env(evaluation_set="dirty")


# ------------------------------------------------------------------ configuration


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"environment": {"domain": "cartpol"}}, "cartpol"),
        ({"environment": {"domain": "cartpole", "task": "fly"}}, "fly"),
        ({"environment": {"image_size": 50}}, "environment.image_size=50 must be a multiple of 16"),
        ({"environment": {"image_size": 8}}, r"environment.image_size=8 must be in \[16, 1024\]"),
        ({"environment": {"num_envs": 0}}, "environment.num_envs=0"),
        ({"environment": {"render": "slow"}}, "environment.render='slow'.*fast, reference"),
        (
            {"environment": {"distraction": "harder"}},
            "environment.distraction='harder'.*must be one of none, easy, medium, hard",
        ),
        ({"environment": {"distraction": {"camera": {"scale": 2}}}}, "camera.scale=2 must be"),
        ({"environment": {"background_split": "test"}}, "background_split='test'.*train, val"),
        ({"environment": {"background_source": "procedural"}}, "background_source is 'procedural'"),
        (
            {"environment": {"distraction": "easy", "background_source": "no/such"}},
            "environment.distraction='easy': background_source is 'no/such': no such folder",
        ),
        ({"evaluation": {"sets": ["cleaner"]}}, "evaluation.sets='cleaner'.*clean, train_videos"),
        (
            {"environment": {"background_source": "no/such"}, "evaluation": {"sets": ["all_hard"]}},
            "evaluation.sets=all_hard: background_source is 'no/such': no such folder",
        ),
        ({"algo": {"latent": "both"}}, "algo.latent='both'.*split, shared, foreground"),
        ({"algo": {"name": "dreamer_v3"}}, "algo.latent='split' must be null"),
        ({"algo": {"name": "ppo"}}, "algo='ppo'.*world2filter, dreamer_v3"),
        ({"segmentation": {"source": "guess"}}, "segmentation='guess'.*simulator"),
        ({"training": {"batch_length": 1}}, "training.batch_length=1"),
        ({"training": {"prefill_steps": 3}}, "training.prefill_steps=3 must be at least"),
        ({"replay": {"capacity": 10}}, "replay.capacity=10"),
        ({"replay": {"storage": "tape"}}, "replay.storage='tape'.*memory, disk"),
        ({"collection": {"num_workers": 3}}, "collection.num_workers=3"),
        ({"optimizer": {"lr": 0.0}}, "optimizer.lr=0.0"),
        ({"optimizer": {"precision": "fp8"}}, "optimizer.precision='fp8'"),
        ({"loss": {"mask": 0.0}}, "loss.mask=0.0"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"device": "cuda:99"}, "device='cuda:99'"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_settings_are_named_before_anything_is_built(tmp_path, settings, match):
    config = tiny_run(tmp_path / "run", **settings)
    with pytest.raises(ConfigError, match=match):
        Trainer(config)
    assert not (tmp_path / "run").exists()


def test_unknown_keys_and_types_are_named():
    with pytest.raises(ConfigError, match="colour"):
        to_run_config({"environment": {"colour": 1}})
    with pytest.raises(ConfigError, match="total_frames"):
        to_run_config({"training": {"total_frames": "many"}})


def test_defaults_are_the_papers():
    run, loss = RunConfig(), LossConfig()
    assert (run.training.batch_size, run.training.batch_length) == (16, 64)
    # 250 updates per 1000 frames at an action repeat of 2.
    assert run.training.train_ratio / (16 * 64) == 0.5
    assert (run.optimizer.lr, run.optimizer.agc, run.optimizer.warmup_updates) == (4e-5, 0.3, 1000)
    assert (loss.representation, loss.dynamics, loss.replay_critic) == (0.1, 1.0, 0.3)
    assert (loss.imagination_horizon, loss.discount_horizon, loss.entropy) == (15, 333.0, 3e-4)


# ------------------------------------------------------------------ command line


def run_cli(*overrides: str, cwd: Path, **kwargs) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "sota_configs" / "world2filter.py"), *overrides]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, **kwargs)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("environment.domain=cartpol", "cartpol"),
        ("environment.camera_id=77", "camera"),
        ("model=size2m", "size2m"),
        ("algo=ppo", "ppo"),
        ("trainin.batch_size=2", "trainin"),
        ("training.batch_size=two", "batch_size"),
    ],
)
def test_cli_errors_name_the_override(tmp_path, override, named):
    done = run_cli(override, "run_dir=run", cwd=tmp_path, timeout=120)
    assert done.returncode != 0
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.render
def test_ctrl_c_ends_a_run_with_a_checkpoint_and_no_traceback(tmp_path):
    """SIGINT to the whole process group, as a terminal sends it."""
    command = [sys.executable, str(ROOT / "sota_configs" / "world2filter.py"), "experiment=smoke"]
    command += ["run_dir=run", "training.total_frames=1000000", "environment.image_size=16"]
    with subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            metrics = tmp_path / "run" / "metrics.jsonl"
            if metrics.exists() and metrics.stat().st_size:
                break
            time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=90)
    assert process.returncode == 0, stderr
    assert "Traceback" not in stderr
    [checkpoint] = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert re.search(rf"checkpoint: run/checkpoints/{checkpoint.name}", stderr)
    assert load_checkpoint(checkpoint).updates > 0

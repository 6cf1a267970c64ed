"""Runs that end before their time and go on: the same run as one that wasn't ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tarfile
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from dm_control import suite
from helpers.runs import tiny_run
from helpers.short_runs import crash, differences, flip_bit, run, short_run, signal_at
from helpers.short_runs import rows as metrics
from tensordict import TensorDict

from w2f_torchrl.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from w2f_torchrl.checkpoint import file as checkpoint_file
from w2f_torchrl.checkpoint.older import complete_model
from w2f_torchrl.checkpoint.parts import Checkpoints
from w2f_torchrl.data.replay.record_files import RecordFiles
from w2f_torchrl.envs import PixelDMControlEnv
from w2f_torchrl.modules import ModelConfig
from w2f_torchrl.trainers import Trainer, load_policy
from w2f_torchrl.utils.random_state import RandomStreams

pytestmark = [pytest.mark.render, pytest.mark.usefixtures("no_curves")]

DREAMER = {"algo": {"name": "dreamer_v3", "latent": None}}
SECRETS = {"WANDB_API_KEY": "wandb-0123456789abcdef", "HF_TOKEN": "hf_fedcba9876543210"}
DISK = {"replay": {"storage": "disk"}}


@pytest.fixture(scope="module")
def undisturbed(no_curves: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "undisturbed"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        run(path)
    return path


def test_signals_at_any_update_change_nothing(tmp_path, undisturbed):
    stops = {3: signal.SIGTERM, 4: signal.SIGUSR1, 11: signal.SIGUSR2, 29: signal.SIGINT}
    for updates, number in stops.items():
        # Mid-way through the updates that a batch grants: the batch is stored, updates are owed.
        assert run(tmp_path, signal_at(updates, number)).updates == updates + 1
    assert run(tmp_path).updates == 48
    assert differences(undisturbed, tmp_path) == []
    rows = metrics(tmp_path)
    assert sum("eval/return_mean" in row for row in rows) == 3
    assert sum("episode/return" in row for row in rows) >= 10


@pytest.mark.parametrize("settings", [DREAMER, DISK], ids=["dreamer_v3", "disk"])
def test_crashes_change_nothing(tmp_path, settings):
    run(tmp_path / "whole", **settings)
    for updates in (13, 23, 42):  # checkpoints are at about 8, 16, 24, ...
        crash(tmp_path / "crashed", updates, **settings)
    run(tmp_path / "crashed", **settings)
    assert differences(tmp_path / "whole", tmp_path / "crashed") == []


def test_a_run_goes_on_in_another_directory(tmp_path, undisturbed):
    run(tmp_path / "first", signal_at(20))
    shutil.copytree(tmp_path / "first", tmp_path / "moved")
    run(tmp_path / "moved")
    assert differences(undisturbed, tmp_path / "moved") == []
    # resume=PATH: the records come along, and the first run stays as it is.
    trainer = run(tmp_path / "second", resume=str(tmp_path / "first"))
    shutil.rmtree(tmp_path / "first")
    assert trainer.updates == 48
    assert len(trainer.replay) == 2 * 200 or len(trainer.replay) == sum(
        load_checkpoint(latest_checkpoint(tmp_path / "second" / "checkpoints")).payload["replay"][
            "written"
        ]
    )
    late = [row for row in metrics(undisturbed) if row["updates"] > 21]
    assert metrics(tmp_path / "second")[-len(late) :] == late
    Trainer(short_run(tmp_path / "second", training={"total_frames": 352})).train()


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [False, True])
def test_worker_processes_resume_exactly_too(tmp_path, overlap):
    # The Control Suite's own task: worker processes know no domain that a test registers.
    collection = {"num_workers": 2, "overlap": overlap}
    settings = {"collection": collection, "environment": {"domain": "cartpole"}}
    settings["evaluation"] = {"every_frames": 0}
    run(tmp_path / "whole", **settings)
    crash(tmp_path / "crashed", 23, **settings)
    run(tmp_path / "crashed", signal_at(30), **settings)
    run(tmp_path / "crashed", **settings)
    assert differences(tmp_path / "whole", tmp_path / "crashed") == []


def test_an_exception_is_kept_and_the_run_goes_on(tmp_path):
    def fail(trainer: Trainer) -> None:
        if trainer.updates == 10:
            raise RuntimeError("a bolt from the blue")

    with pytest.raises(RuntimeError, match="bolt"):
        run(tmp_path, fail)
    text = (tmp_path / "exceptions.txt").read_text()
    assert "a bolt from the blue" in text
    assert "update 10" in text
    saved = load_checkpoint(latest_checkpoint(tmp_path / "checkpoints"))
    assert saved.updates == 10
    assert "a bolt from the blue" in saved.payload["exception"]
    assert run(tmp_path).updates == 48  # the failed update was done again
    assert [row["frames"] for row in metrics(tmp_path)] == sorted(
        row["frames"] for row in metrics(tmp_path)
    )


def test_an_exception_while_collecting_cuts_the_episodes(tmp_path):
    trainer = Trainer(short_run(tmp_path))
    label = trainer.masks.label

    def fail(records):
        if trainer.updates >= 10:
            raise RuntimeError("no masks today")
        return label(records)

    trainer.masks.label = fail
    with pytest.raises(RuntimeError, match="no masks"):
        trainer.train()
    resumed = Trainer(short_run(tmp_path))
    ends = [end - 1 for end in resumed.run.resumption.records.manifest["written"]]
    resumed.train()
    assert resumed.updates == 48
    assert resumed.replay._cuts == list(enumerate(ends))
    slots = [resumed.replay.heads.slot(*cut) for cut in resumed.replay._cuts]
    for _ in range(200):
        sample = resumed.replay.sample()
        for slot in slots:
            assert sample["next", "done"][sample["index"] == slot].all()
            following = sample["is_init"][:, 1:][sample["index"][:, :-1] == slot]
            assert following.all()


def test_envs_that_cannot_say_their_state_begin_anew_and_the_log_says_so(tmp_path, caplog):
    domain = {"domain": "forgetful_cartpole"}
    run(tmp_path, signal_at(20), environment=domain)
    with caplog.at_level("WARNING"):
        assert run(tmp_path, environment=domain).updates == 48
    assert "the environments begin new episodes: their state was not saved" in caplog.text


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"environment": {"num_envs": 1}}, "environment.num_envs=1 must stay 2"),
        ({"environment": {"image_size": 32}}, "another model"),
        ({"training": {"batch_size": 3}}, "batch_length must not change"),
    ],
)
def test_settings_that_must_stay_are_named(tmp_path, undisturbed, settings, named):
    shutil.copytree(undisturbed, tmp_path / "run")
    with pytest.raises(CheckpointError, match=named):
        run(tmp_path / "run", **settings)


def test_a_larger_replay_takes_the_records_over(tmp_path, undisturbed):
    shutil.copytree(undisturbed, tmp_path / "run")
    longer = {"training": {"total_frames": 480}, "replay": {"capacity": 2000}}
    trainer = run(tmp_path / "run", **longer)
    # 320 frames are 160 steps, and a record more an episode: all of them fitted in 400.
    written = int(trainer.replay.heads.written.sum())
    assert len(trainer.replay) == written
    assert trainer.updates == 78


def test_damaged_records_make_the_checkpoint_before_the_newest(tmp_path, caplog):
    crash(tmp_path, 40)
    newest, before = (
        load_checkpoint(p) for p in reversed(list_checkpoints(tmp_path / "checkpoints"))
    )
    manifest, older = newest.payload["replay"], before.payload["replay"]
    [pixels] = (tmp_path / "replay" / manifest["generation"] / "next").glob("pixels.memmap")
    row = manifest["written"][0] - 1
    assert row >= older["written"][0]  # a record that only the newest has
    flip_bit(pixels, row * 3 * 16 * 16 + 5)
    with caplog.at_level("WARNING"):
        trainer = Trainer(short_run(tmp_path))
    assert trainer.updates == before.updates
    assert "do not match their SHA-256 digest. Trying the previous one." in caplog.text
    trainer.run.lock.release()
    flip_bit(pixels, 5)  # what all share: see test_damaged_runs
    assert Trainer(short_run(tmp_path)).updates == before.updates


def test_without_its_records_a_run_fills_its_replay_again(tmp_path, undisturbed, caplog):
    shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "replay")
    with caplog.at_level("WARNING"):
        trainer = run(tmp_path / "run", training={"total_frames": 480})
    assert "The replay fills again before the first update." in caplog.text
    # 160 steps more, 32 of which fill it; 6 / 16 updates a step.
    assert trainer.updates == 48 + (240 - 160 - 32) * 6 // 16


def test_the_former_format_loads(tmp_path, undisturbed, monkeypatch, caplog):
    path = latest_checkpoint(undisturbed / "checkpoints")
    saved = load_checkpoint(path)
    payload = {name: saved.payload[name] for name in ("config", "action_size", "learner")}
    names = ("steps", "first_steps", "schedule")
    payload |= {name: saved.payload["counters"][name] for name in names}
    payload["segmentation"] = {"name": "simulator", "frames": 3}
    monkeypatch.setattr(checkpoint_file, "FORMAT_VERSION", 1)
    save_checkpoint(tmp_path / "checkpoints", payload, updates=48, frames=320)
    monkeypatch.undo()
    with caplog.at_level("WARNING"):
        trainer = run(tmp_path, training={"total_frames": 480})
    assert "contains no replay, which fills again" in caplog.text
    assert trainer.updates == 48 + (240 - 160 - 32) * 6 // 16


def test_the_best_by_evaluation_is_kept_beside_the_last(undisturbed):
    scores = {
        r["updates"]: r["eval/return_mean"] for r in metrics(undisturbed) if "eval/return_mean" in r
    }
    best = load_checkpoint(undisturbed / "checkpoints" / "best.pt")
    assert best.updates == max(scores, key=scores.get)
    assert len(list_checkpoints(undisturbed / "checkpoints")) == 2


def test_two_runs_in_one_directory_are_refused(tmp_path):
    first = Trainer(short_run(tmp_path / "run"))
    with pytest.raises(CheckpointError, match=rf"in use by process {os.getpid()} on"):
        Trainer(short_run(tmp_path / "run"))
    first.run.lock.release()
    Trainer(short_run(tmp_path / "run")).run.lock.release()


@pytest.mark.parametrize("task", ["finger turn_hard", "point_mass hard", "quadruped escape"])
def test_a_simulation_goes_on_bit_for_bit(task):
    """Tasks that change their model at an episode's start, with distractions where there can be."""
    domain, name = task.split()
    settings = {"image_size": 16, "seed": 3, "state_observations": True}
    settings["distraction"] = "hard" if domain != "quadruped" else "none"
    first, second = (PixelDMControlEnv(domain, name, **settings) for _ in range(2))
    actions = torch.rand(12, first.action_spec.shape[-1]) * 2 - 1
    first.reset()
    first.reset()
    second.reset()

    def play(env, actions):
        made = [env.step(TensorDict({"action": action}, []))["next"].clone() for action in actions]
        return [*made, env.reset().clone()]

    play(first, actions[:5])
    first.step(TensorDict({"action": actions[5]}, []))
    second.load_resume_state(first.resume_state())
    for one, other in zip(play(first, actions[6:]), play(second, actions[6:]), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one.keys())
    assert (domain, name) in suite.ALL_TASKS
    with pytest.raises(ValueError, match="another task"):
        PixelDMControlEnv("walker", "walk", image_size=16).load_resume_state(
            {**first.resume_state(), "distractor": None}
        )


def test_nothing_secret_and_no_pickle_is_in_a_run(undisturbed):
    files = [p for p in undisturbed.rglob("*") if p.is_file()]
    assert not {p.suffix for p in files} & {".pkl", ".pickle", ".npy"}
    assert not [p for p in files for value in SECRETS.values() if value.encode() in p.read_bytes()]
    for path in undisturbed.rglob("*.pt"):
        torch.load(path, weights_only=True)
    assert json.loads((undisturbed / "metrics.jsonl").read_text().splitlines()[0])


@pytest.mark.parametrize(
    "change", [{"generation": "../../elsewhere"}, {"fields": {"../../x": ["uint8", [1]]}}]
)
def test_names_in_a_checkpoint_do_not_lead_out_of_its_folder(tmp_path, undisturbed, change):
    shutil.copytree(undisturbed, tmp_path / "run")
    path = latest_checkpoint(tmp_path / "run" / "checkpoints")
    saved = load_checkpoint(path)
    saved.payload["replay"] |= change
    save_checkpoint(path.parent, saved.payload, updates=saved.updates, frames=saved.frames, keep=1)
    with pytest.raises(CheckpointError, match="damaged"):
        Trainer(short_run(tmp_path / "run"))
    with pytest.raises(CheckpointError, match="is not a valid name of records"):
        Trainer(short_run(tmp_path / "new", resume=str(path)))


def test_a_run_that_format_2_saved_is_resumed(tmp_path):
    """The archive is a run of version 17b650e, ended after 24 of its updates."""
    with tarfile.open(Path(__file__).parent / "data" / "run_of_format_2.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    before = metrics(tmp_path)
    path = latest_checkpoint(tmp_path / "checkpoints")
    saved = load_checkpoint(path)
    assert saved.format_version == 2
    assert load_policy(path).config.environment.domain == "shorter_cartpole"
    names = [f.name for f in fields(ModelConfig)]
    settings = {k: v for k, v in saved.payload["config"]["model"].items() if k in names}
    trainer = run(tmp_path, model=settings, evaluation={"every_frames": 128, "episodes": 1})
    assert metrics(tmp_path)[: len(before)] == before
    assert (trainer.updates, trainer.frames) == (48, 320)
    assert trainer.collection.seed == 0  # the envs continued
    now = load_checkpoint(latest_checkpoint(tmp_path / "checkpoints"))
    assert now.format_version == 3
    assert list(now.payload["learner"]["loss"]) == list(saved.payload["learner"]["loss"])


def test_a_resume_hashes_every_file_once(tmp_path, undisturbed, monkeypatch):
    shutil.copytree(undisturbed, tmp_path / "run")
    files, blocks = [], []
    digest, records = checkpoint_file._digest, RecordFiles.digest

    def digest_file(stream, size):
        files.append(stream.name)
        return digest(stream, size)

    def digest_records(folder, row, count):
        blocks.append((folder.folder, row, count))
        return records(folder, row, count)

    monkeypatch.setattr(checkpoint_file, "_digest", digest_file)
    monkeypatch.setattr(RecordFiles, "digest", digest_records)
    trainer = Trainer(short_run(tmp_path / "run"))
    trainer.start()
    trainer._close(report=False)
    assert files == [str(latest_checkpoint(tmp_path / "run" / "checkpoints"))]
    assert blocks
    assert len(blocks) == len(set(blocks))


def test_a_part_that_is_not_in_the_list_is_refused(tmp_path):
    parts = {"header": None, "keep": 1, "every_updates": 1}
    with pytest.raises(ValueError, match=r"parts are learner; they must be learner, counters,"):
        Checkpoints(tmp_path, shared={"learner": RandomStreams()}, own={}, **parts)


def test_a_run_that_format_1_saved_is_resumed(tmp_path, caplog):
    """The archive is a run of version eaccff3, which kept neither its replay nor its envs."""
    with tarfile.open(Path(__file__).parent / "data" / "run_of_format_1.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    before = metrics(tmp_path)
    path = latest_checkpoint(tmp_path / "checkpoints")
    saved = load_checkpoint(path)
    assert saved.format_version == 1
    assert load_policy(path).config.environment.domain == "cartpole"
    names = {f.name for f in fields(ModelConfig)}
    model = complete_model(saved.payload["config"]["model"])
    settings = {"model": {k: v for k, v in model.items() if k in names}, "resume": "auto"}
    settings |= {"training": {"total_frames": 512}, "evaluation": {"every_frames": 0}}
    with caplog.at_level("WARNING"):
        trainer = Trainer(tiny_run(tmp_path, **settings))
        now, then = trainer.learner.state_dict()["loss"], saved.payload["learner"]["loss"]
        kept = [name for name in then if now[name].shape == then[name].shape]
        assert len(kept) == len(then) - 2  # the last layer of colours and mask is two layers now
        assert all(torch.equal(now[name], then[name]) for name in kept)
        trainer.train()
    assert metrics(tmp_path)[: len(before)] == before
    assert "contains no replay, which fills again before the first update" in caplog.text
    assert trainer.frames == 512
    assert trainer.updates > saved.updates == 24

"""Run directories that are damaged, malformed or another's: a clear word, and the run goes on."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.short_runs import differences, flip_bit, short_run

from w2f_torchrl.checkpoint import (
    CheckpointError,
    checkpoint_path,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from w2f_torchrl.checkpoint import file as checkpoint_file
from w2f_torchrl.checkpoint import lock as run_lock
from w2f_torchrl.checkpoint.lock import RunLock
from w2f_torchrl.logging.metrics import MetricsLogger, read_metrics
from w2f_torchrl.logging.wandb import _read_state, _refuse_secrets
from w2f_torchrl.masks.labels import load_labels, load_pictures
from w2f_torchrl.report import write_report
from w2f_torchrl.trainers import ConfigError, Trainer, load_policy

pytestmark = [pytest.mark.render, pytest.mark.usefixtures("no_curves")]
LONGER = {"training": {"total_frames": 352}}


@pytest.fixture(scope="module")
def finished(no_curves: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "finished"
    Trainer(short_run(path)).train()
    return path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return shutil.copytree(finished, tmp_path / "run")


# ------------------------------------------------------------------ records


def test_a_damaged_record_that_all_checkpoints_share_is_left_out(run, finished, caplog):
    manifest = load_checkpoint(latest_checkpoint(run / "checkpoints")).payload["replay"]
    pixels = run / "replay" / manifest["generation"] / "next" / "pixels.memmap"
    flip_bit(pixels, 10 * 3 * 16 * 16 + 5)  # stream 0, in every checkpoint's first block
    trainer = Trainer(short_run(run, **LONGER))
    assert "All checkpoints lack a part or have damaged records" in caplog.text
    assert trainer.updates == 48
    trainer.train()
    assert trainer.updates > 48
    [hole] = trainer.replay.heads.holes
    assert hole[:2] == (0, 0)
    sample = torch.cat([trainer.replay.sample()["index"] for _ in range(100)])
    assert not ((sample >= 0) & (sample < hole[2])).any()
    # The place is known for as long as it can be sampled, whatever digests say by then.
    saved = load_checkpoint(latest_checkpoint(run / "checkpoints"))
    assert saved.payload["sampling"]["holes"] == [list(hole)]
    again = Trainer(short_run(run, training={"total_frames": 384}))
    again.train()
    assert again.replay.heads.holes == [hole]


def test_a_replay_deleted_under_a_run_is_written_again(tmp_path, finished):
    trainer = Trainer(short_run(tmp_path / "run"))
    update = trainer.learner.update

    def deleted(sample):
        if trainer.updates == 20:
            trainer.writer.wait()
            shutil.rmtree(tmp_path / "run" / "replay")
        return update(sample)

    trainer.learner.update = deleted
    trainer.train()
    assert differences(finished, tmp_path / "run") == []
    manifest = load_checkpoint(latest_checkpoint(tmp_path / "run" / "checkpoints")).payload[
        "replay"
    ]
    resumed = Trainer(short_run(tmp_path / "run", **LONGER))
    resumed.train()
    assert resumed.run.resumption.records.damage == []
    assert resumed.run.resumption.records.manifest["generation"] == manifest["generation"] != "0000"
    rows = resumed.replay.rows["next", "pixels"]
    assert rows[:20].any()  # no zeros


# ------------------------------------------------------------------ files beside the checkpoints


def test_damaged_files_beside_the_checkpoints_are_no_reason_to_end(run, caplog):
    (run / "environment.json").write_text('[{"python": ')
    (run / "wandb_run.json").write_text("{")
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b'"frames"', b'"fr\xffmes"')
    (run / "metrics.jsonl").write_bytes(b"".join(lines))
    assert len(read_metrics(run)) == len(lines) - 1
    assert "metrics.jsonl: skipped damaged lines 3" in caplog.text
    write_report([run], run / "report.html")
    assert "environment.json is damaged" in caplog.text
    Trainer(short_run(run, **LONGER)).train()
    assert len(json.loads((run / "environment.json").read_text())) == 1
    state = _read_state(run / "wandb_run.json")
    assert state["rows"] == 0
    assert json.loads((run / "wandb_run.json").read_text()) == state
    (run / "config.yaml").write_text("a: [")
    write_report([run], run / "report.html")


class TornDisk:
    """A file on a disk that is full for a moment: it takes a part of a line, then nothing."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.left = stream, 7

    def write(self, data: bytes) -> int:
        if not self.left:
            raise OSError(errno.ENOSPC, "No space left on device")
        count, self.left = self.stream.write(data[: self.left]), 0
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def test_a_disk_that_is_full_for_a_moment_tears_no_line(tmp_path):
    with MetricsLogger(tmp_path) as logger:
        logger.log({"wm/kl_loss": 1.0}, frames=1, updates=0)
        whole, logger._file = logger._file, TornDisk(logger._file)
        with pytest.raises(OSError, match="No space"):
            logger.log({"wm/kl_loss": 2.0}, frames=2, updates=0)
        logger._file = whole
        logger.log({"wm/kl_loss": 3.0}, frames=3, updates=0)
    assert [row["frames"] for row in read_metrics(tmp_path)] == [1, 3]
    assert b"2.0" not in (tmp_path / "metrics.jsonl").read_bytes()


# ------------------------------------------------------------------ malformed checkpoints


def broken(payload: dict[str, Any], how: str) -> dict[str, Any]:
    payload = dict(payload)
    if how == "no learner":
        del payload["learner"]
    elif how == "masks":
        payload["masks"] = 3
    elif how == "digests":
        payload["replay"] = payload["replay"] | {"digests": None}
    return payload


@pytest.mark.parametrize("how", ["no learner", "masks", "digests", "pickle", "no dict"])
def test_a_malformed_checkpoint_is_an_error_and_auto_takes_the_one_before(run, how, caplog):
    paths = list_checkpoints(run / "checkpoints")
    saved, before = load_checkpoint(paths[-1]), load_checkpoint(paths[-2])
    if how in ("pickle", "no dict"):
        document = Path if how == "pickle" else [1, 2]  # a class: what weights_only refuses
        with paths[-1].open("wb") as stream:
            checkpoint_file._write(document, stream)  # type: ignore[arg-type]
    else:
        payload = broken(saved.payload, how)
        save_checkpoint(paths[-1].parent, payload, updates=saved.updates, frames=saved.frames)
    trainer = Trainer(short_run(run))
    assert trainer.updates == before.updates
    assert "Trying the previous one." in caplog.text
    trainer.run.lock.release()
    with pytest.raises(CheckpointError) as raised:
        Trainer(short_run(run.parent / "other", resume=str(paths[-1])))
    assert "weights_only" not in str(raised.value).split("malformed")[-1]
    assert not (run.parent / "other").exists()


@pytest.mark.parametrize("part", ["optimizer", "first_steps", "sums"])
def test_what_is_malformed_deeper_in_is_a_checkpoint_error_too(run, part):
    path = latest_checkpoint(run / "checkpoints")
    saved = load_checkpoint(path)
    if part == "optimizer":
        saved.payload["learner"] = {"loss": saved.payload["learner"]["loss"]}
    elif part == "first_steps":
        del saved.payload["counters"]["first_steps"]
    else:
        del saved.payload["metrics"]["sums"]
    save_checkpoint(path.parent, saved.payload, updates=saved.updates, frames=saved.frames)
    with pytest.raises(CheckpointError, match="is malformed: KeyError"):
        Trainer(short_run(run))
    if part == "optimizer":
        with pytest.raises(CheckpointError, match="is malformed"):
            load_policy(path)


def test_what_is_too_large_or_no_picture_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    def unpacked(*args: Any, **kwargs: Any) -> None:
        pytest.fail("the arrays are read")

    np.savez_compressed(
        tmp_path / "bomb.npz", pixels=np.zeros((100_000, 3, 64, 64), dtype=np.uint8)
    )
    np.savez_compressed(tmp_path / "float.npz", pixels=np.zeros((2, 3, 8, 8)), masks=np.zeros(3))
    (tmp_path / "text.npz").write_text("none")
    with monkeypatch.context() as patch:
        patch.setattr(np, "load", unpacked)
        with pytest.raises(ConfigError, match=r"1,172 MiB; allowed are .* at most 1,024 MiB"):
            load_pictures(tmp_path / "bomb.npz")
        with pytest.raises(ConfigError, match=r"pixels is float64 \(2, 3, 8, 8\)"):
            load_labels(tmp_path / "float.npz")
        with pytest.raises(ConfigError, match=r"text.npz must be an \.npz file"):
            load_pictures(tmp_path / "text.npz")


# ------------------------------------------------------------------ whose directory it is


def test_the_second_of_two_starts_on_a_new_directory_waits_for_nothing(tmp_path):
    first = RunLock(tmp_path / "new" / "run")
    first.acquire()
    with pytest.raises(CheckpointError, match="in use by process"):
        RunLock(tmp_path / "new" / "run").acquire()
    first.abandon()
    assert not (tmp_path / "new" / "run").exists()  # nothing was in it
    # The first ends between the second's start and its lock: what it has written is seen.
    Trainer(short_run(tmp_path / "run", resume=None)).train()
    with pytest.raises(CheckpointError, match="already holds"):
        Trainer(short_run(tmp_path / "run", resume=None))


def test_without_flock_there_is_another_lock_or_a_warning(tmp_path, monkeypatch, caplog):
    def none(*args: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    def taken(*args: Any) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(run_lock.fcntl, "flock", none)
    lock = RunLock(tmp_path / "posix")
    lock.acquire()
    assert not caplog.text
    child = os.fork()
    if not child:  # a POSIX lock is a process's
        try:
            RunLock(tmp_path / "posix").acquire()
        except CheckpointError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    lock.release()
    monkeypatch.setattr(run_lock.fcntl, "lockf", taken)
    with pytest.raises(CheckpointError, match="in use by"):
        RunLock(tmp_path / "taken").acquire()
    monkeypatch.setattr(run_lock.fcntl, "lockf", none)
    RunLock(tmp_path / "none").acquire()
    assert "does not support locks" in caplog.text
    assert fcntl.LOCK_EX


@pytest.mark.parametrize("name", [".lock", "config.yaml", "metrics.jsonl", ".config.yaml.tmp"])
def test_a_link_in_a_foreign_run_directory_is_not_written_through(run, tmp_path, name):
    target = tmp_path / "precious"
    target.write_text("mine")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(target)
    with pytest.raises(CheckpointError, match=f"{name} is a link to"):
        Trainer(short_run(run))
    assert target.read_text() == "mine"


def test_a_link_among_the_records_is_not_written_through(run, tmp_path):
    target = tmp_path / "precious"
    manifest = load_checkpoint(latest_checkpoint(run / "checkpoints")).payload["replay"]
    path = run / "replay" / manifest["generation"] / "next" / "reward.memmap"
    path.rename(target)
    before = target.read_bytes()
    path.symlink_to(target)
    with pytest.raises((CheckpointError, OSError), match=r"reward\.memmap|symbolic"):
        Trainer(short_run(run, **LONGER)).train()
    assert target.read_bytes() == before


def test_secrets_within_lists_are_found():
    with pytest.raises(ValueError, match=r"config\.hosts\[1\]\.api_key looks like a secret"):
        _refuse_secrets({"hosts": [{"name": "a"}, {"api_key": "x"}]}, "config")
    _refuse_secrets({"hosts": [{"name": "a"}, ["api_key"]], "tags": "token"}, "config")
    assert checkpoint_path("a", 1).name

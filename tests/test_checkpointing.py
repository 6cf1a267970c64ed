"""Checkpoints under faults: each test damages or interrupts something on purpose."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from w2f_torchrl.checkpoint import (
    CheckpointError,
    discard_checkpoints_after,
    latest_checkpoint,
    latest_valid_checkpoint,
    list_checkpoints,
    load_checkpoint,
    resolve_resume,
    save_checkpoint,
    verify_checkpoint,
)
from w2f_torchrl.checkpoint import file as checkpointing
from w2f_torchrl.checkpoint.resume import _find_checkpoint, _read_part
from w2f_torchrl.config import RunConfig


def save(directory: Path, updates: int, keep: int = 3, **payload: Any) -> Path:
    return save_checkpoint(
        directory, payload or {"updates": updates}, updates=updates, frames=4 * updates, keep=keep
    )


def numbers(directory: Path) -> list[int]:
    return [int(path.stem.split("_")[1]) for path in list_checkpoints(directory)]


def flip_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def test_a_payload_comes_back_as_it_was(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    payload = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "nested": {"list": [1, 2.5, None, True, (b"x", "y")], 7: OrderedDict(a=torch.arange(3))},
        "half": torch.randn(2, dtype=torch.bfloat16),
    }
    path = save_checkpoint(tmp_path, payload, updates=12, frames=3456)
    assert path.name == "checkpoint_000000000012.pt"
    loaded = load_checkpoint(path)
    assert (loaded.updates, loaded.frames) == (12, 3456)
    assert loaded.versions["torch"] == torch.__version__.split("+")[0]
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    other.load_state_dict(loaded.payload["model"])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=0, atol=0)
    momentum = loaded.payload["optimizer"]["state"][0]["exp_avg"]
    assert torch.equal(momentum, optimizer.state_dict()["state"][0]["exp_avg"])
    assert loaded.payload["nested"]["list"] == [1, 2.5, None, True, (b"x", "y")]
    assert torch.equal(loaded.payload["nested"][7]["a"], torch.arange(3))
    assert torch.equal(loaded.payload["half"], payload["half"])


def test_plain_torch_load_reads_the_file(tmp_path):
    path = save(tmp_path, 1, weight=torch.arange(5))
    assert torch.equal(torch.load(path, weights_only=True)["payload"]["weight"], torch.arange(5))


@pytest.mark.parametrize(
    ("payload", "key"),
    [
        ({"a": {"b": [1, np.float64(2.0)]}}, r"payload\['a'\]\['b'\]\[1\] is a numpy.float64"),
        ({"a": np.zeros(2)}, r"payload\['a'\] is a numpy.ndarray"),
        ({"a": nn.Linear(1, 1)}, r"payload\['a'\] is a torch.nn.*Linear"),
        ({"a": {1.5: 2}}, r"payload\['a'\] has a key 1.5"),
        ({"a": {1, 2}}, r"payload\['a'\] is a builtins.set"),
    ],
)
def test_a_payload_that_could_not_be_read_back_is_refused_before_anything_is_written(
    tmp_path, payload, key
):
    directory = tmp_path / "checkpoints"
    with pytest.raises(TypeError, match=key):
        save_checkpoint(directory, payload, updates=1, frames=1)
    assert not directory.exists()


def test_checkpoints_are_sorted_and_pruned_by_number_not_by_name(tmp_path):
    for name in ("checkpoint_9.pt", "checkpoint_10.pt", "checkpoint_100.pt"):
        save(tmp_path, 1).rename(tmp_path / name)
    (tmp_path / "checkpoint_best.pt").write_text("a user's file")
    assert numbers(tmp_path) == [9, 10, 100]
    save(tmp_path, 11, keep=3)
    assert numbers(tmp_path) == [10, 11, 100]
    assert latest_checkpoint(tmp_path).name == "checkpoint_100.pt"
    assert (tmp_path / "checkpoint_best.pt").exists()


def test_the_checkpoint_just_written_is_never_pruned(tmp_path):
    for updates in (200, 300, 400):
        save(tmp_path, updates)
    path = save(tmp_path, 100, keep=2)
    assert path.exists()
    assert numbers(tmp_path) == [100, 400]
    save(tmp_path, 50, keep=1)
    assert numbers(tmp_path) == [50]


def test_numbers_longer_than_the_padding_stay_in_order(tmp_path):
    for updates in (10**12, 10**12 - 1, 3):
        save(tmp_path, updates)
    assert numbers(tmp_path) == [3, 10**12 - 1, 10**12]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"keep": 0}, "checkpoint.keep"), ({"updates": -1}, "negative"), ({"frames": -1}, "negative")],
)
def test_bad_arguments_are_named(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        save_checkpoint(tmp_path, {}, **({"updates": 1, "frames": 1, "keep": 1} | arguments))


def test_a_bit_flipped_anywhere_is_found(tmp_path):
    path = save(tmp_path, 1, weight=torch.randn(64))
    size = path.stat().st_size
    for position in range(0, size, max(1, size // 97)):
        flip_bit(path, position)
        with pytest.raises(CheckpointError, match=path.name):
            load_checkpoint(path)
        flip_bit(path, position)
    load_checkpoint(path)


@pytest.mark.parametrize("left", [0, 1, 40, 85, 500, -86, -85, -10, -1])
def test_a_truncated_file_is_found(tmp_path, left):
    path = save(tmp_path, 1, weight=torch.randn(64))
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(CheckpointError, match=path.name):
        load_checkpoint(path)


def test_the_latest_valid_one_is_found_behind_damaged_ones_with_a_warning(tmp_path, caplog):
    paths = [save(tmp_path, updates) for updates in (1, 2, 3)]
    flip_bit(paths[2], 300)
    paths[1].write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert latest_valid_checkpoint(tmp_path) == paths[0]
    assert [paths[2].name in caplog.messages[0], paths[1].name in caplog.messages[1]] == [True] * 2
    paths[0].write_bytes(b"")
    with pytest.raises(CheckpointError, match="All 3 checkpoints"):
        latest_valid_checkpoint(tmp_path)
    assert latest_valid_checkpoint(tmp_path / "none") is None


def test_an_unknown_format_version_is_refused_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpointing, "FORMAT_VERSION", 99)
    path = save(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="version 99"):
        load_checkpoint(path)
    monkeypatch.setattr(checkpointing, "FORMAT_NAME", "another.program")
    path = save(tmp_path, 2)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="not a w2f_torchrl"):
        load_checkpoint(path)


def test_code_in_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    monkeypatch.setattr(checkpointing, "_check_payload", lambda value, key: None)
    path = save(tmp_path, 1, evil=Evil())
    with pytest.raises(CheckpointError, match="types that checkpoints do not: UnpicklingError"):
        load_checkpoint(path)
    assert not (tmp_path / "ran").exists()


class FullDisk:
    """A stream that takes ``room`` bytes."""

    def __init__(self, stream, room: int) -> None:
        self.stream, self.room = stream, room

    def write(self, data) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.stream.write(data)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


@pytest.mark.parametrize("room", [0, 10, 700, 100_000, 4 * 10**6 + 1000])
def test_a_full_disk_leaves_the_earlier_checkpoint_and_no_temporary_file(
    tmp_path, monkeypatch, room
):
    weight = torch.randn(10**6)
    save(tmp_path, 1, keep=1)
    write = checkpointing._write
    monkeypatch.setattr(
        checkpointing, "_write", lambda document, stream: write(document, FullDisk(stream, room))
    )
    with pytest.raises(OSError, match="No space left") as caught:
        save(tmp_path, 2, keep=1, weight=weight)
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ["checkpoint_000000000001.pt"]
    assert load_checkpoint(latest_valid_checkpoint(tmp_path)).updates == 1


def test_the_file_is_synced_before_it_takes_its_name_and_pruning_comes_last(tmp_path, monkeypatch):
    save(tmp_path, 1)
    events = []
    for module, name in ((os, "fsync"), (os, "replace"), (Path, "unlink")):
        original = getattr(module, name)

        def record(*args, _name=name, _original=original, **kwargs):
            if _name != "unlink" or not str(args[0]).endswith(".tmp"):
                events.append(_name)
            return _original(*args, **kwargs)

        monkeypatch.setattr(module, name, record)
    save(tmp_path, 2, keep=1)
    assert events == ["fsync", "replace", "fsync", "unlink"]


# One import, several kills: each delay (seconds) gets a forked child that saves until it is killed.
KILLED = """
import os, signal, sys, time, torch
from pathlib import Path
from w2f_torchrl.checkpoint import save_checkpoint

def save_forever(directory):
    payload, updates = {"weight": torch.empty(2 * 10**6)}, 0
    while True:
        updates += 1
        payload["weight"].fill_(updates)
        save_checkpoint(directory, payload, updates=updates, frames=updates, keep=2)
        (directory / "done").write_text(str(updates))

for delay in map(float, sys.argv[2:]):
    directory = Path(sys.argv[1]) / str(delay)
    directory.mkdir()
    child = os.fork()
    if child == 0:
        save_forever(directory)
    while not (directory / "done").exists():
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def test_kill_9_during_a_save_leaves_a_whole_checkpoint(tmp_path):
    delays = [0.003 + 0.007 * index for index in range(8)]
    command = [sys.executable, "-c", KILLED, str(tmp_path), *map(str, delays)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=200)
    torn = 0
    for directory in tmp_path.iterdir():
        for path in list_checkpoints(directory):
            verify_checkpoint(path)
        loaded = load_checkpoint(latest_valid_checkpoint(directory))
        # "done" may be cut short by the kill, never ahead of the checkpoint.
        assert loaded.updates >= int((directory / "done").read_text() or 0)
        assert (loaded.payload["weight"] == loaded.updates).all()
        torn += any(path.suffix == ".tmp" for path in directory.iterdir())
    if not torn:
        pytest.skip("no kill hit a write on this machine")


def test_a_temporary_file_of_a_killed_process_is_cleared_away(tmp_path):
    (tmp_path / ".checkpoint_000000000007.pt.tmp").write_bytes(b"half a checkpoint")
    assert latest_valid_checkpoint(tmp_path) is None
    save(tmp_path, 1)
    assert os.listdir(tmp_path) == ["checkpoint_000000000001.pt"]


def test_resume_null(tmp_path):
    assert resolve_resume(None, tmp_path) is None
    save(tmp_path / "checkpoints", 1)
    with pytest.raises(CheckpointError, match="resume=auto"):
        resolve_resume(None, tmp_path)


def test_resume_auto_starts_at_zero_or_takes_the_latest_valid(tmp_path):
    assert resolve_resume("auto", tmp_path) is None
    first, second = save(tmp_path / "checkpoints", 1), save(tmp_path / "checkpoints", 2)
    assert resolve_resume("auto", tmp_path).path == second
    flip_bit(second, 200)
    assert resolve_resume("auto", tmp_path).path == first


def test_resume_path_is_a_file_a_directory_or_a_run(tmp_path):
    directory = tmp_path / "other" / "checkpoints"
    path = save(directory, 5)
    for given in (path, directory, directory.parent, str(path)):
        assert resolve_resume(given, tmp_path / "new").path == path
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve_resume(tmp_path / "nowhere.pt", tmp_path)
    with pytest.raises(CheckpointError, match="has no file"):
        resolve_resume(tmp_path, tmp_path)
    flip_bit(path, 100)
    with pytest.raises(CheckpointError, match="damaged"):
        resolve_resume(path, tmp_path)


def test_going_back_discards_the_abandoned_future(tmp_path, caplog):
    for updates in (1, 2, 30):
        save(tmp_path, updates)
    assert [path.name for path in discard_checkpoints_after(tmp_path, 2)] == [
        "checkpoint_000000000030.pt"
    ]
    assert numbers(tmp_path) == [1, 2]
    assert "checkpoint_000000000030.pt is deleted: the run resumes from update 2" in caplog.text


def test_empty_bytes_are_refused_before_they_make_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(TypeError, match=r"payload\['digests'\]\[1\] is empty bytes"):
        save(tmp_path, 1, digests=[b"x", b""])
    assert list_checkpoints(tmp_path) == []


def test_a_checkpoint_without_the_parts_of_all_ranks_is_passed_over(tmp_path, caplog):
    own, other = tmp_path / "checkpoints", tmp_path / "checkpoints" / "rank_1"
    for updates in (1, 2, 3):
        save(own, updates, ranks=2)
        save(other, updates, records=updates)
    assert latest_valid_checkpoint(own).stem.endswith("3")
    (other / "checkpoint_000000000003.pt").unlink()
    assert latest_valid_checkpoint(own).stem.endswith("2")
    flip_bit(other / "checkpoint_000000000002.pt", 100)
    assert latest_valid_checkpoint(own).stem.endswith("1")
    assert "It is the part of rank 1. Trying the previous one." in caplog.text
    (other / "checkpoint_000000000001.pt").unlink()
    assert latest_valid_checkpoint(own).stem.endswith("3")  # none is whole
    assert "without a rank's part all replays fill again" in caplog.text


def start(run_dir: Path, resume: str | None, *, is_restart: bool) -> Path | None:
    config = RunConfig(run_dir=str(run_dir), resume=resume)
    found = _find_checkpoint(config, is_restart=is_restart)
    return None if found is None else found.path


def test_a_restarted_run_continues_where_it_was_and_not_where_it_began(tmp_path):
    first, fork = tmp_path / "first", tmp_path / "fork"
    begin = save(first / "checkpoints", 10)
    path = str(first)
    assert start(fork, path, is_restart=False) == begin
    assert start(fork, path, is_restart=True) == begin  # stopped before its first checkpoint
    own = save(fork / "checkpoints", 12)
    assert start(fork, path, is_restart=True) == own
    assert start(fork, None, is_restart=True) == own
    assert start(tmp_path / "new", None, is_restart=True) is None


def test_a_run_is_not_overwritten_by_another_ones_checkpoint(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    save(first / "checkpoints", 10)
    older, _ = save(second / "checkpoints", 5), save(second / "checkpoints", 12)
    with pytest.raises(CheckpointError, match=r"second already holds a run, and resume=.*first"):
        start(second, str(first), is_restart=False)
    assert numbers(second / "checkpoints") == [5, 12]
    assert start(second, str(older), is_restart=False) == older  # going back is meant
    only_log = tmp_path / "log"
    only_log.mkdir()
    (only_log / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(CheckpointError, match="already holds a run"):
        start(only_log, str(first), is_restart=False)


def test_a_damaged_part_of_a_rank_is_as_good_as_none(tmp_path, caplog):
    path = save(tmp_path, 3, records=1)
    assert _read_part(path).updates == 3
    flip_bit(path, 100)
    assert _read_part(path) is None  # an error would end this rank while the others wait
    assert "is damaged" in caplog.text
    assert _read_part(tmp_path / "missing.pt") is None

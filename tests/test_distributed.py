"""Runs of several ranks: counters, files, resumes on other numbers of ranks, ranks that die."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import run_ranks
from helpers.runs import tiny_run

from w2f_torchrl.checkpoint import latest_checkpoint, load_checkpoint
from w2f_torchrl.config import DistributedConfig
from w2f_torchrl.data import UpdateSchedule
from w2f_torchrl.logging.metrics import read_metrics
from w2f_torchrl.trainers import ConfigError, RunConfig, Trainer
from w2f_torchrl.utils.ranks import RankError, Ranks, _fresh_store

FRAMES_A_ROUND = 2 * 8 * 2  # envs, steps of each, action repeat; of one rank


def bits(trainer: Trainer) -> list[bytes]:
    return [t.numpy().tobytes() for t in trainer.learner.loss.state_dict().values()]


def run_config(run_dir: str | Path, **settings: Any) -> RunConfig:
    return tiny_run(Path(run_dir), **{"evaluation": {"every_frames": 0}} | settings)


def state_of(trainer: Trainer) -> dict[str, Any]:
    return {
        "frames": trainer.frames,
        "updates": trainer.updates,
        "bits": bits(trainer),
        "records": len(trainer.replay),
        "first_record": trainer.replay._storage[0]["next", "pixels"].float().mean().item(),
    }


def whole_run(rank: int, size: int, run_dir: str, settings: dict[str, Any]) -> dict[str, Any]:
    trainer = Trainer(run_config(run_dir, **settings))
    trainer.train()
    return state_of(trainer)


def talk(rank: int, size: int, run_dir: str) -> None:
    """What ranks tell each other."""
    ranks = Ranks.from_environment()
    assert (ranks.rank, ranks.size, ranks.is_first) == (rank, size, rank == 0)
    assert ranks.gather([rank, rank]) == sorted([*range(size)] * 2)
    assert ranks.mean({"both": float(rank), f"of {rank}": 7.0}) == {
        "both": (size - 1) / 2,
        **{f"of {other}": 7.0 for other in range(size)},
    }
    assert ranks.on_first(lambda: rank) == 0
    with pytest.raises(ConfigError, match="on rank 0"):
        ranks.on_first(lambda: fail(f"on rank {rank}"))
    # Only the last rank wishes to stop, at its third call: all learn of it at the fourth.
    answers = [ranks.agree(rank == size - 1 and call == 2) for call in range(6)]
    assert answers == [False] * 3 + [True] * 3
    tensor = torch.full((3,), float(rank))
    ranks.copy_from_first([tensor])
    assert not tensor.any()


def test_an_attempt_has_a_store_that_no_earlier_one_used():
    """Ranks of a first attempt leave their greetings; one of the second comes late, one early."""
    store, timeout = dist.HashStore(), timedelta(seconds=20)
    stores = {}

    def join(rank: int, delay: float) -> None:
        time.sleep(delay)
        stores[rank] = _fresh_store(store, rank, 3, timeout)

    for attempt in range(3):
        delays = (0.0, 0.2, 0.05) if attempt % 2 else (0.2, 0.0, 0.1)
        threads = [threading.Thread(target=join, args=item) for item in enumerate(delays)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert sorted(stores) == [0, 1, 2]
        assert not any(stores[rank].check(["address"]) for rank in range(3))
        stores.pop(0).set("address", "of this attempt")
        assert all(stores.pop(rank).get("address") == b"of this attempt" for rank in (1, 2))
    with pytest.raises(RankError, match=r"ranks \[1, 2\] of 3 did not arrive"):
        _fresh_store(store, 0, 3, timedelta(seconds=0.1))


def fail(message: str) -> None:
    raise ConfigError(message)


def two_ranks(rank: int, size: int, run_dir: str) -> list[dict[str, Any]]:
    """A run, the same run longer on as many ranks, and its errors."""
    talk(rank, size, run_dir)
    first = whole_run(rank, size, run_dir, {"evaluation": {"every_frames": 256, "video": False}})
    with pytest.raises(Exception, match="already holds"):  # on every rank
        Trainer(run_config(run_dir))
    longer = {"training": {"total_frames": 512}, "resume": "auto"}
    return [first, whole_run(rank, size, run_dir, longer)]


def check_metrics(run_dir: Path, ranks: int) -> list[dict[str, float]]:
    """No line goes back, and every count is of all ranks."""
    rows = read_metrics(run_dir)
    counters = [(row["frames"], row["updates"]) for row in rows]
    assert counters == sorted(counters)
    losses = [row for row in rows if "wm/total_loss" in row]
    updates = [row["updates"] for row in losses]
    assert len(set(updates)) == len(updates)
    assert all(row["frames"] % (FRAMES_A_ROUND * ranks) == 0 for row in losses)
    return rows


@pytest.mark.distributed
@pytest.mark.render
@pytest.mark.timeout(900)
def test_runs_on_two_ranks_on_one_and_on_two_again(run_dir):
    (first, longer), (other_first, other_longer) = run_ranks(2, two_ranks, str(run_dir))
    for mine, other in ((first, other_first), (longer, other_longer)):
        assert (mine["frames"], mine["updates"]) == (other["frames"], other["updates"])
        assert mine["bits"] == other["bits"]
        # Their envs and their replays are their own.
        assert mine["records"] > 0
        assert mine["first_record"] != other["first_record"]
    # 128 agent steps over both ranks, the first 32 without updates; 4 records replayed a step, in
    # batches of 2 ranks x 2 x 8 records.
    assert (first["frames"], first["updates"]) == (256, (128 - 32) * 4 // 32)
    assert longer["frames"] == 512
    rows = check_metrics(run_dir, 2)
    assert sum("eval/return_mean" in row for row in rows) == 1
    saved = load_checkpoint(latest_checkpoint(run_dir / "checkpoints"))
    assert saved.payload["ranks"] == 2
    assert (saved.frames, saved.updates) == (512, longer["updates"])

    # On one rank: counters and rank 0's replay go on; updates are half as large, twice as often.
    alone = Trainer(
        run_config(run_dir, training={"total_frames": 768, "prefill_steps": 32}, resume="auto")
    )
    assert (alone.frames, alone.updates) == (512, longer["updates"])
    assert longer["bits"] == bits(alone)
    assert list(saved.payload["learner"]["loss"]) == list(alone.learner.loss.state_dict())
    alone.train()
    assert alone.frames == 768
    assert alone.updates == longer["updates"] + 128 * 4 // 16
    check_metrics(run_dir, 1)

    # And on two again: rank 1 has no replay of that time, so both fill theirs.
    settings = {"training": {"total_frames": 1024}, "resume": "auto"}
    results = run_ranks(2, whole_run, str(run_dir), settings)
    assert [r["frames"] for r in results] == [1024, 1024]
    assert results[0]["updates"] == alone.updates + (128 - 32) * 4 // 32
    assert results[0]["bits"] == results[1]["bits"]


def test_a_schedule_of_another_ratio_goes_on_without_a_jump():
    old = UpdateSchedule(4, batch_size=2, batch_length=8, start=10)
    assert old(50) == 10
    new = UpdateSchedule(4, batch_size=4, batch_length=8, start=10)
    with pytest.raises(ValueError, match="must not change"):
        new.load_state_dict(old.state_dict())
    new.change_ratio(old.state_dict(), 50)
    assert (new(50), new(57), new(58), new(90)) == (0, 0, 1, 4)
    again = UpdateSchedule(4, batch_size=4, batch_length=8, start=10)
    again.load_state_dict(new.state_dict())
    assert again(98) == 1


def test_settings_of_several_ranks(run_dir, monkeypatch):
    config = tiny_run(run_dir, training={"prefill_steps": None})
    assert (config.gradients, config.effective_batch_size, config.prefill_steps) == ("none", 2, 16)
    config.distributed.ranks = 4
    assert (config.gradients, config.effective_batch_size, config.prefill_steps) == ("ddp", 8, 64)
    config.training.prefill_steps = 63
    with pytest.raises(ConfigError, match=r"prefill_steps=63 must be at least 4 ranks x .* = 64"):
        config.validate()
    config.training.prefill_steps = None
    config.distributed = DistributedConfig(gradients="mean")
    with pytest.raises(ConfigError, match=r"distributed.gradients='mean' is unknown; allowed"):
        config.validate()
    config.distributed = DistributedConfig(timeout_seconds=0)
    with pytest.raises(
        ConfigError, match=r"distributed.timeout_seconds=0 must be in \(0, 1000000000\]"
    ):
        config.validate()
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"RANK=2 must be in \[0, WORLD_SIZE=2\)"):
        Ranks.from_environment()


@pytest.mark.parametrize(("device", "current"), [("cuda:1", ["cuda:1"]), ("cuda", []), ("cpu", [])])
def test_the_device_of_a_single_process_is_made_the_current_one(monkeypatch, device, current):
    made: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: made.append(str(device)))
    Ranks().connect(torch.device(device), timeout_seconds=1)
    assert made == current

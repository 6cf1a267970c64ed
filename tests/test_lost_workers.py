"""Workers that die or hang: noticed, replaced, counted; and nothing of them stays."""

from __future__ import annotations

import gc
import itertools
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.counting_env import RECURRENT, DummyPolicy, make_counting_env
from helpers.short_runs import rows, short_run, wait_for
from tensordict import TensorDict

from w2f_torchrl.checkpoint import latest_checkpoint, load_checkpoint
from w2f_torchrl.config import CollectionConfig
from w2f_torchrl.data import WorkerError, make_collector
from w2f_torchrl.data.collector import workers as module
from w2f_torchrl.data.collector.leftovers import SHARED_MEMORY, Leftovers
from w2f_torchrl.data.collector.workers import Patience
from w2f_torchrl.trainers import Trainer
from w2f_torchrl.trainers.collecting import Collection
from w2f_torchrl.utils.ranks import Ranks
from w2f_torchrl.utils.stopping import listen


class FakeCollector:
    """Gives batches until it is told to lose its workers."""

    def __init__(self, seed: int, fails: list[bool]) -> None:
        self.seed, self.fails, self.killed = seed, fails, False

    def __iter__(self):
        while True:
            if self.fails.pop(0):
                raise WorkerError("collector worker 0 of 1 hangs")
            yield TensorDict({"action": torch.zeros(1, 2, 1)}, [1, 2])

    def kill(self) -> None:
        self.killed = True

    def shutdown(self, **options: Any) -> None:
        assert self.killed or not options


class FakeReplay:
    cuts = 0

    def end_episodes(self) -> None:
        self.cuts += 1


def make_collection(fails: list[bool], max_restarts: int) -> tuple[Collection, list[FakeCollector]]:
    made: list[FakeCollector] = []

    def make(*, seed: int, scratch: Path | None) -> FakeCollector:
        assert scratch is None
        made.append(FakeCollector(seed, fails))
        return made[-1]

    settings = CollectionConfig(max_restarts=max_restarts)
    replay = SimpleNamespace(buffer=FakeReplay(), records=None, open=lambda **_: None)
    collection = Collection(settings, Ranks(), replay, make, seed=0, environment={})  # type: ignore[arg-type]
    collection.start(0, resumed=False)
    return collection, made


def test_lost_workers_are_replaced_and_only_failures_in_a_row_end_the_run(caplog):
    fails = [False, True, True, False, True, False, True, True, True]
    collection, made = make_collection(fails, max_restarts=2)
    for _ in range(3):
        assert collection.next_batch().batch_size == (1, 2)
    assert collection.restarts == collection.replay.cuts == 3
    assert [old.killed for old in made] == [True, True, True, False]
    assert len({each.seed for each in made}) == 4  # no noise twice
    assert caplog.text.count("begin new episodes") == 3
    with pytest.raises(WorkerError, match="hangs"):
        collection.next_batch()
    assert collection.restarts == 5
    assert collection.state_dict()["collector"] is None
    collection.close()


def test_after_a_stop_signal_nothing_is_replaced():
    collection, made = make_collection([True], max_restarts=3)
    with listen([signal.SIGTERM]):
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(WorkerError):
            collection.next_batch()
    assert len(made) == 1


def test_a_batch_put_back_comes_first():
    collection, _ = make_collection([False, False], max_restarts=0)
    with collection.taking_a_batch():
        batch = collection.next_batch()
        collection.put_back(batch)
    assert collection.complete
    assert collection.next_batch() is batch
    assert collection.next_batch() is not batch


def test_patience_counts_no_time_in_which_this_process_stood_still(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    patience = Patience(30.0)
    now[0] = 1000.0  # Ctrl+Z, and an hour's sleep
    assert not patience.is_over()
    for _ in range(60):
        now[0] += 0.5
        over = patience.is_over()
    assert over
    assert "30 seconds (collection.timeout_seconds)" in patience.why()
    patience = Patience(3000.0)
    with listen([signal.SIGTERM]):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(int(2 * module.STOP_SECONDS) + 2):
            now[0] += 0.5
            over = patience.is_over()
    assert over
    assert "after the stop signal" in patience.why()


def test_what_a_killed_process_left_is_cleared_by_the_next_start_of_the_run(tmp_path):
    program = """
import multiprocessing, os, signal, sys, tempfile
from pathlib import Path
from w2f_torchrl.data.collector.leftovers import Leftovers
left = Leftovers(Path(sys.argv[1]))
left.take()
lock = multiprocessing.get_context("spawn").Lock()
tempfile.mkdtemp(dir=left.folder)
from multiprocessing import resource_tracker
os.kill(resource_tracker._resource_tracker._pid, signal.SIGKILL)  # as a job's end does
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "run")], check=False)
    own, other = Leftovers(tmp_path / "run"), Leftovers(tmp_path / "other")
    other.take()
    try:
        found = own.clear()
        assert own.folder in found
        assert [path for path in found if path.parent == SHARED_MEMORY]
        assert not [path for path in found if path.exists()]
        assert other.folder.is_dir()
        assert own.clear() == []
    finally:
        other.remove()
    assert not other.folder.exists()


# ------------------------------------------------------------------ real processes


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [False, True])
def test_a_hung_worker_is_noticed_and_killed(overlap):
    collector = make_collector(
        make_counting_env,
        DummyPolicy(),
        primers=RECURRENT,
        num_envs=2,
        num_workers=2,
        frames_per_batch=8,
        overlap=overlap,
        timeout_seconds=2.0,
    )
    inner = collector.collector if overlap else collector
    batches, processes = iter(collector), list(inner.procs)
    next(batches)
    os.kill(processes[1].pid, signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(WorkerError, match=r"worker 1 of 2 hangs: no response for 2 seconds"):
        list(itertools.islice(batches, 3))
    assert time.monotonic() - start < 15
    collector.kill()
    collector.shutdown(raise_on_error=False)
    assert not [process for process in processes if process.is_alive()]


@pytest.mark.slow
@pytest.mark.render
@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_run_outlives_its_workers(tmp_path, number, caplog):
    settings = {
        "collection": {"num_workers": 2, "timeout_seconds": 3.0},
        "environment": {"domain": "cartpole"},
        "evaluation": {"every_frames": 0},
    }
    with caplog.at_level(logging.WARNING):
        run_and_lose_a_worker(tmp_path / "run", number, settings)
    assert ("was killed by SIGKILL" if number == signal.SIGKILL else "hangs") in caplog.text
    assert [r["train/worker_restarts"] for r in rows(tmp_path / "run") if len(r) == 3] == [1.0]
    saved = load_checkpoint(latest_checkpoint(tmp_path / "run" / "checkpoints"))
    assert saved.payload["collection"]["worker_restarts"] == 1
    assert saved.payload["collection"]["collector"] is not None
    left = Leftovers(tmp_path / "run")
    assert not left.folder.exists()
    gc.collect()
    assert left.clear() == []  # no semaphore is left either


def run_and_lose_a_worker(run_dir: Path, number: int, settings: dict[str, Any]) -> None:
    trainer = Trainer(short_run(run_dir, **settings))
    update, lost = trainer.learner.update, []

    def interrupted(sample):
        if trainer.updates == 20:
            lost.extend(trainer.collector.procs)
            os.kill(lost[0].pid, number)
        return update(sample)

    trainer.learner.update = interrupted
    trainer.train()
    assert trainer.updates == 48
    assert not [process for process in lost if process.is_alive()]
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_no_worker_outlives_a_killed_process_not_even_a_hung_one(tmp_path):
    program = """
import os, signal, sys, time
from helpers.counting_env import RECURRENT, DummyPolicy, make_counting_env
from w2f_torchrl.data import make_collector
if __name__ == "__main__":
    collector = make_collector(
        make_counting_env, DummyPolicy(), primers=RECURRENT, num_envs=2, num_workers=2,
        frames_per_batch=8,
    )
    os.kill(collector.procs[0].pid, signal.SIGSTOP)
    print(*(process.pid for process in collector.procs), flush=True)
    time.sleep(600)
"""
    (tmp_path / "program.py").write_text(program)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    main = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py")],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert main.stdout is not None
    workers = [int(word) for word in main.stdout.readline().split()]
    assert len(workers) == 2
    main.kill()
    main.wait()
    gone = wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 10.0)
    assert gone

"""Stop signals: what is under way ends at its next step, and is done again with the same result."""

from __future__ import annotations

import errno
import io
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers.short_runs import differences, rows, short_run

from w2f_torchrl.checkpoint import latest_checkpoint, load_checkpoint
from w2f_torchrl.logging.progress import ProgressBar
from w2f_torchrl.trainers import Trainer
from w2f_torchrl.trainers.preemption import stop_signals
from w2f_torchrl.utils.stopping import StopRequested, check_stop, listen, may_be_cut

pytestmark = [pytest.mark.render, pytest.mark.usefixtures("no_curves")]


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture(scope="module")
def undisturbed(no_curves: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "undisturbed"
    Trainer(short_run(path)).train()
    return path


# ------------------------------------------------------------------ the signals themselves


def test_a_signal_ends_only_work_that_may_be_cut():
    with listen([signal.SIGTERM]) as received:
        send()
        check_stop()  # nothing here may be cut
        assert received == [signal.SIGTERM]
        with pytest.raises(StopRequested), may_be_cut():
            pytest.fail("a signal came before")
    with listen([signal.SIGTERM]), may_be_cut():
        send()
        reached = True  # until the next step
        with pytest.raises(StopRequested) as raised:
            check_stop()
    assert reached
    assert raised.value.code == 128 + signal.SIGTERM
    check_stop()  # nobody listens any more


def test_work_without_steps_ends_at_once_but_not_where_it_must_not():
    whole = [False]
    with listen([signal.SIGTERM]), may_be_cut(at_once=True), pytest.raises(StopRequested):
        send()
    with listen([signal.SIGTERM]) as received, may_be_cut(at_once=lambda: whole[0]):
        send()
        assert received
    assert not issubclass(StopRequested, Exception)  # what tolerates errors lets it pass


def test_a_closed_terminal_is_a_stop_signal_unless_nohup_says_otherwise():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in stop_signals()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert signal.SIGHUP in stop_signals()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread_nothing_is_listened_to():
    found = []
    thread = threading.Thread(target=lambda: found.append(listen([signal.SIGTERM]).__enter__()))
    thread.start()
    thread.join()
    assert found == [[]]


def test_a_progress_bar_outlives_its_terminal():
    class Closed(io.StringIO):
        closed_by_user = False

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            if self.closed_by_user:
                raise OSError(errno.EIO, "Input/output error")
            return super().write(text)

    terminal, now = Closed(), [0.0]
    bar = ProgressBar(100, stream=terminal, clock=lambda: now[0])
    bar.update(frames=10, updates=1)
    terminal.closed_by_user = True
    for frames in range(11, 100):
        now[0] += 1.0
        time.sleep(0.002)
        bar.update(frames=frames, updates=1)
    bar.close()


# ------------------------------------------------------------------ within a run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_an_evaluation_cut_short_is_done_again_with_the_same_result(tmp_path, undisturbed, number):
    cut_at = {128: 3, 256: 7, 320: 1}  # frames of the evaluations, and the step of the signal
    for frames, step in cut_at.items():
        trainer, steps = Trainer(short_run(tmp_path)), []
        policy = trainer.learner.policy
        forward = policy.forward

        def watched(data, trainer=trainer, steps=steps, act=forward, at=frames, stop=step):
            evaluates = data.batch_size == () and trainer.frames == at
            if evaluates:
                steps.append(trainer.frames)
                if len(steps) == stop:
                    send(number)
            return act(data)

        policy.forward = watched
        trainer.train()
        assert len(steps) == step  # not one step of the agent more
        saved = load_checkpoint(latest_checkpoint(tmp_path / "checkpoints"))
        assert saved.frames == frames
        assert saved.payload["evaluations"]["last"] < frames
    Trainer(short_run(tmp_path)).train()
    assert differences(undisturbed, tmp_path) == []
    assert sum("eval/return_mean" in row for row in rows(tmp_path)) == 3


def test_a_batch_of_a_segmenter_cut_short_is_stored_after_the_resume(tmp_path, undisturbed):
    trainer = Trainer(short_run(tmp_path))
    label = trainer.masks.label

    def segment(records):
        if trainer.updates == 12:
            send()
            check_stop()
        return label(records)

    trainer.masks.label = segment
    trainer.train()
    saved = load_checkpoint(latest_checkpoint(tmp_path / "checkpoints"))
    assert saved.payload["collection"]["held"]["action"].shape[0] == 2
    assert saved.payload["collection"]["collector"] is not None
    Trainer(short_run(tmp_path)).train()
    assert differences(undisturbed, tmp_path) == []


def test_a_compilation_cut_short_changes_nothing(tmp_path, undisturbed):
    trainer = Trainer(short_run(tmp_path))
    trainer.learner.execution = "compile"  # only what the trainer does about it
    update = trainer.learner.update

    def compiles(sample):
        torch.rand(5)
        trainer.learner.loss.compute(sample)  # the returns' statistics are those of this batch
        send()
        pytest.fail("the handler raises")

    trainer.learner.update = compiles
    trainer.train()
    assert trainer.updates == 0
    assert not (tmp_path / "exceptions.txt").exists()
    del update
    Trainer(short_run(tmp_path)).train()
    assert differences(undisturbed, tmp_path) == []


def test_a_signal_before_the_first_step_ends_the_start(tmp_path, monkeypatch):
    from w2f_torchrl.trainers import run as run_module

    def interrupted(*args, **settings):
        send()
        pytest.fail("the handler raises")

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "build_mask_source", interrupted)  # loads SAM3
        with pytest.raises(StopRequested):
            Trainer(short_run(tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "prepare", interrupted)  # teaches a student
        run = Trainer(short_run(tmp_path / "run"))
        with pytest.raises(StopRequested):
            run.train()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert latest_checkpoint(tmp_path / "run" / "checkpoints") is None
    Trainer(short_run(tmp_path / "run")).train()  # the lock is free, and resume=auto begins

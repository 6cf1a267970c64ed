"""The next batch is collected while the learner learns: same order, weights one batch older."""

from __future__ import annotations

import threading

import pytest
import torch
from helpers.collecting import NUM_ENVS, STEPS, Run, collect

from w2f_torchrl.data import OverlappedCollector
from w2f_torchrl.trainers import ConfigError, RunConfig


@pytest.fixture(scope="module")
def overlapped() -> Run:
    return collect(overlap=True)


def test_every_batch_is_of_one_policy_one_batch_older(overlapped):
    weights = overlapped.weights
    expected = [weights[0], *weights[:-1]]  # the second was asked for before the first update
    for batch, weight in zip(overlapped.batches, expected, strict=True):
        assert (batch["next", "state"] == weight).all()


def test_envs_go_on_where_they_were(overlapped):
    plain = collect()
    for batch, other in zip(overlapped.batches, plain.batches, strict=True):
        assert batch.batch_size == (NUM_ENVS, STEPS)
        # The counting env's course does not depend on the action: the same batches in order.
        for key in ("is_init", ("next", "done")):
            assert torch.equal(batch[key], other[key])


def test_a_seed_reproduces_a_run_bit_for_bit(overlapped):
    for batch, other in zip(collect(3, overlap=True).batches, overlapped.batches, strict=False):
        assert (batch == other).all()


class _Slow:
    """A collector whose batches are ready when the test says so."""

    def __init__(self):
        self.ready, self.asked = threading.Semaphore(0), threading.Semaphore(0)
        self.weights = []

    def __iter__(self):
        for number in range(3):
            self.asked.release()
            assert self.ready.acquire(timeout=30)
            yield number

    def update_policy_weights_(self, weights):
        self.weights.append(weights)

    def shutdown(self):
        self.weights.append("shutdown")


def test_the_next_batch_is_asked_for_before_the_last_is_handed_out():
    slow = _Slow()
    collector = OverlappedCollector(slow)
    slow.ready.release()
    batches = iter(collector)
    assert next(batches) == 0
    assert slow.asked.acquire(timeout=30)
    assert slow.asked.acquire(timeout=30)  # while the learner would learn from batch 0
    sent = threading.Thread(target=collector.update_policy_weights_, args=("new",))
    sent.start()
    sent.join(0.2)
    assert slow.weights == []  # not in the middle of a batch
    slow.ready.release(2)
    sent.join(30)
    assert slow.weights == ["new"]
    assert list(batches) == [1, 2]
    collector.shutdown()
    assert slow.weights == ["new", "shutdown"]


def test_a_failure_reaches_the_learner():
    class Failing(_Slow):
        def __iter__(self):
            yield 0
            raise OSError("the worker died")

    collector = OverlappedCollector(Failing())
    batches = iter(collector)
    assert next(batches) == 0
    with pytest.raises(OSError, match="the worker died"):
        collector.update_policy_weights_("new")
    with pytest.raises(OSError, match="the worker died"):
        next(batches)
    collector.shutdown()


def test_overlap_needs_workers():
    config = RunConfig()
    config.collection.overlap, config.collection.num_workers = True, 0
    with pytest.raises(ConfigError, match=r"collection\.overlap=true needs worker processes"):
        config.validate()

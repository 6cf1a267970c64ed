"""The parts of a run's state: counters and the updates that they owe, metrics of a row."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict

from w2f_torchrl.checkpoint import CheckpointError
from w2f_torchrl.learner.update_metrics import UpdateMetrics, shown_row
from w2f_torchrl.trainers import to_run_config
from w2f_torchrl.trainers.counters import RunCounters
from w2f_torchrl.trainers.run import build_counters

TRAINING = {"batch_size": 2, "batch_length": 8, "train_ratio": 8, "prefill_steps": 32}


def make_counters(**training: object) -> RunCounters:
    settings = {"training": TRAINING | training, "environment": {"action_repeat": 2}}
    return build_counters(to_run_config(settings))


def test_updates_stay_due_until_they_are_counted():
    counters = make_counters()
    counters.steps = 31
    assert counters.updates_due() == 0  # the replay fills
    counters.steps = 40
    assert (counters.frames, counters.updates_due()) == (80, 4)
    counters.add_update()
    assert (counters.updates, counters.updates_due()) == (1, 3)
    counters.take_back(1)
    assert (counters.updates, counters.updates_due()) == (0, 4)


def test_counters_go_on_and_settings_that_must_stay_are_named():
    counters, other = make_counters(), make_counters()
    counters.steps = 40
    counters.add_update()
    other.load_state_dict(counters.state_dict())
    assert (other.steps, other.updates, other.updates_due()) == (40, 1, 3)
    with pytest.raises(CheckpointError, match=r"training\.train_ratio"):
        make_counters(batch_size=3).load_state_dict(counters.state_dict())


@pytest.mark.parametrize(("steps", "again"), [(100, 32), (20, 20)])
def test_a_lost_replay_fills_again_without_owing_updates(steps, again):
    counters = make_counters()
    counters.steps = steps
    before = counters.updates_due()
    counters.schedule(steps)
    counters.fill_again()
    assert counters.first_steps == steps + 32
    # Of a filling that had not ended only what was used is spared a second time.
    assert counters.schedule.start == 32 + again
    counters.steps = max(steps, 32) + again
    assert counters.updates_due() == 0
    assert before == max(steps - 32, 0) // 2


def row(loss: float, finite: float) -> TensorDict:
    values = {"wm/kl_loss": torch.tensor(loss), "finite": torch.tensor(finite)}
    return TensorDict(values)


def test_means_are_over_applied_updates_and_a_row_goes_on_after_a_resume():
    metrics, other = (UpdateMetrics(torch.device("cpu")) for _ in range(2))
    for number, (loss, finite) in enumerate([(1.0, 1.0), (3.0, 1.0), (0.0, 0.0)]):
        metrics.add(row(loss, finite), torch.tensor([[number]]))
    other.load_state_dict(metrics.state_dict())
    for one in (metrics, other):
        sums = one.read()
        assert (sums.applied, sums.missed, one.count) == (2, 1, 3)
        assert sums.means() == {"wm/kl_loss": 2.0, "train/skipped_updates": 1.0}
        assert one.read().means() == sums.means()  # reading changes nothing
        assert [int(slots) for slots in one.slots] == [0, 1, 2]
    metrics.clear()
    assert metrics.state_dict() == {"sums": None, "summed": 0, "window": []}
    metrics.add(row(math.nan, 0.0), torch.zeros(1, 1))
    assert metrics.read().not_finite() == ["wm/kl_loss"]


def test_a_row_is_written_under_its_names():
    made = {"loss_actor": 1.0, "wm/mask_iou": 0.5, "segmentation/frames": 7.0, "ac/entropy": 2.0}
    assert shown_row(made, 2) == {
        "train/mask_iou": 0.5,
        "segmentation/frames": 14.0,
        "ac/entropy": 2.0,
    }

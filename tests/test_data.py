"""Records, masks, replay and the update schedule, against plain Python models."""

from __future__ import annotations

import random
import signal
import threading
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.records import numbered, slices_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from w2f_torchrl.data import (
    StreamReplayBuffer,
    UpdateSchedule,
    make_replay,
    pack_mask,
    records_from_rollout,
    unpack_mask,
)

few = settings(max_examples=40, deadline=None)


# Masks


@given(st.integers(0, 3), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))
@few
def test_masks_survive_packing_and_match_numpy(lead: int, height: int, octets: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    shape = (*[2] * lead, 1, height, 8 * octets)
    mask = torch.rand(shape, generator=generator) < 0.5
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8
    np.testing.assert_array_equal(packed.numpy(), np.packbits(mask.numpy(), axis=-1))
    restored = unpack_mask(packed)
    assert restored.dtype == torch.bool
    assert torch.equal(restored, mask)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.zeros(2, 1, 64, 60, dtype=torch.bool), ValueError, "W=60"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.bool), ValueError, r"\(2, 3, 64, 64\)"),
        (torch.zeros(2, 1, 64, 64), TypeError, "float32"),
    ],
)
def test_masks_that_cannot_be_packed_are_named(mask, error, message):
    with pytest.raises(error, match=message):
        pack_mask(mask)


# Records


def random_rollout(num_envs: int, steps: int, starts: float, seed: int) -> TensorDict:
    """Transitions whose entries are all different, with episodes' starts at random."""
    rng = torch.Generator().manual_seed(seed)

    def uint8(*shape: int) -> torch.Tensor:
        shape = (num_envs, steps, *shape)
        return torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8)

    def real(*shape: int) -> torch.Tensor:
        return torch.rand(num_envs, steps, *shape, generator=rng)

    done = real(1) < 0.3
    return TensorDict(
        {
            "pixels": uint8(3, 4, 8),
            "foreground_mask": real(1, 4, 8) < 0.5,
            "action": real(2),
            "is_init": real(1) < starts,
            "state": real(7),
            "next": {
                "pixels": uint8(3, 4, 8),
                "foreground_mask": real(1, 4, 8) < 0.5,
                "reward": real(1),
                "terminated": done & (real(1) < 0.5),
                "done": done,
                "step_count": real(1),
            },
        },
        [num_envs, steps],
    )


@given(st.integers(1, 4), st.integers(1, 6), st.floats(0, 1), st.integers(0, 2**31))
@few
def test_records_match_a_loop_over_frames(num_envs, steps, starts, seed):
    batch = random_rollout(num_envs, steps, starts, seed)
    records = records_from_rollout(batch)
    expected = []
    for env in range(num_envs):
        for t in range(steps):
            root, new = batch[env, t], batch[env, t]["next"]
            if root["is_init"]:
                zero = torch.zeros(1)
                first = {"pixels": root["pixels"], "foreground_mask": root["foreground_mask"]}
                first |= {"reward": zero, "terminated": zero.bool(), "done": zero.bool()}
                record = {"stream": env, "action": torch.zeros(2), "is_init": [True], "next": first}
                expected.append(TensorDict(record))
            led = new.select("pixels", "foreground_mask", "reward", "terminated", "done")
            record = {"stream": env, "action": root["action"], "is_init": [False], "next": led}
            expected.append(TensorDict(record))
    expected = torch.stack(expected)
    assert set(records.keys(True, True)) == set(expected.keys(True, True))
    for key, value in expected.items(True, True):
        assert records[key].dtype == value.dtype, key
        assert torch.equal(records[key], value), key


def test_records_hold_only_the_observations_asked_for():
    batch = random_rollout(2, 3, 0.5, 0)
    assert "foreground_mask" not in records_from_rollout(batch, ["pixels"])["next"].keys()
    del batch["foreground_mask"]
    assert "foreground_mask" not in records_from_rollout(batch)["next"].keys()
    with pytest.raises(KeyError, match="foreground_mask"):
        records_from_rollout(batch, ["pixels", "foreground_mask"])
    with pytest.raises(ValueError, match=r"\[N, T\], got \(2,\)"):
        records_from_rollout(batch[:, 0])


# Replay


class Feeder:
    """Writes numbered records and remembers, as lists, what the rings must hold."""

    def __init__(self, replay: StreamReplayBuffer) -> None:
        self.replay = replay
        self.written = [0] * replay.heads.num_streams

    def write(self, counts: list[int], shuffle: random.Random | None = None) -> None:
        parts = [numbered(s, self.written[s], count) for s, count in enumerate(counts) if count > 0]
        if not parts:
            return
        records = torch.cat(parts)
        if shuffle is not None:  # interleave the streams, keeping each in order
            owners = records["stream"].tolist()
            shuffle.shuffle(owners)
            rows = {s: iter((records["stream"] == s).nonzero()[:, 0].tolist()) for s in set(owners)}
            records = records[[next(rows[s]) for s in owners]]
        self.replay.extend(records)
        self.written = [a + b for a, b in zip(self.written, counts, strict=True)]

    def positions(self, stream: int) -> range:
        written = self.written[stream]
        return range(max(0, written - self.replay.heads.capacity), written)


def small_replay(**changes) -> StreamReplayBuffer:
    options = {"capacity": 60, "num_streams": 3, "batch_size": 4, "batch_length": 5, "seed": 0}
    return make_replay(**(options | changes))


@st.composite
def histories(draw):
    """Sizes of a replay and a sequence of writes (records for each stream)."""
    streams = draw(st.integers(1, 4))
    length = draw(st.integers(1, 5))
    capacity = draw(st.integers(length, 13))
    sizes = st.lists(st.integers(0, 17), min_size=streams, max_size=streams)
    return streams, length, capacity, draw(st.lists(sizes, min_size=1, max_size=12))


@given(histories(), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=80, deadline=None)
def test_replay_matches_lists_through_many_wraps(history, newest_first, seed):
    streams, length, capacity, writes = history
    replay = make_replay(
        capacity=streams * capacity,
        num_streams=streams,
        batch_size=3,
        batch_length=length,
        newest_first=newest_first,
        seed=seed,
    )
    feeder, shuffle = Feeder(replay), random.Random(seed)
    chunks = []  # complete chunks that wait for their turn: (stream, start)
    for counts in writes:
        before = feeder.written
        feeder.write(counts, shuffle)
        assert len(replay) == sum(len(feeder.positions(s)) for s in range(streams))
        for stream in range(streams):
            first, last = before[stream] // length, feeder.written[stream] // length
            chunks += [(stream, chunk * length) for chunk in range(first, last)]
        chunks = [(s, start) for s, start in chunks if start in feeder.positions(s)]
        starts = {
            (s, start)
            for s in range(streams)
            for start in feeder.positions(s)
            if start + length - 1 in feeder.positions(s)
        }
        assert replay.can_sample() == bool(starts)
        if not starts:
            with pytest.raises(RuntimeError, match=f"batch_length={length}"):
                replay.sample()
            continue
        drawn = slices_of(replay.sample())
        assert len(drawn) == 3
        assert set(drawn) <= starts
        if newest_first:
            turn, chunks = chunks[:3], chunks[3:]
            assert drawn[: len(turn)] == turn


def test_every_new_chunk_comes_exactly_once_and_first():
    replay = small_replay(batch_size=2)
    feeder = Feeder(replay)
    feeder.write([12, 4, 20])
    assert slices_of(replay.sample(3)) == [(0, 0), (0, 5), (2, 0)]
    feeder.write([0, 1, 0])  # completes a chunk of stream 1
    assert slices_of(replay.sample(5))[:4] == [(2, 5), (2, 10), (2, 15), (1, 0)]
    # Nothing is left but chance: 60 draws can't repeat one order of chunks.
    assert len(set(slices_of(replay.sample(60)))) > 10


def test_chunks_that_were_overwritten_are_dropped():
    replay = small_replay()  # 20 records a stream
    feeder = Feeder(replay)
    feeder.write([20, 0, 0])
    feeder.write([3, 0, 0])  # overwrites the start of the chunk at 0
    assert slices_of(replay.sample(3)) == [(0, 5), (0, 10), (0, 15)]


def test_the_newest_record_can_be_sampled_at_once():
    replay = small_replay(newest_first=False, batch_size=200)
    feeder = Feeder(replay)
    for written in range(5, 50):
        feeder.write([written - feeder.written[0], 0, 0])
        last = {start + 4 for _, start in slices_of(replay.sample())}
        assert max(last) == written - 1


def test_starts_are_uniform_over_streams_of_uneven_fill():
    replay = small_replay(newest_first=False, batch_size=1000)
    Feeder(replay).write([33, 7, 4])  # full and wrapped, partly filled, too short for a slice
    draws = Counter(start for _ in range(30) for start in slices_of(replay.sample()))
    starts = [(0, p) for p in range(13, 29)] + [(1, p) for p in range(3)]
    assert set(draws) == set(starts)
    expected = 30_000 / len(starts)
    chi_square = sum((draws[start] - expected) ** 2 / expected for start in starts)
    assert chi_square < 42.3  # 18 degrees of freedom: exceeded with probability 0.001


def test_slices_run_over_episode_borders_and_mark_them():
    replay = small_replay(batch_length=20, newest_first=False)
    Feeder(replay).write([20, 20, 20])
    sample = replay.sample()
    assert torch.equal(sample["is_init"][0, :, 0].nonzero()[:, 0], torch.tensor([0, 7, 14]))
    # The record before a first one is its episode's last.
    assert torch.equal(sample["next", "done"][:, :-1], sample["is_init"][:, 1:])


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_record_takes_at_most_13500_bytes(where: str, tmp_path: Path):
    num = 32
    replay = make_replay(
        capacity=num,
        num_streams=2,
        batch_size=2,
        batch_length=8,
        path=tmp_path / "replay" if where == "disk" else None,
    )
    mask = torch.rand(num, 1, 64, 64) < 0.5
    pixels = torch.randint(0, 256, (num, 3, 64, 64), dtype=torch.uint8)
    flags = torch.zeros(num, 1, dtype=torch.bool)
    new = {"pixels": pixels, "foreground_mask": mask, "reward": torch.rand(num, 1)}
    new |= {"terminated": flags, "done": flags}
    records = {"stream": torch.arange(num) // 16, "action": torch.rand(num, 38), "is_init": flags}
    replay.extend(TensorDict(records | {"next": new}, [num]))
    stored = sum(leaf.untyped_storage().nbytes() for leaf in replay.storage._storage.values(1, 1))
    if where == "disk":
        files = (tmp_path / "replay").rglob("*.memmap")
        assert sum(file.stat().st_size for file in files) == stored
    assert 12_288 < stored / num <= 13_500  # 38 actions (dog) are the suite's most
    sample = replay.sample()
    assert sample.batch_size == (2, 8)
    assert torch.equal(sample["next", "foreground_mask"], mask[sample["index"]])
    assert torch.equal(sample["next", "pixels"], pixels[sample["index"]])
    assert {key: (tuple(leaf.shape), leaf.dtype) for key, leaf in sample.items(True, True)} == {
        "action": ((2, 8, 38), torch.float32),
        "is_init": ((2, 8, 1), torch.bool),
        "index": ((2, 8), torch.int64),
        ("next", "pixels"): ((2, 8, 3, 64, 64), torch.uint8),
        ("next", "foreground_mask"): ((2, 8, 1, 64, 64), torch.bool),
        ("next", "reward"): ((2, 8, 1), torch.float32),
        ("next", "terminated"): ((2, 8, 1), torch.bool),
        ("next", "done"): ((2, 8, 1), torch.bool),
    }


def test_extend_leaves_its_argument_alone():
    records = numbered(0, 0, 6)
    before = records.clone()
    replay = small_replay()
    replay.extend(records)
    assert set(records.keys(True, True)) == set(before.keys(True, True))
    assert (records == before).all()
    replay.add(numbered(0, 6, 1)[0])
    assert len(replay) == replay.write_count == 7
    replay.empty()
    assert (len(replay), replay.write_count, replay.can_sample()) == (0, 0, False)


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("way", ["files", "state_dict"])
@pytest.mark.filterwarnings("ignore:Loading the storage on an uninitialized TensorDict")
def test_a_restored_replay_goes_on_equally(where, way, tmp_path):
    def make(name: str) -> StreamReplayBuffer:
        path = tmp_path / name if where == "disk" else None
        return small_replay(path=path, seed=1)

    replay = make("one")
    feeder = Feeder(replay)
    feeder.write([33, 14, 4])
    replay.sample()
    restored = make("two")
    restored.set_rng(torch.Generator().manual_seed(99))  # must come from the saved state
    if way == "files":
        replay.dumps(tmp_path / "saved")
        saved = (tmp_path / "saved" / "storage" / "next" / "pixels.memmap").stat().st_size
        assert saved == (20 + 14 + 4) * 3 * 2 * 8  # the stored records only
        restored.loads(tmp_path / "saved")
    else:
        restored.load_state_dict(replay.state_dict())
    other = Feeder(restored)
    other.written = list(feeder.written)
    assert len(restored) == len(replay)
    for counts in ([0, 0, 0], [3, 0, 6], [0, 21, 1], [0, 0, 0]):
        feeder.write(counts)
        other.write(counts)
        for _ in range(3):
            a, b = replay.sample(), restored.sample()
            slices_of(a)
            assert (a == b).all()


def test_a_replay_of_another_layout_is_refused(tmp_path: Path):
    replay = small_replay()
    Feeder(replay).write([9, 9, 9])
    replay.dumps(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"3 streams of 20 records.*2 of 30"):
        small_replay(num_streams=2).loads(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"batch_length=5.*batch_length=6"):
        small_replay(batch_length=6).loads(tmp_path / "saved")
    with pytest.raises(RuntimeError, match="empty replay"):
        small_replay().dumps(tmp_path / "empty")


def test_sampling_while_another_thread_writes():
    replay = small_replay(newest_first=False)
    feeder = Feeder(replay)
    feeder.write([20, 20, 20])
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            feeder.write([3, 1, 2])

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(200):
            slices_of(replay.sample())
    finally:
        stop.set()
        writer.join()
    assert min(feeder.written) > 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_length": 21}, r"batch_length=21 exceeds the 20 .* capacity=60.*at least 63"),
        ({"num_streams": 0}, "num_streams must be positive, got 0"),
        ({"capacity": -1}, "capacity must be positive, got -1"),
        ({"pin_memory": True}, "pin_memory=True"),
    ],
)
def test_impossible_replays_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small_replay(**changes)


def test_sampling_too_early_says_what_is_missing():
    replay = small_replay()
    with pytest.raises(RuntimeError, match=r"at least 5 .* holds 0 \(0 records in total\)"):
        replay.sample()
    Feeder(replay).write([4, 3, 4])
    with pytest.raises(RuntimeError, match=r"at least 5 .*3 streams holds 4 \(11 records in"):
        replay.sample()


def test_records_of_another_kind_are_refused():
    replay = small_replay()
    records = numbered(0, 0, 2)
    replay.extend(records)
    for key, value in {
        "action": torch.zeros(2, 3),
        ("next", "pixels"): torch.zeros(2, 3, 2, 8),
        ("next", "foreground_mask"): torch.zeros(2, 1, 2, 16, dtype=torch.bool),
        ("next", "extra"): torch.zeros(2, 1),
    }.items():
        name = key if isinstance(key, str) else key[-1]
        with pytest.raises(ValueError, match=name):
            replay.extend(records.clone().set(key, value))
    with pytest.raises(ValueError, match=r"foreground_mask.*None"):
        replay.extend(records.exclude(("next", "foreground_mask")))
    with pytest.raises(ValueError, match=r"streams 3 to 3.*num_streams=3"):
        replay.extend(numbered(3, 0, 2))
    with pytest.raises(ValueError, match=r"batch size \[M\], got \(2, 1\)"):
        replay.extend(records.unsqueeze(-1))
    assert len(replay) == 2


def test_a_replay_on_disk_guards_its_folder_and_leaves_signals_alone(tmp_path: Path):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    Feeder(small_replay(path=tmp_path / "replay")).write([5, 0, 0])
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    with pytest.raises(FileExistsError, match="replay"):
        small_replay(path=tmp_path / "replay")
    again = small_replay(path=tmp_path / "replay", exist_ok=True)
    Feeder(again).write([0, 6, 0])
    assert slices_of(again.sample(1)) == [(1, 0)]


@pytest.mark.gpu
def test_pinned_and_device_replays_give_the_same_slices(tmp_path: Path):
    samples = []
    pinned = {"pin_memory": True}
    for changes in ({}, pinned, pinned | {"path": tmp_path}, {"device": "cuda"}):
        replay = small_replay(**changes)
        Feeder(replay).write([33, 7, 14])
        samples.append([replay.sample() for _ in range(4)])
        for entry in ("pixels", "foreground_mask", "reward"):
            pinned_entry = samples[-1][0]["next", entry].is_pinned()
            assert pinned_entry == ("pin_memory" in changes), entry
        assert samples[-1][0].device.type == changes.get("device", "cpu")
    for other in samples[1:]:
        assert all((a == b.cpu()).all() for a, b in zip(samples[0], other, strict=True))


# Update schedule


@pytest.mark.parametrize(
    ("train_ratio", "batch_size", "batch_length"),
    [
        (512, 16, 64),
        (0.1, 1, 1),
        (1, 7, 7),
        (1000, 7, 13),
        ("1/3", 16, 65),
        (999.999, 16, 64),
        (0, 1, 1),
    ],
)
def test_updates_are_exact_over_a_long_run(train_ratio, batch_size, batch_length):
    schedule = UpdateSchedule(train_ratio, batch_size, batch_length, start=100)
    ratio = Fraction(str(train_ratio)) / (batch_size * batch_length)
    rng, steps, total = random.Random(0), 0, 0
    for call in range(20_000):
        steps += rng.choice([0, 1, 2, 4, 16, 997])
        if call == 10_000:  # a restored schedule goes on
            saved = schedule.state_dict()
            schedule = UpdateSchedule(train_ratio, batch_size, batch_length)
            schedule.load_state_dict(saved)
        due = schedule(steps)
        assert due >= 0
        total += due
        assert total == max(steps - 100, 0) * ratio.numerator // ratio.denominator
    assert schedule.updates == total


def test_schedules_refuse_what_makes_no_sense():
    schedule = UpdateSchedule(1, 1, 1)
    schedule(10)
    with pytest.raises(ValueError, match="steps=9 allows 9 updates, but 10"):
        schedule(9)
    with pytest.raises(ValueError, match="made 1 updates per agent step, this one makes 2"):
        UpdateSchedule(2, 1, 1).load_state_dict(schedule.state_dict())
    with pytest.raises(ValueError, match="train_ratio must not be negative, got -1"):
        UpdateSchedule(-1, 1, 1)
    with pytest.raises(ValueError, match="positive, got 0 and 4"):
        UpdateSchedule(1, 0, 4)
    with pytest.raises(ValueError, match="start must not be negative"):
        UpdateSchedule(1, 1, 1, start=-1)

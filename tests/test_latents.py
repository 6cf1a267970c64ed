"""Latents beside the replay's records: who gets which, when, and what checkpoints hold of them."""

from __future__ import annotations

import dataclasses
import random
import re
import threading
from pathlib import Path

import pytest
import torch
from helpers.records import numbered, slices_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from w2f_torchrl.checkpoint.file import load_checkpoint, write_checkpoint
from w2f_torchrl.data import StreamReplayBuffer, make_replay
from w2f_torchrl.data.replay.latents import LatentStore, latent_fields
from w2f_torchrl.data.replay.record_files import Field
from w2f_torchrl.data.replay.replay_files import (
    ReplayFiles,
    find_damage,
    open_records,
    read_streams,
)
from w2f_torchrl.modules import PRESETS, build_world_model
from w2f_torchrl.modules.packed_latents import (
    pack_belief,
    pack_state,
    packed_state_dtype,
    unpack_belief,
    unpack_state,
)

FIELDS = {
    "belief": Field("float16", (3,)),
    "state": Field("uint8", (2,)),
    "background_belief": Field("float16", (1,)),
}
ONE = torch.ones(())


# ------------------------------------------------------------------ packing


@pytest.mark.parametrize("classes", [2, 4, 96, 255, 256, 300])
def test_states_survive_packing(classes):
    number = torch.arange(classes).repeat(3, 1)
    state = torch.nn.functional.one_hot(number, classes).flatten(-2).float()
    state[1] = 0  # none
    probs = torch.softmax(torch.randn(3, classes, classes), -1).flatten(-2)
    straight_through = probs + (state - probs)
    straight_through[1] = 0
    packed = pack_state(straight_through, classes)
    assert packed.dtype is packed_state_dtype(classes)
    assert (classes <= 255) == (packed.dtype is torch.uint8)
    assert packed.shape == (3, classes)
    assert torch.equal(packed[0].long(), torch.arange(classes) + 1)
    assert not packed[1].any()
    assert torch.equal(unpack_state(packed, classes), state)


def test_beliefs_are_rounded_by_less_than_2_to_the_minus_12():
    belief = torch.cat((torch.linspace(-1, 1, 200_001), torch.tensor([1 + 2e-7, 3e-6, -1e-5])))
    error = (unpack_belief(pack_belief(belief)) - belief).abs()
    assert error.max() <= 2**-12
    assert (belief.bfloat16().float() - belief).abs().max() > 2**-10  # why not bfloat16
    small = belief[belief.abs() > 2**-14]
    assert ((unpack_belief(pack_belief(small)) - small) / small).abs().max() <= 2**-11


def test_beliefs_never_leave_minus_1_to_1():
    """Whatever the weights: the update is a mixture of the belief before and a tanh."""
    config = dataclasses.replace(PRESETS["size1m"], belief_size=64, hidden_size=16, units=16)
    torch.manual_seed(0)
    rollout = build_world_model(config, action_size=2, latent="whole").rollout
    for parameter in rollout.parameters():
        torch.nn.init.normal_(parameter, std=3.0)
    size = rollout.rssm_posterior.module.obs_rnn_to_post_projector[0].in_features - 64
    embedding, action = 5 * torch.randn(4, 100, size), torch.randn(4, 100, 2)
    with torch.no_grad():
        reset = torch.zeros(4, 100, 1, dtype=torch.bool)
        belief = rollout.unroll(embedding, action, reset).belief
    assert 0.99 < belief.abs().max() <= 1


def test_the_bytes_of_a_latent():
    def size(preset: str, latent: str) -> int:
        return sum(field.size for field in latent_fields(PRESETS[preset], latent).values())

    # 2 bytes a feature of the belief, 1 byte a categorical.
    assert size("size1m", "whole") == size("size1m", "shared") == 2 * 512 + 32
    assert size("size1m", "split") == 2 * (512 + 256) + 2 * 32
    assert size("size12m", "foreground") == 2 * 2048 + 32
    assert size("size12m", "split") == 2 * (2048 + 512) + 2 * 32


# ------------------------------------------------------------------ whose latent is whose


def with_latents(records: TensorDict) -> TensorDict:
    """Give numbered records the latents that acting had: they name stream and position."""
    stream, position = records["stream"], records["action"][:, 1].long()
    belief = torch.stack((stream, position % 1000, torch.zeros_like(stream)), -1).half()
    state = torch.stack((stream + 1, position % 200 + 1), -1).byte()
    acting = ~records["is_init"]
    previous = {"belief": belief * acting, "state": state * acting}
    return records.set("previous", TensorDict(previous, records.batch_size))


def latents_of_update(number: int, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Latents that name the update, the slice and the step."""
    place = torch.arange(batch * length).view(batch, length)
    belief = torch.stack((torch.full_like(place, number % 2000), place, place + 0.5), -1).half()
    state = torch.stack((place % 250, torch.full_like(place, number % 250)), -1).byte()
    return {"belief": belief, "state": state, "background_belief": -belief[..., :1]}


def replay_with_latents(**changes) -> StreamReplayBuffer:
    options = {"capacity": 60, "num_streams": 3, "batch_size": 4, "batch_length": 5, "seed": 0}
    return make_replay(**(options | {"latents": FIELDS} | changes))


class Expected:
    """What each record's latent must be, by the rules and with lists alone."""

    def __init__(self, replay: StreamReplayBuffer) -> None:
        self.replay = replay
        self.rows: dict[tuple[int, int], tuple[list[float], ...]] = {}
        self.written = [0] * replay.heads.num_streams
        self.updates = 0
        self.pending: tuple[list[tuple[int, int]], dict[str, torch.Tensor]] | None = None

    def write(self, counts: list[int]) -> None:
        for stream, count in enumerate(counts):
            if not count:
                continue
            records = with_latents(numbered(stream, self.written[stream], count))
            for row in range(count):
                previous = records["previous"]
                entries = (previous["belief"][row].tolist(), previous["state"][row].tolist(), [0.0])
                self.rows[stream, self.written[stream] + row] = entries
            self.written[stream] += count
            self.replay.extend(records)

    def update(self, applied: bool = True) -> None:
        sample = self.replay.sample()
        slices = [(int(s), int(p)) for s, p in sample["action"][:, 0]]
        batch, length = sample.shape
        for number, place in enumerate(slices):
            belief, state, background = self.rows[place]
            initial = sample["initial"][number]
            assert initial.batch_size == (length,)
            for step in range(length):
                assert initial["belief"][step].tolist() == belief
                assert initial["state"][step].tolist() == state
                assert initial["background_belief"][step].tolist() == background
        self.updates += 1
        latents = latents_of_update(self.updates, batch, length)
        values = TensorDict(latents, [batch, length])
        self.replay.write_back(sample["index"], values, ONE if applied else ONE * 0)
        self._apply()
        self.pending = (slices, latents) if applied else None

    def _apply(self) -> None:
        """Do the last update's writes, step by step."""
        slices, latents = self.pending or ([], {})
        for number, (stream, start) in enumerate(slices):
            for step in range(latents["belief"].shape[1]):
                place = (stream, start + step + 1)
                if place in self.present() and place[1] % 7:  # every 7th begins an episode
                    self.rows[place] = tuple(
                        latents[name][number, step].tolist() for name in FIELDS
                    )

    def present(self) -> set[tuple[int, int]]:
        capacity = self.replay.heads.capacity
        return {(s, p) for s, n in enumerate(self.written) for p in range(max(0, n - capacity), n)}

    def check(self) -> None:
        for stream, position in self.present():
            slot = torch.tensor([self.replay.heads.slot(stream, position)])
            found = self.replay.latents.read(slot)
            assert tuple(found[name][0].tolist() for name in FIELDS) == self.rows[stream, position]


@settings(max_examples=40, deadline=None)
@given(
    newest_first=st.booleans(),
    ring=st.sampled_from([None, 27]),
    steps=st.lists(
        st.one_of(
            st.lists(st.integers(0, 9), min_size=3, max_size=3),
            st.sampled_from(["update", "update", "not applied"]),
        ),
        min_size=5,
        max_size=25,
    ),
)
def test_every_record_has_the_latent_that_the_rules_give_it(newest_first, ring, steps):
    """Writes that overwrite, slices that overlap, cross episodes and have no follower yet."""
    replay = replay_with_latents(newest_first=newest_first, ring=ring)
    expected = Expected(replay)
    expected.write([6, 5, 8])
    for step in steps:
        if isinstance(step, str):
            expected.update(step == "update")
        else:
            expected.write(step)
        expected.check()
    slices_of(replay.sample())


def test_an_updates_latents_are_written_with_the_next_ones():
    replay = replay_with_latents(batch_size=1, capacity=15, num_streams=1, newest_first=True)
    expected = Expected(replay)
    expected.write([12])
    before = replay.latents.state_dict()
    expected.update()  # records 0 to 4
    assert all(torch.equal(before[name][:12], replay.latents.rows(0, 12)[name]) for name in FIELDS)
    # The next slice, records 5 to 9, begins with the latent that acting had.
    expected.update()
    assert replay.latents.rows(5, 6)["belief"].tolist() == [[1, 4, 4.5]]  # of update 1, step 4
    assert replay.latents.rows(6, 7)["belief"].tolist() == [[0, 6, 0]]


def test_latents_of_overwritten_records_go_nowhere():
    replay = replay_with_latents(batch_size=1, capacity=10, num_streams=1, newest_first=True)
    replay.extend(with_latents(numbered(0, 0, 10)))
    sample = replay.sample()  # records 0 to 4, in slots 0 to 4
    latents = TensorDict(latents_of_update(9, 1, 5), [1, 5])
    replay.write_back(sample["index"], latents, ONE)
    replay.extend(with_latents(numbered(0, 10, 3)))  # in slots 0 to 2
    replay.write_back(replay.sample()["index"], latents, ONE)
    belief = replay.latents.rows(0, 10)["belief"]
    assert belief[:3].tolist() == [[0, 10, 0], [0, 11, 0], [0, 12, 0]]
    assert belief[3:6].tolist() == [[9, 2, 2.5], [9, 3, 3.5], [9, 4, 4.5]]


def test_a_replay_that_was_emptied_takes_no_old_latents():
    replay = replay_with_latents(newest_first=False)
    expected = Expected(replay)
    expected.write([20, 20, 20])
    expected.update()
    replay.empty()
    again = Expected(replay)
    again.write([20, 20, 20])
    again.update()
    again.check()


def test_what_does_not_fit_is_named():
    replay = replay_with_latents()
    records = with_latents(numbered(0, 0, 6))
    wrong = records.clone()
    wrong["previous", "belief"] = wrong["previous", "belief"].float()
    with pytest.raises(ValueError, match=r"'belief'\) as torch.float16 \(6, 3\), got .*float32"):
        replay.extend(wrong)
    wrong = records.clone()
    del wrong["previous", "state"]
    with pytest.raises(ValueError, match=r"'state'\).*got None"):
        replay.extend(wrong)
    replay.extend(records)
    without = replay_with_latents(latents=None)
    without.extend(numbered(0, 0, 6))
    assert "initial" not in without.sample().keys()
    with pytest.raises(RuntimeError, match="does not store latents"):
        without.write_back(torch.zeros(1, 1), TensorDict(), ONE)


def test_records_without_latents_clear_those_of_the_records_they_replace():
    replay = replay_with_latents(num_streams=1, capacity=10)
    replay.extend(with_latents(numbered(0, 0, 10)))
    replay.extend(numbered(0, 10, 4))
    assert not any(rows.any() for rows in replay.latents.rows(0, 4).values())
    assert replay.latents.rows(4, 10)["belief"].any()


# ------------------------------------------------------------------ saving


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("way", ["files", "state_dict"])
@pytest.mark.filterwarnings("ignore:Loading the storage on an uninitialized TensorDict")
def test_a_restored_replay_has_its_latents_and_those_on_their_way(where, way, tmp_path):
    def make(name: str) -> StreamReplayBuffer:
        return replay_with_latents(path=tmp_path / name if where == "disk" else None)

    replay, restored = make("one"), make("two")
    expected = Expected(replay)
    expected.write([25, 14, 6])
    for _ in range(3):
        expected.update()
    restored.set_rng(torch.Generator().manual_seed(99))
    if way == "files":
        replay.dumps(tmp_path / "saved")
        restored.loads(tmp_path / "saved")
    else:
        restored.load_state_dict(replay.state_dict())
    expected.replay = restored
    for counts in ([0, 3, 9], [21, 0, 0]):
        expected.update()
        expected.write(counts)
        expected.check()


def files_of(replay: StreamReplayBuffer, folder: Path) -> ReplayFiles:
    return ReplayFiles(replay, folder, "0000", 512)


def save(files: ReplayFiles) -> dict:
    manifest = files.commit(files.prepare(None))
    assert manifest is not None
    return manifest


def test_a_snapshot_is_of_the_moment_it_began(tmp_path):
    """However much is written before, while and after its files are."""
    replay = replay_with_latents()
    files, expected = files_of(replay, tmp_path), Expected(replay)
    expected.write([25, 14, 6])
    for _ in range(4):
        expected.update()
    pending = files.prepare(None)
    then = {place: row for place, row in expected.rows.items() if place in expected.present()}
    for counts in ([7, 0, 1], [2, 9, 0]):
        expected.update()
        expected.write(counts)
    manifest = files.commit(pending)
    for _ in range(2):
        expected.update()
    restored = replay_with_latents()
    files_of(restored, tmp_path).load(manifest, tmp_path)
    other = Expected(restored)
    other.rows, other.written = then, list(manifest["written"])
    assert len(then) == 20 + 14 + 6
    other.check()
    expected.check()


def test_a_snapshot_holds_while_another_thread_writes(tmp_path):
    rows = 20_000
    store = LatentStore({"belief": Field("float16", (64,))}, rows)
    store.write(torch.arange(rows), {"belief": torch.full((rows, 64), 1.0).half()})
    from w2f_torchrl.data.replay.latent_files import write_snapshot

    stop, writes = threading.Event(), 0

    def change() -> None:
        nonlocal writes
        while not stop.is_set():
            slots = torch.randperm(rows)[:500]
            store.write(slots, {"belief": torch.full((500, 64), 2.0).half()})
            writes += 1

    store.begin_snapshot()
    thread = threading.Thread(target=change)
    thread.start()
    while not writes:
        pass
    heads = {"written": [rows], "first": [0], "capacity": rows, "ring": rows}
    saved = write_snapshot(store, heads, tmp_path)
    stop.set()
    thread.join()
    content = (tmp_path / "latents" / saved["name"] / "belief.memmap").read_bytes()
    assert (torch.frombuffer(bytearray(content), dtype=torch.float16) == 1).all()
    assert (store.rows(0, rows)["belief"] == 2).any()


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_larger_replay_takes_latents_over(where, tmp_path):
    replay = replay_with_latents(
        path=tmp_path / "0000" if where == "disk" else None,
        ring=512 if where == "disk" else None,
    )
    files, expected = files_of(replay, tmp_path), Expected(replay)
    expected.write([45, 14, 6])
    for _ in range(4):
        expected.update()
    manifest = save(files)
    for capacity in (300, 36):  # 100 and 12 records a stream
        restored = replay_with_latents(capacity=capacity)
        files_of(restored, tmp_path / "other").load(manifest, tmp_path)
        other = Expected(restored)
        other.rows, other.written = expected.rows, expected.written
        oldest = [n - min(n, 20, capacity // 3) for n in expected.written]
        other.present = lambda oldest=oldest: {
            (s, p) for s, n in enumerate(expected.written) for p in range(oldest[s], n)
        }
        assert len(restored) == len(other.present())
        other.check()


def test_unneeded_snapshots_go(tmp_path):
    replay = replay_with_latents()
    files, expected = files_of(replay, tmp_path), Expected(replay)
    expected.write([25, 14, 6])
    manifests = [save(files) for _ in range(3)]
    names = [manifest["latents"]["name"] for manifest in manifests]
    assert len(set(names)) == 3
    files.remove_unused([manifests[2], None, manifests[0]])
    left = sorted(path.name for path in (tmp_path / "latents").iterdir())
    assert left == sorted([names[0], names[2]])
    assert save(files)["latents"]["name"] not in names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("flip", "latents of records .* do not match their SHA-256 digest"),
        ("cut", "is truncated"),
        ("remove", "are missing"),
        ("name", "is not a valid name of latents"),
        ("fields", "other shapes or dtypes"),
        ("none", "the checkpoint has no latents"),
    ],
)
def test_latents_that_cannot_be_read_become_zero(change, message, tmp_path, caplog):
    replay = replay_with_latents()
    files, expected = files_of(replay, tmp_path), Expected(replay)
    expected.write([25, 14, 6])
    expected.update()
    expected.update()
    manifest = save(files)
    saved = manifest["latents"]
    path = tmp_path / "latents" / saved["name"] / "state.memmap"
    if change == "flip":
        content = bytearray(path.read_bytes())
        content[2 * (2 * 20 + 5)] ^= 4  # of the last stream: the others are placed before it
        path.write_bytes(content)
    elif change == "cut":
        path.write_bytes(path.read_bytes()[:50])
    elif change == "remove":
        path.unlink()
    elif change == "name":
        saved["name"] = "../latents/" + saved["name"]
    elif change == "fields":
        saved["fields"]["belief"] = ["float16", [4]]
    else:
        del manifest["latents"]
    restored = replay_with_latents()
    with caplog.at_level("INFO"):
        files_of(restored, tmp_path).load(manifest, tmp_path)
    [record] = [record for record in caplog.records if record.name.startswith("w2f")]
    assert record.levelname == ("INFO" if change == "none" else "WARNING")
    assert re.search(message, record.getMessage())
    assert len(restored) == 40
    sample = restored.sample()
    slices_of(sample)
    assert not any(rows.any() for rows in restored.latents.rows(0, 20 + 14).values())
    assert not any(rows.any() for rows in restored.latents.rows(40, 46).values())


def test_a_shuffled_write_gives_each_record_its_own_latent():
    replay = replay_with_latents()
    records = torch.cat([with_latents(numbered(s, 0, 9)) for s in range(3)])
    owners = records["stream"].tolist()
    random.Random(1).shuffle(owners)
    rows = {s: iter((records["stream"] == s).nonzero()[:, 0].tolist()) for s in range(3)}
    replay.extend(records[[next(rows[s]) for s in owners]])
    for stream in range(3):
        belief = replay.latents.rows(20 * stream, 20 * stream + 9)["belief"]
        expected = [[stream, p, 0] if p % 7 else [0, 0, 0] for p in range(9)]
        assert belief.tolist() == expected


def test_a_stream_without_records_does_not_spoil_a_checkpoint(tmp_path):
    replay = replay_with_latents()
    files, expected = files_of(replay, tmp_path / "replay"), Expected(replay)
    expected.write([25, 0, 6])
    path = write_checkpoint(tmp_path / "a.pt", {"replay": save(files)}, updates=1, frames=1)
    manifest = load_checkpoint(path).payload["replay"]
    assert find_damage(manifest, tmp_path / "replay") == []
    restored = replay_with_latents()
    files_of(restored, tmp_path / "replay").load(manifest, tmp_path / "replay")
    assert restored.heads.written.tolist() == [25, 0, 6]


def test_reading_starts_with_the_oldest_record_of_a_replay(tmp_path):
    """A new generation of files begins within a block, whose first rows hold nothing."""
    replay = make_replay(
        capacity=300, num_streams=1, batch_size=2, batch_length=4, seed=0, latents=FIELDS
    )
    files, expected = ReplayFiles(replay, tmp_path, "0000", 768), Expected(replay)
    newest = None
    for count in (200, 200, 600):
        expected.write([count])
        newest = files.commit(files.prepare(newest))
    assert newest["generation"] != "0000"
    with open_records(newest, tmp_path) as opened:
        blocks = [block for block in read_streams(opened, newest) if block is not None]
    positions = torch.cat([block["action"][:, 1] for block in blocks])
    assert positions.tolist() == list(range(700, 1000))

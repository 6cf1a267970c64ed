"""Recorded episodes: what is read is what happened, and runs on them are runs like any other."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import TINY
from helpers.runs import tiny_run
from helpers.short_runs import crash_when, differences, rows

from sota_configs import record
from w2f_torchrl.checkpoint import CheckpointError
from w2f_torchrl.config import ConfigError, DataConfig, EnvironmentConfig
from w2f_torchrl.data import make_replay, records_from_rollout
from w2f_torchrl.data.environments import build_env
from w2f_torchrl.data.recorded.collection import RecordedCollection
from w2f_torchrl.data.recorded.episodes import DataError, RecordedData
from w2f_torchrl.data.recorded.form import load_episode
from w2f_torchrl.data.recorded.open import open_data
from w2f_torchrl.data.recorded.reader import EpisodeStreams, frames_of, shared_out
from w2f_torchrl.data.recorded.write import write_arrays
from w2f_torchrl.evaluation.imagination import CONTEXT
from w2f_torchrl.evaluation.recorded.open_loop import predict_open_loop
from w2f_torchrl.evaluation.recorded.record import Player, Recorder
from w2f_torchrl.evaluation.recorded.replay_export import export_replay
from w2f_torchrl.masks.packing import unpack_mask
from w2f_torchrl.modules import build_world_model
from w2f_torchrl.trainers import Trainer
from w2f_torchrl.utils.seeding import derive_seed

pytestmark = [pytest.mark.render, pytest.mark.usefixtures("no_curves")]

SIZE, STEPS, EPISODES = 16, 24, 9
ENVIRONMENT = EnvironmentConfig(
    domain="cartpole", task="swingup", image_size=SIZE, distraction="easy"
)
RECORDED = {"domain": "recorded", "task": "swingup"}
ONLINE = {"domain": "cartpole", "task": "swingup"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "easy"
    recorder = Recorder(path, ENVIRONMENT, [Player("random")], max_steps=STEPS, seed=5)
    assert len(recorder.record(EPISODES)) == EPISODES
    return path


def opened(path: Path, size: int = SIZE, **settings: Any) -> RecordedData:
    return open_data(DataConfig(path=str(path), **settings), size)


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as archive:
        return {name: archive[name] for name in archive.files}


# ------------------------------------------------------------------ what is read


def test_the_action_of_a_row_led_to_its_observation(folder):
    data = opened(folder)
    env = build_env(ENVIRONMENT, 0)
    for index in (0, 4):
        episode = load_episode(data, index)
        env.set_seed(derive_seed(5, "recording", index), static_seed=True)
        step = env.reset()
        assert torch.equal(step["pixels"], episode.pixels[0])
        assert not episode.action[0].any()
        for t in range(1, len(episode)):
            step = env.step(step.set("action", episode.action[t]))["next"]
            assert torch.equal(step["pixels"], episode.pixels[t])
            assert torch.equal(step["foreground_mask"], episode.mask[t])
            assert float(step["reward"]) == float(episode.reward[t])
    env.close()


def test_records_are_those_of_collecting_the_same_steps(folder):
    episode = load_episode(opened(folder), 2)
    env = build_env(ENVIRONMENT, 0)
    env.set_seed(derive_seed(5, "recording", 2), static_seed=True)
    actions = iter(episode.action[1:])
    rollout = env.rollout(STEPS, lambda td: td.set("action", next(actions)))
    env.close()
    collected = records_from_rollout(rollout.unsqueeze(0)).exclude("stream")
    loaded = episode.records()
    assert set(loaded.keys(True, True)) == set(collected.keys(True, True))
    collected["next", "done"][-1] = True  # a recording that was cut ends there
    assert (loaded == collected).all()


def as_chunks(folder: Path, source: list[Path], length: int) -> None:
    """Write episodes as DreamerV3's replay does: one stream, cut anywhere, actions taken at."""
    parts: dict[str, list[np.ndarray]] = {}
    for path in source:
        arrays = arrays_of(path)
        arrays["action"] = np.concatenate([arrays["action"][1:], 0 * arrays["action"][:1]])
        for key in ("image", "action", "reward", "is_first", "is_last", "is_terminal"):
            parts.setdefault(key, []).append(arrays[key])
    stream = {key: np.concatenate(values) for key, values in parts.items()}
    total = len(stream["action"])
    starts = list(range(0, total, length))
    for number, start in enumerate(starts):
        follow = number + 1 if number + 1 < len(starts) else 99
        rows = {key: values[start : start + length] for key, values in stream.items()}
        rows["stepid"] = np.zeros((len(rows["action"]), 20), np.uint8)
        # Times don't sort as the successors do, so that only these can be followed.
        name = f"2024010{9 - number}T000000F0-{number:04d}x-{follow:04d}x-{len(rows['action'])}.npz"
        write_arrays(folder / name, rows)


def test_pieces_of_dreamer_v3s_replay_are_joined_and_their_actions_shifted(folder, tmp_path):
    source = sorted(folder.glob("*.npz"))[:4]
    as_chunks(tmp_path, source, 31)
    joined, single = opened(tmp_path), opened(folder)
    assert joined.convention == "taken_at"
    assert single.convention == "led_to"
    assert [len(span) for span in joined.spans] == [STEPS + 1] * 4
    for index in range(4):
        one, other = load_episode(joined, index), load_episode(single, index)
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.action, other.action)
        assert torch.equal(one.reward, other.reward)
    unshifted = opened(tmp_path, actions="led_to")
    assert not torch.equal(load_episode(unshifted, 0).action, load_episode(single, 0).action)


def test_images_are_resized_by_area_and_scales_of_actions_undone(tmp_path, folder):
    arrays = arrays_of(sorted(folder.glob("*.npz"))[0])
    arrays["image"] = arrays["image"].repeat(3, 1).repeat(3, 2)
    arrays["foreground_mask"] = arrays["foreground_mask"].repeat(3, 1).repeat(3, 2)
    arrays["action"] = 5 + 2 * arrays["action"]
    arrays["action"][0] = 0
    write_arrays(tmp_path / "big.npz", arrays)
    found = load_episode(opened(tmp_path, action_range=[3.0, 7.0]), 0)
    wanted = load_episode(opened(folder), 0)
    assert torch.equal(found.pixels, wanted.pixels)
    assert torch.equal(found.mask, wanted.mask)
    assert torch.allclose(found.action, wanted.action, atol=1e-6)


def test_discrete_actions_may_be_indices_or_one_hot(tmp_path, folder):
    arrays = arrays_of(sorted(folder.glob("*.npz"))[0])
    index = np.arange(STEPS + 1) % 3
    for name, action in {"index": index, "hot": np.eye(3, dtype=np.float32)[index]}.items():
        (tmp_path / name).mkdir()
        write_arrays(tmp_path / name / "a.npz", arrays | {"action": action})
        data = opened(tmp_path / name, choices=3)
        action = load_episode(data, 0).action
        assert action[0].tolist() == [0, 0, 0]
        assert action[1:].argmax(-1).tolist() == index[1:].tolist()
    assert opened(tmp_path / "hot", choices=3, actions="taken_at").action_size == 3
    with pytest.raises(DataError, match=r"a\.npz: action is int64 .*set data\.choices"):
        opened(tmp_path / "index")
    with pytest.raises(DataError, match=r"action lies in \[0, 2\]; allowed: 0 to 1"):
        opened(tmp_path / "index", choices=2)


def changed(**entries: Any) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    def change(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        made = {key: value(arrays) if callable(value) else value for key, value in entries.items()}
        return {key: value for key, value in (arrays | made).items() if value is not None}

    return change


BAD: dict[str, tuple[Any, str]] = {
    "no action": (changed(action=None), "action is missing; it holds .*image"),
    "no reward": (changed(reward=None), "reward is missing"),
    "no image": (changed(image=None), "image or pixels is missing.*data.camera"),
    "floats": (changed(image=lambda a: a["image"] / 255), r"image is float64 .*allowed: uint8"),
    "grey": (changed(image=lambda a: a["image"][..., 0]), r"allowed: uint8 \[T, H, W, 3\]"),
    "cut": (changed(image=lambda a: a["image"][:-1]), "image has the shape .* 25 rows"),
    "range": (changed(action=lambda a: 3 * a["action"]), r"action lies in .*allowed: \[-1, 1\]"),
    "nan": (changed(reward=np.full(STEPS + 1, np.nan)), "reward holds nan"),
    "first": (changed(action=np.ones((STEPS + 1, 1))), "data.actions=taken_at"),
    "size": (changed(action=np.zeros((STEPS + 1, 2))), r"allowed: \[T, 1\]"),
    "mask": (changed(foreground_mask=None), "foreground_mask is missing, though"),
    "flags": (changed(is_terminal=np.zeros((STEPS + 1, 2))), r"is_terminal is \[25, 2\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_are_named_before_anything_is_built(case, tmp_path, folder):
    change, message = BAD[case]
    files = sorted(folder.glob("*.npz"))
    shutil.copy(files[0], tmp_path / "a.npz")
    write_arrays(tmp_path / "b.npz", change(arrays_of(files[1])))
    with pytest.raises(DataError, match=message) as error:
        opened(tmp_path)
    assert str(tmp_path / "b.npz") in str(error.value)


def test_files_that_are_no_archive_or_were_cut_are_named(tmp_path, folder):
    tmp_path = tmp_path / "a" / "64px"
    tmp_path.mkdir(parents=True)
    file = sorted(folder.glob("*.npz"))[0]
    (tmp_path / "a.npz").write_bytes(file.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"a\.npz can't be read"):
        opened(tmp_path)
    (tmp_path / "a.npz").unlink()
    shutil.copy(file, tmp_path / "20200101T000000-abc-501.npz")
    with pytest.raises(DataError, match="has 25 rows, but its name says 501"):
        opened(tmp_path)
    with pytest.raises(DataError, match=f"Did you mean data.path={tmp_path}"):
        opened(tmp_path.parent.parent)
    shutil.copy(file, tmp_path / "20200101T000000-abc-def-25.npz")
    with pytest.raises(DataError, match="one kind per folder"):
        opened(tmp_path)


def test_masks_of_wrong_values_are_named(tmp_path, folder):
    arrays = arrays_of(sorted(folder.glob("*.npz"))[0])
    arrays["foreground_mask"] = arrays["foreground_mask"].astype(np.float32)
    write_arrays(tmp_path / "a.npz", arrays)
    with pytest.raises(DataError, match=r"a\.npz: foreground_mask is float32"):
        load_episode(opened(tmp_path), 0)


# ------------------------------------------------------------------ streams and the replay


def test_an_epoch_reads_every_record_once_and_continues_from_a_state(folder):
    data = opened(folder)
    training, held_out = data.split()
    assert len(held_out) == 1
    assert sorted(training + held_out) == list(range(EPISODES))

    def streams() -> EpisodeStreams:
        return EpisodeStreams(data, training, 3, seed=1)

    reader, parts = streams(), []
    while (part := reader.read(7, repeat=False)) is not None:
        parts.append(part)
    assert reader.exhausted
    whole = torch.cat(parts)
    assert len(whole) == len(training) * (STEPS + 1)
    first = whole[whole["is_init"].squeeze(-1)]
    assert len(first) == len({tuple(p.flatten().tolist()) for p in first["next", "pixels"]})
    for stream in range(3):  # each stream holds whole episodes, one after the other
        starts = whole[whole["stream"] == stream]["is_init"].squeeze(-1).nonzero().flatten()
        assert torch.equal(starts, (STEPS + 1) * torch.arange(len(starts)))
    reader, again = streams(), streams()
    for _ in range(9):  # into the second epoch
        reader.read(11, repeat=True)
    again.load_state_dict(reader.state_dict())
    assert reader.epoch == 1
    assert (reader.read(40, repeat=True) == again.read(40, repeat=True)).all()


class Opened:
    """A replay that needs no run."""

    records = None

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity

    def open(self, *, seed: int, resume_episodes: bool) -> None:
        del resume_episodes
        sizes = {"batch_size": 4, "batch_length": 8, "newest_first": False}
        self.buffer = make_replay(capacity=self.capacity, num_streams=2, seed=seed, **sizes)


@pytest.mark.parametrize(("capacity", "resident"), [(1000, True), (100, False)])
def test_all_that_fits_is_loaded_once_and_the_rest_streams_through(folder, capacity, resident):
    data = opened(folder)
    training, _ = data.split()
    seen = []

    def label(records):
        seen.append(len(records))
        return records

    streams = EpisodeStreams(data, training, 2, seed=0)
    collection = RecordedCollection(
        Opened(capacity), streams, label, num_streams=2, steps_per_batch=5, seed=0
    )
    collection.start(0, resumed=False)
    total = len(training) * (STEPS + 1)
    assert collection.resident is resident
    assert len(collection.replay) == sum(seen) == min(total, capacity)
    for _ in range(30):
        batch = collection.next_batch()
        assert batch.numel() == 10
        assert collection.store(batch, label) == []
    assert sum(seen) == (total if resident else capacity + 30 * 10)
    sample = collection.replay.sample()
    start = sample["is_init"].squeeze(-1)
    assert not sample["action"][start].any()
    assert sample["next", "done"].squeeze(-1)[:, :-1].equal(start[:, 1:])


def test_a_smaller_replay_streams_what_it_no_longer_holds(folder):
    data = opened(folder)
    training, _ = data.split()

    held = []

    def keep(records):
        held.append(records)
        return records

    def collection_of(capacity: int) -> RecordedCollection:
        streams = EpisodeStreams(data, training, 2, seed=0)
        return RecordedCollection(
            Opened(capacity), streams, keep, num_streams=2, steps_per_batch=5, seed=0
        )

    whole = collection_of(1000)
    whole.start(0, resumed=False)
    assert whole.resident
    for capacity in (1000, 100):
        again = collection_of(capacity)
        again.load_state_dict(whole.state_dict())
        again.run_replay.records = object()  # the checkpoint has records
        restore = again.run_replay.open

        def open_with_records(again=again, restore=restore, **settings: Any) -> None:
            restore(**settings)
            again.replay.extend(torch.cat(held))

        again.run_replay.open = open_with_records
        again.start(0, resumed=True)
        assert again.resident is (capacity == 1000)


def test_frames_for_a_segmenter_come_from_all_episodes(folder):
    data = opened(folder)
    frames = frames_of(data, range(EPISODES), 20, seed=0)
    assert frames["pixels"].shape == (20, 3, SIZE, SIZE)
    assert frames["foreground_mask"].any()
    everything = torch.stack([load_episode(data, i).pixels for i in range(EPISODES)])
    owners = set()
    for frame in frames["pixels"]:
        same = (everything == frame).flatten(2).all(-1)  # [episodes, T]
        owners.add(int(same.any(-1).nonzero()[0]))
    assert owners == set(range(EPISODES))


def test_ranks_share_the_episodes_out(folder, tmp_path):
    data = opened(folder)
    training, held_out = data.split()
    shares = [shared_out(data, rank, 3) for rank in range(3)]
    assert sorted(index for share in shares for index in share) == training
    assert not set(held_out) & set(training)
    shutil.copy(sorted(folder.glob("*.npz"))[0], tmp_path / "a.npz")
    with pytest.raises(DataError, match="has 1 episodes to train on for 2 ranks"):
        shared_out(opened(tmp_path), 1, 2)


# ------------------------------------------------------------------ evaluation


def test_open_loop_errors_are_those_of_their_definition(folder):
    episode = load_episode(opened(folder), 1)
    model = build_world_model(TINY, action_size=1, image_size=SIZE, latent="split")
    before = torch.get_rng_state()
    found = predict_open_loop(model, episode.records().unsqueeze(0), count=1, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    pixels = episode.pixels.float() / 255
    still = (pixels[CONTEXT:] - pixels[CONTEXT - 1]).abs().mean()
    assert found["still_error"] == pytest.approx(float(still), rel=1e-5)
    # The head of a new model predicts a reward of zero.
    assert found["reward_error"] == pytest.approx(float(episode.reward[CONTEXT:].abs().mean()))
    assert 0 < found["error"] < 1
    assert set(found) >= {"context_error", "last_error", "mask_iou"}
    # Later pictures are not seen: neither predictions nor their errors on earlier frames change.
    changed = replace(episode, pixels=episode.pixels.clone())
    changed.pixels[-1] = 255 - changed.pixels[-1]
    other = predict_open_loop(model, changed.records().unsqueeze(0), count=1, seed=3)
    assert other["context_error"] == found["context_error"]
    assert other["mask_iou"] == found["mask_iou"]
    assert other["last_error"] != found["last_error"]
    assert predict_open_loop(model, episode.records()[:CONTEXT].unsqueeze(0)) is None


# ------------------------------------------------------------------ runs


def offline(run_dir: Path, folder: Path, **settings: Any):
    """A run on recorded data; its 128 frames of 2 control steps allow 8 updates."""
    values: dict[str, Any] = {
        "environment": RECORDED | settings.pop("environment", {}),
        "data": {"path": str(folder)} | settings.pop("data", {}),
        "resume": "auto",
        "training": {"total_frames": 256} | settings.pop("training", {}),
        "evaluation": {"video": False} | settings.pop("evaluation", {}),
        "logging": {"report": False} | settings.pop("logging", {}),
    }
    return tiny_run(run_dir, **values, **settings)


def test_a_run_on_recorded_data_has_the_updates_of_one_that_collects(tmp_path, folder):
    logging = {"report": True}
    trainer = Trainer(offline(tmp_path / "offline", folder, logging=logging))
    trainer.train()
    never = {"every_frames": 0}
    online = Trainer(
        tiny_run(tmp_path / "online", environment={"task": "swingup"}, evaluation=never)
    )
    online.train()
    assert (trainer.frames, trainer.updates) == (online.frames, online.updates)
    assert trainer.updates > 0
    found = rows(tmp_path / "offline")
    last = [row for row in found if "recorded/error" in row][-1]
    assert 0 < last["recorded/error"] < 1
    assert 0 <= last["recorded/mask_iou"] <= 1
    assert 0 <= last["wm/mask_iou"] <= 1
    assert not any("eval/return_mean" in row or "episode/return" in row for row in found)
    assert (tmp_path / "offline" / "checkpoints" / "best.pt").exists()
    assert (tmp_path / "offline" / "report.html").exists()


STREAMED = {"replay": {"capacity": 100}}
DISK = {"replay": {"capacity": 100, "storage": "disk"}}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="resident", marks=pytest.mark.slow),
        pytest.param(STREAMED, id="streamed", marks=pytest.mark.slow),
        pytest.param(DISK, id="disk"),
    ],
)
def test_a_run_that_was_interrupted_is_the_same_run(tmp_path, folder, settings):
    Trainer(offline(tmp_path / "whole", folder, **settings)).train()
    crash_when(offline(tmp_path / "crashed", folder, **settings), 13)
    Trainer(offline(tmp_path / "crashed", folder, **settings)).train()
    assert differences(tmp_path / "whole", tmp_path / "crashed") == []


def test_other_episodes_need_another_run(tmp_path, folder):
    copy = tmp_path / "data"
    shutil.copytree(folder, copy)
    crash_when(offline(tmp_path / "run", copy), 13)
    moved = copy.rename(tmp_path / "moved")  # the same episodes may lie elsewhere
    crash_when(offline(tmp_path / "run", moved), 20)
    with pytest.raises(CheckpointError, match=r"data\.path=None must stay .*/moved"):
        Trainer(offline(tmp_path / "run", moved, data={"path": None}, environment=ONLINE))
    sorted(moved.glob("*.npz"))[3].unlink()
    with pytest.raises(ConfigError, match="its episodes are not those that the run began with"):
        Trainer(offline(tmp_path / "run", moved)).train()


def test_an_environment_may_serve_to_evaluate_only(tmp_path, folder):
    environment = ONLINE
    evaluation = {"max_control_steps": 40, "every_frames": 256}
    trainer = Trainer(offline(tmp_path, folder, environment=environment, evaluation=evaluation))
    trainer.train()
    last = [row for row in rows(tmp_path) if "eval/return_mean" in row][-1]
    assert last["eval/length_mean"] == 20
    assert "recorded/error" in last
    walker = offline(tmp_path / "b", folder, environment={"domain": "walker", "task": "walk"})
    with pytest.raises(ConfigError, match="recorded actions have 1 continuous numbers, but the"):
        Trainer(walker)


@pytest.mark.parametrize("source", ["median", pytest.param("student", marks=pytest.mark.slow)])
def test_segmenters_learn_from_the_data_and_segment_each_frame_once(tmp_path, folder, source):
    segmentation = {"source": source, "train_steps": 3, "teacher_frames": 20, "teacher_every": 0}
    trainer = Trainer(offline(tmp_path, folder, segmentation=segmentation))
    trainer.train()
    assert trainer.masks.frames == (EPISODES - 1) * (STEPS + 1)
    assert any("segmentation/iou" in row for row in rows(tmp_path))


def test_filtering_is_measured_on_recorded_states(tmp_path, folder):
    pytest.importorskip("sklearn", reason="needs the extra analysis")
    evaluation = {"filtering": True, "filtering_episodes": 8, "every_frames": 256}
    Trainer(offline(tmp_path, folder, evaluation=evaluation)).train()
    last = rows(tmp_path)[-1] | next(r for r in rows(tmp_path) if "recorded/error" in r)
    assert "filtering/content/foreground/pose/linear" in last
    assert "filtering/leakage/background/camera/linear" in last
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in folder.glob("*.npz"):
        kept = {k: v for k, v in arrays_of(path).items() if "/" not in k}
        write_arrays(bare / path.name, kept)
    with pytest.raises(DataError, match="true states are missing; allowed keys: agent/NAME"):
        Trainer(offline(tmp_path / "b", bare, evaluation=evaluation))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": {"path": "/nowhere"}}, "data.path=/nowhere does not exist"),
        ({"data": {"path": None}}, "environment.domain=recorded .*set data.path"),
        ({"data": {"choices": 3, "action_range": [0.0, 1.0]}}, "data.action_range"),
        ({"data": {"action_range": [1.0, 0.0]}}, "data.action_range"),
        ({"model": {"vectors": {"position": 3}}}, "model.vectors=.* must be empty with data.path"),
        ({"collection": {"overlap": True}}, "collection.overlap=true must be false"),
        ({"data": {"format": "zarr"}}, "data.format='zarr' is unknown"),
        ({"environment": {"distraction": "easy"}}, "environment.distraction='easy' must be none"),
        (
            {"training": {"batch_length": 256, "prefill_steps": 512, "total_frames": 9999}},
            "too few for training.batch_length=256",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(tmp_path, folder, settings, message):
    with pytest.raises(ConfigError, match=message):
        Trainer(offline(tmp_path, folder, **settings)).train()


def test_settings_of_data_without_data_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.choices=3 has no effect without data\.path"):
        tiny_run(tmp_path, data={"choices": 3}).validate()


# ------------------------------------------------------------------ recording


def test_a_recording_continues_where_it_was_interrupted(tmp_path, folder):
    class Enough(Exception):
        pass

    def stop(path: Path) -> None:
        if path.name.startswith("000002"):
            raise Enough

    def recorder(**settings: Any) -> Recorder:
        values = {"max_steps": STEPS, "seed": 5} | settings
        return Recorder(tmp_path, ENVIRONMENT, [Player("random")], **values)

    with pytest.raises(Enough):
        recorder().record(5, tell=stop)
    assert [path.name[:6] for path in recorder().record(5)] == ["000003", "000004"]
    for path in sorted(tmp_path.glob("*.npz")):
        one, other = arrays_of(path), arrays_of(folder / path.name)
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[key], other[key]) for key in one)
    with pytest.raises(ConfigError, match="hold was 4 and is 2: record into another folder"):
        recorder(hold=2)


def test_the_replay_of_a_run_can_be_trained_on(tmp_path):
    environment = {"task": "swingup", "num_envs": 2}
    evaluation = {"every_frames": 0, "max_control_steps": 40}
    trainer = Trainer(tiny_run(tmp_path / "run", environment=environment, evaluation=evaluation))
    trainer.train()
    made = export_replay(tmp_path / "run", tmp_path / "data")
    assert export_replay(tmp_path / "run", tmp_path / "data") == []
    data = opened(tmp_path / "data", holdout=0.0)
    assert data.steps == len(trainer.replay)
    rows = trainer.replay.rows
    for stream, path in enumerate(made):  # no episode has ended: each stream is one
        start = trainer.replay.heads.slot(stream, 0)
        one, stored = arrays_of(path), rows[start : start + data.steps // 2]
        assert np.array_equal(one["image"], stored["next", "pixels"].permute(0, 2, 3, 1))
        assert np.array_equal(one["action"], stored["action"].clamp(-1, 1))
        assert np.array_equal(one["reward"], stored["next", "reward"][:, 0])
        masks = unpack_mask(stored["next", "foreground_mask"])
        assert np.array_equal(one["foreground_mask"], masks[:, 0])
    with pytest.raises(ConfigError, match="has no checkpoint with a replay"):
        export_replay(tmp_path / "data", tmp_path / "other")


def test_the_command_records_what_it_is_told(tmp_path, capsys):
    settings = ["environment.domain=cartpole", f"environment.image_size={SIZE}"]
    settings.append("environment.task=balance")
    record.main([str(tmp_path / "a"), "--episodes", "2", "--max-steps", "5", *settings])
    assert capsys.readouterr().out.strip() == str(tmp_path / "a")
    assert len(opened(tmp_path / "a").spans) == 2
    for arguments, message in [
        ([], "pass either --episodes or --replay"),
        (["--episodes", "0"], "--episodes 0 must be at least 1"),
        (["--episodes", "1", "training.batch_size=3"], "is no setting of the environment"),
        (["--episodes", "1", "environment.nothing=3"], "nothing"),
        (["--episodes", "1", "environment.domain=moon"], "domain is 'moon'"),
        (["--episodes", "1", "--policy", "nowhere.pt"], "nowhere.pt"),
        (["--episodes", "3", *settings], "max_steps was 5 and is None"),
    ]:
        with pytest.raises(SystemExit, match=message):
            record.main([str(tmp_path / "a"), *arguments])


def test_discrete_actions_are_recorded_and_trained_on(tmp_path):
    pytest.importorskip("gymnasium", reason="needs the extra gym")
    pytest.importorskip("pygame", reason="needs the extra gym")
    environment = {"domain": "gym", "task": "CartPole-v1", "image_size": SIZE, "action_repeat": 1}
    Recorder(tmp_path / "data", EnvironmentConfig(**environment), [Player("random")]).record(4)
    episode = load_episode(opened(tmp_path / "data", choices=2), 0)
    assert episode.terminated  # the pole has fallen
    assert episode.action[1:].sum(-1).eq(1).all()
    assert episode.reward[1:].eq(1).all()
    settings: dict[str, Any] = {
        "environment": environment,
        "algo": {"name": "dreamer_v3", "latent": None},
        "evaluation": {"every_frames": 0},
        "training": {"total_frames": 96},
    }
    with pytest.raises(ConfigError, match=r"have 2 continuous numbers, but .* has 2 choices"):
        Trainer(offline(tmp_path / "a", tmp_path / "data", **settings))
    chosen = {"choices": 2}
    trainer = Trainer(offline(tmp_path / "b", tmp_path / "data", data=chosen, **settings))
    trainer.train()
    assert trainer.updates > 0

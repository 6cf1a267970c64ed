"""Data sets of others: files made in their exact form hold what was written into them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from w2f_torchrl.config import DataConfig
from w2f_torchrl.data.recorded.episodes import DataError, RecordedData
from w2f_torchrl.data.recorded.form import load_episode
from w2f_torchrl.data.recorded.open import open_data
from w2f_torchrl.data.recorded.rows import rewards_with_observations
from w2f_torchrl.data.recorded.write import write_arrays

SIZE, LENGTH, ACTION, FPS = 16, 7, 2, 10
EPISODES = 3


def opened(path: Path, **settings: Any) -> RecordedData:
    return open_data(DataConfig(path=str(path), **settings), SIZE)


@pytest.fixture(scope="module")
def steps() -> dict[str, np.ndarray]:
    """Rows of three episodes, as V-D4RL stores them: the action of a row led to its image."""
    draw = np.random.default_rng(0)
    rows = EPISODES * LENGTH
    start = np.arange(rows) % LENGTH == 0
    action = draw.uniform(-1, 1, (rows, ACTION)).astype(np.float32)
    reward = draw.uniform(0, 1, rows).astype(np.float32)
    action[start], reward[start] = 0, 0
    image = np.repeat(np.repeat(draw.integers(0, 256, (rows, 4, 4, 3), np.uint8), 4, 1), 4, 2)
    return {"image": image, "action": action, "reward": reward, "start": start}


def check(data: RecordedData, steps: dict[str, np.ndarray], exact: bool = True) -> None:
    """The episodes of a data set are those of the rows."""
    assert [len(span) for span in data.spans] == [LENGTH] * EPISODES
    assert data.action_size == ACTION
    for index in range(EPISODES):
        rows, episode = slice(index * LENGTH, (index + 1) * LENGTH), load_episode(data, index)
        pixels = torch.from_numpy(steps["image"][rows].transpose(0, 3, 1, 2))
        close = (episode.pixels.int() - pixels.int()).abs().float().mean()
        assert close == 0 if exact else close < 12
        assert torch.allclose(episode.action, torch.from_numpy(steps["action"][rows]), atol=1e-6)
        assert torch.allclose(episode.reward, torch.from_numpy(steps["reward"][rows]))


def taken_at(steps: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The same actions and rewards, in the row in which the action was taken."""
    action, reward = np.zeros_like(steps["action"]), np.zeros_like(steps["reward"])
    action[:-1], reward[:-1] = steps["action"][1:], steps["reward"][1:]
    return action, reward


# ------------------------------------------------------------------ V-D4RL


def vd4rl_episodes(folder: Path, steps: dict[str, np.ndarray]) -> list[Path]:
    """The 64-pixel form: an .npz per episode, named by time, identifier and length."""
    flags = {"is_first": np.arange(LENGTH) == 0, "is_last": np.arange(LENGTH) == LENGTH - 1}
    flags["is_terminal"] = np.zeros(LENGTH, bool)
    paths = []
    for index in range(EPISODES):
        rows = slice(index * LENGTH, (index + 1) * LENGTH)
        arrays = {key: steps[key][rows] for key in ("image", "action", "reward")}
        arrays["discount"] = np.ones(LENGTH, np.float32)
        name = f"20220510T10162{index}-{index:032x}-{LENGTH}.npz"
        paths.append(write_arrays(folder / name, arrays | flags))
    return paths


def test_vd4rls_episodes_of_64_pixels(tmp_path, steps):
    vd4rl_episodes(tmp_path, steps)
    check(opened(tmp_path), steps)
    check(opened(tmp_path, format="vd4rl"), steps)


def test_vd4rls_shards_of_84_pixels(tmp_path, steps):
    h5py = pytest.importorskip("h5py", reason="needs the extra recorded")
    kinds = np.ones(EPISODES * LENGTH)
    kinds[::LENGTH], kinds[LENGTH - 1 :: LENGTH] = 0, 2
    with h5py.File(tmp_path / "shard_0.hdf5", "w") as file:
        file.create_dataset("observation", data=steps["image"].transpose(0, 3, 1, 2), compression=1)
        for key in ("action", "reward"):
            file.create_dataset(key, data=steps[key])
        file.create_dataset("discount", data=np.ones(EPISODES * LENGTH))
        file.create_dataset("step_type", data=kinds)
    check(opened(tmp_path), steps)
    with h5py.File(tmp_path / "shard_0.hdf5", "a") as file:
        del file["step_type"]
    with pytest.raises(DataError, match=r"shard_0\.hdf5: step_type is missing; it holds action"):
        opened(tmp_path)
    (tmp_path / "shard_0.hdf5").write_bytes(b"no hdf5")
    with pytest.raises(DataError, match=r"shard_0\.hdf5 can't be read as an hdf5 file"):
        opened(tmp_path)


def test_the_folder_of_torchrls_vd4rl_class(tmp_path, steps):
    from torchrl.data.datasets import vd4rl

    # What the class does after its download, with its own functions.
    parts = [
        vd4rl.VD4RLExperienceReplay._process_data(vd4rl._from_npz(path).unlock_())
        for path in vd4rl_episodes(tmp_path, steps)
    ]
    stored = parts[0][0].expand(EPISODES * LENGTH).memmap_like(str(tmp_path / "main"))
    for index, part in enumerate(parts):
        stored[index * LENGTH : (index + 1) * LENGTH] = part
    data = opened(tmp_path / "main")
    check(data, steps)
    # As transitions they would be wrong: the action of a row is not that of its next pixels.
    row = TensorDict.load_memmap(tmp_path / "main")[2]
    assert torch.equal(row["next", "pixels"], torch.from_numpy(steps["image"][3]))
    assert torch.equal(row["action"], torch.from_numpy(steps["action"][2]))


# ------------------------------------------------------------------ videos


def write_video(path: Path, images: np.ndarray) -> None:
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        codec = "ffv1" if path.suffix == ".mkv" else "mpeg4"
        stream = container.add_stream(codec, rate=FPS)
        stream.width, stream.height = images.shape[2], images.shape[1]
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        stream.bit_rate = 4_000_000
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def write_table(path: Path, columns: dict[str, Any]) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def columns_of(action: np.ndarray, reward: np.ndarray) -> dict[str, Any]:
    named = {f"action_{index}": action[:, index] for index in range(ACTION)}
    return named | {"reward": reward}


@pytest.mark.parametrize("last", [0, 1], ids=["a row per frame", "none for the last"])
def test_videos_with_a_table_each(tmp_path, steps, last):
    action, reward = taken_at(steps)
    for index in range(EPISODES):
        rows = slice(index * LENGTH, (index + 1) * LENGTH)
        write_video(tmp_path / f"{index}.mkv", steps["image"][rows])
        short = slice(index * LENGTH, (index + 1) * LENGTH - last)
        write_table(tmp_path / f"{index}.csv", columns_of(action[short], reward[short]))
    check(opened(tmp_path), steps)
    write_table(tmp_path / "1.csv", columns_of(action[:3], reward[:3]))
    with pytest.raises(
        DataError, match=r"1\.mkv: has 7 frames, but its table has 3 rows; .*7 or 6"
    ):
        opened(tmp_path)
    write_table(tmp_path / "1.csv", {"action_0": action[:7, 0]})
    with pytest.raises(DataError, match=r"1\.mkv: column reward is missing"):
        opened(tmp_path)
    (tmp_path / "1.csv").unlink()
    with pytest.raises(DataError, match=r"actions are missing; allowed: 1\.csv, or actions\.csv"):
        opened(tmp_path)


def test_videos_with_one_table(tmp_path, steps):
    names = np.repeat([f"{index}.mkv" for index in range(EPISODES)], LENGTH)
    for index in range(EPISODES):
        images = steps["image"][index * LENGTH : (index + 1) * LENGTH]
        write_video(tmp_path / f"{index}.mkv", images)
    led_to = columns_of(steps["action"], steps["reward"])
    ends = {"is_terminal": [0] * (LENGTH - 1) + [1] + [0] * 2 * LENGTH}
    write_table(tmp_path / "actions.csv", {"video": names} | led_to | ends)
    data = opened(tmp_path, actions="led_to")
    check(data, steps)
    assert [load_episode(data, index).terminated for index in range(3)] == [True, False, False]
    (tmp_path / "0.mkv").write_bytes(b"no video")
    with pytest.raises(DataError, match=r"0\.mkv can't be read as a video"):
        opened(tmp_path)


# ------------------------------------------------------------------ LeRobot

TEMPLATES = {
    "v2.1": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    "v3.0": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
}
CAMERA = "observation.images.top"


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra recorded")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra recorded")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)


def lerobot(folder: Path, steps: dict[str, np.ndarray], version: str, kind: str = "video") -> None:
    """Write a data set with the layout of its version."""
    action, reward = taken_at(steps)
    kinds = {CAMERA: {"dtype": kind, "shape": [SIZE, SIZE, 3]}}
    info = {
        "codebase_version": version,
        "fps": FPS,
        "chunks_size": 1000,
        "video_path": TEMPLATES[version],
        "features": kinds | {"action": {"dtype": "float32", "shape": [ACTION]}},
    }
    (folder / "meta").mkdir(parents=True)
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    index = np.arange(EPISODES * LENGTH)
    columns: dict[str, list[Any]] = {
        "action": action.tolist(),
        "next.reward": reward.tolist(),
        "next.done": (index % LENGTH == LENGTH - 1).tolist(),
        "episode_index": (index // LENGTH).tolist(),
        "frame_index": (index % LENGTH).tolist(),
        "index": index.tolist(),
    }
    if kind == "image":
        columns[CAMERA] = [{"bytes": png(image), "path": None} for image in steps["image"]]
    if version == "v3.0":
        write_parquet(folder / "data/chunk-000/file-000.parquet", columns)
    for episode in range(EPISODES):
        rows = slice(episode * LENGTH, (episode + 1) * LENGTH)
        if version == "v2.1":
            name = f"data/chunk-000/episode_{episode:06d}.parquet"
            write_parquet(folder / name, {key: values[rows] for key, values in columns.items()})
        if version == "v2.1" and kind == "video":
            place = {"episode_chunk": 0, "video_key": CAMERA, "episode_index": episode}
            write_video(folder / TEMPLATES[version].format(**place), steps["image"][rows])
    if version == "v3.0" and kind == "video":
        place = {"chunk_index": 0, "video_key": CAMERA, "file_index": 0}
        write_video(folder / TEMPLATES[version].format(**place), steps["image"])
        begin = [episode * LENGTH / FPS for episode in range(EPISODES)]
        listed = {
            "episode_index": list(range(EPISODES)),
            "length": [LENGTH] * EPISODES,
            f"videos/{CAMERA}/chunk_index": [0] * EPISODES,
            f"videos/{CAMERA}/file_index": [0] * EPISODES,
            f"videos/{CAMERA}/from_timestamp": begin,
        }
        write_parquet(folder / "meta/episodes/chunk-000/file-000.parquet", listed)


def png(image: np.ndarray) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("version", TEMPLATES)
@pytest.mark.parametrize("kind", ["video", "image"])
def test_lerobots_data_sets(tmp_path, steps, version, kind):
    lerobot(tmp_path / "data", steps, version, kind)
    data = opened(tmp_path / "data")
    assert data.convention == "taken_at"
    check(data, steps, exact=kind == "image")
    with pytest.raises(DataError, match=r"data\.camera='side' is unknown; allowed: observation"):
        opened(tmp_path / "data", camera="side")


def test_lerobots_actions_may_have_any_range(tmp_path, steps):
    scale = np.array([3.0, 50.0], np.float32)
    wide = steps | {"action": steps["action"] * scale}
    lerobot(tmp_path / "data", wide, "v3.0", "image")
    with pytest.raises(DataError, match=r"action lies in .*allowed: \[-1, 1\].*data.action_range"):
        opened(tmp_path / "data")
    data = opened(tmp_path / "data", action_range="data")
    low, high = data.action_limits
    assert np.allclose(low, taken_at(wide)[0].min(0))
    found = load_episode(data, 1).action[1:]
    original = (found.numpy() + 1) / 2 * (high - low) + low
    assert np.allclose(original, wide["action"][LENGTH + 1 : 2 * LENGTH], atol=1e-4)
    assert float(found.abs().max()) <= 1


def test_what_a_lerobot_data_set_lacks_is_named(tmp_path, steps):
    lerobot(tmp_path / "a", steps, "v3.0")
    next((tmp_path / "a" / "videos").rglob("*.mp4")).unlink()
    with pytest.raises(DataError, match=r"episode 0: its video is missing .*file-000\.mp4"):
        opened(tmp_path / "a")
    write_parquet(tmp_path / "a/data/chunk-000/file-000.parquet", {"action": [[0.0, 0.0]]})
    with pytest.raises(DataError, match=r"next\.reward is missing; it holds action"):
        opened(tmp_path / "a")
    (tmp_path / "a/meta/info.json").write_text('{"codebase_version": "v9.0"}')
    with pytest.raises(DataError, match=r"codebase_version v9\.0; allowed: 2\.x and 3\.x"):
        opened(tmp_path / "a")


def test_the_folder_of_torchrls_lerobot_class(tmp_path, steps):
    from torchrl.data.datasets.lerobot import lerobot_columns_to_tensordict

    action, reward = taken_at(steps)
    index = torch.arange(EPISODES * LENGTH)
    columns = {
        CAMERA: torch.from_numpy(steps["image"].transpose(0, 3, 1, 2).copy()),
        "action": torch.from_numpy(action),
        "next.reward": torch.from_numpy(reward),
        "episode_index": index // LENGTH,
        "frame_index": index % LENGTH,
    }
    lerobot_columns_to_tensordict(columns).memmap_(tmp_path / "owner_name")
    check(opened(tmp_path / "owner_name"), steps)


def test_a_folder_of_nothing_says_what_is_allowed(tmp_path):
    with pytest.raises(DataError, match=r"holds no recorded episodes; allowed: \*\.npz, \*\.hdf5"):
        opened(tmp_path)
    with pytest.raises(DataError, match="neither a folder nor"):
        opened(tmp_path / "nothing")


def test_the_reward_of_an_episodes_last_action_is_not_lost():
    reward = np.array([0, 2, 1, 0, 0, 4, 7], np.float32)  # of the action taken in each row
    starts = np.array([1, 0, 0, 1, 0, 0, 1], bool)
    moved = rewards_with_observations(reward, starts)
    assert moved.tolist() == [0, 0, 2 + 1, 0, 0, 0 + 4, 7]
    assert moved.sum() == reward.sum()

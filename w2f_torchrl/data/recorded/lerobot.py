"""LeRobot data sets on disk, of format 2 and 3, and the copies that TorchRL converts them to.

A data set is a folder with ``meta/info.json``, tables ``data/**/*.parquet`` with a row per frame,
and images in those tables or in ``videos/``. A row holds the action taken at its frame and, as
``next.reward`` and ``next.done``, what it led to. (TorchRL 0.14.1's ``LeRobotExperienceReplay``
reads this layout only after it has downloaded it from the hub; the folder that it converts a data
set to, ``ROOT/OWNER_NAME``, is read through the class.)
"""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from w2f_torchrl.config import DataConfig
from w2f_torchrl.data.recorded.episodes import Array, DataError, RecordedData, Span
from w2f_torchrl.data.recorded.form import check_image, check_rows
from w2f_torchrl.data.recorded.rows import (
    Rows,
    RowsData,
    choose_camera,
    require,
    rewards_with_observations,
)
from w2f_torchrl.data.recorded.vd4rl import EXTRA
from w2f_torchrl.data.recorded.videos import decode_frames
from w2f_torchrl.envs.scenery.clip_files import resize_picture

IMAGES = "observation.images."
NEEDED = ("action", "next.reward", "episode_index", "frame_index")


class Place(NamedTuple):
    """Where an episode's frames lie in a video."""

    path: Path
    start: int


class LeRobotData(RecordedData):
    """Episodes of a LeRobot data set.

    Args:
        settings: The run's settings of recorded data.
        image_size: Side of the images that a run trains on, pixels.

    Raises:
        DataError: If pyarrow is missing, or the data set can't be read or lacks a column.
    """

    def __init__(self, settings: DataConfig, image_size: int) -> None:
        super().__init__(settings, image_size)
        if importlib.util.find_spec("pyarrow") is None:
            raise DataError(f"{self.path} needs pyarrow: {EXTRA}")
        self.convention = "taken_at" if settings.actions == "auto" else settings.actions
        self.has_mask, self.states = False, ()
        self.info = _read_info(self.path)
        features = self.info.get("features", {})
        cameras = [n for n, f in features.items() if f.get("dtype") in ("video", "image")]
        self.camera = choose_camera(self.path, cameras, settings.camera)
        self.in_video = features[self.camera]["dtype"] == "video"
        self._open: tuple[Path, Any] | None = None
        rows = self._read_rows()
        self.rows = rows
        starts = np.flatnonzero(rows["frame_index"] == 0).tolist()
        if starts[:1] != [0]:
            raise DataError(f"{self.path}: frame_index of the first row must be 0.")
        lengths = np.diff([*starts, len(rows["action"])]).tolist()
        self.learn_actions([self.path], [rows["action"]])
        check_rows(str(self.path), rows, starts, self)
        self.spans = [
            Span(f"{self.path}, episode {index}", ((self.path, start, start + length),))
            for index, (start, length) in enumerate(zip(starts, lengths, strict=True))
        ]
        self.places = self._find_videos() if self.in_video else {}

    def read(self, span: Span) -> dict[str, Array]:
        """Read an episode, and decode its images."""
        _, start, stop = span.parts[0]
        rows = {key: self.rows[key][start:stop] for key in ("action", "reward", "is_terminal")}
        if self.in_video:
            place = self.places[int(self.rows["episode_index"][start])]
            last = place.start + stop - start
            image = decode_frames(place.path, self.image_size, place.start, last)
        else:
            image = self._decode_images(start, stop)
        return rows | {"image": image}

    def _read_rows(self) -> dict[str, Array]:
        """Read the columns of few numbers, sorted by ``index``."""
        columns: dict[str, list[Array]] = {}
        self.files: list[tuple[Path, int]] = []
        for path in sorted((self.path / "data").rglob("*.parquet")):
            table = _read_parquet(path)
            require(str(path), NEEDED, table.column_names)
            names = [n for n in (*NEEDED, "next.done") if n in table.column_names]
            for name in names:
                columns.setdefault(name, []).append(_dense(path, name, table.column(name)))
            self.files.append((path, table.num_rows))
        if not self.files:
            raise DataError(f"{self.path}: data/**/*.parquet are missing.")
        rows = {name: np.concatenate(parts) for name, parts in columns.items()}
        first = rows["frame_index"] == 0
        reward = rows.pop("next.reward").reshape(-1)
        if self.convention == "taken_at":
            reward = rewards_with_observations(reward, first)
        # A done frame is the last of its episode; that the task is over, as against cut, is not
        # said, so that episodes count as cut.
        rows.pop("next.done", None)
        return rows | {
            "reward": reward,
            "is_first": first,
            "is_terminal": np.zeros(len(first), bool),
        }

    def _find_videos(self) -> dict[int, Place]:
        """Return where each episode's frames are."""
        template, fps = str(self.info["video_path"]), float(self.info["fps"])
        if _version(self.info) < 3:
            size = int(self.info.get("chunks_size", 1000))
            indices = {int(self.rows["episode_index"][s.parts[0][1]]) for s in self.spans}
            found = {
                index: Place(
                    self.path
                    / template.format(
                        episode_chunk=index // size, video_key=self.camera, episode_index=index
                    ),
                    0,
                )
                for index in indices
            }
        else:
            found = {}
            for file in sorted((self.path / "meta" / "episodes").rglob("*.parquet")):
                for row in _read_parquet(file).to_pylist():
                    prefix = f"videos/{self.camera}/"
                    require(str(file), (f"{prefix}file_index", f"{prefix}from_timestamp"), row)
                    path = self.path / template.format(
                        video_key=self.camera,
                        chunk_index=int(row[f"{prefix}chunk_index"]),
                        file_index=int(row[f"{prefix}file_index"]),
                    )
                    begin = round(float(row[f"{prefix}from_timestamp"]) * fps)
                    found[int(row["episode_index"])] = Place(path, begin)
        for span in self.spans:
            index = int(self.rows["episode_index"][span.parts[0][1]])
            if index not in found or not found[index].path.is_file():
                where = found[index].path if index in found else "meta/episodes"
                raise DataError(f"{span.name}: its video is missing ({where}).")
        return found

    def _decode_images(self, start: int, stop: int) -> Array:
        """Decode images that lie in the tables as files."""
        from PIL import Image

        frames, offset = [], 0
        for path, count in self.files:
            begin, end = max(start - offset, 0), min(stop - offset, count)
            offset += count
            if begin >= end:
                continue
            if self._open is None or self._open[0] != path:
                self._open = path, _read_parquet(path).column(self.camera)
            for cell in self._open[1].slice(begin, end - begin).to_pylist():
                try:
                    with Image.open(io.BytesIO(cell["bytes"])) as picture:
                        frames.append(resize_picture(picture.convert("RGB"), self.image_size))
                except (TypeError, KeyError, OSError, ValueError) as error:
                    raise DataError(
                        f"{path}: {self.camera} holds something else than image files: {error}"
                    ) from error
        return np.stack(frames)


def open_converted(settings: DataConfig, image_size: int, path: Path) -> RowsData:
    """Open the folder that ``LeRobotExperienceReplay`` converts a data set to.

    Raises:
        DataError: If it lacks an entry, or its images are in videos.
    """
    from torchrl.data.datasets import LeRobotExperienceReplay

    if (path / "video_refs.json").exists():
        raise DataError(
            f"{path} refers to videos elsewhere: name the folder of the LeRobot data set itself, "
            "which has meta/info.json."
        )
    replay = LeRobotExperienceReplay(path.name, root=path.parent, download=False)
    rows = replay[:]
    names = [".".join(k if isinstance(k, tuple) else (k,)) for k in rows.keys(True, True)]
    require(str(path), ("action", "next.reward", "frame"), names)
    cameras = [name for name in names if name.startswith("observation.image.")]
    camera = choose_camera(path, cameras, settings.camera)
    image = rows[tuple(camera.split("."))].numpy()
    check_image(str(path), camera, image.shape, image.dtype)
    first = rows["frame"].numpy().reshape(-1) == 0
    reward = rows["next", "reward"].numpy().reshape(-1)
    if settings.actions != "led_to":
        reward = rewards_with_observations(reward, first)
    small = {
        "action": rows["action"].numpy(),
        "reward": reward,
        "is_first": first,
        "is_terminal": np.zeros(len(first), bool),
    }
    return RowsData(settings, image_size, [Rows(path, small, {"image": image})], "taken_at")


def _version(info: Mapping[str, Any]) -> int:
    return int(str(info.get("codebase_version", "v3.0")).lstrip("v").split(".")[0])


def _read_info(path: Path) -> dict[str, Any]:
    try:
        info: dict[str, Any] = json.loads((path / "meta" / "info.json").read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: meta/info.json can't be read: {error}") from error
    if _version(info) not in (2, 3):
        raise DataError(
            f"{path}: meta/info.json has codebase_version {info.get('codebase_version')}; allowed: "
            "2.x and 3.x."
        )
    return info


def _read_parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} can't be read as a parquet file: {error}") from error


def _dense(path: Path, name: str, column: Any) -> Array:
    """Return a column of numbers, or of lists of as many, as an array."""
    values = column.to_pylist()
    try:
        dense = np.array(values)
    except ValueError as error:
        raise DataError(f"{path}: {name} has lists of different lengths.") from error
    if dense.dtype == object or dense.dtype.kind not in "biuf":
        raise DataError(f"{path}: {name} holds something else than numbers.")
    return dense.astype(np.float32) if dense.dtype == np.float64 else dense

"""Videos with a table of actions and rewards for each.

``NAME.mp4`` (or another container) is an episode, and ``NAME.csv`` its table, with a header and a
row per frame: ``action_0``, ``action_1``, ... and ``reward``, and ``is_terminal`` (0 or 1) if
episodes can end. Or one ``actions.csv`` has the rows of all videos, with their names in the column
``video``. A row holds the action taken at its frame, and the reward of that action; the last frame
of an episode needs no row.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from w2f_torchrl.config import DataConfig
from w2f_torchrl.data.recorded.episodes import Array, DataError, RecordedData, Span
from w2f_torchrl.data.recorded.form import check_rows
from w2f_torchrl.data.recorded.rows import rewards_with_observations
from w2f_torchrl.envs.scenery.clip_files import (
    VIDEO_SUFFIXES,
    BackgroundError,
    read_video,
    resize_picture,
)

ALL = "actions.csv"


class VideoData(RecordedData):
    """Episodes in a folder of videos.

    Args:
        settings: The run's settings of recorded data.
        image_size: Side of the images that a run trains on, pixels.

    Raises:
        DataError: If a table is missing or lacks a column, or its rows are not those of the video.
    """

    def __init__(self, settings: DataConfig, image_size: int) -> None:
        super().__init__(settings, image_size)
        self.convention = "taken_at" if settings.actions == "auto" else settings.actions
        self.has_mask, self.states = False, ()
        videos = find_videos(self.path)
        tables = _read_tables(self.path, videos)
        self.rows = {
            video: _complete(video, tables[video], count_frames(video), self.convention)
            for video in videos
        }
        self.learn_actions(videos, [self.rows[video]["action"] for video in videos])
        for video in videos:
            check_rows(str(video), self.rows[video], [0], self)
        self.spans = [Span(str(v), ((v, 0, len(self.rows[v]["action"])),)) for v in videos]

    def read(self, span: Span) -> dict[str, Array]:
        """Decode an episode; its images are resized as they are decoded."""
        path, _, length = span.parts[0]
        return self.rows[path] | {"image": decode_frames(path, self.image_size, 0, length)}


def find_videos(folder: Path) -> list[Path]:
    """Return the videos of a folder by name."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith(".")
    )


def count_frames(path: Path) -> int:
    """Return the number of a video's frames.

    Raises:
        DataError: If it can't be read.
    """
    return sum(1 for _ in _pictures(path))


def decode_frames(path: Path, size: int, start: int, stop: int) -> Array:
    """Decode frames ``start`` to ``stop`` of a video, uint8 ``[T, size, size, 3]``.

    Raises:
        DataError: If it can't be read, or has fewer frames.
    """
    frames = []
    for number, picture in enumerate(_pictures(path)):
        if number >= stop:
            break
        if number >= start:
            frames.append(resize_picture(picture, size))
    if len(frames) < stop - start:
        raise DataError(f"{path}: has {start + len(frames)} frames, but {stop} are needed.")
    return np.stack(frames)


def _pictures(path: Path) -> Iterator[Any]:
    try:
        yield from read_video(path, [])
    except BackgroundError as error:
        raise DataError(f"{path} can't be read as a video: {error.__cause__ or error}") from error


def _read_tables(folder: Path, videos: Sequence[Path]) -> dict[Path, list[dict[str, str]]]:
    if (folder / ALL).exists():
        rows = _read_csv(folder / ALL)
        tables = {video: [r for r in rows if r.get("video") == video.name] for video in videos}
        without = [video for video in videos if not tables[video]]
        if without:
            raise DataError(
                f"{folder / ALL}: rows of {without[0].name} are missing; the column video must "
                "hold the names of the files."
            )
        return tables
    tables = {}
    for video in videos:
        table = video.with_suffix(".csv")
        if not table.exists():
            raise DataError(
                f"{video}: its actions are missing; allowed: {table.name}, or {ALL} for all videos."
            )
        tables[video] = _read_csv(table)
    return tables


def _read_csv(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            return list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} can't be read as a table: {error}") from error


def _complete(
    video: Path, rows: Sequence[Mapping[str, str]], frames: int, convention: str
) -> dict[str, Array]:
    """Return the entries of an episode, as many as it has frames."""
    names = list(rows[0]) if rows else []
    actions = [name for name in names if name.startswith("action_")]
    wanted = [f"action_{index}" for index in range(max(len(actions), 1))]
    for name in (*wanted, "reward"):
        if name not in names:
            raise DataError(
                f"{video}: column {name} is missing in its table, which has {', '.join(names)}."
            )
    allowed = (frames, frames - 1) if convention == "taken_at" else (frames,)
    if len(rows) not in allowed:
        raise DataError(
            f"{video}: has {frames} frames, but its table has {len(rows)} rows; allowed: "
            f"{' or '.join(map(str, allowed))}."
        )
    action = _column_block(video, rows, wanted)
    reward = _column_block(video, rows, ["reward"])[:, 0]
    ends = "is_terminal" in names and bool(_column_block(video, rows, ["is_terminal"]).any())
    if len(rows) < frames:
        action = np.concatenate([action, np.zeros_like(action[:1])])
        reward = np.append(reward, 0)
    first = np.arange(frames) == 0
    if convention == "taken_at":
        reward = rewards_with_observations(reward, first)
    terminal = (np.arange(frames) == frames - 1) & ends
    return {"action": action, "reward": reward, "is_first": first, "is_terminal": terminal}


def _column_block(video: Path, rows: Sequence[Mapping[str, str]], names: Sequence[str]) -> Array:
    """Return columns as float32 ``[N, len(names)]``."""
    try:
        return np.array([[float(row[name]) for name in names] for row in rows], np.float32)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{video}: its table holds something else than numbers in {', '.join(names)}: {error}"
        ) from error

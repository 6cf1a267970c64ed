"""Episodes in ``.npz`` files, as DreamerV2, DreamerV3, V-D4RL and ``record.py`` write them.

Two kinds of name are known. ``TIME-ID-LENGTH.npz`` (DreamerV2, V-D4RL) is one episode, whose rows
hold the action that *led to* their observation. ``TIME-ID-SUCCESSOR-LENGTH.npz`` (DreamerV3's
replay) is a piece of a stream, continued by the file whose ID is SUCCESSOR, and its rows hold the
action *taken at* their observation (``embodied/core/driver.py`` joins an observation with the
action chosen for it, and the agent shifts them by one). Any other name is one episode too, or
several if ``is_first`` marks them.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from w2f_torchrl.config import DataConfig
from w2f_torchrl.data.recorded.episodes import SMALL, STATES, Array, DataError, RecordedData, Span
from w2f_torchrl.data.recorded.form import check_image, check_rows
from w2f_torchrl.keys import MASK

IMAGES = ("image", "pixels")
EPISODE = re.compile(r"[^-]+-[^-]+-(?P<length>\d+)")
CHUNK = re.compile(r"[^-]+-(?P<id>[^-]+)-(?P<next>[^-]+)-(?P<length>\d+)")
UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError)


class Header(NamedTuple):
    """Shape and dtype of an entry that was not read."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class NpzFile(NamedTuple):
    """What is known of a file without its images."""

    path: Path
    small: dict[str, Array]
    headers: dict[str, Header]

    def __len__(self) -> int:
        """Rows."""
        return len(self.small["action"])


class NpzData(RecordedData):
    """Episodes in a folder of ``.npz`` files, or in one such file.

    Args:
        settings: The run's settings of recorded data.
        image_size: Side of the images that a run trains on, pixels.

    Raises:
        DataError: If a file can't be read, lacks an entry, or differs from the others.
    """

    def __init__(self, settings: DataConfig, image_size: int) -> None:
        super().__init__(settings, image_size)
        self._open: tuple[Path, dict[str, Array]] | None = None
        paths = [self.path] if self.path.is_file() else sorted(self.path.glob("[!.]*.npz"))
        files = [self._look_at(path) for path in paths]
        if not files:
            raise DataError(f"data.path={self.path} holds no .npz files.")
        chunks = [CHUNK.fullmatch(file.path.stem) is not None for file in files]
        if any(chunks) and not all(chunks):
            odd = files[chunks.index(not chunks[0])].path
            raise DataError(
                f"{odd}: data.path holds both episodes and pieces of DreamerV3's replay "
                "(TIME-ID-SUCCESSOR-LENGTH.npz); allowed: one kind per folder."
            )
        self.zero_first = settings.actions == "auto" and settings.format != "vd4rl"
        self.convention = settings.actions
        if settings.actions == "auto":
            self.convention = "taken_at" if chunks[0] else "led_to"
        self.learn_actions(paths, [file.small["action"] for file in files])
        self.has_mask = _all_or_none(files, MASK)
        shared = set.intersection(*(set(file.headers) for file in files))
        self.states = tuple(sorted(name for name in shared if name.startswith(STATES)))
        self.spans = [
            span
            for stream in (_streams(files) if chunks[0] else [[f] for f in files])
            for span in _episodes(stream)
        ]
        for file in files:
            self._check(file)

    def read(self, span: Span) -> dict[str, Array]:
        """Read an episode; the last file is kept open for the next one."""
        parts = []
        for path, start, stop in span.parts:
            if self._open is None or self._open[0] != path:
                self._open = path, self._load(path)
            parts.append({key: values[start:stop] for key, values in self._open[1].items()})
        keys = set.intersection(*(set(part) for part in parts))
        return {key: np.concatenate([part[key] for part in parts]) for key in sorted(keys)}

    def _load(self, path: Path) -> dict[str, Array]:
        try:
            with np.load(path, allow_pickle=False) as archive:
                image = self._image_key(path, archive.files)
                names = [n for n in archive.files if n in (*SMALL, MASK) or n.startswith(STATES)]
                arrays = {name: archive[name] for name in names} | {"image": archive[image]}
        except UNREADABLE as error:
            raise _unreadable(path, error) from error
        return _complete(path, arrays)

    def _look_at(self, path: Path) -> NpzFile:
        """Read a file's small entries, and only the headers of the others."""
        small: dict[str, Array] = {}
        headers: dict[str, Header] = {}
        try:
            with zipfile.ZipFile(path) as archive:
                for member in archive.namelist():
                    name = member.removesuffix(".npy")
                    headers[name] = _header(archive, member)
            with np.load(path, allow_pickle=False) as arrays:
                small = {name: arrays[name] for name in SMALL if name in headers}
        except UNREADABLE as error:
            raise _unreadable(path, error) from error
        self._image_key(path, list(headers))
        for name in ("action", "reward"):
            if name not in small:
                raise DataError(f"{path}: {name} is missing; it holds {_listed(headers)}.")
        return NpzFile(path, _complete(path, small), headers)

    def _image_key(self, path: Path, names: Sequence[str]) -> str:
        wanted = IMAGES if self.settings.camera is None else (self.settings.camera,)
        found = next((name for name in wanted if name in names), None)
        if found is None:
            raise DataError(
                f"{path}: {' or '.join(wanted)} is missing; it holds {_listed(names)}. "
                "data.camera=NAME names the entry with the images."
            )
        return found

    def _check(self, file: NpzFile) -> None:
        """Check all that can be checked without reading images."""
        key = self._image_key(file.path, list(file.headers))
        image, name = file.headers[key], str(file.path)
        check_image(name, key, image.shape, image.dtype)
        for entry, header in file.headers.items():
            used = entry in (*SMALL, key, MASK) or entry.startswith(STATES)
            if used and header.shape[:1] != (len(file),):
                raise DataError(
                    f"{name}: {entry} has the shape {list(header.shape)}, but action has "
                    f"{len(file)} rows; all entries must have as many."
                )
        match = CHUNK.fullmatch(file.path.stem) or EPISODE.fullmatch(file.path.stem)
        if match is not None and int(match["length"]) != len(file):
            raise DataError(
                f"{name}: has {len(file)} rows, but its name says {match['length']}: it was cut."
            )
        # The first row may be in the middle of an episode that an earlier file began.
        starts = sorted({0, *np.flatnonzero(file.small["is_first"]).tolist()})
        check_rows(name, file.small, starts, self)


def _header(archive: zipfile.ZipFile, member: str) -> Header:
    form: Any = np.lib.format  # untyped
    with archive.open(member) as stream:
        version = form.read_magic(stream)
        read = form.read_array_header_1_0 if version == (1, 0) else form.read_array_header_2_0
        shape, _, dtype = read(stream)
    return Header(shape, dtype)


def _complete(path: Path, arrays: dict[str, Array]) -> dict[str, Array]:
    """Add the flags that a file may leave out."""
    length = len(arrays["action"])
    if "is_first" not in arrays:
        arrays["is_first"] = np.arange(length) == 0
    if "is_terminal" not in arrays:  # as in DreamerV2's older files
        ends = arrays["discount"] == 0 if "discount" in arrays else np.zeros(length)
        arrays["is_terminal"] = ends.reshape(length, -1)[:, 0] if length else ends
    for key in ("is_first", "is_last", "is_terminal"):
        if key in arrays and arrays[key].shape not in ((length,), (length, 1)):
            raise DataError(f"{path}: {key} is {list(arrays[key].shape)}; allowed: [{length}].")
        if key in arrays:
            arrays[key] = arrays[key].reshape(length).astype(bool)
    return arrays


def _all_or_none(files: Sequence[NpzFile], key: str) -> bool:
    have = [key in file.headers for file in files]
    if any(have) and not all(have):
        without = files[have.index(False)].path
        raise DataError(
            f"{without}: {key} is missing, though {files[have.index(True)].path} has "
            "it; allowed: all files or none."
        )
    return have[0]


def _streams(files: Sequence[NpzFile]) -> list[list[NpzFile]]:
    """Join pieces of DreamerV3's replay: each names its successor."""
    names = {file.path: CHUNK.fullmatch(file.path.stem) for file in files}
    by_id = {match["id"]: file for file in files if (match := names[file.path]) is not None}
    follow = {match["id"]: match["next"] for match in names.values() if match is not None}
    later = set(follow.values())
    streams = []
    for begin in (name for name in by_id if name not in later):
        stream, here = [], begin
        while here in by_id:
            stream.append(by_id[here])
            here = follow[here]
        streams.append(stream)
    return streams


def _episodes(stream: Sequence[NpzFile]) -> Iterator[Span]:
    """Cut consecutive files into episodes at ``is_first``."""
    rows = [(file.path, row) for file in stream for row in range(len(file))]
    first = np.concatenate([file.small["is_first"] for file in stream])
    starts = sorted({0, *np.flatnonzero(first).tolist()})
    for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
        parts: list[tuple[Path, int, int]] = []
        for path, row in rows[start:stop]:
            if parts and parts[-1][0] == path:
                parts[-1] = path, parts[-1][1], row + 1
            else:
                parts.append((path, row, row + 1))
        whole = len(starts) == 1 and len(stream) == 1
        name = str(parts[0][0]) if whole else f"{parts[0][0]}, row {parts[0][1]}"
        yield Span(name, tuple(parts))


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} can't be read as an .npz file: {error}")


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "nothing"

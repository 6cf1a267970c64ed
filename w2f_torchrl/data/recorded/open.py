"""Open recorded data of any format."""

from __future__ import annotations

from pathlib import Path

from w2f_torchrl.config import DataConfig
from w2f_torchrl.data.recorded.episodes import STATES, DataError, RecordedData
from w2f_torchrl.data.recorded.lerobot import LeRobotData, open_converted
from w2f_torchrl.data.recorded.npz import NpzData
from w2f_torchrl.data.recorded.vd4rl import open_memmap, open_shards
from w2f_torchrl.data.recorded.videos import VideoData, find_videos
from w2f_torchrl.keys import MASK

MIN_EPISODES = 8
"""Minimum number of episodes for probes, which are trained and tested on different ones."""


def check_measurable(data: RecordedData) -> None:
    """Check that the measures of filtering can be made on recorded episodes.

    Raises:
        DataError: If the data have no masks, no true states, or too few episodes.
    """
    missing = None
    if not data.has_mask:
        missing = f"{MASK} is missing; the measures compare with true masks"
    elif not data.states:
        missing = (
            f"true states are missing; allowed keys: {', '.join(f'{p}NAME' for p in STATES)}, as "
            "sota_configs/record.py writes them"
        )
    elif len(data.spans) < MIN_EPISODES:
        missing = f"it has {len(data.spans)} episodes; probes need at least {MIN_EPISODES}"
    if missing is not None:
        raise DataError(
            f"evaluation.filtering=true with data.path={data.path} and no environment: {missing}."
        )


def open_data(settings: DataConfig, image_size: int) -> RecordedData:
    """Open recorded data, and check all but the images.

    Args:
        settings: The run's settings of recorded data.
        image_size: Side of the images that a run trains on, pixels.

    Raises:
        DataError: If the data can't be used; names the file, the key and what is allowed.
    """
    assert settings.path is not None, "only called for recorded data"
    path = Path(settings.path)
    kind = settings.format if settings.format != "auto" else format_of(path)
    if kind == "videos":
        return VideoData(settings, image_size)
    if kind == "lerobot":
        if (path / "meta.json").exists():
            return open_converted(settings, image_size, path)
        return LeRobotData(settings, image_size)
    if kind == "vd4rl":
        if shards := _files(path, "*.hdf5"):
            return open_shards(settings, image_size, shards)
        if (path / "meta.json").exists():
            return open_memmap(settings, image_size, path)
    return NpzData(settings, image_size)


def format_of(path: Path) -> str:
    """Return the format of what lies at a path.

    Raises:
        DataError: If it is none; names the files that would be.
    """
    if path.is_file() and path.suffix in (".npz", ".hdf5"):
        return "npz" if path.suffix == ".npz" else "vd4rl"
    if not path.is_dir():
        raise DataError(f"data.path={path} is neither a folder nor an .npz or .hdf5 file.")
    if (path / "meta" / "info.json").exists():
        return "lerobot"
    if (path / "meta.json").exists():  # a stored tensordict
        return "lerobot" if (path / "frame.memmap").exists() else "vd4rl"
    if _files(path, "*.hdf5"):
        return "vd4rl"
    if _files(path, "*.npz"):
        return "npz"
    if find_videos(path):
        return "videos"
    below = sorted({file.parent for file in path.rglob("*.npz")})
    hint = f" Did you mean data.path={below[0]}?" if below else ""
    raise DataError(
        f"data.path={path} holds no recorded episodes; allowed: *.npz, *.hdf5, videos with tables "
        f"of actions, meta/info.json of LeRobot, or meta.json of TorchRL.{hint}"
    )


def _files(path: Path, pattern: str) -> list[Path]:
    if path.is_file():
        return [path] if path.match(pattern) else []
    return sorted(each for each in path.glob(pattern) if not each.name.startswith("."))

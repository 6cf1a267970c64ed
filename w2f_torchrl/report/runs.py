"""Read run directories for the report."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from w2f_torchrl.logging.environment import read_environment
from w2f_torchrl.logging.metrics_file import read_metrics

logger = logging.getLogger(__name__)

_MEDIA = re.compile(r"(.+)_(\d{9})")


@dataclass
class Media:
    """A video or image of a run."""

    name: str
    """The file's name without the frame count: ``train_imagination_comparison``."""
    frames: int
    path: Path


@dataclass
class Run:
    """The contents of a run directory."""

    path: Path
    label: str
    """Short label, unique among the runs on the page."""
    records: list[dict[str, float]]
    settings: dict[str, str]
    """Every setting by its dotted name, as text."""
    environment: list[dict[str, str]]
    """One entry for each start."""
    videos: list[Media] = field(default_factory=list)
    images: list[Media] = field(default_factory=list)

    def series(self, name: str) -> list[tuple[int, int, float]]:
        """Return frames, updates and value of a metric, in order of time."""
        return [
            (int(row["frames"]), int(row["updates"]), row[name])
            for row in self.records
            if name in row
        ]

    @property
    def frames(self) -> int:
        """Environment frames so far."""
        return int(max((row["frames"] for row in self.records), default=0))

    @property
    def updates(self) -> int:
        """Updates so far."""
        return int(max((row["updates"] for row in self.records), default=0))


def load_runs(paths: list[Path]) -> list[Run]:
    """Read run directories.

    Args:
        paths: Run directories; runs may still be in progress.

    Raises:
        FileNotFoundError: If one has no ``metrics.jsonl``.
        ValueError: If one is given twice.
    """
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"a run is given twice: {', '.join(map(str, paths))}.")
    labels = _labels(resolved)
    return [_load(path, label) for path, label in zip(paths, labels, strict=True)]


def _load(path: Path, label: str) -> Run:
    config = path / "config.yaml"
    settings = _read_settings(config) if config.exists() else {}
    return Run(
        path=path,
        label=label,
        records=read_metrics(path),
        settings=flatten(settings),
        environment=read_environment(path / "environment.json"),
        videos=_media(path / "videos", ".mp4"),
        images=_media(path / "images", ".png"),
    )


def _read_settings(path: Path) -> Mapping[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        settings = None
    if not isinstance(settings, Mapping):
        logger.warning("%s is damaged: the report will not show the run's settings", path)
        return {}
    return settings


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Convert nested settings to texts by dotted name."""
    out: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = "null" if value is None else _text(value)
    return out


def newest(media: list[Media]) -> list[Media]:
    """Return the newest item of each name, ordered by name."""
    last: dict[str, Media] = {}
    for item in sorted(media, key=lambda item: item.frames):
        last[item.name] = item
    return [last[name] for name in sorted(last)]


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _media(folder: Path, suffix: str) -> list[Media]:
    found = []
    for path in sorted(folder.glob(f"*{suffix}")) if folder.is_dir() else []:
        match = _MEDIA.fullmatch(path.stem)
        if match is not None and not path.name.startswith("."):
            found.append(Media(match.group(1), int(match.group(2)), path))
    return found


def _labels(paths: list[Path]) -> list[str]:
    """Return the shortest path endings that distinguish the runs."""
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    raise AssertionError("different paths have different parts")

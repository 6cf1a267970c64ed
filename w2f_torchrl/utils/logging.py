"""Metrics of a run: a JSON Lines file always, and TorchRL's loggers beside it."""

from __future__ import annotations

import json
import logging
import math
import numbers
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torchrl.record.loggers.common import Logger

from w2f_torchrl.utils.progress import ProgressBar
from w2f_torchrl.utils.video import write_video
from w2f_torchrl.utils.wandb_logging import make_wandb_logger

__all__ = ["METRIC_GROUPS", "MetricsLogger", "ProgressBar", "make_wandb_logger", "read_metrics"]

logger = logging.getLogger(__name__)

#: First part of a metric's name: world model, actor and critic, training episodes, ...
METRIC_GROUPS = ("wm", "ac", "episode", "eval", "segmentation", "train", "speed")

_NAME = re.compile(rf"({'|'.join(METRIC_GROUPS)})(/[A-Za-z0-9_]+)+")


class MetricsLogger:
    """Appends metrics to ``run_dir/metrics.jsonl`` and forwards them to TorchRL loggers.

    A line is one JSON object: ``frames`` and ``updates`` (integers), then the metrics (numbers).
    JSON has no NaN and no infinity: a metric that isn't finite is written as ``null``, and the
    first time for each name a warning says which value it was. Lines reach the operating system as
    they are written, so a killed process loses nothing; :meth:`sync` also covers a power failure.

    A last line that a crash left incomplete is removed when the file is opened again.

    To resume a run: open the logger, call :meth:`truncate_after` with the checkpoint's counters,
    go on. Log what belongs to an update before saving its checkpoint, else a resumed run lacks it.

    Args:
        run_dir: The run's directory; created if missing.
        loggers: TorchRL loggers (CSV, TensorBoard, wandb, ...), stepped by frames.
    """

    def __init__(self, run_dir: str | os.PathLike[str], loggers: Sequence[Logger] = ()) -> None:
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.path = self.run_dir / "metrics.jsonl"
        self.loggers = tuple(loggers)
        self._reported: set[str] = set()
        _repair(self.path)
        self._start = _last_counters(self.path)
        self._file = self.path.open("ab", buffering=0)

    def log(
        self, metrics: Mapping[str, float | Tensor], *, frames: int, updates: int
    ) -> dict[str, float]:
        """Write one line.

        Args:
            metrics: Name to number or one-element tensor. All tensors of a device come to the host
                in one transfer.
            frames: Environment frames so far.
            updates: Learner updates so far.

        Returns:
            The metrics as Python floats, NaN and infinities included.

        Raises:
            ValueError: If a name is in no group of ``METRIC_GROUPS``, a tensor holds more than one
                element, or a counter lies before the last line that the file had when it was opened
                (a resumed run that didn't call :meth:`truncate_after`).
            TypeError: If a value is no number.
        """
        for name in metrics:
            _check_name(name)
        if frames < self._start[0] or updates < self._start[1]:
            raise ValueError(
                f"{self.path} already reaches frames={self._start[0]}, updates={self._start[1]}, "
                f"and got frames={frames}, updates={updates}. When resuming, call truncate_after "
                "with the checkpoint's counters first."
            )
        values = _to_floats(metrics)
        self._report_non_finite(values, frames)
        record = {"frames": int(frames), "updates": int(updates)} | {
            name: value if math.isfinite(value) else None for name, value in values.items()
        }
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        for sink in self.loggers:
            sink.log_metrics(dict(values), step=int(frames))
        return values

    def log_video(self, name: str, video: Tensor, *, frames: int, fps: float = 30.0) -> Path:
        """Write ``run_dir/videos/<name>_<frames>.mp4`` and forward the video to the loggers.

        Args:
            name: A metric name, such as ``"train/reconstruction_video"``; ``/`` becomes ``_`` in
                the file's name.
            video: uint8 ``[T, 3, H, W]``.
            frames: Environment frames so far.
            fps: Pictures per second.

        Returns:
            The path of the file.

        Raises:
            ValueError: If the name is in no group, or the video has another shape or dtype.
        """
        _check_name(name)
        path = self.run_dir / "videos" / f"{name.replace('/', '_')}_{frames:09d}.mp4"
        write_video(path, video, fps=fps)
        for sink in self.loggers:
            # TorchRL's loggers want a leading batch dimension.
            sink.log_video(name, video.cpu().unsqueeze(0), step=int(frames), fps=round(fps))
        return path

    def truncate_after(self, frames: int, updates: int | None = None) -> int:
        """Remove the lines that lie after a checkpoint, so that a resumed run repeats none.

        Args:
            frames: The checkpoint's frames; lines with more are removed.
            updates: The checkpoint's updates; lines with more are removed (several updates may
                share one count of frames).

        Returns:
            How many lines were removed.
        """
        kept, removed = [], 0
        for record in _records(self.path):
            late = record["frames"] > frames
            late |= updates is not None and record["updates"] > updates
            removed += late
            if not late:
                kept.append(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.close()
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with temporary.open("wb") as stream:
            stream.writelines(kept)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, self.path)
        self._start = _last_counters(self.path)
        self._file = self.path.open("ab", buffering=0)
        return removed

    def sync(self) -> None:
        """Force the file to disk; call it before saving a checkpoint."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file and shut the loggers down. Closing twice is allowed."""
        if self._file.closed:
            return
        self._file.close()
        for sink in self.loggers:
            sink.close()

    def __enter__(self) -> MetricsLogger:
        """Return the logger itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the logger."""
        self.close()

    def _report_non_finite(self, values: Mapping[str, float], frames: int) -> None:
        for name, value in values.items():
            if not math.isfinite(value) and name not in self._reported:
                self._reported.add(name)
                logger.warning(
                    "%s is %s at frame %d (written as null; said once).", name, value, frames
                )


def read_metrics(run_dir: str | os.PathLike[str]) -> list[dict[str, float]]:
    """Read the metrics of a run, which may still be going on.

    Args:
        run_dir: A run directory.

    Returns:
        One dict per line with ``frames`` and ``updates`` (int) and the metrics (float; NaN where
        the line has null). A last line that is still being written, or was torn, is left out.

    Raises:
        FileNotFoundError: If there is no ``metrics.jsonl``.
        ValueError: If a line before the last is damaged; names the file and the line.
    """
    path = Path(run_dir) / "metrics.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: {run_dir} is not a run directory.")
    return [
        {name: math.nan if value is None else value for name, value in record.items()}
        for record in _records(path)
    ]


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"Unknown metric name {name!r}: expected <group>/<name> with a group among "
            f"{', '.join(METRIC_GROUPS)}."
        )


def _to_floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    values: dict[str, float] = dict.fromkeys(metrics, math.nan)  # keeps the caller's order
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for name, value in metrics.items():
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"{name} must hold one element, got shape {tuple(value.shape)}.")
            scalar = value.detach().reshape(()).to(torch.float64)
            by_device.setdefault(value.device, {})[name] = scalar
        elif isinstance(value, numbers.Real):
            values[name] = float(value)
        else:
            raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}.")
    for group in by_device.values():
        values.update(zip(group, torch.stack(list(group.values())).tolist(), strict=True))
    return values


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            record = _parse(line)
            if record is not None:
                yield record
            elif line.endswith(b"\n"):
                raise ValueError(f"{path}, line {number}: not a metrics record: {line[:80]!r}.")


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not {"frames", "updates"} <= record.keys():
        return None
    return record


def _repair(path: Path) -> None:
    """Make the file end with a whole line."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole, newline, tail = content.rpartition(b"\n")
    if not tail:
        return
    if _parse(tail) is not None:
        with path.open("ab") as stream:  # only the line's end is missing
            stream.write(b"\n")
        return
    logger.warning("%s: removed an incomplete last line of %d bytes.", path, len(tail))
    os.truncate(path, len(whole) + len(newline))


def _last_counters(path: Path) -> tuple[int, int]:
    """Return the highest frames and updates in the file."""
    frames = updates = 0
    if path.exists():
        for record in _records(path):
            frames, updates = max(frames, record["frames"]), max(updates, record["updates"])
    return frames, updates

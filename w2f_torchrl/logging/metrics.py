"""Metrics of a run: always a JSON Lines file, and optionally TorchRL's loggers."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import numbers
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchrl.record.loggers.common import Logger

from w2f_torchrl.logging.background_worker import BackgroundWorker
from w2f_torchrl.logging.metrics_file import last_counters, read_metrics, read_records, repair
from w2f_torchrl.logging.pictures.video import write_image, write_video
from w2f_torchrl.logging.progress import ProgressBar
from w2f_torchrl.logging.sinks import Sinks
from w2f_torchrl.logging.wandb import make_wandb_logger, read_wandb_run
from w2f_torchrl.utils.closing import Closing
from w2f_torchrl.utils.files import atomic_path

__all__ = ["METRIC_GROUPS", "MetricsLogger", "ProgressBar", "make_wandb_logger", "read_metrics"]

logger = logging.getLogger(__name__)

#: First part of a metric's name: world model, actor and critic, training episodes, ...
METRIC_GROUPS = (
    "wm",
    "ac",
    "episode",
    "eval",
    "segmentation",
    "train",
    "speed",
    "weights",
    "gradients",
    "latents",
    "filtering",
    "recorded",
)

_NAME = re.compile(rf"({'|'.join(METRIC_GROUPS)})(/[A-Za-z0-9_]+)+")


class MetricsLogger(Closing):
    """Append metrics to ``run_dir/metrics.jsonl`` and forward them to TorchRL loggers.

    A line is one JSON object: ``frames`` and ``updates`` (integers), then the metrics (numbers).
    JSON has no NaN and no infinity: a metric that is not finite is written as ``null``, and the
    first one of each name is reported with a warning. Each line is passed to the operating system
    at once, so a killed process loses nothing; :meth:`sync` also protects against a power failure.

    An incomplete last line, left by a crash, is removed when the file is opened again.

    To resume a run: open the logger, call :meth:`truncate_after` with the checkpoint's counters,
    then continue. Log the metrics of an update before saving its checkpoint; otherwise a resumed
    run lacks them.

    Videos and images are made in a background thread (:attr:`background`); they are complete after
    :meth:`flush` and :meth:`close`. A failure there, or in a TorchRL logger, is logged and does not
    end the run.

    Args:
        run_dir: The run's directory; created if missing.
        loggers: TorchRL loggers (CSV, TensorBoard, wandb, ...), stepped by frames.
    """

    def __init__(self, run_dir: str | os.PathLike[str], loggers: Sequence[Logger] = ()) -> None:
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.path = self.run_dir / "metrics.jsonl"
        self.sinks = Sinks(loggers)
        self.background = BackgroundWorker()
        self._reported: set[str] = set()
        repair(self.path)
        self._start = last_counters(self.path)
        self._file = self.path.open("ab", buffering=0)

    def log(
        self, metrics: Mapping[str, float | Tensor], *, frames: int, updates: int
    ) -> dict[str, float]:
        """Write one line.

        Args:
            metrics: Name to number or scalar tensor. All tensors of a device are copied to the host
                in one transfer.
            frames: Environment frames so far.
            updates: Learner updates so far.

        Returns:
            The metrics as Python floats, NaN and infinities included.

        Raises:
            ValueError: If a name is in no group of ``METRIC_GROUPS``, a tensor has more than one
                element, or a counter is below that of the last line when the file was opened (a
                resumed run that did not call :meth:`truncate_after`).
            TypeError: If a value is not a number.
        """
        for name in metrics:
            _check_name(name)
        if frames < self._start[0] or updates < self._start[1]:
            raise ValueError(
                f"{self.path} already reaches frames={self._start[0]}, updates={self._start[1]}, "
                f"but got frames={frames}, updates={updates}. When resuming, call truncate_after "
                "with the checkpoint's counters first."
            )
        values = _to_floats(metrics)
        self._report_non_finite(values, frames)
        record = {"frames": int(frames), "updates": int(updates)} | {
            name: value if math.isfinite(value) else None for name, value in values.items()
        }
        self._append(json.dumps(record, allow_nan=False).encode() + b"\n")
        self.sinks.log_metrics(values, step=int(frames))
        return values

    def _append(self, line: bytes) -> None:
        """Write a whole line or nothing.

        Raises:
            OSError: If the disk is full.
        """
        # A full disk may accept part of a line without an error; the next line would follow it.
        size, written = os.fstat(self._file.fileno()).st_size, 0
        try:
            while written < len(line):
                written += self._file.write(line[written:]) or 0
        except OSError:
            os.ftruncate(self._file.fileno(), size)
            raise

    def log_video(
        self,
        name: str,
        video: Tensor | Callable[[], Tensor],
        *,
        frames: int,
        fps: float = 30.0,
        scale: int | None = None,
    ) -> Path | None:
        """Write ``run_dir/videos/<name>_<frames>.mp4`` and forward the video to the loggers.

        Without PyAV no video is made, with a single warning.

        Args:
            name: A metric name, such as ``"train/reconstruction_video"``; ``/`` becomes ``_`` in
                the file's name.
            video: uint8 ``[T, 3, H, W]``, or a function that makes it in the background.
            frames: Environment frames so far.
            fps: Frames per second.
            scale: As in :func:`~w2f_torchrl.logging.pictures.video.write_video`.

        Returns:
            The future path of the file; None if no video is made.

        Raises:
            ValueError: If the name is in no group.
        """
        _check_name(name)
        if importlib.util.find_spec("av") is None:
            if "av" not in self._reported:
                self._reported.add("av")
                logger.warning("this run makes no videos: pip install av")
            return None
        path = self.run_dir / "videos" / f"{name.replace('/', '_')}_{frames:09d}.mp4"

        def make() -> None:
            pictures = (video() if callable(video) else video).cpu()
            write_video(path, pictures, fps=fps, scale=scale)
            self.sinks.log_video(name, path, pictures, step=int(frames), fps=fps)

        self.background.submit(f"video {name} at frame {frames}", make)
        return path

    def log_image(
        self, name: str, picture: Tensor | Callable[[], Tensor], *, frames: int, scale: int = 1
    ) -> Path:
        """Write ``run_dir/images/<name>_<frames>.png`` and forward the image to the loggers.

        Args:
            name: A metric name.
            picture: uint8 ``[3, H, W]``, or a function that makes it in the background.
            frames: Environment frames so far.
            scale: Each pixel becomes a square of this side.

        Returns:
            The future path of the file.

        Raises:
            ValueError: If the name is in no group.
        """
        _check_name(name)
        path = self.run_dir / "images" / f"{name.replace('/', '_')}_{frames:09d}.png"

        def make() -> None:
            pixels = (picture() if callable(picture) else picture).cpu()
            large = pixels.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
            write_image(path, large)
            self.sinks.log_image(name, large, step=int(frames))

        self.background.submit(f"picture {name} at frame {frames}", make)
        return path

    def log_histogram(self, name: str, values: Tensor, *, frames: int) -> None:
        """Forward a histogram to the loggers that support them.

        Args:
            name: A metric name.
            values: Floating point or integer ``[...]``; values that are not finite are left out.
            frames: Environment frames so far.

        Raises:
            ValueError: If the name is in no group.
        """
        _check_name(name)
        flat = values.detach().reshape(-1).float().cpu()
        finite = flat[flat.isfinite()]
        if len(finite):
            self.sinks.log_histogram(name, finite, step=int(frames))

    def flush(self) -> None:
        """Wait until all videos and images are complete."""
        self.background.flush()

    def state_dict(self) -> dict[str, Any]:
        """Force the file to disk, and return its size and what Weights & Biases has of the run."""
        self.sync()
        return {"bytes": self.path.stat().st_size, "wandb": read_wandb_run(self.run_dir)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Cut the file back to the moment of a checkpoint.

        Args:
            state: ``frames`` and ``updates`` of the checkpoint, and the ``bytes`` that the file had
                then, None if it was another run's.
        """
        size, now = state["bytes"], self.path.stat().st_size
        if size is None or size > now:
            if size is not None:
                logger.warning("%s has lost lines that it had at the checkpoint", self.path)
            self.truncate_after(state["frames"], state["updates"])
            return
        os.ftruncate(self._file.fileno(), size)
        self._start = last_counters(self.path)
        self.sinks.truncate_after(state["frames"])

    def truncate_after(self, frames: int, updates: int | None = None) -> int:
        """Remove the lines after a checkpoint, so that a resumed run does not repeat them.

        Args:
            frames: The checkpoint's frames; lines with more are removed.
            updates: The checkpoint's updates; lines with more are removed (several updates may
                share one count of frames).

        Returns:
            Number of removed lines.
        """
        kept, removed = [], 0
        for record in read_records(self.path):
            late = record["frames"] > frames
            late |= updates is not None and record["updates"] > updates
            removed += late
            if not late:
                kept.append(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.close()
        with atomic_path(self.path) as temporary, temporary.open("wb") as stream:
            stream.writelines(kept)
            stream.flush()
            os.fsync(stream.fileno())
        self._start = last_counters(self.path)
        self._file = self.path.open("ab", buffering=0)
        self.sinks.truncate_after(frames)
        return removed

    def sync(self) -> None:
        """Flush the file to disk; call it before saving a checkpoint."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Finish the videos, close the file, and shut the loggers down. May be called twice."""
        if self._file.closed:
            return
        self.background.close()
        self._file.close()
        self.sinks.close()

    def _report_non_finite(self, values: Mapping[str, float], frames: int) -> None:
        for name, value in values.items():
            if not math.isfinite(value) and name not in self._reported:
                self._reported.add(name)
                logger.warning(
                    "%s is %s at frame %d (written as null; reported once).", name, value, frames
                )


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

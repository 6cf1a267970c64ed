"""TorchRL's loggers of a run behind one lock; their failures never end the run."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torchrl.record.loggers.common import Logger

logger = logging.getLogger(__name__)


class Sinks:
    """Forward metrics, images, videos and histograms to TorchRL loggers.

    The loggers of this package (wandb, TensorBoard, CSV) also have ``log_image``,
    ``log_video_file`` and ``truncate_after``. Any other TorchRL logger receives metrics and videos,
    and histograms if it supports them.

    A logger that raises (its server is down, its disk full) is reported with its traceback and then
    disabled; the others and the run continue.

    Args:
        loggers: TorchRL loggers.
    """

    def __init__(self, loggers: Sequence[Logger] = ()) -> None:
        self.loggers = list(loggers)
        self.failed: list[str] = []
        """Names of the loggers that raised and were disabled."""
        self._lock = threading.Lock()

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Forward numbers."""
        self._each(lambda sink: sink.log_metrics(dict(values), step=step))

    def log_video(self, name: str, path: Path, video: Tensor, *, step: int, fps: float) -> None:
        """Forward a video: as a file to loggers that accept one, else uint8 ``[1, T, 3, H, W]``.

        Args:
            name: The video's name.
            path: An MP4 file.
            video: Its frames, uint8 ``[T, 3, H, W]``.
            step: Environment frames.
            fps: Frames per second.
        """

        def forward(sink: Logger) -> None:
            if hasattr(sink, "log_video_file"):
                sink.log_video_file(name, path, video, step=step, fps=fps)
            else:
                sink.log_video(name, video.unsqueeze(0), step=step, fps=round(fps))

        self._each(forward)

    def log_image(self, name: str, picture: Tensor, *, step: int) -> None:
        """Forward an image, uint8 ``[3, H, W]``, to loggers that accept one."""
        self._each(lambda sink: sink.log_image(name, picture, step=step), "log_image")

    def log_histogram(self, name: str, values: Tensor, *, step: int) -> None:
        """Forward the histogram of values ``[N]`` to loggers that support histograms."""

        def forward(sink: Logger) -> None:
            try:
                sink.log_histogram(name, values.numpy(), step=step)
            except NotImplementedError:  # a logger without histograms
                return

        self._each(forward, "log_histogram")

    def truncate_after(self, frames: int) -> None:
        """Remove entries after a checkpoint from the loggers that can do so."""
        self._each(lambda sink: sink.truncate_after(frames), "truncate_after")

    def close(self) -> None:
        """Flush the loggers and shut them down."""
        self._each(lambda sink: sink.close())
        self.loggers = []

    def _give_up(self, sink: Any) -> None:
        self.failed.append(type(sink).__name__)
        self.loggers.remove(sink)
        try:
            sink.close()  # data received so far is kept
        except Exception:
            logger.exception("%s could not be closed either.", type(sink).__name__)

    def _each(self, action: Callable[[Any], object], method: str | None = None) -> None:
        with self._lock:
            for sink in list(self.loggers):
                if method is not None and not hasattr(sink, method):
                    continue
                try:
                    action(sink)
                except Exception:
                    logger.exception(
                        "%s failed and is disabled for this run; metrics.jsonl, videos and "
                        "images continue.",
                        type(sink).__name__,
                    )
                    self._give_up(sink)

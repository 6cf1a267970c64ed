"""TensorBoard and CSV files, through TorchRL's loggers."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torchrl.record.loggers.csv import CSVLogger
from torchrl.record.loggers.tensorboard import TensorboardLogger

from w2f_torchrl.utils.files import write_text

GIF_PICTURES = 100
"""Maximum number of frames of a video in TensorBoard, which stores videos as GIF."""


class RunTensorboardLogger(TensorboardLogger):
    """TorchRL's TensorBoard logger, with images, and videos without moviepy.

    torch's ``add_video`` imports a module that moviepy 2 no longer has, and then drops the video
    with a printed line.
    """

    def log_image(self, name: str, picture: Tensor, *, step: int) -> None:
        """Log an image, uint8 ``[3, H, W]``."""
        self.experiment.add_image(name, picture, global_step=step)

    def log_video_file(
        self, name: str, path: Path, video: Tensor, *, step: int, fps: float
    ) -> None:
        """Log a video, uint8 ``[T, 3, H, W]``, as a GIF of at most :data:`GIF_PICTURES`."""
        del path
        from tensorboard.compat.proto.summary_pb2 import Summary

        every = -(-len(video) // GIF_PICTURES)
        shown = video[::every].permute(0, 2, 3, 1).contiguous().numpy()
        first, *rest = [Image.fromarray(picture) for picture in shown]
        buffer = io.BytesIO()
        first.save(
            buffer,
            "GIF",
            save_all=True,
            append_images=rest,
            duration=round(1000 * every / fps),
            loop=0,
        )
        picture = Summary.Image(
            height=video.shape[2],
            width=video.shape[3],
            colorspace=3,
            encoded_image_string=buffer.getvalue(),
        )
        summary = Summary(value=[Summary.Value(tag=name, image=picture)])
        self.experiment.file_writer.add_summary(summary, step)

    def log_histogram(
        self, name: str, data: Any, *, step: int | None = None, bins: str = "tensorflow"
    ) -> None:
        """Log the histogram of values ``[N]``."""
        super().log_histogram(name, data, step=step, bins=bins)

    def truncate_after(self, frames: int) -> None:
        """Make TensorBoard hide entries that an earlier process wrote after ``frames``."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        # SummaryWriter does this with `purge_step`, which TorchRL does not pass on.
        start = SessionLog(status=SessionLog.START)
        self.experiment.file_writer.add_event(Event(session_log=start), frames + 1)


class RunCSVLogger(CSVLogger):
    """TorchRL's CSV logger for numbers; videos are already in ``run_dir/videos``."""

    def log_video_file(self, name: str, path: Path, video: Tensor, **kwargs: Any) -> None:
        """Do nothing: TorchRL's logger would write the video again, as a tensor."""

    def truncate_after(self, frames: int) -> None:
        """Remove the rows after ``frames`` from every file."""
        for stream in self.experiment.files.values():
            stream.close()
        self.experiment.files.clear()
        for path in Path(self.experiment.log_dir, "scalars").rglob("*.csv"):
            lines = path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and _step(line) <= frames]
            write_text(path, "".join(kept))


def make_tensorboard_logger(run_dir: Path) -> RunTensorboardLogger:
    """Build the TensorBoard logger of a run, in ``run_dir/tensorboard``.

    Raises:
        ModuleNotFoundError: If tensorboard is missing; the message has the install command.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise ModuleNotFoundError(
            "logging.tensorboard=true needs tensorboard: pip install 'tensorboard>=2.18'"
        )
    return RunTensorboardLogger("tensorboard", log_dir=str(run_dir))


def make_csv_logger(run_dir: Path) -> RunCSVLogger:
    """Build the CSV logger of a run: ``run_dir/csv/scalars/<group>/<name>.csv``."""
    return RunCSVLogger("csv", log_dir=str(run_dir))


def _step(line: str) -> int:
    return int(line.split(",", 1)[0])

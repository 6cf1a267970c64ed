"""Videos and contact sheets of frames, masks and reconstructions.

Ranges are never guessed: uint8 is 0 to 255, float is 0 to 1 (anything else is an error), bool is a
mask. Shapes use T (time), H and W (pixels).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from w2f_torchrl.utils.files import atomic_path

_MARGIN = 4  # pixels between columns
_TITLE = 14  # pixels above the images for a label


def to_uint8(video: Tensor, name: str = "video") -> Tensor:
    """Convert images to uint8 colours.

    Args:
        video: ``[T, 3, H, W]`` or ``[T, 1, H, W]``; uint8 (0 to 255), floating (0 to 1) or bool.
        name: Name of the video, for messages.

    Returns:
        uint8 ``[T, 3, H, W]`` on the CPU; a single channel becomes grey.

    Raises:
        ValueError: If the shape is wrong, or a float is outside [0, 1] or NaN.
        TypeError: If the dtype is wrong.
    """
    if video.ndim != 4 or video.shape[1] not in (1, 3) or video.numel() == 0:
        raise ValueError(
            f"{name} must have shape [T, 3, H, W] or [T, 1, H, W] with no empty dimension, got "
            f"{list(video.shape)}."
        )
    video = video.detach().cpu()
    if video.dtype == torch.bool:
        video = video.to(torch.uint8) * 255
    elif video.dtype.is_floating_point:
        low, high = video.min().item(), video.max().item()
        if not (low >= 0.0 and high <= 1.0):  # also false for NaN
            raise ValueError(f"{name} is float and must lie in [0, 1], got [{low}, {high}].")
        video = (video.float() * 255.0).round().to(torch.uint8)
    elif video.dtype != torch.uint8:
        raise TypeError(f"{name} must be uint8, floating or bool, got {video.dtype}.")
    return video.expand(-1, 3, -1, -1)


def write_video(
    path: str | os.PathLike[str], frames: Tensor, fps: float = 30.0, *, scale: int | None = None
) -> Path:
    """Write an MP4 file atomically (H.264 if PyAV has an encoder for it, else MPEG-4 Part 2).

    Args:
        path: Path of the file; directories are created.
        frames: uint8 ``[T, 3, H, W]``.
        fps: Frames per second.
        scale: Each pixel becomes a square of this side; None chooses the smallest one for a height
            of at least 256. The codecs need even sizes: odd ones are padded with black.

    Returns:
        The path.

    Raises:
        ValueError: If the shape or dtype is wrong, or ``fps`` or ``scale`` is not positive.
    """
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3 or len(frames) == 0:
        raise ValueError(
            f"frames must be uint8 [T, 3, H, W], got {frames.dtype} {list(frames.shape)}."
        )
    scale = -(-256 // frames.shape[2]) if scale is None else scale
    if fps <= 0 or scale < 1:
        raise ValueError(f"fps and scale must be positive, got fps={fps} and scale={scale}.")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        _encode(temporary, frames.permute(0, 2, 3, 1).cpu().numpy(), fps, scale)
    return path


def write_image(path: str | os.PathLike[str], picture: Tensor) -> Path:
    """Write a PNG file atomically.

    Args:
        path: Path of the file; directories are created.
        picture: uint8 ``[3, H, W]``.

    Returns:
        The path.

    Raises:
        ValueError: If the shape or dtype is wrong.
    """
    if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] != 3:
        raise ValueError(
            f"picture must be uint8 [3, H, W], got {picture.dtype} {list(picture.shape)}."
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = picture.permute(1, 2, 0).contiguous().cpu().numpy()
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")
    return path


def read_video(path: str | os.PathLike[str]) -> Tensor:
    """Read all frames of a video.

    Args:
        path: A video file.

    Returns:
        uint8 ``[T, 3, H, W]``.
    """
    import av  # optional: without it a run trains but makes no videos

    with av.open(os.fspath(path)) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def panel(rows: Mapping[str, Tensor], *, scale: int = 4) -> Tensor:
    """Arrange labelled videos side by side.

    Args:
        rows: Label to ``[T, 3, H, W]`` or ``[T, 1, H, W]``, all of one T, H and W; dtypes and
            ranges as in :func:`to_uint8`.
        scale: Each pixel becomes a square of this side (nearest neighbour).

    Returns:
        uint8 ``[T, 3, H', W']`` with labels above the columns. Pass ``scale=1`` to
        :func:`write_video`.

    Raises:
        ValueError: If no video is given, or the sizes differ.
    """
    columns = _columns(rows)
    first = next(iter(columns.values()))
    height, width = first.shape[2] * scale, first.shape[3] * scale
    canvas = torch.full(
        (len(first), 3, height + _TITLE, len(columns) * (width + _MARGIN) - _MARGIN),
        255,
        dtype=torch.uint8,
    )
    canvas[:, :, :_TITLE] = _title(list(columns), width, canvas.shape[3])
    for index, video in enumerate(columns.values()):
        left = index * (width + _MARGIN)
        enlarged = video.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
        canvas[:, :, _TITLE:, left : left + width] = enlarged
    return canvas


def contact_sheet(
    path: str | os.PathLike[str], columns: Mapping[str, Tensor], every: int = 1, *, scale: int = 2
) -> Path:
    """Save every ``every``-th step of labelled videos as one PNG: a row per step.

    Args:
        path: Path of the file; directories are created.
        columns: As the ``rows`` of :func:`panel`.
        every: Steps between rows.
        scale: Each pixel becomes a square of this side.

    Returns:
        The path.

    Raises:
        ValueError: If ``every`` is below 1, no video is given, or the sizes differ.
    """
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}.")
    pictures = panel({label: video[::every] for label, video in columns.items()}, scale=scale)
    title, body = pictures[0, :, :_TITLE], pictures[:, :, _TITLE:]  # body [T, 3, H', W']
    gap = torch.full_like(body[:, :, :_MARGIN], 255)
    tall = torch.cat([body, gap], 2).transpose(0, 1).flatten(1, 2)  # [3, T * (H' + margin), W']
    sheet = torch.cat([title, tall[:, :-_MARGIN]], 1)
    return write_image(path, sheet)


def _columns(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not rows:
        raise ValueError("No video was given to show.")
    columns = {label: to_uint8(video, label) for label, video in rows.items()}
    shapes = {label: list(video.shape) for label, video in columns.items()}
    if len({tuple(shape) for shape in shapes.values()}) > 1:
        raise ValueError(f"All videos must have the same length and size, got {shapes}.")
    return columns


def _title(labels: list[str], column_width: int, total_width: int) -> Tensor:
    """Draw the labels, ``[3, _TITLE, total_width]``, each shortened to its column."""
    picture = Image.new("RGB", (total_width, _TITLE), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(10)
    for index, label in enumerate(labels):
        text = label
        while text and draw.textlength(text, font=font) > column_width:
            text = text[:-1]
        draw.text((index * (column_width + _MARGIN) + 1, 1), text, fill="black", font=font)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _encode(path: Path, pictures: np.ndarray, fps: float, scale: int) -> None:
    """Encode uint8 ``[T, H, W, 3]``."""
    import av

    height, width = pictures.shape[1] * scale, pictures.shape[2] * scale
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(os.fspath(path), mode="w", format="mp4") as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
        assert isinstance(stream, av.VideoStream)  # the codec decides the stream's class
        stream.width, stream.height = width + width % 2, height + height % 2
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1  # the other cores are for training and environments
        # x264's default preset takes more than twice the time, for files of about the same size.
        x264 = {"crf": "18", "preset": "veryfast"}
        stream.options = dict(x264 if codec == "libx264" else {"qscale": "2"})
        for picture in pictures:
            large = picture.repeat(scale, 0).repeat(scale, 1)
            large = np.pad(large, ((0, height % 2), (0, width % 2), (0, 0)))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(large), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())

"""Clips that are files: folders of images, and videos.

The validation of settings imports this module, so decoders are imported only when a clip is read.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".gif")
MIN_FRAMES = 2
MAX_FRAMES = 1000
"""Longer clips are cut here."""

UNEVEN = 0.5
"""Maximum deviation of a frame interval from the median in an even video, as a share of it."""

# Names of the formats behind the suffixes, in Pillow and FFmpeg.
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF")
_DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,avi,matroska,webm,mpeg,mpegvideo,mpegts,gif"

_PART = re.compile(r"(\D*)(\d*)")

UInt8Array = npt.NDArray[np.uint8]


class BackgroundError(ValueError):
    """A background cannot be used; the message names the file or the setting."""


@dataclass(frozen=True)
class FileClip:
    """A clip in a folder of images or in a video file.

    Frames are stretched to a square, and averaged over areas if they shrink; sizes may differ
    within a clip. Images play in the order of their names, with numbers compared as numbers.

    Args:
        path: A folder or a file.
    """

    path: Path

    @property
    def name(self) -> str:
        """Name for messages."""
        return str(self.path)

    def key(self) -> list[object]:
        """Return its key in the cache, which changes when a file does."""
        files = _images(self.path) if self.path.is_dir() else [self.path]
        parts = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files[:MAX_FRAMES]]
        return ["files", str(self.path.resolve()), parts]

    def read(self, size: int) -> UInt8Array:
        """Decode the clip.

        Args:
            size: Side of the frames, pixels.

        Returns:
            uint8 [T, size, size, 3].

        Raises:
            BackgroundError: If a file cannot be read, or there are fewer than two frames.
        """
        times: list[float | None] = []
        folder = self.path.is_dir()
        pictures = _read_images(self.path) if folder else read_video(self.path, times)
        frames = [
            resize_picture(picture, size) for picture in itertools.islice(pictures, MAX_FRAMES)
        ]
        if not folder:
            frames = [frames[index] for index in even_intervals(times[: len(frames)])]
        if len(frames) < MIN_FRAMES:
            raise BackgroundError(
                f"background clip {self.path} has {len(frames)} frames: it needs at least "
                f"{MIN_FRAMES}."
            )
        return np.stack(frames)


def find_clips(folder: Path) -> list[FileClip]:
    """Return the clips of a folder: its subfolders and its video files, by name.

    Hidden entries, and files without a video suffix, are ignored.

    Raises:
        BackgroundError: If the folder has no clips.
    """
    entries = [path for path in _sorted(folder.iterdir()) if not path.name.startswith(".")]
    clips = [p for p in entries if p.is_dir() or p.suffix.lower() in VIDEO_SUFFIXES]
    if not clips:
        images = any(path.suffix.lower() in IMAGE_SUFFIXES for path in entries)
        why = "images, but no folder of them" if images else "neither"
        raise BackgroundError(
            f"background_source {folder} has no clips: a clip is a folder of images or a video "
            f"file ({' '.join(VIDEO_SUFFIXES)}), and it holds {why}."
        )
    return [FileClip(path) for path in clips]


def _sorted(paths: Iterator[Path]) -> list[Path]:
    """Sort by name, with frame_9 before frame_10."""

    def key(path: Path) -> list[tuple[str, int]]:
        return [(text, int(number or -1)) for text, number in _PART.findall(path.name)]

    return sorted(paths, key=key)


def _images(folder: Path) -> list[Path]:
    return _sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)


def resize_picture(picture: Image.Image, size: int) -> UInt8Array:
    """Stretch an image to ``[size, size, 3]``; averaged over areas if it shrinks."""
    from PIL import Image

    shrinks = min(picture.size) >= size
    means = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
    return np.asarray(picture.resize((size, size), means))


def _as_shown(picture: Image.Image) -> Image.Image:
    """Return an image as a viewer shows it: upright, on black if transparent, 8-bit RGB.

    Raises:
        ValueError: If the range of its values is unknown.
    """
    from PIL import Image, ImageOps

    sixteen_bits = picture.mode.startswith("I;16")
    sixteen_bits |= picture.mode == "I" and picture.format in ("PNG", "PPM")
    if picture.mode in ("I", "F") and not sixteen_bits:
        raise ValueError(
            f"its pixels are {'floating-point' if picture.mode == 'F' else '32-bit'} numbers, "
            "whose range is unknown: save it with 8 or 16 bits"
        )
    transparent = "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA", "RGBa")
    picture = ImageOps.exif_transpose(picture)
    if sixteen_bits:
        values = np.asarray(picture).astype(np.float64) / 257  # 65535 is white, as 255 is
        return Image.fromarray(np.rint(values).astype(np.uint8)).convert("RGB")
    if transparent:
        shown = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", shown.size, (0, 0, 0, 255)), shown)
    return picture.convert("RGB")


def _read_images(folder: Path) -> Iterator[Image.Image]:
    from PIL import Image, UnidentifiedImageError

    for path in _images(folder):
        try:
            # The contents decide, not the name, and only these formats are allowed.
            with Image.open(path, formats=_FORMATS) as picture:
                shown = _as_shown(picture)
        except (
            OSError,
            SyntaxError,
            ValueError,
            UnidentifiedImageError,
            Image.DecompressionBombError,
        ) as error:
            raise BackgroundError(f"background image {path} cannot be read: {error}") from error
        yield shown


def read_video(path: Path, times: list[float | None]) -> Iterator[Image.Image]:
    """Yield the images of a video, and append to ``times`` when each is shown, seconds.

    Raises:
        BackgroundError: If it can't be read.
    """
    import av
    from PIL import Image

    try:
        # Playlists and the like would make FFmpeg read other files, even from the network.
        options = {"format_whitelist": _DEMUXERS, "protocol_whitelist": "file"}
        with av.open(path, options=options) as container:
            if not container.streams.video:
                raise BackgroundError(f"background video {path} has no images.")
            for frame in container.decode(container.streams.video[0]):
                times.append(frame.time)
                picture = Image.fromarray(frame.to_ndarray(format="rgb24"))
                turn = frame.rotation
                yield picture.rotate(turn, expand=True) if turn else picture
    except (av.error.FFmpegError, OSError) as error:
        raise BackgroundError(f"background video {path} cannot be read: {error}") from error


def even_intervals(times: Sequence[float | None]) -> list[int]:
    """Return the frames to show at even intervals, the median of theirs; long ones are repeated.

    A video with even intervals, up to the rounding of its clock, is left unchanged.

    Args:
        times: When each frame is shown, seconds; None if unknown.

    Returns:
        Indices of the frames, at most ``MAX_FRAMES``.
    """
    as_they_are = list(range(len(times)))
    if len(times) < MIN_FRAMES or any(time is None for time in times):
        return as_they_are
    moments = np.array(times, dtype=np.float64)
    intervals = np.diff(moments)
    usual = float(np.median(intervals))
    if usual <= 0 or (np.abs(intervals - usual) <= UNEVEN * usual).all():
        return as_they_are
    count = min(round((moments[-1] - moments[0]) / usual) + 1, MAX_FRAMES)
    ticks = moments[0] + usual * np.arange(count)
    found: list[int] = (np.searchsorted(moments, ticks + usual / 2) - 1).tolist()
    return found

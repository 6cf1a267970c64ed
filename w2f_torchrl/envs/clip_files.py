"""Clips that are files: folders of images, and videos.

Settings are checked with this module, so what decodes is imported where a clip is read.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
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
"""A longer clip ends here."""

_PART = re.compile(r"(\D*)(\d*)")

UInt8Array = npt.NDArray[np.uint8]


class BackgroundError(ValueError):
    """A background can't be used; the message names the file or the setting."""


@dataclass(frozen=True)
class FileClip:
    """A clip in a folder of images or in a video file.

    Frames are stretched to a square, by means over areas where they shrink; within a clip sizes may
    differ. Images play in the order of their names, with numbers compared as numbers.

    Args:
        path: A folder or a file.
    """

    path: Path

    @property
    def name(self) -> str:
        """What messages call it."""
        return str(self.path)

    def key(self) -> list[object]:
        """What the cache knows it by: it changes when a file does."""
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
            BackgroundError: If a file can't be read, or there are fewer than two frames.
        """
        pictures = _read_images(self.path) if self.path.is_dir() else _read_video(self.path)
        frames = [_resize(picture, size) for picture in itertools.islice(pictures, MAX_FRAMES)]
        if len(frames) < MIN_FRAMES:
            raise BackgroundError(
                f"background clip {self.path} has {len(frames)} frames: it needs at least "
                f"{MIN_FRAMES}."
            )
        return np.stack(frames)


def find_clips(folder: Path) -> list[FileClip]:
    """The clips of a folder: its subfolders and its video files, by name.

    Hidden entries, and files that are no videos by their suffix, are left out.

    Raises:
        BackgroundError: If the folder holds no clip.
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
    """By name, with frame_9 before frame_10."""

    def key(path: Path) -> list[tuple[str, int]]:
        return [(text, int(number or -1)) for text, number in _PART.findall(path.name)]

    return sorted(paths, key=key)


def _images(folder: Path) -> list[Path]:
    return _sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)


def _resize(picture: Image.Image, size: int) -> UInt8Array:
    from PIL import Image

    shrinks = min(picture.size) >= size
    means = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
    return np.asarray(picture.convert("RGB").resize((size, size), means))


def _read_images(folder: Path) -> Iterator[Image.Image]:
    from PIL import Image, UnidentifiedImageError

    for path in _images(folder):
        try:
            with Image.open(path) as picture:
                picture.load()
                yield picture
        except (
            OSError,
            SyntaxError,
            UnidentifiedImageError,
            Image.DecompressionBombError,
        ) as error:
            raise BackgroundError(f"background image {path} can't be read: {error}") from error


def _read_video(path: Path) -> Iterator[Image.Image]:
    import av
    from PIL import Image

    try:
        with av.open(path) as container:
            if not container.streams.video:
                raise BackgroundError(f"background video {path} has no pictures in it.")
            for frame in container.decode(container.streams.video[0]):
                yield Image.fromarray(frame.to_ndarray(format="rgb24"))
    except (av.error.FFmpegError, OSError) as error:
        raise BackgroundError(f"background video {path} can't be read: {error}") from error

"""Labelled videos of several windows, which mark observed and imagined frames.

Shape letters: N windows, T time, C, H, W channels, height, width.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from w2f_torchrl.logging.pictures.video import to_uint8

SEEN, IMAGINED = (47, 125, 79), (200, 85, 61)
"""Colours of the bar above frames that the model observed, and above imagined ones."""

_GAP = 4  # pixels between images
_LABELS = 84  # pixels to the left of the images
_HEADER = 24  # pixels above them, bar included
_BAR = 4
_MIN_HEIGHT = 96  # minimum height of an image, pixels


def film(rows: Mapping[str, Tensor], context: int) -> Tensor:
    """Arrange a video: a row for each label, a column for each window.

    Args:
        rows: Label to ``[N, T, 3, H, W]`` or ``[N, T, 1, H, W]``; dtypes and ranges as in
            :func:`~w2f_torchrl.logging.pictures.video.to_uint8`.
        context: Number of observed frames.

    Returns:
        uint8 ``[T, 3, H', W']``.
    """
    pictures = _enlarge(rows)
    windows, steps = next(iter(pictures.values())).shape[:2]
    frames = []
    for t in range(steps):
        cells = {label: video[:, t] for label, video in pictures.items()}
        number = f"seen {t + 1}/{context}"
        if t >= context:
            number = f"imagined {t + 1 - context}/{steps - context}"
        frames.append(_page(cells, [number] + [""] * (windows - 1), [t < context] * windows))
    return torch.stack(frames)


def film_strip(rows: Mapping[str, Tensor], context: int, window: int = 0, every: int = 1) -> Tensor:
    """Arrange one window as an image: a row for each label, time from left to right.

    Args:
        rows: As in :func:`film`.
        context: Number of observed frames.
        window: Which of the N.
        every: Steps between columns, counted in both directions from the last observed frame.

    Returns:
        uint8 ``[3, H', W']``.
    """
    pictures = {label: video[window] for label, video in _enlarge(rows).items()}
    steps = next(iter(pictures.values())).shape[0]
    chosen = [t for t in range(steps) if (t - (context - 1)) % every == 0]
    titles = [f"{t - context + 1:+d}" if t >= context else "seen" for t in chosen]
    cells = {label: video[chosen] for label, video in pictures.items()}
    return _page(cells, titles, [t < context for t in chosen])


def _enlarge(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return uint8 colours ``[N, T, 3, H, W]``, with each pixel enlarged to a square."""
    out = {}
    for label, video in rows.items():
        pixels = to_uint8(video.flatten(0, 1), label).unflatten(0, video.shape[:2])
        scale = -(-_MIN_HEIGHT // pixels.shape[-2])
        out[label] = pixels.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
    return out


def _page(cells: Mapping[str, Tensor], titles: list[str], seen: list[bool]) -> Tensor:
    """Arrange a row ``[columns, 3, H, W]`` per label, under titles and coloured bars."""
    columns, _, height, width = next(iter(cells.values())).shape
    size = (
        _LABELS + columns * (width + _GAP) - _GAP,
        _HEADER + len(cells) * (height + _GAP) - _GAP,
    )
    page = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for column in range(columns):
        left = _LABELS + column * (width + _GAP)
        draw.text((left, 2), titles[column], fill="black", font=font)
        color = SEEN if seen[column] else IMAGINED
        draw.rectangle((left, _HEADER - _BAR - 1, left + width - 1, _HEADER - 3), fill=color)
    for row, label in enumerate(cells):
        top = _HEADER + row * (height + _GAP)
        draw.text((4, top + height // 2 - 8), label, fill="black", font=font)
    canvas = torch.from_numpy(np.array(page)).permute(2, 0, 1)
    for row, pictures in enumerate(cells.values()):
        top = _HEADER + row * (height + _GAP)
        for column, picture in enumerate(pictures):
            left = _LABELS + column * (width + _GAP)
            canvas[:, top : top + height, left : left + width] = picture
    return canvas

"""Procedural moving backgrounds: a camera pans over scenes of opaque textured shapes.

A still image is a pile of leaves, shapes of all sizes that hide each other ("dead leaves"; Lee,
Mumford and Huang 2001), whose edges and power-law sizes give the statistics of natural images. A
clip pans over such an image, and some shapes move across it on separate paths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from w2f_torchrl.utils.seeding import derive_seed

FRAMES = 100
"""Frames of a clip."""
VERSION = 1
"""Part of the cache's keys; increased when the same seed gives a different image."""

FloatArray = npt.NDArray[np.float32]
UInt8Array = npt.NDArray[np.uint8]

_OVERSAMPLING = 2
_EXTENT = 2.2
"""Side of the still image that a clip pans over, in sides of a frame."""
_LEAVES = 330
_SIZES = (0.024, 0.8)
"""Minimum and maximum radius of a leaf, in sides of a frame."""


@dataclass(frozen=True)
class ProceduralClip:
    """One computed clip.

    Args:
        seed: Seed of the whole set of clips.
        split: ``"train"`` or ``"val"``; their streams share nothing.
        index: Number of the clip within its split.
    """

    seed: int
    split: str
    index: int

    @property
    def name(self) -> str:
        """Name for messages."""
        return f"procedural:{self.seed}/{self.split}/{self.index:02d}"

    def key(self) -> list[object]:
        """Return its key in the cache."""
        return ["procedural", VERSION, FRAMES, self.seed, self.split, self.index]

    def read(self, size: int) -> UInt8Array:
        """Compute the clip.

        Args:
            size: Side of the frames, pixels. Another size shows the same scene.

        Returns:
            uint8 [100, size, size, 3].
        """
        seed = derive_seed(self.seed, "procedural", self.split, self.index)
        return render_clip(np.random.default_rng(seed), size)


def render_clip(generator: np.random.Generator, size: int) -> UInt8Array:
    """Draw one clip, uint8 [100, size, size, 3]."""
    palette = _palette(generator)
    still = _paint_still(generator, palette, size)
    frames = _pan(still, _path(generator, _EXTENT - 1.0, speed=generator.uniform(0.03, 0.14)), size)
    for _ in range(generator.integers(1, 5)):
        _paint_mover(frames, generator, palette)
    return _expose(frames, generator)


def _palette(generator: np.random.Generator) -> FloatArray:
    """Return a few matching colours, float32 [5, 3]: very different in lightness, less in hue."""
    light = generator.uniform(0.0, 1.0, (5, 1))
    tint = generator.normal(0.0, 0.04, (1, 3)) + generator.normal(0.0, 0.07, (5, 3))
    return np.asarray(light + tint - tint.mean(axis=1, keepdims=True), dtype=np.float32)


def _leaf_color(generator: np.random.Generator, palette: FloatArray) -> FloatArray:
    color = palette[generator.integers(len(palette))] + generator.normal(0.0, 0.08)
    return np.asarray(color + generator.normal(0.0, 0.02, 3), dtype=np.float32)


@dataclass(frozen=True)
class _Leaf:
    """An opaque shape between an ellipse and a rectangle, with shading."""

    radii: tuple[float, float]
    """Half axes, in sides of a frame."""
    angle: float
    power: float
    """2 is an ellipse; larger values are squarer."""
    color: FloatArray
    shading: tuple[float, float]
    """Change of lightness along each axis, from the middle to the rim."""
    stripes: tuple[float, float]
    """Amplitude and waves per frame of stripes along the first axis."""

    @classmethod
    def draw(cls, generator: np.random.Generator, palette: FloatArray, radius: float) -> _Leaf:
        stretch = generator.uniform(1.0, 2.2)
        striped = generator.random() < 0.15
        return cls(
            radii=(radius * stretch, radius / stretch),
            angle=generator.choice([0.0, generator.uniform(0.0, math.pi)]),
            power=generator.choice([2.0, 8.0], p=[0.6, 0.4]),
            color=_leaf_color(generator, palette),
            shading=tuple(generator.normal(0.0, 0.06, 2).tolist()),
            stripes=(0.08 * striped, generator.uniform(2.0, 6.0)),
        )

    def paint(self, x: FloatArray, y: FloatArray, pixel: float) -> tuple[FloatArray, FloatArray]:
        """Return coverage [*, h, w, 1] and colours [*, h, w, 3] relative to the leaf's centre.

        Args:
            x: In sides of a frame.
            y: As ``x``.
            pixel: Side of a pixel; the edge is one pixel wide.
        """
        cosine, sine = math.cos(self.angle), math.sin(self.angle)
        along = np.abs(u := (cosine * x + sine * y) / self.radii[0])
        across = np.abs(v := (cosine * y - sine * x) / self.radii[1])
        if self.power == 2.0:
            reach = np.sqrt(along * along + across * across)
        else:
            reach = np.maximum(along, across)
        coverage = np.clip((1.0 - reach) * (min(self.radii) / pixel) + 0.5, 0.0, 1.0)
        light = self.shading[0] * u + self.shading[1] * v
        if self.stripes[0]:
            light = light + self.stripes[0] * np.sin(
                2 * math.pi * self.stripes[1] * self.radii[0] * u
            )
        colors: FloatArray = self.color + light[..., None].astype(np.float32)
        return coverage[..., None].astype(np.float32), colors


def _paint_still(generator: np.random.Generator, palette: FloatArray, size: int) -> FloatArray:
    """Pile leaves up, float32 [P, P, 3] at twice a frame's resolution."""
    side = math.ceil(_EXTENT * size * _OVERSAMPLING) + 2
    pixel = 1.0 / (size * _OVERSAMPLING)
    still = np.empty((side, side, 3), dtype=np.float32)
    still[:] = _leaf_color(generator, palette)
    positions = (np.arange(side, dtype=np.float32) + 0.5) * np.float32(pixel)
    smallest, largest = _SIZES
    for _ in range(_LEAVES):
        # Radii of density r^-3 between the limits, so that leaves of each size cover equal areas.
        share = generator.random()
        radius = (smallest**-2 + share * (largest**-2 - smallest**-2)) ** -0.5
        leaf = _Leaf.draw(generator, palette, radius)
        x, y = generator.uniform(0.0, _EXTENT, 2)
        reach = 1.5 * max(leaf.radii) + pixel
        rows = slice(*np.searchsorted(positions, [y - reach, y + reach]))
        columns = slice(*np.searchsorted(positions, [x - reach, x + reach]))
        offsets = (
            positions[columns][None, :] - np.float32(x),
            positions[rows][:, None] - np.float32(y),
        )
        coverage, colors = leaf.paint(*offsets, pixel)
        still[rows, columns] += coverage * (colors - still[rows, columns])
    still += _texture(np.random.default_rng(generator.integers(2**32)), size, side)
    return still


def _texture(generator: np.random.Generator, size: int, side: int) -> FloatArray:
    """Return fine grey 1/f noise, float32 [side, side, 1]."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    frequency = np.maximum(frequency * side / _EXTENT, 1.0)  # waves per frame
    shape = (*frequency.shape, 2)
    phases = generator.standard_normal(shape).view(np.complex128)[..., 0]
    noise = np.fft.irfft2(phases * frequency**-1.0, s=(side, side))
    return np.asarray(0.038 * noise / noise.std(), dtype=np.float32)[..., None]


def _path(generator: np.random.Generator, room: float, speed: float) -> FloatArray:
    """Return a smooth path in [0, room]^2, float32 [100, 2]; ``speed`` sides per 100 frames."""
    times = np.linspace(0.0, 1.0, FRAMES)
    path = np.zeros((FRAMES, 2))
    heading = generator.uniform(0.0, 2 * math.pi)
    path += speed * times[:, None] * np.array([math.cos(heading), math.sin(heading)])
    for waves in (1, 2, 3):
        amplitude = generator.normal(0.0, 0.35 * speed / waves**1.5, 2)
        path += amplitude * np.sin(
            2 * math.pi * waves * times[:, None] + generator.uniform(0, 7, 2)
        )
    path -= path.min(axis=0)
    path *= np.minimum(1.0, room / np.maximum(path.max(axis=0), 1e-9))
    return np.asarray(path + generator.uniform(0.0, room - path.max(axis=0)), dtype=np.float32)


def _pan(still: FloatArray, path: FloatArray, size: int) -> FloatArray:
    """View the still image through a moving window, float32 [100, size, size, 3]."""
    frames = np.empty((len(path), size, size, 3), dtype=np.float32)
    wide = size * _OVERSAMPLING
    for frame, (x, y) in zip(frames, path * wide, strict=True):
        column, row = int(x), int(y)
        window = still[row : row + wide + 1, column : column + wide + 1]
        window = window[:-1] + (y - row) * (window[1:] - window[:-1])
        window = window[:, :-1] + (x - column) * (window[:, 1:] - window[:, :-1])
        frame[:] = window.reshape(size, _OVERSAMPLING, size, _OVERSAMPLING, 3).mean(axis=(1, 3))
    return frames


def _paint_mover(frames: FloatArray, generator: np.random.Generator, palette: FloatArray) -> None:
    """Move an object of three leaves across the clip, in place."""
    size = frames.shape[1]
    path = _path(generator, 1.2, speed=generator.uniform(0.2, 0.7)) - np.float32(0.1)
    radius = generator.uniform(0.05, 0.16)
    leaves = [_Leaf.draw(generator, palette, radius * share) for share in (1.0, 0.6, 0.4)]
    places = generator.normal(0.0, radius, (3, 2)).astype(np.float32)
    positions = (np.arange(size, dtype=np.float32) + 0.5) / np.float32(size)
    for frame, (x, y) in zip(frames, path, strict=True):
        for leaf, (dx, dy) in zip(leaves, places, strict=True):
            reach = 1.5 * max(leaf.radii) + 1.0 / size
            left, top = x + dx, y + dy
            rows = slice(*np.searchsorted(positions, [top - reach, top + reach]))
            columns = slice(*np.searchsorted(positions, [left - reach, left + reach]))
            offsets = positions[columns][None, :] - left, positions[rows][:, None] - top
            coverage, colors = leaf.paint(*offsets, 1.0 / size)
            frame[rows, columns] += coverage * (colors - frame[rows, columns])


def _expose(frames: FloatArray, generator: np.random.Generator) -> UInt8Array:
    """Set light and contrast of the whole clip, and add the camera's noise."""
    frames -= frames.mean()
    frames *= generator.uniform(38.0, 60.0) / frames.mean(axis=-1).std()
    frames += generator.uniform(95.0, 140.0)
    frames += generator.normal(0.0, 1.0, frames.shape[:-1]).astype(np.float32)[..., None]
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8)

"""What is between the scene and the picture: noise, blur, another brightness, an occluder."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from w2f_torchrl.envs.renderers.foreground import BoolArray
from w2f_torchrl.envs.renderers.rendering import Renderer
from w2f_torchrl.envs.scenery.walks import CorruptionWalk

UInt8Array = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]

TRUNCATE = 4.0
"""Radius of the blur's kernel, in standard deviations."""


class CorruptedRenderer:
    """Disturb the pictures of another renderer.

    Args:
        renderer: Renders what the camera would see.
        walk: What disturbs it.
    """

    def __init__(self, renderer: Renderer, walk: CorruptionWalk) -> None:
        self.image_size, self.foreground_mask = renderer.image_size, renderer.foreground_mask
        self._renderer, self._walk = renderer, walk

    def draw(self) -> tuple[UInt8Array, BoolArray | None]:
        """Return the image uint8 [3, H, W], and the mask bool [1, H, W] of what is visible."""
        picture, mask = self._renderer.draw()
        return corrupt(picture, self._walk), _visible(mask, self._walk)

    def upload_height_fields(self) -> None:
        """Upload terrain to OpenGL."""
        self._renderer.upload_height_fields()

    def close(self) -> None:
        """Free OpenGL's resources."""
        self._renderer.close()


def corrupt(picture: UInt8Array, walk: CorruptionWalk) -> UInt8Array:
    """Disturb a picture.

    Args:
        picture: uint8 [3, H, W], H equal to W. Not written to.
        walk: What disturbs it; the same state gives the same result.

    Returns:
        uint8 [3, H, W]:

        - ``noise``: Gaussian noise of the standard deviation ``noise`` added to each channel;
        - ``blur``: averaged by a Gaussian whose standard deviation is the share ``blur`` of H, with
          the outermost pixels continued outside;
        - ``brightness``: multiplied by 1 - ``brightness`` or 1 + ``brightness``;
        - ``occluder``: an opaque square of one colour, whose side is the share ``occluder`` of H.
    """
    config, size = walk.config, picture.shape[-1]
    if walk.kind is None:
        return picture
    if walk.kind == "occluder":
        covered = picture.copy()
        color = np.array([int(256 * value) for value in walk.values[2:5]], dtype=np.uint8)
        covered[:, *occluded(walk, size)] = color[:, None, None]
        return covered
    if walk.kind == "noise":
        generator = np.random.default_rng(walk.noise_seed)
        noise = generator.standard_normal(picture.shape, dtype=np.float32)
        changed = picture + np.float32(config.noise) * noise
    elif walk.kind == "blur":
        kernel = _blur_matrix(size, config.blur * size)
        changed = kernel @ picture.astype(np.float32) @ kernel.T
    else:
        sign = -1 if walk.values[0] < 0.5 else 1
        changed = picture * np.float32(1 + sign * config.brightness)
    return np.clip(np.rint(changed), 0, 255).astype(np.uint8)


def occluded(walk: CorruptionWalk, size: int) -> tuple[slice, slice]:
    """Return the rows and columns that the occluder covers.

    Args:
        walk: Its kind must be ``"occluder"``.
        size: Side of the picture, pixels.
    """
    side = max(round(walk.config.occluder * size), 1)
    top, left = (int(value * (size - side + 1)) for value in walk.values[:2])
    return slice(top, top + side), slice(left, left + side)


def _visible(mask: BoolArray | None, walk: CorruptionWalk) -> BoolArray | None:
    """Return the mask [1, H, W] without what an occluder covers."""
    if mask is None or walk.kind != "occluder":
        return mask
    visible = mask.copy()
    visible[:, *occluded(walk, mask.shape[-1])] = False
    return visible


@functools.lru_cache(maxsize=8)
def _blur_matrix(size: int, deviation: float) -> FloatArray:
    """Return the matrix [H, H] that blurs a column of pixels."""
    radius = int(TRUNCATE * deviation + 0.5)
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / deviation) ** 2)
    sources = np.clip(np.arange(size)[:, None] + offsets, 0, size - 1)
    matrix = np.zeros((size, size))
    np.add.at(matrix, (np.arange(size)[:, None], sources), weights / weights.sum())
    return matrix.astype(np.float32)

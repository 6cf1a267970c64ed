"""Load labelled frames, and background images, from files that may come from anywhere."""

from __future__ import annotations

import logging
import math
import zipfile
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from w2f_torchrl.config import ConfigError
from w2f_torchrl.envs import BackgroundError
from w2f_torchrl.envs.scenery.backgrounds import load_clips

logger = logging.getLogger(__name__)

MAX_BYTES = 2**30
"""Maximum size of an array of images in a file, bytes."""


def load_labels(path: str | Path) -> tuple[Tensor, Tensor]:
    """Read labelled frames from an ``.npz`` file.

    Returns:
        ``pixels`` uint8 ``[N, 3, H, W]`` and ``masks`` bool ``[N, 1, H, W]``.

    Raises:
        ConfigError: If an array is missing, or has the wrong dtype or shape.
    """
    arrays = _load_arrays(path, ("pixels", "masks"))
    pixels, masks = arrays["pixels"], arrays["masks"]
    _check_pictures(path, pixels)
    if masks.dtype is not torch.bool or masks.shape != (len(pixels), 1, *pixels.shape[2:]):
        raise ConfigError(
            f"{path}: masks must be bool {(len(pixels), 1, *pixels.shape[2:])}, got {masks.dtype} "
            f"{tuple(masks.shape)}."
        )
    return pixels, masks


def load_pictures(path: str | Path) -> Tensor:
    """Read background images, ``pixels`` uint8 ``[K, 3, H, W]``, from an ``.npz`` file.

    Raises:
        ConfigError: If the array is missing, or has the wrong dtype or shape.
    """
    pixels = _load_arrays(path, ("pixels",))["pixels"]
    _check_pictures(path, pixels)
    return pixels


def load_backgrounds(source: str | None, size: int) -> Tensor | None:
    """Load images to paste foregrounds onto.

    Args:
        source: An ``.npz`` file with ``pixels``, or clips in the form of
            ``environment.background_source``, of which every fourth frame of the training split is
            used; None for none.
        size: Side of the frames, pixels.

    Returns:
        uint8 ``[K, 3, H, W]``, or None.

    Raises:
        ConfigError: If the source does not exist, or cannot be read.
    """
    if source is None:
        return None
    if source.endswith(".npz"):
        return load_pictures(source)
    try:
        clips = load_clips(source, "train", None, size)
    except BackgroundError as error:
        raise ConfigError(f"segmentation.backgrounds={source}: {error}") from error
    frames = torch.cat([torch.from_numpy(clip[::4].copy()) for clip in clips])  # [K, H, W, 3]
    return frames.permute(0, 3, 1, 2)


def _check_pictures(path: str | Path, pixels: Tensor) -> None:
    if pixels.dtype is not torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ConfigError(
            f"{path}: pixels must be uint8 [N, 3, H, W], got {pixels.dtype} {tuple(pixels.shape)}."
        )
    if not len(pixels):
        raise ConfigError(f"{path}: pixels holds no images.")


def _load_arrays(path: str | Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    try:
        _check_size(path, names)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in names}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, BadZipFile) as error:
        raise ConfigError(
            f"{path} must be an .npz file with {' and '.join(names)}: {error}"
        ) from error


def _check_size(path: str | Path, names: tuple[str, ...]) -> None:
    """Check the arrays' headers in an .npz file before they are unpacked.

    Raises:
        ValueError: If an array has no image dtype, or is too large.
        KeyError: If an array is missing.
    """
    form: Any = np.lib.format  # untyped
    with zipfile.ZipFile(path) as archive:
        for name in names:
            with archive.open(f"{name}.npy") as stream:
                if form.read_magic(stream) == (1, 0):
                    shape, _, dtype = form.read_array_header_1_0(stream)
                else:
                    shape, _, dtype = form.read_array_header_2_0(stream)
            size = math.prod(shape) * dtype.itemsize
            if dtype not in (np.uint8, np.bool_) or len(shape) != 4 or size > MAX_BYTES:
                raise ValueError(
                    f"{name} is {dtype} {shape}, {size / 2**20:,.0f} MiB; allowed are uint8 or "
                    f"bool [N, C, H, W] of at most {MAX_BYTES / 2**20:,.0f} MiB"
                )

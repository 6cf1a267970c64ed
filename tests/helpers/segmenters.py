"""Segmenters for tests: what they return is known, and they count."""

from __future__ import annotations

import torch
from torch import Tensor


class BrightSegmenter:
    """Marks pixels whose red channel is above 100, and counts calls and frames."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, pixels: Tensor) -> Tensor:
        self.calls.append(len(pixels))
        return bright(pixels)


class BrightConfidence(BrightSegmenter):
    """The same as a confidence."""

    confidence = True

    def __call__(self, pixels: Tensor) -> Tensor:
        self.calls.append(len(pixels))
        return pixels[:, :1] / 255


def bright(pixels: Tensor) -> Tensor:
    """What BrightSegmenter says, for any leading shape."""
    return pixels[..., :1, :, :] > 100


def random_pixels(*shape: int, size: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (*shape, 3, size, size), dtype=torch.uint8, generator=generator)

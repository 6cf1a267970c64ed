"""Segmenters without learning."""

from __future__ import annotations

import torch
from torch import Tensor

from w2f_torchrl.segmenters.base import check_pixels
from w2f_torchrl.utils.tensors import check_tensor


class MedianSegmenter:
    """Mark pixels that differ from the background, the median over time of each pixel.

    It needs a static background and a fixed camera; it marks a moving background as foreground. The
    background must be known first: from :meth:`fit`, or from ``background``.

    Args:
        threshold: Minimum difference from the background, exclusive, of the most different colour
            channel, in [0, 255).
        background: uint8 ``[3, H, W]``, if already known.

    Raises:
        ValueError: If the threshold is out of range.

    Examples:
        >>> pixels = torch.zeros(5, 3, 4, 4, dtype=torch.uint8)
        >>> pixels[2, :, 1, 3] = 200  # an object in one image out of five
        >>> MedianSegmenter().fit(pixels)(pixels).nonzero().tolist()
        [[2, 0, 1, 3]]
    """

    confidence = False

    def __init__(self, threshold: int = 24, background: Tensor | None = None) -> None:
        if not 0 <= threshold < 255:
            raise ValueError(f"threshold={threshold} must be in [0, 255).")
        if background is not None:
            check_tensor("background", background, torch.uint8, (3, "H", "W"))
        self.threshold = threshold
        self.background = background

    def fit(self, pixels: Tensor) -> MedianSegmenter:
        """Compute the background from images in which each pixel shows it at least half the time.

        Args:
            pixels: uint8 ``[N, 3, H, W]``, spread over time.

        Returns:
            The segmenter itself.
        """
        check_pixels(pixels)
        if not len(pixels):
            raise ValueError("a median needs at least one image, got none.")
        self.background = pixels.median(0).values
        return self

    def __call__(self, pixels: Tensor) -> Tensor:
        """Find the foreground: uint8 ``[N, 3, H, W]`` to bool ``[N, 1, H, W]``.

        Raises:
            RuntimeError: If the background is not known yet.
            ValueError: If the images and the background differ in size.
        """
        check_pixels(pixels)
        if self.background is None:
            raise RuntimeError("MedianSegmenter has no background yet: call fit(pixels) first.")
        if pixels.shape[1:] != self.background.shape:
            raise ValueError(
                f"pixels of shape {tuple(pixels.shape)} do not match the background "
                f"{tuple(self.background.shape)}: fit on images of the same size."
            )
        background = self.background.to(pixels.device)
        difference = torch.maximum(pixels, background) - torch.minimum(pixels, background)
        return difference.amax(1, keepdim=True) > self.threshold

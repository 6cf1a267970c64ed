"""Segmenters that need no learning."""

from __future__ import annotations

import torch
from torch import Tensor

from w2f_torchrl.segmenters.base import check_pixels
from w2f_torchrl.utils.tensors import check_tensor


class MedianSegmenter:
    """Marks what differs from the background, the median over time of each pixel.

    For a static background and a camera that stands still; a moving background is all foreground to
    it. The background has to be known first: by :meth:`fit`, or by ``background``.

    Args:
        threshold: How far the most different colour channel must lie from the background's, in
            [0, 255].
        background: uint8 ``[3, H, W]``, if it is known already.

    Raises:
        ValueError: If the threshold is out of range.

    Examples:
        >>> pixels = torch.zeros(5, 3, 4, 4, dtype=torch.uint8)
        >>> pixels[2, :, 1, 3] = 200  # what is there in one picture of five
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
        """Take the background from pictures in which each pixel shows it at least half the time.

        Args:
            pixels: uint8 ``[N, 3, H, W]``, spread over time.

        Returns:
            The segmenter itself.
        """
        check_pixels(pixels)
        if not len(pixels):
            raise ValueError("a median needs at least one picture, got none.")
        self.background = pixels.median(0).values
        return self

    def __call__(self, pixels: Tensor) -> Tensor:
        """Find the foreground: uint8 ``[N, 3, H, W]`` to bool ``[N, 1, H, W]``.

        Raises:
            RuntimeError: If the background is not known yet.
            ValueError: If the pictures have another size than the background.
        """
        check_pixels(pixels)
        if self.background is None:
            raise RuntimeError("MedianSegmenter knows no background yet: call fit(pixels) first.")
        if pixels.shape[1:] != self.background.shape:
            raise ValueError(
                f"pixels of shape {tuple(pixels.shape)} don't fit the background "
                f"{tuple(self.background.shape)}: fit on pictures of the same size."
            )
        background = self.background.to(pixels.device)
        difference = torch.maximum(pixels, background) - torch.minimum(pixels, background)
        return difference.amax(1, keepdim=True) > self.threshold

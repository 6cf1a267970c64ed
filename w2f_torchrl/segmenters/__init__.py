"""Where masks come from, and how they are compared."""

from w2f_torchrl.segmenters.base import Segmenter, mask_iou

__all__ = ["Segmenter", "mask_iou"]

"""Segmenters, which produce masks, and measures that compare masks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from w2f_torchrl._lazy import lazy_exports
from w2f_torchrl.registry import register_segmenter
from w2f_torchrl.segmenters.sam3_requirements import SegmenterUnavailableError

if TYPE_CHECKING:
    from w2f_torchrl.segmenters.base import Segmenter, boundary_error, mask_iou
    from w2f_torchrl.segmenters.heuristics import MedianSegmenter
    from w2f_torchrl.segmenters.sam3_segmenter import Sam3Segmenter
    from w2f_torchrl.segmenters.student import StudentNetwork, StudentSegmenter
    from w2f_torchrl.segmenters.teaching import choose_diverse, train_student
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "base": ("Segmenter", "boundary_error", "mask_iou"),
            "heuristics": ("MedianSegmenter",),
            "sam3_segmenter": ("Sam3Segmenter",),
            "student": ("StudentNetwork", "StudentSegmenter"),
            "teaching": ("choose_diverse", "train_student"),
        },
    )

__all__ = [
    "MedianSegmenter",
    "Sam3Segmenter",
    "Segmenter",
    "SegmenterUnavailableError",
    "StudentNetwork",
    "StudentSegmenter",
    "boundary_error",
    "choose_diverse",
    "mask_iou",
    "register_segmenter",
    "train_student",
]

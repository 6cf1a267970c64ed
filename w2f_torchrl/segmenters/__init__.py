"""Where masks come from, and how they are compared."""

from w2f_torchrl.segmenters.base import (
    Segmenter,
    SegmenterUnavailableError,
    boundary_error,
    mask_iou,
)
from w2f_torchrl.segmenters.heuristics import MedianSegmenter
from w2f_torchrl.segmenters.sam3_segmenter import Sam3Segmenter
from w2f_torchrl.segmenters.student import StudentNetwork, StudentSegmenter
from w2f_torchrl.segmenters.teaching import choose_diverse, train_student

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
    "train_student",
]

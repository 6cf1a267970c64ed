"""Transforms that write foreground masks, for any TorchRL pipeline."""

from w2f_torchrl.transforms.foreground_mask import ForegroundMaskTransform, SAM3MaskTransform

__all__ = ["ForegroundMaskTransform", "SAM3MaskTransform"]

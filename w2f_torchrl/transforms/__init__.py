"""Transforms that write foreground masks or replace the scenery, for any TorchRL pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from w2f_torchrl._lazy import lazy_exports

if TYPE_CHECKING:
    from w2f_torchrl.transforms.foreground_mask import ForegroundMaskTransform, SAM3MaskTransform
    from w2f_torchrl.transforms.replaced_scenery import ReplacedSceneryTransform
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "foreground_mask": ("ForegroundMaskTransform", "SAM3MaskTransform"),
            "replaced_scenery": ("ReplacedSceneryTransform",),
        },
    )

__all__ = [
    "ForegroundMaskTransform",
    "ReplacedSceneryTransform",
    "SAM3MaskTransform",
]

"""Losses: reconstruction, world model, actor and critic."""

from __future__ import annotations

from typing import TYPE_CHECKING

from w2f_torchrl._lazy import lazy_exports
from w2f_torchrl.config.loss import LossConfig

if TYPE_CHECKING:
    from w2f_torchrl.objectives.reconstruction import (
        background_loss,
        foreground_loss,
        image_loss,
        mask_loss,
    )
    from w2f_torchrl.objectives.returns import lambda_return
    from w2f_torchrl.objectives.world2filter import World2FilterLoss
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "reconstruction": ("background_loss", "foreground_loss", "image_loss", "mask_loss"),
            "returns": ("lambda_return",),
            "world2filter": ("World2FilterLoss",),
        },
    )

__all__ = [
    "LossConfig",
    "World2FilterLoss",
    "background_loss",
    "foreground_loss",
    "image_loss",
    "lambda_return",
    "mask_loss",
]

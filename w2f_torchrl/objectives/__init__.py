"""Losses: reconstruction, world model, actor and critic."""

from __future__ import annotations

from typing import TYPE_CHECKING

from w2f_torchrl._lazy import lazy_exports
from w2f_torchrl.config.loss import LossConfig
from w2f_torchrl.registry import register_loss

if TYPE_CHECKING:
    from w2f_torchrl.objectives.reconstruction import (
        background_loss,
        foreground_loss,
        image_loss,
        mask_loss,
    )
    from w2f_torchrl.objectives.returns import lambda_return
    from w2f_torchrl.objectives.terms import LossTerm
    from w2f_torchrl.objectives.world2filter import World2FilterLoss
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "reconstruction": ("background_loss", "foreground_loss", "image_loss", "mask_loss"),
            "returns": ("lambda_return",),
            "terms": ("LossTerm",),
            "world2filter": ("World2FilterLoss",),
        },
    )

__all__ = [
    "LossConfig",
    "LossTerm",
    "World2FilterLoss",
    "background_loss",
    "foreground_loss",
    "image_loss",
    "lambda_return",
    "mask_loss",
    "register_loss",
]

"""Losses: reconstruction, world model, actor and critic."""

from w2f_torchrl.objectives.reconstruction import (
    background_loss,
    foreground_loss,
    image_loss,
    mask_loss,
)
from w2f_torchrl.objectives.returns import lambda_return
from w2f_torchrl.objectives.world2filter import LossConfig, World2FilterLoss

__all__ = [
    "LossConfig",
    "World2FilterLoss",
    "background_loss",
    "foreground_loss",
    "image_loss",
    "lambda_return",
    "mask_loss",
]

"""Algorithms, which say what a run trains and what acts: World2Filter, DreamerV3 and others.

Each of the others is one file of this folder; docs/methods.md says what it assumes and needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from w2f_torchrl._lazy import lazy_exports
from w2f_torchrl.registry import register_algorithm

if TYPE_CHECKING:
    from w2f_torchrl.algorithms.base import (
        Algorithm,
        AlgorithmSettings,
        build_around,
        build_world2filter,
        world_model_of,
    )
    from w2f_torchrl.algorithms.build import build_algorithm
    from w2f_torchrl.algorithms.masked_input import MaskedEncoder, MaskedInputLoss
    from w2f_torchrl.algorithms.r2dreamer import R2DreamerLoss, barlow_twins_loss
    from w2f_torchrl.algorithms.repo import RepoLoss
    from w2f_torchrl.algorithms.tia import TiaDecoder, TiaLoss, reverse_gradient
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "base": (
                "Algorithm",
                "AlgorithmSettings",
                "build_around",
                "build_world2filter",
                "world_model_of",
            ),
            "build": ("build_algorithm",),
            "masked_input": ("MaskedEncoder", "MaskedInputLoss"),
            "r2dreamer": ("R2DreamerLoss", "barlow_twins_loss"),
            "repo": ("RepoLoss",),
            "tia": ("TiaDecoder", "TiaLoss", "reverse_gradient"),
        },
    )

__all__ = [
    "Algorithm",
    "AlgorithmSettings",
    "MaskedEncoder",
    "MaskedInputLoss",
    "R2DreamerLoss",
    "RepoLoss",
    "TiaDecoder",
    "TiaLoss",
    "barlow_twins_loss",
    "build_algorithm",
    "build_around",
    "build_world2filter",
    "register_algorithm",
    "reverse_gradient",
    "world_model_of",
]

"""The learner: networks, losses, optimizer, and modes of execution."""

from __future__ import annotations

from typing import TYPE_CHECKING

from w2f_torchrl._lazy import lazy_exports
from w2f_torchrl.registry import register_algorithm

if TYPE_CHECKING:
    from w2f_torchrl.algorithms.base import Algorithm, AlgorithmSettings, build_world2filter
    from w2f_torchrl.learner.learner import Learner
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "w2f_torchrl.algorithms.base": (
                "Algorithm",
                "AlgorithmSettings",
                "build_world2filter",
            ),
            "learner": ("Learner",),
        },
    )

__all__ = ["Algorithm", "AlgorithmSettings", "Learner", "build_world2filter", "register_algorithm"]

"""The learner: networks, losses, optimizer, and modes of execution."""

from __future__ import annotations

from typing import TYPE_CHECKING

from w2f_torchrl._lazy import lazy_exports

if TYPE_CHECKING:
    from w2f_torchrl.learner.learner import Learner
else:
    __getattr__, __dir__ = lazy_exports(__name__, {"learner": ("Learner",)})

__all__ = ["Learner"]

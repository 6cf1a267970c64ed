"""``training.execution=auto`` on CUDA: the fastest mode that works and matches eager's update."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from tensordict import TensorDictBase
from torch import Tensor

from w2f_torchrl.learner.graphed_update import GraphedUpdate, Update, UpdateState

logger = logging.getLogger(__name__)

#: Maximum difference from eager's update that counts as rounding, by precision: of the sum of the
#: world model's losses (relative), and of all gradients (norm of the difference over norm). A
#: rounding difference can flip a sampled class and change a slice, so bounds cannot be tighter.
TOLERANCES = {
    "float32": {"losses": 1e-3, "gradients": 5e-2},
    "bfloat16": {"losses": 2e-2, "gradients": 2e-1},
}


class Trial(NamedTuple):
    """The results of an update that is undone."""

    losses: Tensor
    """Sum of the world model's losses."""
    gradients: list[Tensor]


def difference(eager: Trial, other: Trial) -> dict[str, float]:
    """Return the differences from eager's update, as in :data:`TOLERANCES`; NaN if not finite."""
    moved = torch.stack(torch._foreach_norm(torch._foreach_sub(other.gradients, eager.gradients)))
    norms = torch.stack(torch._foreach_norm(eager.gradients))
    losses = (other.losses - eager.losses).abs() / eager.losses.abs()
    return {"losses": losses.item(), "gradients": (moved.norm() / norms.norm()).item()}


class AutoUpdate:
    """Choose a mode at the first call, and use it from then on.

    Each mode makes one update from the same state, batch and random numbers as an eager update;
    then everything is undone. A mode is rejected with a warning, on all ranks together, if it fails
    to compile, to capture or to fit into memory, or if its update differs by more than rounding.

    Args:
        modes: The modes to try by name, the fastest first; each value makes the mode's update.
        eager: Eager's update, also used if no mode works.
        undo: Called after a mode that failed, to undo the changes made for it.
        state: The state that updates change.
        parameters: The trained parameters.
        precision: ``float32`` or ``bfloat16``.
    """

    def __init__(
        self,
        modes: Mapping[str, Callable[[], Update]],
        *,
        eager: Update,
        undo: Callable[[], None],
        state: UpdateState,
        parameters: Sequence[Tensor],
        precision: str,
    ):
        self._modes, self._eager, self._undo = modes, eager, undo
        self._state, self._parameters = state, parameters
        self._tolerance = TOLERANCES[precision]
        self._update: Update | None = None
        self.mode = "auto"
        """The mode in use, once it is chosen."""

    def __call__(self, sample: TensorDictBase) -> TensorDictBase:
        """Update on a sample ``[B, T]``."""
        if self._update is None:
            self.mode, self._update = self._decide(sample)
        return self._update(sample)

    def recapture(self, graphed: Callable[[], Update]) -> None:
        """Capture the graph again, if one is used, because the optimizer has new moments."""
        if isinstance(self._update, GraphedUpdate):
            self._update = graphed()

    def _decide(self, sample: TensorDictBase) -> tuple[str, Update]:
        eager = self._try(self._eager, sample)
        for mode, make in self._modes.items():
            problem = None
            try:
                update = make()
                found = difference(eager, self._try(update, sample))
                figures = ", ".join(f"{name} {value:.1e}" for name, value in found.items())
                if not all(found[name] <= limit for name, limit in self._tolerance.items()):
                    problem = f"its update differs from eager's by more than rounding ({figures})"
            # Compilers and drivers raise all kinds of errors; eager is always available.
            except Exception as error:  # noqa: BLE001
                problem = f"{type(error).__name__}: {str(error)[:500]}"
            if _all_ranks(problem is None):
                logger.info("training.execution=auto: %s (from eager: %s)", mode, figures)
                return mode, update
            logger.warning(
                "training.execution=auto: %s is not used: %s", mode, problem or "of another rank"
            )
            self._undo()
            torch.cuda.empty_cache()
        logger.info("training.execution=auto: eager")
        return "eager", self._eager

    def _try(self, update: Update, sample: TensorDictBase) -> Trial:
        """Make an update and undo it, even if it fails."""
        before = self._state.copy()
        try:
            metrics = update(sample)
            losses = metrics["wm/total_loss"].clone()
            gradients = [p.grad.clone() for p in self._parameters if p.grad is not None]
            return Trial(losses, gradients)
        finally:
            self._state.restore(before)


def _all_ranks(fine: bool) -> bool:
    if not dist.is_initialized():
        return fine
    flag = torch.tensor([int(fine)])
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)

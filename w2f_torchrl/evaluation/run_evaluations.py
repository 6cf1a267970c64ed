"""When a run is evaluated, with which measures, and how well it did at its best."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import torch

from w2f_torchrl.config import RunConfig
from w2f_torchrl.evaluation.evaluator import Evaluation, Evaluator
from w2f_torchrl.learner.learner import Learner
from w2f_torchrl.utils.seeding import derive_seed

if TYPE_CHECKING:
    from w2f_torchrl.evaluation.run_filtering import FilteringMeter

logger = logging.getLogger(__name__)


class RunEvaluations:
    """The evaluations of a run, one after the other.

    Args:
        config: The run's settings.
        learner: Whose policy and world model are evaluated.
    """

    def __init__(self, config: RunConfig, learner: Learner) -> None:
        self.config, self.learner = config, learner
        self.last = 0
        """Frames at the last evaluation."""
        self.best: float | None = None
        """Highest mean return so far."""
        self._filtering: FilteringMeter | None = None

    def are_due(self, frames: int) -> bool:
        """Whether ``evaluation.every_frames`` have passed."""
        every = self.config.evaluation.every_frames
        return every > 0 and frames // every > self.last // every

    def final_is_due(self, frames: int) -> bool:
        """Return whether a run that is evaluated at all was not evaluated after its last frame."""
        return self.config.evaluation.every_frames > 0 and self.last != frames

    def play(self, evaluator: Evaluator, frames: int) -> Evaluation:
        """Play episodes; that they were played is the caller's to note, in :attr:`last`.

        Args:
            evaluator: Plays.
            frames: Environment frames so far, from which the envs are seeded.
        """
        settings = self.config.evaluation
        evaluator.seed(frames)
        return evaluator.evaluate(self.learner.world_model, settings.episodes)

    def measure_filtering(self) -> dict[str, float]:
        """Probe the latents; training's random numbers stay as they are."""
        device = self.config.torch_device()
        # The episodes are recorded in every process anew: not at the training's cost.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return self._measure_filtering()

    def is_best(self, evaluation: Evaluation) -> bool:
        """Whether no evaluation before had so high a mean return; it is the best from now on.

        A mean that is not finite is never the best: nothing would exceed nan later.
        """
        score = evaluation.metrics["eval/return_mean"]
        if not math.isfinite(score):
            logger.warning("eval/return_mean=%s: best.pt stays as it is", score)
            return False
        best = self.best is None or score > self.best
        self.best = score if best else self.best
        return best

    def state_dict(self) -> dict[str, Any]:
        """Return when the last evaluation was, and the best score."""
        return {"last": self.last, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state from :meth:`state_dict`."""
        self.last, self.best = state["last"], state["best"]
        if self.best is not None and not math.isfinite(self.best):
            self.best = None  # older versions kept a nan

    def _measure_filtering(self) -> dict[str, float]:
        """Probe the latents; the episodes are recorded at the first call."""
        from w2f_torchrl.evaluation.run_filtering import (  # scikit-learn
            FilteringMeter,
            flat_metrics,
        )

        if self._filtering is None:
            self._filtering = FilteringMeter(self.config, derive_seed(self.config.seed, "probe", 0))
        found = self._filtering.measure(self.learner.loss, seeds=(0,), probes=("linear",))
        return flat_metrics(found)

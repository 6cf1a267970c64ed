"""The evaluations of a run: when they are due, their measures, and the best score."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import torch

from w2f_torchrl.algorithms.masked_input import student_of
from w2f_torchrl.config import EnvironmentConfig, EvaluationConfig
from w2f_torchrl.evaluation.evaluator import Evaluation, Evaluator
from w2f_torchrl.learner.learner import Learner
from w2f_torchrl.utils.seeding import derive_seed

if TYPE_CHECKING:
    from w2f_torchrl.evaluation.run_filtering import FilteringMeter

logger = logging.getLogger(__name__)


class RunEvaluations:
    """The evaluations of a run.

    Args:
        settings: When they are due, and their measures.
        environment: The env in which the measures of filtering are made.
        learner: The learner whose policy and world model are evaluated.
        seed: The run's seed.
    """

    def __init__(
        self,
        settings: EvaluationConfig,
        environment: EnvironmentConfig,
        learner: Learner,
        *,
        seed: int = 0,
    ) -> None:
        self.settings, self.environment, self.learner = settings, environment, learner
        self.seed = seed
        self.last = 0
        """Frames at the last evaluation."""
        self.best: float | None = None
        """Highest mean return so far."""
        self._filtering: FilteringMeter | None = None

    def are_due(self, frames: int) -> bool:
        """Return whether ``evaluation.every_frames`` have passed since the last evaluation."""
        every = self.settings.every_frames
        return every > 0 and frames // every > self.last // every

    def final_is_due(self, frames: int) -> bool:
        """Return whether evaluations are enabled and none was made at this frame."""
        return self.settings.every_frames > 0 and self.last != frames

    def play(self, evaluator: Evaluator, frames: int) -> Evaluation:
        """Play episodes; the caller must update :attr:`last`.

        Args:
            evaluator: The evaluator.
            frames: Environment frames so far, used to seed the envs.
        """
        evaluator.seed(frames)
        return evaluator.evaluate(self.learner.world_model, self.settings.episodes)

    def measure_filtering(self) -> dict[str, float]:
        """Probe the latents without changing the random state of training."""
        device = next(self.learner.world_model.parameters()).device
        # Every process records the episodes again, which must not change training.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return self._measure_filtering()

    def is_best(self, evaluation: Evaluation) -> bool:
        """Return whether the mean return is the highest so far, and remember it if so.

        A mean that is not finite is never the best, because nothing would exceed nan later.
        """
        score = evaluation.metrics["eval/return_mean"]
        if not math.isfinite(score):
            logger.warning("eval/return_mean=%s: best.pt is not changed", score)
            return False
        best = self.best is None or score > self.best
        self.best = score if best else self.best
        return best

    def state_dict(self) -> dict[str, Any]:
        """Return the frames of the last evaluation, and the best score."""
        return {"last": self.last, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state from :meth:`state_dict`."""
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
            self._filtering = FilteringMeter(
                self.environment,
                self.settings.filtering_episodes,
                derive_seed(self.seed, "probe", 0),
            )
        segment = student_of(self.learner.policy)
        found = self._filtering.measure(
            self.learner.loss, segment=segment, seeds=(0,), probes=("linear",)
        )
        return flat_metrics(found)

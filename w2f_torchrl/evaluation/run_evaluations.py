"""The evaluations of a run: when they are due, their measures, and the best score."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import TransformedEnv

from w2f_torchrl.algorithms.masked_input import student_of
from w2f_torchrl.config import EnvironmentConfig, EvaluationConfig, RunConfig
from w2f_torchrl.data.environments import build_env
from w2f_torchrl.data.recorded.episodes import RecordedData
from w2f_torchrl.envs import EvaluationSet
from w2f_torchrl.envs.recorded import DOMAIN as RECORDED
from w2f_torchrl.evaluation.evaluator import Evaluation, Evaluator
from w2f_torchrl.evaluation.recorded.evaluator import RecordedEvaluator
from w2f_torchrl.learner.learner import Learner
from w2f_torchrl.modules import latent_sizes
from w2f_torchrl.utils.seeding import derive_seed

if TYPE_CHECKING:
    from w2f_torchrl.evaluation.run_filtering import FilteringMeter

logger = logging.getLogger(__name__)

AnyEvaluator: TypeAlias = Evaluator | RecordedEvaluator
ERRORS = ("recorded/error", "recorded/reward_error")
"""Metrics of which the first available one ranks evaluations without returns."""


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

    def play(self, evaluator: AnyEvaluator, frames: int) -> Evaluation:
        """Play episodes; the caller must update :attr:`last`.

        Args:
            evaluator: The evaluator.
            frames: Environment frames so far, used to seed the envs.
        """
        evaluator.seed(frames)
        return evaluator.evaluate(self.learner.world_model, self.settings.episodes)

    def measure_filtering(self, evaluator: AnyEvaluator) -> dict[str, float]:
        """Probe the latents without changing the random state of training.

        Args:
            evaluator: Has the recorded episodes of a run without an environment.
        """
        device = next(self.learner.world_model.parameters()).device
        # Every process records the episodes again, which must not change training.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return self._measure_filtering(evaluator)

    def is_best(self, evaluation: Evaluation) -> bool:
        """Return whether the mean return is the highest so far, and remember it if so.

        Without an environment the error of open-loop prediction counts, with its sign changed. A
        score that is not finite is never the best, because nothing would exceed nan later.
        """
        name, score = score_of(evaluation.metrics)
        if not math.isfinite(score):
            logger.warning("%s=%s: best.pt is not changed", name, score)
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

    def _measure_filtering(self, evaluator: AnyEvaluator) -> dict[str, float]:
        """Probe the latents; the episodes are recorded, or loaded, at the first call."""
        from w2f_torchrl.evaluation.run_filtering import (  # scikit-learn
            FilteringMeter,
            flat_metrics,
        )

        segment = student_of(self.learner.policy)
        probing: dict[str, Any] = {"segment": segment, "seeds": (0,), "probes": ("linear",)}
        if self.environment.domain == RECORDED and isinstance(evaluator, RecordedEvaluator):
            meter = evaluator.meter(self.settings.filtering_episodes)
            return flat_metrics(meter.measure(self.learner.loss, **probing))
        if self._filtering is None:
            self._filtering = FilteringMeter(
                self.environment,
                self.settings.filtering_episodes,
                derive_seed(self.seed, "probe", 0),
            )
        return flat_metrics(self._filtering.measure(self.learner.loss, **probing))


def score_of(metrics: Mapping[str, float]) -> tuple[str, float]:
    """Return the metric that ranks evaluations, and a score of which higher is better."""
    if "eval/return_mean" in metrics:
        return "eval/return_mean", metrics["eval/return_mean"]
    name = next((name for name in ERRORS if name in metrics), ERRORS[0])
    return name, -metrics.get(name, math.nan)


def make_evaluator(
    config: RunConfig, policy: TensorDictModuleBase, action_size: int, **options: Any
) -> Evaluator:
    """Build what plays a policy, of this run or of a checkpoint, in the envs of its settings.

    Args:
        config: The settings of its run.
        policy: The acting policy.
        action_size: A.
        options: ``seed``, ``segment`` and ``observations`` of
            :class:`~w2f_torchrl.evaluation.evaluator.Evaluator`.
    """
    return Evaluator(
        config.evaluation,
        partial(_evaluation_env, config),
        policy,
        latent_sizes(config.model, action_size),
        action_repeat=config.environment.action_repeat,
        device=config.torch_device(),
        **options,
    )


def make_recorded_evaluator(
    config: RunConfig,
    policy: TensorDictModuleBase,
    data: RecordedData,
    **options: Any,
) -> RecordedEvaluator:
    """Build what evaluates on recorded episodes, and in the run's env if it has one.

    Args:
        config: The run's settings.
        policy: The acting policy.
        data: The recorded episodes.
        options: As for :func:`make_evaluator`.
    """
    player = None
    if config.environment.domain != RECORDED:
        player = make_evaluator(config, policy, data.action_size, **options)
    return RecordedEvaluator(
        data,
        player,
        seed=options["seed"],
        device=config.torch_device(),
        masks=config.needs_masks,
        segment=options["segment"],
    )


def _evaluation_env(config: RunConfig, seed: int, chosen: EvaluationSet | None) -> TransformedEnv:
    return build_env(
        config.environment, seed, foreground_mask=config.needs_masks, evaluation_set=chosen
    )

"""Measure the filtering of a run on the same episodes at every evaluation."""

from __future__ import annotations

from typing import Any

from w2f_torchrl.config import EnvironmentConfig
from w2f_torchrl.data.environments import build_env
from w2f_torchrl.envs import EvaluationSet, PixelDMControlEnv
from w2f_torchrl.evaluation import (
    Episode,
    flat_metrics,
    measure_filtering,
    record_episodes,
    replace_backgrounds,
)
from w2f_torchrl.modules import WorldModel
from w2f_torchrl.objectives import World2FilterLoss

__all__ = ["FilteringMeter", "flat_metrics"]

MAX_STEPS = 128
"""Maximum agent steps of an episode."""
REPLACED = 4
"""Number of episodes that are replayed with other backgrounds."""


class FilteringMeter:
    """Record a run's probe episodes once, then measure any state of its model on them.

    Actions are random and held, so the episodes are the same for every model of a task.

    Args:
        environment: The run's env.
        count: Number of episodes.
        seed: Seed of the episodes.
        evaluation_set: Set whose distraction replaces the run's.
    """

    def __init__(
        self,
        environment: EnvironmentConfig,
        count: int,
        seed: int,
        evaluation_set: EvaluationSet | None = None,
    ) -> None:
        env = build_env(environment, seed, evaluation_set=evaluation_set)
        base = env.base_env
        assert isinstance(base, PixelDMControlEnv), "no registered env (validated)"
        self.episodes: list[Episode] = record_episodes(base, count, seed=seed, max_steps=MAX_STEPS)
        self.replaced: list[Episode] = []
        if base.distractor is not None and base.distractor.replaceable:
            self.replaced = replace_backgrounds(base, self.episodes[:REPLACED])
        env.close()

    def measure(
        self, model: World2FilterLoss, *, untrained: WorldModel | None = None, **probing: Any
    ) -> Any:
        """Measure a model; see :func:`~w2f_torchrl.evaluation.measure_filtering`.

        Args:
            model: World model, actor and critic.
            untrained: A world model of the same sizes to compare with.
            probing: ``seeds`` and ``probes``, as in that function.
        """
        return measure_filtering(
            model, self.episodes, replaced=self.replaced, untrained=untrained, **probing
        )

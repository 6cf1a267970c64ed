"""Measure the filtering of a run on the same episodes at every evaluation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from w2f_torchrl.config import EnvironmentConfig
from w2f_torchrl.data.environments import build_env
from w2f_torchrl.envs import EvaluationSet, PixelDMControlEnv, evaluation_sets
from w2f_torchrl.evaluation import (
    Episode,
    flat_metrics,
    measure_filtering,
    record_episodes,
    replace_backgrounds,
    replay_in,
)
from w2f_torchrl.modules import WorldModel
from w2f_torchrl.objectives import World2FilterLoss
from w2f_torchrl.segmenters import Segmenter

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
        self.clean: list[Episode] = []
        if base.distractor is not None:
            without = build_env(environment, seed, evaluation_set=evaluation_sets()["clean"])
            self.clean = replay_in(without.base_env, self.episodes[:REPLACED])
            without.close()
        env.close()

    def measure(
        self,
        model: World2FilterLoss,
        *,
        untrained: WorldModel | None = None,
        segment: Segmenter | None = None,
        **probing: Any,
    ) -> Any:
        """Measure a model; see :func:`~w2f_torchrl.evaluation.measure_filtering`.

        Args:
            model: World model, actor and critic.
            untrained: A world model of the same sizes to compare with.
            segment: Makes the masks that the model acts on, if not the simulator's.
            probing: ``seeds`` and ``probes``, as in that function.
        """
        episodes, replaced, clean = (
            _seen(each, segment) for each in (self.episodes, self.replaced, self.clean)
        )
        return measure_filtering(
            model, episodes, replaced=replaced, clean=clean, untrained=untrained, **probing
        )


def _seen(episodes: list[Episode], segment: Segmenter | None) -> list[Episode]:
    if segment is None:
        return episodes
    return [replace(each, seen_masks=segment(each.pixels)) for each in episodes]

"""Measure the filtering of a run on the same episodes at every evaluation."""

from __future__ import annotations

from typing import Any

import torch

from w2f_torchrl.config import RunConfig
from w2f_torchrl.data.environments import build_env
from w2f_torchrl.envs import EvaluationSet, PixelDMControlEnv
from w2f_torchrl.evaluation import (
    Episode,
    flat_metrics,
    measure_filtering,
    record_episodes,
    replace_backgrounds,
)
from w2f_torchrl.modules import build_world_model
from w2f_torchrl.objectives import World2FilterLoss
from w2f_torchrl.utils.seeding import derive_seed

__all__ = ["FilteringMeter", "flat_metrics"]

MAX_STEPS = 128
"""Maximum agent steps of an episode."""
REPLACED = 4
"""Number of episodes that are replayed with other backgrounds."""


class FilteringMeter:
    """Record a run's probe episodes once, then measure any state of its model on them.

    Actions are random and held, so the episodes are the same for every model of a task.

    Args:
        config: The run's settings; ``evaluation.filtering_episodes`` is the number of episodes.
        seed: Seed of the episodes and of the untrained control.
        evaluation_set: Set whose distraction replaces the run's.
    """

    def __init__(
        self, config: RunConfig, seed: int, evaluation_set: EvaluationSet | None = None
    ) -> None:
        self.config, self.seed = config, seed
        env = build_env(config.environment, seed, evaluation_set=evaluation_set)
        base = env.base_env
        assert isinstance(base, PixelDMControlEnv), "no registered env (validated)"
        count = config.evaluation.filtering_episodes
        self.episodes: list[Episode] = record_episodes(base, count, seed=seed, max_steps=MAX_STEPS)
        self.replaced: list[Episode] = []
        video = None if base.distractor is None else base.distractor.video
        if video is not None and video.num_clips > 1:
            self.replaced = replace_backgrounds(base, self.episodes[:REPLACED])
        env.close()

    def measure(self, model: World2FilterLoss, *, control: bool = False, **probing: Any) -> Any:
        """Measure a model; see :func:`~w2f_torchrl.evaluation.measure_filtering`.

        Args:
            model: World model, actor and critic.
            control: Whether to also measure an untrained world model of the same sizes.
            probing: ``seeds`` and ``probes``, as in that function.
        """
        untrained = None
        if control:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed(self.seed, "untrained"))
                untrained = build_world_model(
                    self.config.model,
                    action_size=self.episodes[0].actions.shape[-1],
                    image_size=self.config.environment.image_size,
                    latent=self.config.latent,  # type: ignore[arg-type]
                ).to(next(model.world_model.parameters()).device)
        return measure_filtering(
            model, self.episodes, replaced=self.replaced, untrained=untrained, **probing
        )

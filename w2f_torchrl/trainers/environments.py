"""The envs of a run.

Collectors' worker processes import this module: it leaves out what only the trainer needs.
"""

from __future__ import annotations

from typing import Any

from torchrl.envs import TransformedEnv

from w2f_torchrl.envs import EvaluationSet, make_env
from w2f_torchrl.envs.distractions import shows_video
from w2f_torchrl.trainers.config import EnvironmentConfig, RunConfig


def create_env(config: RunConfig, index: int, seed: int) -> TransformedEnv:
    """Make a collector worker's env; ``index`` is its place in the batch."""
    del index
    return build_env(config.environment, seed, foreground_mask=config.needs_masks)


def build_env(
    environment: EnvironmentConfig,
    seed: int,
    *,
    foreground_mask: bool = True,
    evaluation_set: EvaluationSet | None = None,
) -> TransformedEnv:
    """Make one env of a run, on the CPU.

    Args:
        environment: The run's settings; ``num_envs`` is not read.
        seed: The env's seed.
        foreground_mask: Whether the simulator's mask is drawn.
        evaluation_set: In place of the run's own distraction.
    """
    return make_env(
        environment.domain,
        environment.task,
        image_size=environment.image_size,
        action_repeat=environment.action_repeat,
        **_distraction_settings(environment, evaluation_set),
        render=environment.render,  # type: ignore[arg-type]
        camera_id=environment.camera_id,
        foreground_mask=foreground_mask,
        seed=seed,
    )


def _distraction_settings(
    environment: EnvironmentConfig, evaluation_set: EvaluationSet | None
) -> dict[str, Any]:
    if evaluation_set is not None:
        return {
            "distraction": evaluation_set.distraction or "none",
            "background_source": evaluation_set.background_source(environment.background_source),
            "background_split": evaluation_set.split,
        }
    videos = shows_video(environment.distraction)
    return {
        "distraction": environment.distraction,
        "background_source": environment.background_source if videos else None,
        "background_split": environment.background_split,
    }

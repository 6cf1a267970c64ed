"""The envs of a run.

Collectors' worker processes import this module: it imports nothing that only the trainer needs.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from torchrl.envs import Compose, EnvBase, StepCounter, TransformedEnv

from w2f_torchrl.config import ConfigError, EnvironmentConfig, RunConfig
from w2f_torchrl.envs import EvaluationSet, ForegroundRule, evaluation_sets, make_env
from w2f_torchrl.envs.discrete_actions import is_discrete
from w2f_torchrl.envs.recorded import DOMAIN as RECORDED
from w2f_torchrl.envs.scenery.distractions import shows_video
from w2f_torchrl.envs.specs import check_env, check_further, extra_observations
from w2f_torchrl.envs.tasks import registered_factory
from w2f_torchrl.keys import MASK
from w2f_torchrl.plugins import load_plugins

if TYPE_CHECKING:
    from w2f_torchrl.data.recorded.episodes import RecordedData

logger = logging.getLogger(__name__)


class EnvFacts(NamedTuple):
    """What the trainer must know of an env before it makes any networks."""

    action_size: int
    """A: numbers of a continuous action, choices of a discrete one."""
    has_mask: bool
    """Whether it draws ``foreground_mask`` itself."""
    observations: tuple[str, ...] = ()
    """Further entries of its observations, which records keep."""
    discrete_actions: bool = False
    """Whether an action is one of A, one-hot."""
    data: RecordedData | None = None
    """The recorded episodes to train on; ``has_mask`` and ``observations`` are then theirs."""


def probe_env(config: RunConfig) -> EnvFacts:
    """Build every kind of env of a run once, so that what is wrong with one shows before any work.

    Recorded episodes are opened here too.

    Raises:
        ConfigError: If one can't be built, or offers what a run can't use.
    """
    recorded = None if config.data.path is None else _probe_data(config)
    if recorded is not None and config.environment.domain == RECORDED:
        return recorded
    played = _probe_played(config)
    return played if recorded is None else _check_same_actions(config, recorded, played)


def _probe_data(config: RunConfig) -> EnvFacts:
    from w2f_torchrl.data.recorded.open import check_measurable, open_data

    data = open_data(config.data, config.environment.image_size)
    if config.evaluation.filtering and config.environment.domain == RECORDED:
        check_measurable(data)
    discrete = config.data.choices is not None
    return EnvFacts(data.action_size, data.has_mask, discrete_actions=discrete, data=data)


def _check_same_actions(config: RunConfig, recorded: EnvFacts, played: EnvFacts) -> EnvFacts:
    """Return the facts of recorded data that are evaluated in an env.

    Raises:
        ConfigError: If the env has other actions.
    """

    def described(facts: EnvFacts) -> str:
        kind = "choices" if facts.discrete_actions else "continuous numbers"
        return f"{facts.action_size} {kind}"

    if described(recorded) != described(played):
        name = f"{config.environment.domain} {config.environment.task}"
        raise ConfigError(
            f"data.path={config.data.path}: recorded actions have {described(recorded)}, but the "
            f"environment {name} has {described(played)}. Name the environment of the data, or "
            f"pass environment={RECORDED} to evaluate on recorded episodes alone."
        )
    return recorded


def _probe_played(config: RunConfig) -> EnvFacts:
    """Build the run's env, and those of its evaluation sets."""
    environment = config.environment
    try:
        env = build_env(environment, 0, foreground_mask=config.needs_masks)
        if registered_factory(environment.domain) is not None:
            check_env(env, environment.domain, environment.image_size)
        observations = extra_observations(env)
        check_further(
            env,
            config.model.vectors,
            config.model.pictures,
            environment.image_size,
            masks=config.needs_masks,
        )
    except ValueError as error:  # a camera that the model lacks, a video that can't be read
        raise ConfigError(f"environment: {error}") from error
    for name in config.evaluation.sets:
        chosen = evaluation_sets()[name]
        if chosen.is_stand_in:
            logger.warning(
                "evaluation.sets=%s is a built-in stand-in: its scores are not comparable with "
                "published ones",
                name,
            )
        try:
            build_env(environment, 0, evaluation_set=chosen).close()
        except ValueError as error:
            raise ConfigError(f"evaluation.sets={name}: {error}") from error
    has_mask = MASK in env.observation_spec.keys()
    facts = EnvFacts(
        int(env.action_spec.shape[-1]),
        has_mask,
        tuple(observations),
        discrete_actions=is_discrete(env.action_spec),
    )
    env.close()
    return facts


def create_env(config: RunConfig, index: int, seed: int) -> TransformedEnv:
    """Make a collector worker's env; ``index`` is its place in the batch."""
    del index
    load_plugins(config.plugins)
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
        camera_id=environment.camera_id
        if environment.camera_name is None
        else environment.camera_name,
        foreground_mask=foreground_mask,
        further_cameras=environment.further_cameras,
        state_observations=environment.state_observations,
        foreground=ForegroundRule(
            tuple(environment.foreground_include), tuple(environment.foreground_exclude)
        ),
        seed=seed,
        action_range=environment.action_range,
        kwargs=environment.kwargs,
    )


def control_steps(env: EnvBase, action_repeat: int) -> int | None:
    """Control steps after which an env ends its episodes, where it says so; None where it doesn't.

    What says so: an attribute ``max_episode_steps`` of control steps, which the Control Suite's
    tasks with a time limit have; a ``StepCounter`` with ``max_steps``, which are agent steps.

    Args:
        env: Of a run, unbatched.
        action_repeat: Control steps of an agent step.
    """
    limits: list[float] = []
    while isinstance(env, TransformedEnv):
        for transform in env.transform if isinstance(env.transform, Compose) else [env.transform]:
            if isinstance(transform, StepCounter) and transform.max_steps:
                limits.append(transform.max_steps * action_repeat)
        env = env.base_env
    limits.append(getattr(env, "max_episode_steps", None) or math.inf)
    limit = min(limits)
    return None if math.isinf(limit) else int(limit)


def _distraction_settings(
    environment: EnvironmentConfig, evaluation_set: EvaluationSet | None
) -> dict[str, Any]:
    if evaluation_set is not None:
        chosen = evaluation_set.resolved(environment.distraction, environment.dmcgb_data)
        return {
            "distraction": chosen.distraction or "none",
            "background_source": chosen.background_source(environment.background_source),
            "background_split": chosen.split,
        }
    videos = shows_video(environment.distraction)
    return {
        "distraction": environment.distraction,
        "background_source": environment.background_source if videos else None,
        "background_split": environment.background_split,
    }

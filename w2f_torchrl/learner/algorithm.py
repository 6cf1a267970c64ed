"""An algorithm: what is built from the settings of a run's networks and losses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase

from w2f_torchrl.config import ConfigError, LossConfig, ModelConfig
from w2f_torchrl.modules import (
    GaussianActor,
    build_actor,
    build_critic,
    build_discrete_actor,
    build_policy,
    build_world_model,
)
from w2f_torchrl.objectives import World2FilterLoss
from w2f_torchrl.registry import algorithms, losses


@dataclass(frozen=True)
class AlgorithmSettings:
    """What an algorithm is built from.

    Attributes:
        model: Sizes of the networks.
        loss: Scales and constants of the losses.
        latent: ``whole``, ``split``, ``shared`` or ``foreground``.
        action_size: A.
        image_size: Side of the square image, pixels.
        loss_class: The class of ``algo.loss``.
        discrete_actions: Whether the env's actions are one of A, and not A numbers.
    """

    model: ModelConfig
    loss: LossConfig
    latent: str
    action_size: int
    image_size: int
    loss_class: type[World2FilterLoss] = World2FilterLoss
    discrete_actions: bool = False

    def build_actor(self) -> ProbabilisticTensorDictSequential:
        """Build the actor that the env's actions need; its network is ``[0].module``."""
        build = build_discrete_actor if self.discrete_actions else build_actor
        return build(self.model, self.action_size)


class Algorithm(NamedTuple):
    """What a learner trains and what acts; both share their networks."""

    loss: World2FilterLoss
    """The losses, with the world model, the actor and the critic as submodules."""
    policy: TensorDictModuleBase
    """Reads an observation, ``is_init`` and the carried ``state``, ``belief`` and
    ``previous_action``; writes ``action`` and the carried entries under ``next``."""


def build_world2filter(settings: AlgorithmSettings) -> Algorithm:
    """Build World2Filter, or DreamerV3 for the latent ``whole``."""
    model, action_size = settings.model, settings.action_size
    world_model = build_world_model(
        model,
        action_size=action_size,
        image_size=settings.image_size,
        latent=cast(Any, settings.latent),
    )
    actor = settings.build_actor()
    loss = settings.loss_class(world_model, actor[0].module, build_critic(model), settings.loss)
    # Shares the encoder, the foreground's prior and posterior and the actor.
    return Algorithm(loss, build_policy(world_model, actor))


def build_algorithm(
    name: str, settings: AlgorithmSettings, loss_name: str | None = None
) -> Algorithm:
    """Build the algorithm of a name.

    Args:
        name: ``world2filter``, ``dreamer_v3`` or a registered name.
        settings: What it is built from.
        loss_name: A registered loss; None for the settings' class.

    Raises:
        ConfigError: If a name is unknown, or a registered builder returns something else, or an
            actor for continuous actions where they are discrete.
        ValueError: If a size or a weight is wrong.
    """
    loss_class = losses.get(loss_name) or settings.loss_class
    if not (isinstance(loss_class, type) and issubclass(loss_class, World2FilterLoss)):
        raise ConfigError(
            f"algo.loss={loss_name}: {loss_class!r} must be a subclass of World2FilterLoss."
        )
    build = algorithms.get(name) or build_world2filter
    made = build(replace(settings, loss_class=loss_class))
    if not isinstance(made, Algorithm):
        raise ConfigError(f"algo={name}: {build!r} returned {made!r}; it must be an Algorithm.")
    if settings.discrete_actions and isinstance(made.loss.actor, GaussianActor):
        raise ConfigError(
            f"algo={name} builds a {type(made.loss.actor).__name__}, for continuous actions, but "
            f"the env's action is one of {settings.action_size}: use settings.build_actor()."
        )
    return made

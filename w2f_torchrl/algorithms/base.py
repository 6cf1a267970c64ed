"""What an algorithm is built from and what it is; World2Filter and DreamerV3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase

from w2f_torchrl.config import LossConfig, MethodConfig, ModelConfig
from w2f_torchrl.modules import (
    WorldModel,
    build_actor,
    build_critic,
    build_discrete_actor,
    build_policy,
    build_world_model,
)
from w2f_torchrl.objectives import World2FilterLoss

T = TypeVar("T", bound=MethodConfig)


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
        method: The group of settings named like the algorithm, if there is one; None for the
            defaults.
    """

    model: ModelConfig
    loss: LossConfig
    latent: str
    action_size: int
    image_size: int
    loss_class: type[World2FilterLoss] = World2FilterLoss
    discrete_actions: bool = False
    method: MethodConfig | None = None

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


def own_settings(settings: AlgorithmSettings, kind: type[T]) -> T:
    """Return the algorithm's own group of settings; without one, its defaults.

    Raises:
        TypeError: If it is another algorithm's.
    """
    method = kind() if settings.method is None else settings.method
    if not isinstance(method, kind):
        raise TypeError(f"method must be a {kind.__name__}, got {type(method).__name__}.")
    return method


def world_model_of(settings: AlgorithmSettings) -> WorldModel:
    """Build the world model of the settings' sizes and latent."""
    return build_world_model(
        settings.model,
        action_size=settings.action_size,
        image_size=settings.image_size,
        latent=cast(Any, settings.latent),
    )


def build_around(
    world_model: WorldModel,
    settings: AlgorithmSettings,
    loss_class: type[World2FilterLoss] | None = None,
    weights: Mapping[str, float] | None = None,
    **of_loss: Any,
) -> Algorithm:
    """Build actor, critic, losses and policy around a world model.

    Args:
        world_model: The world model.
        settings: What the rest is built from.
        loss_class: In place of the settings' own.
        weights: Of the losses that only this class has.
        **of_loss: Further arguments of that class.

    Raises:
        ValueError: If ``loss.extra`` is set too, although all weights are given.
    """
    config = settings.loss
    if weights is not None:
        if config.extra:
            raise ValueError(
                f"loss.extra={config.extra} must be empty with this algorithm, which has its own "
                f"settings for {', '.join(weights)}."
            )
        config = config.thawed(extra=dict(weights))
    actor = settings.build_actor()
    critic = build_critic(settings.model)
    loss_class = loss_class or settings.loss_class
    loss = loss_class(world_model, actor[0].module, critic, config, **of_loss)
    # Shares the encoder, the foreground's prior and posterior and the actor.
    return Algorithm(loss, build_policy(world_model, actor))


def build_world2filter(settings: AlgorithmSettings) -> Algorithm:
    """Build World2Filter, or DreamerV3 for the latent ``whole``."""
    return build_around(world_model_of(settings), settings)

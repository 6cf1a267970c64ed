"""Algorithms by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from w2f_torchrl.algorithms.base import Algorithm, AlgorithmSettings, build_world2filter
from w2f_torchrl.algorithms.masked_input import build_masked_input
from w2f_torchrl.algorithms.r2dreamer import build_r2dreamer
from w2f_torchrl.algorithms.repo import build_repo
from w2f_torchrl.algorithms.tia import build_tia
from w2f_torchrl.config import ConfigError
from w2f_torchrl.modules import GaussianActor
from w2f_torchrl.objectives import World2FilterLoss
from w2f_torchrl.registry import algorithms, losses

BUILDERS: dict[str, Callable[[AlgorithmSettings], Algorithm]] = {
    "world2filter": build_world2filter,
    "dreamer_v3": build_world2filter,
    "masked_input": build_masked_input,
    "repo": build_repo,
    "r2dreamer": build_r2dreamer,
    "tia": build_tia,
}
"""The package's; their settings are in :mod:`w2f_torchrl.config.methods`."""


def build_algorithm(
    name: str, settings: AlgorithmSettings, loss_name: str | None = None
) -> Algorithm:
    """Build the algorithm of a name.

    Args:
        name: One of :data:`BUILDERS`, or a registered name.
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
    build = algorithms.get(name) or BUILDERS[name]
    made = build(replace(settings, loss_class=loss_class))
    if not isinstance(made, Algorithm):
        raise ConfigError(f"algo={name}: {build!r} returned {made!r}; it must be an Algorithm.")
    if settings.discrete_actions and isinstance(made.loss.actor, GaussianActor):
        raise ConfigError(
            f"algo={name} builds a {type(made.loss.actor).__name__}, for continuous actions, but "
            f"the env's action is one of {settings.action_size}: use settings.build_actor()."
        )
    return made

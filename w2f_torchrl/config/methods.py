"""The methods that the package provides, and the settings that only one of them has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from w2f_torchrl.utils.settings import Settings, setting


@dataclass
class MethodConfig(Settings):
    """Base class of the settings of one method, which are the group of its name."""


@dataclass
class RepoConfig(MethodConfig):
    """RePo's settings (arXiv:2309.00082); the defaults are those of its authors' code."""

    target_kl: float = setting(
        3.0,
        "Budget of the KL of posterior and prior, summed over a state's categoricals. "
        "`loss.free_nats`, `loss.dynamics` and `loss.representation` are not read.",
        unit="nats",
        above=0,
    )
    initial_dual: float = setting(
        1e-5, "The dual variable, the weight of the KL, at the start.", unit="weight", above=0
    )
    dual_slowdown: float = setting(
        3.0,
        "An update moves the dual variable's logarithm by about `optimizer.lr` divided by this.",
        unit="factor",
        above=0,
    )
    prior_weight: float = setting(
        5.0,
        "How many times as much of the KL trains the prior as trains posterior and encoder: at 5, "
        "five sixths train the prior.",
        unit="factor",
        above=0,
    )


@dataclass
class R2DreamerConfig(MethodConfig):
    """R2-Dreamer's settings; the defaults are those of its authors' code."""

    barlow: float = setting(
        0.05,
        "Weight of the Barlow Twins loss, which replaces the decoder's.",
        unit="weight",
        minimum=0,
    )
    redundancy: float = setting(
        5e-4,
        "Weight, within that loss, of correlations between different features.",
        unit="weight",
        minimum=0,
    )


@dataclass
class TiaConfig(MethodConfig):
    """The settings of Task Informed Abstractions (arXiv:2106.15612)."""

    background_image: float = setting(
        1.5,
        "Weight of the picture that the distractor's latent has to reconstruct alone, relative to "
        "`loss.image`'s scale.",
        unit="weight",
        minimum=0,
    )
    dissociation: float = setting(
        1.0,
        "Factor of the reversed gradient with which the distractor's latent unlearns the reward. "
        "The cross-entropy of the two-hot reward is in nats, so that at 1 it unlearns the reward "
        "as strongly as the task's latent learns it.",
        unit="factor",
        minimum=0,
    )


class Method(NamedTuple):
    """What follows from the name of an algorithm, in place of ``algo.latent``."""

    latent: str
    """The world model's: ``whole``, or ``split`` for one with a latent of the background too."""
    trains_on_masks: bool = False
    acts_on_masks: bool = False
    """Whether the policy reads the mask of every observation."""


METHODS: dict[str, Method] = {
    "dreamer_v3": Method("whole"),
    "masked_input": Method("whole", trains_on_masks=True, acts_on_masks=True),
    "repo": Method("whole"),
    "r2dreamer": Method("whole"),
    "tia": Method("split"),
}
"""All but ``world2filter``, whose latent is ``algo.latent``; docs/methods.md compares them."""

"""The acting policy: encoder, posterior and actor, one observation at a time."""

from __future__ import annotations

from tensordict.nn import (
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torch import Tensor
from torchrl.modules import RSSMStateEstimatorV3

from w2f_torchrl.config.model import ModelConfig
from w2f_torchrl.modules.components import encoder_keys
from w2f_torchrl.modules.world_model import WorldModel


def _carry(state: Tensor, belief: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return state, belief, action


def build_policy(
    world_model: WorldModel, actor: ProbabilisticTensorDictSequential
) -> TensorDictSequential:
    """Compose the acting policy from the trained parts, which are shared, not copied.

    It reads ``pixels``, ``is_init`` and the carried ``state``, ``belief`` and ``previous_action``
    (a TensorDictPrimer makes the first ones, with the sizes of :func:`latent_sizes`), and writes
    ``action`` and the carried entries for the next step. It computes neither mask nor background.
    """
    encoder, rollout = world_model.encoder, world_model.rollout
    carried = ["state", "belief", "previous_action"]
    return TensorDictSequential(
        TensorDictModule(encoder, encoder_keys(encoder), ["encoded_latents"]),
        RSSMStateEstimatorV3(rollout.rssm_prior.module, rollout.rssm_posterior.module),
        actor,
        TensorDictModule(_carry, ["state", "belief", "action"], [("next", key) for key in carried]),
    )


def latent_sizes(config: ModelConfig, action_size: int) -> dict[str, int]:
    """Return the sizes of the entries that the policy carries from step to step, by key."""
    return {
        "state": config.state_size,
        "belief": config.belief_size,
        "previous_action": action_size,
    }

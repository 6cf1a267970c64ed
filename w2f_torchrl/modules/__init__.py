"""Networks: encoder, RSSM, decoders, heads, actor and critic.

Read :mod:`~w2f_torchrl.modules.rssm` first, then :mod:`~w2f_torchrl.modules.world_model`. Functions
from :mod:`w2f_torchrl.kernels` are faster forms of the operations that their names say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from w2f_torchrl._lazy import lazy_exports
from w2f_torchrl.config.model import LATENTS, ModelConfig
from w2f_torchrl.config.presets import PRESETS
from w2f_torchrl.registry import register_decoder, register_encoder

if TYPE_CHECKING:
    from w2f_torchrl.kernels.block_gru import BlockGRUStep
    from w2f_torchrl.modules.actor_critic import (
        Actor,
        GaussianActor,
        action_distribution,
        build_actor,
        build_critic,
    )
    from w2f_torchrl.modules.by_env.discrete_actor import CategoricalActor, build_discrete_actor
    from w2f_torchrl.modules.dual_decoder import DualImageDecoder, compose
    from w2f_torchrl.modules.imagination import imagine, imagine_step
    from w2f_torchrl.modules.policy import build_policy, latent_sizes
    from w2f_torchrl.modules.rssm import RSSMRollout, Unrolled, sample_one_hot
    from w2f_torchrl.modules.world_model import WorldModel, build_world_model
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "actor_critic": (
                "Actor",
                "GaussianActor",
                "action_distribution",
                "build_actor",
                "build_critic",
            ),
            "by_env.discrete_actor": ("CategoricalActor", "build_discrete_actor"),
            "dual_decoder": ("DualImageDecoder", "compose"),
            "imagination": ("imagine", "imagine_step"),
            "policy": ("build_policy", "latent_sizes"),
            "rssm": ("BlockGRUStep", "RSSMRollout", "Unrolled", "sample_one_hot"),
            "world_model": ("WorldModel", "build_world_model"),
        },
    )

__all__ = [
    "LATENTS",
    "PRESETS",
    "Actor",
    "BlockGRUStep",
    "CategoricalActor",
    "DualImageDecoder",
    "GaussianActor",
    "ModelConfig",
    "RSSMRollout",
    "Unrolled",
    "WorldModel",
    "action_distribution",
    "build_actor",
    "build_critic",
    "build_discrete_actor",
    "build_policy",
    "build_world_model",
    "compose",
    "imagine",
    "imagine_step",
    "latent_sizes",
    "register_decoder",
    "register_encoder",
    "sample_one_hot",
]

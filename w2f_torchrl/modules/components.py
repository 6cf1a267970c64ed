"""The parts of the world model, built from its sizes.

Shape letters: E embedding, A action, H, W height, width.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import RSSMPosteriorV3, RSSMPriorV3

from w2f_torchrl.config.model import ModelConfig
from w2f_torchrl.modules.by_env.observations import ObservationEncoder
from w2f_torchrl.modules.dual_decoder import DualImageDecoder
from w2f_torchrl.modules.image_decoder import build_image_decoder
from w2f_torchrl.modules.networks import ImageEncoder
from w2f_torchrl.modules.rssm import RSSMRollout
from w2f_torchrl.registry import decoders, encoders

Latent = Literal["whole", "split", "shared", "foreground"]
"""The latents of a world model: see :class:`~w2f_torchrl.modules.WorldModel`."""


def background_sizes(config: ModelConfig) -> ModelConfig:
    """Return the sizes with the background's in place of the foreground's."""
    return config.thawed(
        belief_size=config.background_belief_size,
        hidden_size=config.background_hidden_size,
        num_classes=config.background_num_classes,
        cnn_depth=config.background_cnn_depth,
        pictures=[],
        vectors={},
    )


def build_encoder(config: ModelConfig, image_size: int) -> ImageEncoder:
    """Build an encoder of observations, by default pictures ``[..., 3, H, W]``, to ``[..., E]``."""
    if (build := encoders.get(config.encoder)) is not None:
        return build(config, image_size)  # type: ignore[no-any-return]
    if config.observes_more:
        build = partial(build_encoder, config.thawed(pictures=[], vectors={}), image_size)
        return ObservationEncoder(config, build)  # type: ignore[return-value]
    return ImageEncoder(
        depth=config.cnn_depth,
        mults=config.cnn_multipliers,
        kernel_size=config.kernel_size,
        pooled=config.resample == "reference",
    )


def encoder_keys(*encoders: nn.Module | None) -> list[str]:
    """Return the entries of an observation that encoders are called with, by default pixels."""
    return [key for encoder in encoders for key in getattr(encoder, "in_keys", ["pixels"])]


def build_rollout(
    config: ModelConfig,
    embedding: int,
    action_size: int | None,
    embedding_key: str = "encoded_latents",
) -> RSSMRollout:
    """Build an RSSM.

    Args:
        config: Sizes.
        embedding: E.
        action_size: A; None: the background's, which sees no action.
        embedding_key: Under ``next``.
    """
    # All values whose defaults differ in TorchRL's constructors are passed.
    prior = RSSMPriorV3(
        action_shape=(action_size or 1,),
        action_dim=action_size or 1,
        hidden_dim=config.hidden_size,
        rnn_hidden_dim=config.belief_size,
        num_categoricals=config.num_categoricals,
        num_classes=config.num_classes,
        recurrent_model="block_gru",
        num_blocks=config.num_blocks,
        num_layers=config.dynamics_layers,
        prior_num_layers=config.prior_layers,
        unimix=config.unimix,
    )
    posterior = RSSMPosteriorV3(
        hidden_dim=config.hidden_size,
        rnn_hidden_dim=config.belief_size,
        obs_embed_dim=embedding,
        num_categoricals=config.num_categoricals,
        num_classes=config.num_classes,
        use_rms_norm=True,
        num_layers=config.posterior_layers,
        unimix=config.unimix,
    )
    action_key = None if action_size is None else "action"
    prefix = "background_" if action_size is None else ""
    state, belief = f"{prefix}state", f"{prefix}belief"
    return RSSMRollout(
        TensorDictModule(
            prior,
            [state, belief, "action"],
            [("next", f"{prefix}prior_logits"), ("next", state), ("next", belief)],
        ),
        TensorDictModule(
            posterior,
            [("next", belief), ("next", embedding_key)],
            [("next", f"{prefix}posterior_logits"), ("next", state)],
        ),
        action_key=action_key,
    )


def build_decoder(
    config: ModelConfig, image_size: int, latent: Latent
) -> TensorDictModule | DualImageDecoder:
    """Build the decoder of the whole picture, or of foreground and background."""
    if (build := decoders.get(config.decoder)) is not None:
        return build(config, image_size, latent)
    image_shape = (3, image_size, image_size)
    features = (config.state_size, config.belief_size)
    settings: dict[str, Any] = {
        "decoder": config.decoder,
        "mults": config.cnn_multipliers,
        "kernel_size": config.kernel_size,
        "num_blocks": config.num_blocks,
        "nearest": config.resample != "stride",
    }
    if latent == "whole":
        decoder = build_image_decoder(
            features=features,
            image_shape=image_shape,
            depth=config.cnn_depth,
            units=config.units,
            **settings,
        )
        keys = [("next", "state"), ("next", "belief")]
        return TensorDictModule(_Float32(decoder), keys, [("next", "reconstructed_pixels")])
    own = (config.background_state_size, config.background_belief_size)
    background_features = {"split": own, "shared": features}.get(latent)
    prefix = "" if latent == "shared" else "background_"
    return DualImageDecoder(
        features,
        background_features,
        image_shape,
        depth=config.cnn_depth,
        units=config.units,
        background_depth=config.background_cnn_depth,
        background_units=config.background_hidden_size,
        background_keys=(f"{prefix}state", f"{prefix}belief"),
        **settings,
    )


class _Float32(nn.Module):
    """Return the wrapped module's output in float32, also under autocast."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        output: Tensor = self.module(*inputs)
        return output.float()

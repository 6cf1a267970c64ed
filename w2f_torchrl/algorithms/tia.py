r"""Task Informed Abstractions: two latents without masks, one of which must not know the reward.

Fu, Yang, Agrawal and Jaakkola, "Learning Task Informed Abstractions", ICML 2021, arXiv:2106.15612.
The task's latent s+ predicts the reward; the distractor's latent s- must not. Together they
reconstruct the image, through a mask M that both decoders propose:

    o = M o(s+) + (1 - M) o(s-)

s+ maximises ln p(o | s+, s-) + ln p(r | s+) - KL; s- maximises
ln p(o | s+, s-) + lambda_O ln p(o | s-) - lambda_R max ln p(r | s-) - KL (its section 3). So s- has
to reconstruct the image alone as well, or it could stay empty, and a reward head that does its best
on s- has its gradient reversed on the way into s-. Both latents see the actions. Reward,
continuation, actor and critic read s+ only.

Here the learner is DreamerV3, the distractor's head makes one step per update, and the squared
error of the image is not halved, as in DreamerV3.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import Tensor, nn

from w2f_torchrl.algorithms.base import (
    Algorithm,
    AlgorithmSettings,
    build_around,
    own_settings,
    world_model_of,
)
from w2f_torchrl.config import ModelConfig, TiaConfig
from w2f_torchrl.keys import NEXT_MASK, PIXELS
from w2f_torchrl.modules import RSSMRollout, WorldModel, compose
from w2f_torchrl.modules.components import background_sizes, build_rollout
from w2f_torchrl.modules.image_decoder import ImageDecoder, build_image_decoder
from w2f_torchrl.modules.networks import MLP
from w2f_torchrl.objectives import LossTerm, World2FilterLoss, image_loss
from w2f_torchrl.objectives.terms import TERMS, TOTAL
from w2f_torchrl.registry import decoders

IMAGE = (TOTAL, "wm/image_loss")


def reverse_gradient(features: Tensor, factor: float) -> Tensor:
    """Return features ``[..., F]`` unchanged; their gradient is multiplied by ``-factor``."""
    stopped = features.detach()
    return stopped - factor * (features - stopped)


class TiaDecoder(TensorDictModuleBase):
    """The joint reconstruction's parts, and the picture that s- reconstructs alone.

    Writes under ``next`` ``foreground_pixels`` (of s+), ``mask_logits`` (of M, one map of both
    decoders' proposals), ``background_pixels`` (of s-), and ``distractor_pixels`` (of s- alone).

    Args:
        config: Sizes.
        image_size: Side of the square picture, pixels.
    """

    in_keys: ClassVar[list[NestedKey]] = [
        ("next", key) for key in ("state", "belief", "background_state", "background_belief")
    ]
    out_keys: ClassVar[list[NestedKey]] = [
        ("next", key)
        for key in ("foreground_pixels", "mask_logits", "background_pixels", "distractor_pixels")
    ]

    def __init__(self, config: ModelConfig, image_size: int) -> None:
        super().__init__()
        background = background_sizes(config)

        def build(sizes: ModelConfig, *, mask: bool) -> ImageDecoder:
            return build_image_decoder(
                config.decoder,
                (sizes.state_size, sizes.belief_size),
                (3, image_size, image_size),
                depth=sizes.cnn_depth,
                units=config.units if sizes is config else config.background_hidden_size,
                mults=config.cnn_multipliers,
                kernel_size=config.kernel_size,
                num_blocks=config.num_blocks,
                nearest=config.resample != "stride",
                mask=mask,
            )

        self.foreground = build(config, mask=True)
        self.background = build(background, mask=True)
        self.distractor = build(background, mask=False)
        self.joint_mask = nn.Conv2d(2, 1, kernel_size=1)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the pictures ``[..., C, H, W]`` into ``tensordict``, in float32."""
        state, belief, *background = (tensordict.get(key) for key in self.in_keys)
        colours, first = self.foreground(state, belief)  # [..., 3, H, W], [..., 1, H, W]
        behind, second = self.background(*background)
        proposals = torch.cat((first, second), -3)  # [..., 2, H, W]
        mask = self.joint_mask(proposals.flatten(0, -4)).unflatten(0, proposals.shape[:-3])
        made = (colours, mask, behind, self.distractor(*background))
        for key, picture in zip(self.out_keys, made, strict=True):
            tensordict.set(key, picture.float())
        return tensordict


class TiaLoss(World2FilterLoss):
    """DreamerV3's losses for two latents that share the image and not the reward.

    ``loss_image`` is the joint reconstruction's, ``loss_background_image`` that of s- alone, and
    ``loss_dissociation`` the cross-entropy of the reward predicted from s-: its head minimises it,
    and s- maximises it.

    Args:
        *parts: Arguments of :class:`~w2f_torchrl.objectives.World2FilterLoss`, in their order.
        dissociation: lambda_R.
    """

    terms: ClassVar[dict[str, LossTerm]] = {
        **{n: t for n, t in TERMS.items() if n not in ("foreground", "mask", "background")},
        "image": LossTerm(IMAGE),
        "background_image": LossTerm(IMAGE),
        "dissociation": LossTerm((TOTAL, "wm/dissociation_loss")),
    }

    def __init__(self, *parts: Any, dissociation: float) -> None:
        super().__init__(*parts)
        self.dissociation = dissociation
        self.in_keys = [key for key in self.in_keys if key != NEXT_MASK]
        config = self.world_model.config
        features = config.background_state_size + config.background_belief_size
        units = config.background_hidden_size
        self.background_reward = MLP(
            features, config.num_bins, config.head_layers, units, outscale=0.0
        )

    def world_model_losses(
        self, model_td: TensorDictBase
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return unweighted losses of both latents, and metrics.

        Args:
            model_td: Output of the world model, ``[B, T]``.
        """
        losses, metrics = super().world_model_losses(model_td)
        td = model_td.get("next")
        features = torch.cat((td.get("background_belief"), td.get("background_state")), -1)
        logits = self.background_reward(reverse_gradient(features, self.dissociation)).float()
        reward = self.world_model.two_hot.loss(logits, td.get("reward")).mean()
        return losses | {"dissociation": reward}, metrics

    def reconstruction_losses(
        self, td: TensorDictBase
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the squared errors of the joint picture and of that of s- alone.

        Args:
            td: The entries under ``next``, ``[B, T]``.
        """
        names = ("foreground_pixels", "mask_logits", "background_pixels")
        joint, pixels = compose(*(td.get(name) for name in names)), td.get(PIXELS)
        alone = image_loss(td.get("distractor_pixels"), pixels)
        return {"image": image_loss(joint, pixels), "background_image": alone}, {}


def _with_actions(world_model: WorldModel) -> RSSMRollout:
    """Build the distractor's RSSM, of the background's sizes, which sees the actions too."""
    config, size = world_model.config, world_model.image_size
    assert world_model.background_encoder is not None, "checked"
    embedding = world_model.background_encoder.output_features((3, size, size))
    made = build_rollout(background_sizes(config), embedding, world_model.action_size)
    state, belief = "background_state", "background_belief"
    return RSSMRollout(
        TensorDictModule(
            made.rssm_prior.module,
            [state, belief, "action"],
            [("next", "background_prior_logits"), ("next", state), ("next", belief)],
        ),
        TensorDictModule(
            made.rssm_posterior.module,
            [("next", belief), ("next", "background_encoded_latents")],
            [("next", "background_posterior_logits"), ("next", state)],
        ),
    )


def build_tia(settings: AlgorithmSettings) -> Algorithm:
    """Build Task Informed Abstractions on DreamerV3.

    Raises:
        ValueError: If both latents would share an encoder, or a decoder is registered.
    """
    model, method = settings.model, own_settings(settings, TiaConfig)
    if model.background_encoder != "own":
        raise ValueError(
            f"model.background_encoder={model.background_encoder!r} must be own with algo=tia: a "
            "shared encoder would unlearn the reward."
        )
    if model.decoder not in decoders.builtin:
        raise ValueError(
            f"model.decoder={model.decoder!r} must be {' or '.join(decoders.builtin)} with "
            "algo=tia, whose pictures come from three decoders."
        )
    world_model = world_model_of(settings)
    gone = set(world_model.decoder.out_keys)
    world_model.background_rollout = _with_actions(world_model)
    world_model.decoder = TiaDecoder(model, settings.image_size)
    kept = [key for key in world_model.out_keys if key not in gone]
    world_model.out_keys = [*kept, *world_model.decoder.out_keys]
    weights = {"background_image": method.background_image, "dissociation": 1.0}
    return build_around(
        world_model, settings, TiaLoss, weights=weights, dissociation=method.dissociation
    )

r"""R2-Dreamer: the latent has to predict the encoder's embedding, not the image.

Morihira et al., "R2-Dreamer: Redundancy-Reduced World Models without Decoders or Augmentation",
ICLR 2026, arXiv:2603.18202; public code: NM512/r2dreamer (``rep_loss=r2dreamer``). In place of the
decoder a linear map projects the latent to the size of the embedding, and a Barlow Twins loss
(Zbontar et al. 2021, arXiv:2103.03230, eq. 1) asks that each projected feature correlates with its
own feature of the embedding and with no other. The embedding is stopped: the encoder learns through
the posterior only. Nothing distinguishes the agent from the scenery.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from w2f_torchrl.algorithms.base import (
    Algorithm,
    AlgorithmSettings,
    build_around,
    own_settings,
    world_model_of,
)
from w2f_torchrl.algorithms.no_decoder import TERMS_WITHOUT_IMAGE, without_decoder
from w2f_torchrl.config import R2DreamerConfig
from w2f_torchrl.objectives import LossTerm, World2FilterLoss

EPSILON = 1e-8
"""Added to standard deviations, as features of the embedding can be constant."""


def barlow_twins_loss(projected: Tensor, embedding: Tensor, redundancy: float) -> Tensor:
    r"""Return :math:`\sum_i (1 - C_{ii})^2 + \lambda \sum_{i \neq j} C_{ij}^2`.

    C is the correlation of the features of both over the batch, with standard deviations of N - 1
    and products divided by N, as in the authors' code.

    Args:
        projected: Projected latents ``[N, E]``.
        embedding: Embeddings ``[N, E]``.
        redundancy: lambda, the weight of the entries off the diagonal.
    """
    # Products of 16 bits would round the correlations, whose squares are summed E^2 times.
    with torch.autocast(projected.device.type, enabled=False):
        first, second = _standardised(projected.float()), _standardised(embedding.float())
        correlation = first.T @ second / len(first)  # [E, E]
        own = correlation.diagonal()  # [E]
        others = correlation.square().sum() - own.square().sum()
        return (1 - own).square().sum() + redundancy * others


def _standardised(features: Tensor) -> Tensor:
    return (features - features.mean(0)) / (features.std(0) + EPSILON)


class R2DreamerLoss(World2FilterLoss):
    """DreamerV3's losses with ``loss_barlow`` in place of the image's.

    Args:
        *parts: Arguments of :class:`~w2f_torchrl.objectives.World2FilterLoss`, in their order.
        redundancy: Weight of correlations between different features.
    """

    terms: ClassVar[dict[str, LossTerm]] = TERMS_WITHOUT_IMAGE

    def __init__(self, *parts: Any, redundancy: float) -> None:
        super().__init__(*parts)
        self.redundancy = redundancy
        config, size = self.world_model.config, self.world_model.image_size
        embedding = self.world_model.encoder.output_features((3, size, size))
        features = config.belief_size + config.state_size
        self.projector = nn.Linear(features, embedding, bias=False)

    def loss_names(self) -> list[str]:
        """Return DreamerV3's, and the loss in place of the image's."""
        return [*super().loss_names(), "loss_barlow"]

    def reconstruction_losses(
        self, td: TensorDictBase
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the loss between latents and embeddings.

        Args:
            td: The entries under ``next``, ``[B, T]``.
        """
        features = torch.cat((td.get("belief"), td.get("state")), -1).flatten(0, 1)  # [N, D + S]
        embedding = td.get("encoded_latents").detach().flatten(0, 1)  # [N, E]
        loss = barlow_twins_loss(self.projector(features), embedding, self.redundancy)
        return {"barlow": loss}, {}


def build_r2dreamer(settings: AlgorithmSettings) -> Algorithm:
    """Build R2-Dreamer."""
    method = own_settings(settings, R2DreamerConfig)
    world_model = without_decoder(world_model_of(settings))
    weights = {"barlow": method.barlow}
    return build_around(
        world_model, settings, R2DreamerLoss, weights=weights, redundancy=method.redundancy
    )

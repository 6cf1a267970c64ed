r"""RePo: latents that predict rewards within a budget of information about the image.

Zhu, Simchowitz, Gadipudi and Gupta, "RePo: Resilient Model-Based Reinforcement Learning by
Regularizing Posterior Predictability", NeurIPS 2023, arXiv:2309.00082. Nothing is reconstructed.
The latents maximise the likelihood of the rewards subject to

    E[KL(q(z_t | h_t, x_t) || p(z_t | h_t))] <= epsilon

(its section 3), by gradient descent on the Lagrangian and ascent on its dual variable beta. As in
its authors' code, the KL is balanced, a share of it trains the prior and the rest the posterior,
and beta is kept by its logarithm. Scenery that predicts no reward only costs budget.

Here the learner is DreamerV3: categorical states, two-hot rewards, a continuation, and a critic
whose loss on replayed rewards reaches the latents.
"""

from __future__ import annotations

import math
from dataclasses import replace
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
from w2f_torchrl.config import RepoConfig
from w2f_torchrl.objectives import LossTerm, World2FilterLoss
from w2f_torchrl.objectives.terms import TOTAL

KL = ("dynamics", "representation")


class RepoLoss(World2FilterLoss):
    """DreamerV3's losses with a budget for the KL, and without the image's.

    ``loss_budget`` is beta (KL - epsilon), with beta stopped; ``loss_dual`` is
    -log(beta) (KL - epsilon), with the KL stopped: minimising it raises beta while the KL exceeds
    the budget. The dual variable is a parameter of this module: it is part of every checkpoint,
    the optimizer moves it, and an update that is not applied leaves it unchanged.

    Args:
        *parts: Arguments of :class:`~w2f_torchrl.objectives.World2FilterLoss`, in their order.
        repo: The budget, and the dual variable's start and rate.
    """

    terms: ClassVar[dict[str, LossTerm]] = {
        **{name: term for name, term in TERMS_WITHOUT_IMAGE.items() if name not in KL},
        "budget": LossTerm((TOTAL, "wm/kl_loss")),
        "dual": LossTerm(("wm/dual_loss",)),
    }

    def __init__(self, *parts: Any, repo: RepoConfig) -> None:
        super().__init__(*parts)
        self.repo = repo
        # The optimizer normalises gradients, so a parameter moves by about its learning rate per
        # update, and the logarithm, which is a fraction of the parameter, by that fraction of it.
        start = math.log(repo.initial_dual) * repo.dual_slowdown
        self.scaled_log_dual = nn.Parameter(torch.tensor(start))

    @property
    def log_dual(self) -> Tensor:
        """The logarithm of beta, a scalar with gradient."""
        return self.scaled_log_dual / self.repo.dual_slowdown

    def world_model_losses(
        self, model_td: TensorDictBase
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the budgeted KL, the dual variable's, reward and continuation losses, and metrics.

        Args:
            model_td: Output of the world model, ``[B, T]``.
        """
        losses, metrics = super().world_model_losses(model_td)
        dynamics, representation = (losses.pop(name) for name in KL)
        weight, log_dual = self.repo.prior_weight, self.log_dual
        kl = (weight * dynamics + representation) / (weight + 1)
        violation = kl - self.repo.target_kl
        beta = log_dual.detach().exp()
        losses["budget"] = beta * violation
        losses["dual"] = -log_dual * violation.detach()
        return losses, metrics | {"wm/dual": beta}

    def reconstruction_losses(
        self, td: TensorDictBase
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return nothing: nothing is reconstructed.

        Args:
            td: The entries under ``next``, ``[B, T]``.
        """
        del td
        return {}, {}


def build_repo(settings: AlgorithmSettings) -> Algorithm:
    """Build RePo on DreamerV3."""
    repo = own_settings(settings, RepoConfig)
    # The budget takes the place of the free nats, below which the KL would have no gradient.
    settings = replace(settings, loss=settings.loss.thawed(free_nats=0.0))
    # Gradients are clipped relative to their parameter, so a logarithm would stay where it is zero,
    # at beta = 1. So small a gradient is never clipped; the step does not depend on its scale.
    weights = {"budget": 1.0, "dual": 1e-6}
    world_model = without_decoder(world_model_of(settings))
    return build_around(world_model, settings, RepoLoss, weights=weights, repo=repo)

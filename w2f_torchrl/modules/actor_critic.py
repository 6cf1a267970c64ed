"""Actor and critic (DreamerV3, eq. 4).

Shape letters: A action, S state, D belief.
"""

from __future__ import annotations

import torch
from tensordict.nn import (
    InteractionType,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torch import Tensor
from torchrl.modules.distributions import IndependentNormal

from w2f_torchrl.config.model import ModelConfig
from w2f_torchrl.kernels.imagination import Actor as Actor
from w2f_torchrl.kernels.imagination import two_heads
from w2f_torchrl.modules.networks import MLP
from w2f_torchrl.utils.checks import check_number


def action_distribution(mean: Tensor, std: Tensor) -> IndependentNormal:
    """Return the distribution over actions ``[..., A]``, whose log-probabilities are ``[...]``."""
    return IndependentNormal(mean, std, validate_args=False)


class GaussianActor(Actor):
    """The paper's policy for continuous actions: a Normal with a mean squashed into [-1, 1].

    The standard deviation lies in [0.1, 1] and starts near 0.9, the mean near 0 (output scale
    0.01; DreamerV3, hyperparameter table). Mean and deviation have separate linear
    layers, as in the reference: adaptive gradient clipping treats them separately.

    Args:
        features: S + D, features of state and belief.
        action_size: A.
        config: Sizes; ``units`` and ``actor_critic_layers`` are read.
    """

    min_std = 0.1
    max_std = 1.0

    def __init__(self, features: int, action_size: int, config: ModelConfig):
        super().__init__()
        layers = config.actor_critic_layers
        self.backbone = MLP(features, None, depth=layers, num_cells=config.units)
        self.mean, self.std = (
            MLP(config.units, action_size, depth=0, outscale=0.01) for _ in range(2)
        )

    def forward(self, state: Tensor, belief: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``[..., S], [..., D]`` to mean and standard deviation ``[..., A]``."""
        return self.from_features(torch.cat((belief, state), -1))

    @two_heads
    def from_features(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Compute :meth:`forward` from belief and state joined, ``[..., D + S]``."""
        hidden = self.backbone(features)  # [..., units]
        return self.squash(self.mean(hidden), self.std(hidden))  # [..., A]

    def squash(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Map the outputs of the two layers ``[..., A]`` to their ranges."""
        std = torch.sigmoid(std.float() + 2.0)
        return mean.float().tanh(), (self.max_std - self.min_std) * std + self.min_std

    distribution = staticmethod(action_distribution)

    def noise(self, like: Tensor) -> Tensor:
        """Return the noise that :meth:`draw` needs for actions of this shape, ``[..., A]``."""
        return torch.randn_like(like)

    def draw(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """Draw actions ``[..., A]`` from mean, deviation and noise of the same shape."""
        return mean + std * noise


def build_actor(config: ModelConfig, action_size: int) -> ProbabilisticTensorDictSequential:
    """Build the actor: reads ``state`` and ``belief``, writes ``loc``, ``scale`` and ``action``.

    Under ``set_exploration_type(ExplorationType.MODE)`` the action is the mean.
    """
    check_number("action_size", action_size, integer=True, minimum=1)
    net = GaussianActor(config.state_size + config.belief_size, action_size, config)
    return ProbabilisticTensorDictSequential(
        TensorDictModule(net, in_keys=["state", "belief"], out_keys=["loc", "scale"]),
        ProbabilisticTensorDictModule(
            in_keys=["loc", "scale"],
            out_keys=["action"],
            distribution_class=IndependentNormal,
            default_interaction_type=InteractionType.RANDOM,
        ),
    )


def build_critic(config: ModelConfig) -> MLP:
    """Build the critic: ``belief, state`` to logits over the bins, all zero at the start."""
    return MLP(
        config.state_size + config.belief_size,
        config.num_bins,
        depth=config.actor_critic_layers,
        num_cells=config.units,
        outscale=0.0,
    )

"""The actor for discrete actions (DreamerV3, "Actor learning"): a categorical over A actions.

An action is one-hot everywhere outside the env: in records, in the recurrence and in imagination.
Only the env's own transform turns it into what the env wants
(:class:`w2f_torchrl.envs.discrete_actions.DiscreteActions`).

Shape letters: A actions, S state, D belief.
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
from torchrl.modules.distributions import OneHotCategorical

from w2f_torchrl.config.model import ModelConfig
from w2f_torchrl.kernels.categoricals import one_hot
from w2f_torchrl.kernels.dense import linear
from w2f_torchrl.kernels.imagination import Actor, linear_heads
from w2f_torchrl.modules.networks import MLP
from w2f_torchrl.modules.rssm import sample_one_hot
from w2f_torchrl.utils.checks import check_number


class OneHotActions(OneHotCategorical):
    """TorchRL's one-hot categorical with actions in the dtype of the logits.

    ``rsample`` has TorchRL's straight-through gradient: that of the probabilities. Of equally
    likely actions the mode is the first one; TorchRL's marks them all.
    """

    @property
    def mode(self) -> Tensor:
        """The most likely action, one-hot ``[..., A]``."""
        return one_hot(self.logits.argmax(-1), self.logits.shape[-1], self.logits.dtype)

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Draw one-hot actions ``[*sample_shape, ..., A]``."""
        drawn: Tensor = super().sample(torch.Size(sample_shape))
        return drawn.to(self.logits.dtype)


def one_hot_distribution(log_probs: Tensor) -> OneHotActions:
    """Return the distribution over one-hot actions ``[..., A]``; log-probabilities are ``[...]``.

    Args:
        log_probs: Of each action ``[..., A]``.
    """
    return OneHotActions(logits=log_probs, validate_args=False)


class CategoricalActor(Actor):
    """The paper's policy for discrete actions: a categorical mixed with 1 % of the uniform one.

    The same network, with the same parameters and initialisation (output scale 0.01), as that of
    :class:`torchrl.modules.DreamerV3DiscreteActor`, which it is compared with in the tests; here
    its layers are this package's, and imagination draws actions as it draws states.

    Args:
        features: S + D, features of state and belief.
        num_actions: A, at least 2.
        config: Sizes; ``units``, ``actor_critic_layers`` and ``unimix`` are read. The reference's
            share of the uniform distribution, 0.01, is the same for states and actions.
    """

    def __init__(self, features: int, num_actions: int, config: ModelConfig):
        super().__init__()
        self.unimix = config.unimix
        layers = config.actor_critic_layers
        self.backbone = MLP(features, None, depth=layers, num_cells=config.units)
        self.logits_head = MLP(config.units, num_actions, depth=0, outscale=0.01).model[0]

    def forward(self, state: Tensor, belief: Tensor) -> tuple[Tensor]:
        """Map ``[..., S], [..., D]`` to the log-probability of each action ``[..., A]``."""
        return self.from_features(torch.cat((belief, state), -1))

    @linear_heads("logits_head")
    def from_features(self, features: Tensor) -> tuple[Tensor]:
        """Compute :meth:`forward` from belief and state joined, ``[..., D + S]``."""
        hidden = self.backbone(features)  # [..., units]
        return self.squash(linear(hidden, self.logits_head.weight, self.logits_head.bias))

    def squash(self, logits: Tensor) -> tuple[Tensor]:
        """Map the layer's output to log-probabilities mixed with the uniform share, ``[..., A]``.

        p = (1 - m) softmax(logits) + m / A with m = ``unimix``: no action is ever impossible.
        """
        probs = torch.softmax(logits.float(), -1)
        return (torch.log((1 - self.unimix) * probs + self.unimix / logits.shape[-1]),)

    distribution = staticmethod(one_hot_distribution)

    def noise(self, like: Tensor) -> Tensor:
        """Return the uniform draws that :meth:`draw` needs: ``[..., A]`` to ``[..., 1]``."""
        return torch.rand_like(like[..., :1])

    def draw(self, log_probs: Tensor, noise: Tensor) -> Tensor:
        """Draw one-hot actions by inverting the distribution function.

        Args:
            log_probs: From :meth:`from_features`, ``[..., A]``; the uniform share is in them.
            noise: Draws from U[0, 1) ``[..., 1]``.
        """
        return sample_one_hot(log_probs.unsqueeze(-2), 0.0, noise).squeeze(-2)  # [..., A]


def build_discrete_actor(
    config: ModelConfig, num_actions: int
) -> ProbabilisticTensorDictSequential:
    """Build the actor: reads ``state`` and ``belief``, writes ``logits`` and ``action``.

    Under ``set_exploration_type(ExplorationType.MODE)`` the action is the most likely one.

    Args:
        config: Sizes.
        num_actions: A, at least 2.
    """
    check_number("num_actions", num_actions, integer=True, minimum=2)
    net = CategoricalActor(config.state_size + config.belief_size, num_actions, config)
    return ProbabilisticTensorDictSequential(
        TensorDictModule(net, in_keys=["state", "belief"], out_keys=["logits"]),
        ProbabilisticTensorDictModule(
            in_keys={"logits": "logits"},
            out_keys=["action"],
            distribution_class=OneHotActions,
            distribution_kwargs={"validate_args": False},
            default_interaction_type=InteractionType.RANDOM,
        ),
    )

"""Tensors that the posterior's recurrence passes from step to step.

Shape letters: B batch, D belief, S state, H hidden, G blocks, w = D / G, K categoricals, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from w2f_torchrl.kernels.dense import Normed


class ScanWeights(NamedTuple):
    """The weights of the recurrence; views of TorchRL's parameters."""

    belief: Tensor
    """``[H, D]``, with its bias."""
    belief_bias: Tensor
    state: Tensor
    """``[H, S]``, with its bias."""
    state_bias: Tensor
    input_norm: Tensor
    """``[2, H]``, of the projected belief and of the projected state."""
    features: Tensor
    """``[2 H, D]``, from both projections to every block."""
    blocks: Tensor
    """``[G, w, w]``, from a block's belief to the block."""
    hidden_norm: Tensor
    """``[D]``."""
    gates: Tensor
    """``[G, w, 3 w]``: reset, update, candidate."""
    gates_bias: Tensor
    """``[G, 1, 3 w]``, including the constant of the update gate."""
    posterior: Tensor
    """``[H, D]``, the belief's share of the posterior's first layer."""
    posterior_norm: Tensor
    """``[H]``."""
    logits: Tensor
    """``[S, H]``, with its bias."""
    logits_bias: Tensor


#: Weights of products and their biases, which have autocast's precision under autocast.
MULTIPLIED = (
    "belief",
    "belief_bias",
    "state",
    "state_bias",
    "features",
    "blocks",
    "gates",
    "gates_bias",
    "posterior",
    "logits",
    "logits_bias",
)


def cast_weights(dtype: torch.dtype, weights: ScanWeights) -> ScanWeights:
    """Return the weights with those in :data:`MULTIPLIED` cast."""
    cast = {name: getattr(weights, name).to(dtype) for name in MULTIPLIED}
    return weights._replace(**cast)


class Latent(NamedTuple):
    """The latent before a step, zeroed where an episode starts."""

    state: Tensor
    """``[B, S]``, in the precision of the products."""
    belief: Tensor
    """``[B, D]``."""
    lower: Tensor | None
    """The belief in the precision of the products; None if it has that precision."""

    @property
    def multiplied(self) -> Tensor:
        """The belief in the precision of the products ``[B, D]``."""
        return self.belief if self.lower is None else self.lower


class SavedGRU(NamedTuple):
    """Intermediates of the block GRU that the backward pass reads."""

    by_input: Normed
    features: Tensor
    """``[B, 2 H]``."""
    hidden: Tensor
    """``[B, D]``."""
    by_hidden: Normed
    reset: Tensor
    """In the layout of ``split_blocks``, like the three below."""
    update: Tensor
    candidate_input: Tensor
    candidate: Tensor


class Saved(NamedTuple):
    """Intermediates of one step that the backward pass reads."""

    latent: Latent
    gru: SavedGRU
    belief: Tensor
    """``[B, D]``."""
    by_posterior: Normed
    posterior: Tensor
    """``[B, H]``."""
    probs: Tensor
    """``[B, K, C]``."""


class Carried(NamedTuple):
    """The gradient of a latent as separate summands from the later step.

    The earlier step adds them up, so that a compiler can fuse the sum with its first kernel.
    """

    state: Tensor
    """``[B, S]``."""
    belief: Tensor
    """Through the belief's projection ``[B, D]``."""
    blocks: Tensor
    """Through the weights of the blocks ``[G, B, w]``."""
    kept: Tensor
    """Through the update gate ``[B, D]``."""
    keep: Tensor
    """0 where the later step starts an episode, else 1 ``[B, 1]``."""

    def sums(self) -> tuple[Tensor, Tensor]:
        """Return the gradients of state ``[B, S]`` and belief ``[B, D]``."""
        blocks = self.blocks.transpose(0, 1).flatten(1)  # [B, D]
        return self.state * self.keep, (self.kept + blocks + self.belief) * self.keep


class StepGradients(NamedTuple):
    """Gradients of the outputs of one step's weights."""

    logits: Tensor
    """``[B, S]``."""
    posterior_input: Tensor
    """``[B, H]``, of the norm's input, and of its scaled output below."""
    posterior_scaled: Tensor
    gates: Tensor
    """``[G, B, 3 w]``."""
    hidden_input: Tensor
    """``[B, D]``, of the norm's input, and of its scaled output below."""
    hidden_scaled: Tensor
    inputs: Tensor
    """``[B, 2, H]``, of the norm's input, and of its scaled output below."""
    inputs_scaled: Tensor

"""The recurrent state-space model (RSSM).

DreamerV3 (arXiv:2301.04104v2), eq. 1, with this package's names::

    belief     h_t = f(h_{t-1}, z_{t-1}, a_{t-1})   [D], deterministic: a block GRU
    prior      p(z_t | h_t)                         before the observation is seen
    posterior  q(z_t | h_t, x_t)                    after that; x_t is its embedding, [E]
    state      z_t                                  [S], a draw: K one-hot categoricals of C classes

The block GRU f has G blocks of width w = D / G, which share their inputs. It is TorchRL's cell; a
layer is a linear map, an RMS norm and SiLU::

    features = layer(h_{t-1}), layer(z_{t-1}), layer(a_{t-1})    [3 H]
    hidden_g = linear_g(features, h_{t-1} of block g)            [w], each g: all join to [D]
    hidden = silu(norm(hidden))                                  [D]
    reset, candidate, update of block g = linear_g(hidden_g)     [w] each
    u = sigmoid(update - 1)
    h_t = u tanh(sigmoid(reset) candidate) + (1 - u) h_{t-1}     [D]

Records hold the action that led *to* their observation, so the action at index t is a_{t-1}.

Shape letters: B batch, T time, D belief, S = K x C state, A action, E embedding, H hidden.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.modules import RSSMPosteriorV3, RSSMPriorV3, RSSMRolloutV3

from w2f_torchrl.kernels.block_gru import BlockGRUStep
from w2f_torchrl.kernels.dense import linear, run_layers
from w2f_torchrl.kernels.scan import STEP_FUNCTIONS, StepFunctions, can_scan, scan


class Unrolled(NamedTuple):
    """Latents and predictions of a sequence."""

    state: Tensor
    """Posterior sample, one-hot with straight-through gradient ``[B, T, S]``."""
    belief: Tensor
    """Deterministic belief ``[B, T, D]``."""
    prior_logits: Tensor
    """``[B, T, K, C]``."""
    posterior_logits: Tensor
    """``[B, T, K, C]``."""


def sample_one_hot(logits: Tensor, unimix: float, uniform: Tensor) -> Tensor:
    """Draw one-hot categoricals by inverting the distribution function.

    Args:
        logits: ``[..., K, C]``.
        unimix: Share of the uniform distribution in the mixture, in [0, 1).
        uniform: Draws from U[0, 1) ``[..., K]``.

    Returns:
        One-hot samples ``[..., K, C]`` whose gradient is that of the probabilities
        (straight-through; DreamerV3, methods).
    """
    probs = torch.softmax(logits, -1)
    if unimix:
        probs = probs * (1 - unimix) + unimix / logits.shape[-1]
    with torch.no_grad():
        index = (uniform.unsqueeze(-1) > probs.cumsum(-1)).sum(-1, keepdim=True)  # [..., K, 1]
        # Rounding can leave the last cumulative probability below 1.
        index.clamp_(max=logits.shape[-1] - 1)
        one_hot = torch.zeros_like(probs).scatter_(-1, index, 1.0)  # [..., K, C]
    if not probs.requires_grad:
        return one_hot
    return probs + (one_hot - probs.detach())


class RSSMRollout(RSSMRolloutV3):
    """The posterior over sequences: TorchRL's :class:`~torchrl.modules.RSSMRolloutV3`, faster.

    Parameters, state dict, random stream and results are the same (tested in float64). Only the
    recurrence itself is computed step by step: the prior's logits, the action's share of the GRU
    and the embedding's share of the posterior are computed for all steps at once, and no prior
    state is drawn. The keys can be chosen, so that a second RSSM can write ``background_state`` and
    ``background_belief``. ``benchmarks/speed/learner.py`` measures both.

    Args:
        rssm_prior: A TensorDictModule around a block-GRU ``RSSMPriorV3`` with the in_keys
            ``[state, belief, action]`` and out_keys ``[prior_logits, state, belief]``.
        rssm_posterior: A TensorDictModule around an ``RSSMPosteriorV3`` with the in_keys
            ``[belief, embedding]`` and out_keys ``[posterior_logits, state]``.
        reset_key: bool ``[B, T, 1]``; where true, state, belief and action are zeroed first.
        action_key: The action's key ``[B, T, A]``; ``None`` for no action (the background's RSSM).
            TorchRL's cell needs an input, so it receives a constant zero.
    """

    def __init__(
        self,
        rssm_prior: TensorDictModule,
        rssm_posterior: TensorDictModule,
        reset_key: str = "is_init",
        action_key: str | None = "action",
    ):
        super().__init__(rssm_prior, rssm_posterior, reset_key, action_key or "action")
        prior, posterior = rssm_prior.module, rssm_posterior.module
        if not isinstance(prior, RSSMPriorV3) or prior.recurrent_model != "block_gru":
            raise ValueError(
                "rssm_prior must hold an RSSMPriorV3 with recurrent_model='block_gru'."
            )
        if not isinstance(posterior, RSSMPosteriorV3):
            raise ValueError("rssm_posterior must hold an RSSMPosteriorV3.")
        self.step_functions: StepFunctions = STEP_FUNCTIONS
        """Forward and backward step of the recurrence; the learner may compile them."""
        self.has_action = action_key is not None
        self.state_key, self.belief_key = rssm_prior.in_keys[:2]
        self.embedding_key = rssm_posterior.in_keys[1]
        self.in_keys = [self.embedding_key, self.reset_key]
        if self.has_action:
            self.in_keys = [self.action_key, *self.in_keys]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the posterior over a sequence into ``tensordict``.

        Args:
            tensordict: ``[B, T]`` with the embedding ``[B, T, E]``, the action that led to each
                observation and the reset flag. A ``state`` and ``belief`` entry gives the latent
                before the first step (its first row is read); without one it is zero.

        Returns:
            The same tensordict with the out_keys of both modules.
        """
        state = tensordict.get(self.state_key, None)
        belief = tensordict.get(self.belief_key, None)
        unrolled = self.unroll(
            tensordict.get(self.embedding_key),
            tensordict.get(self.action_key) if self.has_action else None,
            tensordict.get(self.reset_key),
            None if state is None else state[:, 0],
            None if belief is None else belief[:, 0],
        )
        prior_key, state_key, belief_key = self.rssm_prior.out_keys
        tensordict.set(prior_key, unrolled.prior_logits)
        tensordict.set(state_key, unrolled.state)
        tensordict.set(belief_key, unrolled.belief)
        tensordict.set(self.rssm_posterior.out_keys[0], unrolled.posterior_logits)
        return tensordict

    def unroll(
        self,
        embedding: Tensor,
        action: Tensor | None,
        reset: Tensor,
        state: Tensor | None = None,
        belief: Tensor | None = None,
    ) -> Unrolled:
        """Infer the latents of a sequence.

        Args:
            embedding: Encoded observations ``[B, T, E]``.
            action: The action that led to each observation ``[B, T, A]``, or ``None`` for none.
            reset: bool ``[B, T, 1]``, true on the first observation of an episode.
            state: Latent before the first step ``[B, S]``; zero if ``None``.
            belief: Belief before the first step ``[B, D]``; zero if ``None``.
        """
        prior, posterior = self.rssm_prior.module, self.rssm_posterior.module
        batch, time = embedding.shape[:2]
        categoricals = prior.num_categoricals
        step = BlockGRUStep(prior)  # f
        # In the precision of the parameters, which differs from the embedding's under autocast.
        zeros = partial(step.bias.new_zeros, batch)
        state = zeros(categoricals * prior.num_classes) if state is None else state  # [B, S]
        belief = zeros(prior.rnn_hidden_dim) if belief is None else belief  # [B, D]
        if action is None:
            action = embedding.new_zeros(batch, time, 1)

        # The shares of the action and of the embedding, for all steps at once.
        action_input = step.action_input(torch.where(reset, 0, action))  # [B, T, D]
        first = posterior.obs_rnn_to_post_projector[0]
        embedded = linear(embedding, first.weight[:, prior.rnn_hidden_dim :], first.bias)  # [B,T,H]
        keep = (~reset).to(step.bias.dtype)  # [B, T, 1]
        # TorchRL also draws uniform numbers for the prior. Drawing them in the same call is free
        # and keeps the random stream equal to that of its rollout.
        uniform = torch.rand(time, 2, batch, categoricals, device=embedding.device)[:, 1]  # [T,B,K]

        inputs = (step, posterior, state, belief, keep, action_input, embedded, uniform)
        if can_scan(step, posterior):
            state, belief, logits = scan(*inputs, self.step_functions)
        else:
            state, belief, logits = roll(*inputs)
        prior_logits = run_layers(prior.rnn_to_prior_projector, belief)  # [B, T, S]
        return Unrolled(
            state,
            belief,
            prior_logits.unflatten(-1, (categoricals, -1)),  # [B, T, K, C]
            logits.unflatten(-1, (categoricals, -1)),
        )


def roll(
    step: BlockGRUStep,
    posterior: RSSMPosteriorV3,
    state: Tensor,
    belief: Tensor,
    keep: Tensor,
    action_input: Tensor,
    embedded: Tensor,
    uniform: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Roll the posterior over a sequence, step by step.

    The plain form of :func:`~w2f_torchrl.kernels.scan.scan`, for any number of layers.

    Args:
        step: The block GRU.
        posterior: The posterior.
        state: State before the first step ``[B, S]``.
        belief: Belief before the first step ``[B, D]``.
        keep: 0 where an episode starts, else 1 ``[B, T, 1]``.
        action_input: The action's share of the block GRU ``[B, T, D]``.
        embedded: The embedding's share of the posterior's first layer ``[B, T, H]``.
        uniform: Draws from U[0, 1) ``[T, B, K]``.

    Returns:
        States ``[B, T, S]``, beliefs ``[B, T, D]`` and posterior logits ``[B, T, S]``.
    """
    first, *rest = posterior.obs_rnn_to_post_projector
    belief_weight = first.weight[:, : step.core.belief_dim].t()  # [D, H]
    states, beliefs, logits = [], [], []
    rows = zip(*(x.unbind(1) for x in (keep, action_input, embedded)), uniform, strict=True)
    for keep_t, action_t, embedded_t, uniform_t in rows:
        belief = step(state * keep_t, belief * keep_t, action_t)  # [B, D]
        logit = torch.addmm(embedded_t, belief, belief_weight)  # [B, H]
        for layer in rest:
            logit = layer(logit)  # finally [B, S]
        grouped = logit.unflatten(-1, (posterior.num_categoricals, -1))  # [B, K, C]
        state = sample_one_hot(grouped, posterior.unimix, uniform_t).flatten(-2)  # [B, S]
        states.append(state)
        beliefs.append(belief)
        logits.append(logit)
    return torch.stack(states, 1), torch.stack(beliefs, 1), torch.stack(logits, 1)

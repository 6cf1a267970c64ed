"""The recurrent state-space model, rolled out over time with little work in the time loop.

Shape letters: B batch, T time, D belief, S = K x classes state, G blocks of the GRU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.modules import RSSMPosteriorV3, RSSMPriorV3, RSSMRolloutV3

from w2f_torchrl.modules.layers import (
    Affine,
    activate,
    block_product,
    by_hand,
    linear,
    maps_in,
    on_cpu,
    product,
    run_layers,
)
from w2f_torchrl.modules.scan import (
    ScanWeights,
    drawn_classes,
    scan,
    softmax_classes,
    step_backward,
    step_forward,
    thresholds,
)
from w2f_torchrl.utils.checks import check_number

if TYPE_CHECKING:
    from w2f_torchrl.modules.actor_critic import GaussianActor


class Unrolled(NamedTuple):
    """What the RSSM gives for a sequence."""

    state: Tensor
    """Posterior sample, one-hot with straight-through gradient ``[B, T, S]``."""
    belief: Tensor
    """Deterministic belief ``[B, T, D]``."""
    prior_logits: Tensor
    """``[B, T, K, classes]``."""
    posterior_logits: Tensor
    """``[B, T, K, classes]``."""


def sample_one_hot(logits: Tensor, unimix: float, uniform: Tensor) -> Tensor:
    """Draw one-hot categoricals by inverting the distribution function.

    Args:
        logits: ``[..., K, classes]``.
        unimix: Share of the uniform distribution in the mixture, in [0, 1).
        uniform: Draws from U[0, 1) ``[..., K]``.

    Returns:
        One-hot samples ``[..., K, classes]`` whose gradient is that of the probabilities
        (straight-through; DreamerV3, methods).
    """
    probs = torch.softmax(logits, -1)
    if unimix:
        probs = probs * (1 - unimix) + unimix / logits.shape[-1]
    with torch.no_grad():
        index = (uniform.unsqueeze(-1) > probs.cumsum(-1)).sum(-1, keepdim=True)
        # Rounding can leave the last cumulative probability below 1.
        index.clamp_(max=logits.shape[-1] - 1)
        one_hot = torch.zeros_like(probs).scatter_(-1, index, 1.0)
    if not probs.requires_grad:
        return one_hot
    return probs + (one_hot - probs.detach())


def _draw_one_hot(logits: Tensor, unimix: float, uniform: Tensor) -> Tensor:
    """:func:`sample_one_hot` without a gradient, from logits with the classes first.

    Args:
        logits: ``[N, classes, K]``: a CPU's softmax and sums are then vectorised over K.
        unimix: Share of the uniform distribution in the mixture, in [0, 1).
        uniform: Draws from U[0, 1) ``[N, K]``.

    Returns:
        One-hot samples ``[N, K, classes]``.
    """
    classes = logits.shape[1]
    probs = torch.softmax(logits, 1).mul_(1 - unimix).add_(unimix / classes)
    # The last cumulative probability is not asked: rounding can leave it below 1.
    index = (uniform.unsqueeze(1) > probs.cumsum(1)[:, :-1]).sum(1)
    if not by_hand(logits):  # a compiler fuses this form
        every = torch.arange(classes, device=logits.device)
        return (index.unsqueeze(-1) == every).to(logits.dtype)
    one_hots = torch.eye(classes, dtype=logits.dtype, device=logits.device)
    return one_hots.index_select(0, index.flatten()).view(*uniform.shape, classes)


class BlockGRUStep:
    """One step of TorchRL's block GRU with everything known in advance taken out of it.

    TorchRL's cell repeats the projected features for every block and concatenates them with the
    block's belief. The product with the block weights is the same as one dense product of the
    features plus one batched product of the belief, and the action's share of it (and the bias)
    can be made for all steps at once. Built once per forward pass: it holds views of the
    parameters, so gradients reach them.

    Args:
        prior: A TorchRL prior with ``recurrent_model="block_gru"``.
    """

    def __init__(self, prior: RSSMPriorV3):
        core = prior.rnn
        self.core = core
        # What imagination runs.
        self.belief_layers: list[Any] = list(core.belief_projection)
        self.state_layers: list[Any] = list(core.state_projection)
        self.action_layers: list[Any] = list(core.action_projection)
        self.blocks = core.num_blocks
        first = core.hidden_layers[0]
        self.rest = list(core.hidden_layers[1:])
        width = core.belief_dim // self.blocks
        # [G, D/G + 3 hidden, D/G]: the block's own belief first, then the shared features.
        self.belief_weight = first.weight[:, :width]
        self.features = first.weight[:, width:].transpose(0, 1).flatten(1)  # [3 hidden, D]
        hidden = self.features.shape[0] // 3
        self.feature_weight = self.features[: 2 * hidden]
        self.action_weight = self.features[2 * hidden :]
        self.bias = first.bias
        # Reset, update, candidate, not TorchRL's order: the two sigmoids side by side.
        order = (0, 2, 1)
        weights = core.gates.weight.chunk(3, -1)
        self.gate_weight = torch.cat([weights[i] for i in order], -1)  # [G, D/G, 3 D/G]
        biases = core.gates.bias.view(self.blocks, 1, 3 * width).chunk(3, -1)
        # The update gate starts at sigmoid(-1): the cell's constant goes into the bias.
        self.gate_bias = torch.cat((biases[0], biases[2] - 1, biases[1]), -1)

    def multiply_in(self, dtype: torch.dtype) -> None:
        """Cast what :meth:`imagine` multiplies by; the gates' bias is added in float32."""
        self.belief_layers = maps_in(dtype, self.belief_layers)
        self.state_layers = maps_in(dtype, self.state_layers)
        self.action_layers = maps_in(dtype, self.action_layers)
        self.features, self.bias = self.features.to(dtype), self.bias.to(dtype)
        self.belief_weight = self.belief_weight.to(dtype)
        self.gate_weight = self.gate_weight.to(dtype)

    def _project_action(self, action: Tensor) -> Tensor:
        action = action / action.detach().abs().clamp_min(1)
        return run_layers(self.action_layers, action)

    def action_input(self, action: Tensor) -> Tensor:
        """The action's share of the first layer: ``[..., A]`` to ``[..., D]``."""
        return linear(self._project_action(action), self.action_weight.t(), self.bias)

    def __call__(self, state: Tensor, belief: Tensor, action_input: Tensor) -> Tensor:
        """Advance the belief: ``[B, S], [B, D], [B, D]`` to ``[B, D]``."""
        core, blocks = self.core, self.blocks
        features = torch.cat((core.belief_projection(belief), core.state_projection(state)), -1)
        grouped = belief.unflatten(-1, (blocks, -1)).transpose(0, 1)  # [G, B, D/G]
        shared = torch.addmm(action_input, features, self.feature_weight)
        shared = shared.unflatten(-1, (blocks, -1)).transpose(0, 1)
        hidden = torch.baddbmm(shared, grouped, self.belief_weight)
        hidden = hidden.transpose(0, 1).flatten(1)
        for layer in self.rest:
            hidden = layer(hidden)
        hidden = hidden.unflatten(-1, (blocks, -1)).transpose(0, 1)
        # In place, because a broadcast bias is first copied to the product's size otherwise.
        gates = torch.bmm(hidden, self.gate_weight).add_(self.gate_bias)
        return _update_belief(grouped, gates).transpose(0, 1).flatten(1)

    def imagine(
        self, state: Tensor, belief: Tensor, multiplied: Tensor, action: Tensor
    ) -> tuple[Tensor, Tensor]:
        """:meth:`__call__` without a gradient, for many rows.

        Args:
            state: ``[N, S]``.
            belief: ``[N, D]``.
            multiplied: The belief in the products' precision.
            action: ``[N, A]``.

        Returns:
            The belief ``[N, D]``, and the same in the precision of ``multiplied``.
        """
        projected = (
            run_layers(self.belief_layers, multiplied),
            run_layers(self.state_layers, state),
            self._project_action(action),
        )
        hidden = product(torch.cat(projected, -1), self.features.t(), self.bias)
        hidden = hidden.add_(block_product(multiplied, self.belief_weight))
        hidden = activate(hidden, self.rest[0])
        for layer in self.rest[2:]:  # more than one dynamics layer
            hidden = layer(hidden)
        gates = block_product(hidden, self.gate_weight, self.gate_bias.squeeze(1))
        gates = gates.unflatten(-1, (self.blocks, -1))
        belief = _imagine_belief(belief.unflatten(-1, (self.blocks, -1)), gates)
        # Cast in the layout that it was computed in: a compiler makes both at once.
        return belief.flatten(1), belief.to(multiplied.dtype).flatten(1)


def _update_belief(belief: Tensor, gates: Tensor) -> Tensor:
    """The gated update of blocks ``[..., w]`` by gates ``[..., 3 w]``."""
    # The belief stays in its own precision, also under autocast.
    reset, update, candidate = gates.to(belief.dtype).chunk(3, -1)
    candidate = torch.tanh(reset.sigmoid() * candidate)
    return torch.lerp(belief, candidate, update.sigmoid())


def _imagine_belief(belief: Tensor, gates: Tensor) -> Tensor:
    """:func:`_update_belief` without a gradient, with the gates' memory.

    A CPU's logistic function takes a fifth of its tanh's time; as tanh(x) = 2 / (1 + exp(-2 x)) - 1
    it is exact to 1e-7, float32's rounding of values near 1.
    """
    if not on_cpu(gates):  # compiled or not: another formula could turn a draw
        return _update_belief(belief, gates)
    opening, candidate = gates.tensor_split((2 * belief.shape[-1],), -1)
    reset, update = opening.sigmoid_().chunk(2, -1)
    zero, minus_one = gates.new_zeros(()), gates.new_full((), -1)
    candidate = torch.addcmul(zero, candidate, reset, value=2).sigmoid_()
    candidate = torch.add(minus_one, candidate, alpha=2)
    return torch.lerp(belief, candidate, update)


class RSSMRollout(RSSMRolloutV3):
    """TorchRL's :class:`~torchrl.modules.RSSMRolloutV3`, with less work per time step.

    The same parameters, state dict, random stream and results (tested in float64); what changes
    is where the work is done. The prior's head, the action's projection and the posterior's
    projection of the embedding run once for all steps, no prior sample is drawn in the loop, and
    the keys are free, so that a second RSSM can write ``background_state`` and
    ``background_belief``. ``benchmarks/learner.py`` measures both.

    Args:
        rssm_prior: A TensorDictModule around a block-GRU ``RSSMPriorV3`` with the in_keys
            ``[state, belief, action]`` and out_keys ``[prior_logits, state, belief]``.
        rssm_posterior: A TensorDictModule around an ``RSSMPosteriorV3`` with the in_keys
            ``[belief, embedding]`` and out_keys ``[posterior_logits, state]``.
        reset_key: bool ``[B, T, 1]``; where true, state, belief and action are zeroed first.
        action_key: The action's key ``[B, T, A]``; ``None``: no action (the scenery's RSSM).
            TorchRL's cell needs an input, so it gets one constant zero.
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
        self.steps = (step_forward, step_backward)
        """A step of the recurrence and a step back; the learner may compile them."""
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
        embedding = tensordict.get(self.embedding_key)
        state = tensordict.get(self.state_key, None)
        belief = tensordict.get(self.belief_key, None)
        unrolled = self.unroll(
            embedding,
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
        """Roll the recurrence over a sequence.

        Args:
            embedding: Encoded observations ``[B, T, E]``.
            action: The action that led to each observation ``[B, T, A]``, or ``None`` for none.
            reset: bool ``[B, T, 1]``, true on the first observation of an episode.
            state: Latent before the first step ``[B, S]``; zero if ``None``.
            belief: Belief before the first step ``[B, D]``; zero if ``None``.
        """
        prior, posterior = self.rssm_prior.module, self.rssm_posterior.module
        batch, time = embedding.shape[:2]
        if action is None:
            action = embedding.new_zeros(batch, time, 1)
        step = BlockGRUStep(prior)
        # In the parameters' precision: under autocast the embedding has the products'.
        zeros = partial(step.bias.new_zeros, batch)
        if state is None:
            state = zeros(prior.num_categoricals * prior.num_classes)
        if belief is None:
            belief = zeros(prior.rnn_hidden_dim)
        action_input = step.action_input(torch.where(reset, 0, action))
        first = posterior.obs_rnn_to_post_projector[0]
        embedded = linear(embedding, first.weight[:, prior.rnn_hidden_dim :], first.bias)
        keep = (~reset).to(step.bias.dtype)
        # TorchRL draws the prior's uniforms too; drawing them in the same call costs nothing and
        # keeps the random stream equal to its rollout's.
        uniform = torch.rand(time, 2, batch, prior.num_categoricals, device=embedding.device)[:, 1]
        roll = self._scan if self._has_one_layer_each() else self._roll
        state, belief, logits = roll(step, state, belief, keep, action_input, embedded, uniform)
        prior_logits = run_layers(prior.rnn_to_prior_projector, belief)
        categoricals = (prior.num_categoricals, -1)
        return Unrolled(
            state,
            belief,
            prior_logits.unflatten(-1, categoricals),
            logits.unflatten(-1, categoricals),
        )

    def _has_one_layer_each(self) -> bool:
        """Whether the layers are those, all presets', whose backward pass is written out."""
        prior, posterior = self.rssm_prior.module, self.rssm_posterior.module
        return (len(prior.rnn.hidden_layers), len(posterior.obs_rnn_to_post_projector)) == (3, 4)

    def _scan(
        self,
        step: BlockGRUStep,
        state: Tensor,
        belief: Tensor,
        keep: Tensor,
        action_input: Tensor,
        embedded: Tensor,
        uniform: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        core, posterior = step.core, self.rssm_posterior.module
        first, posterior_norm, _, last = posterior.obs_rnn_to_post_projector
        weights = ScanWeights(
            belief=core.belief_projection[0].weight,
            belief_bias=core.belief_projection[0].bias,
            state=core.state_projection[0].weight,
            state_bias=core.state_projection[0].bias,
            input_norm=torch.stack(
                (core.belief_projection[1].weight, core.state_projection[1].weight)
            ),
            features=step.feature_weight,
            blocks=step.belief_weight,
            hidden_norm=core.hidden_layers[1].weight,
            gates=step.gate_weight,
            gates_bias=step.gate_bias,
            posterior=first.weight[:, : core.belief_dim],
            posterior_norm=posterior_norm.weight,
            logits=last.weight,
            logits_bias=last.bias,
        )
        eps, unimix = core.hidden_layers[1].eps, posterior.unimix
        return scan(
            weights,
            state,
            belief,
            keep,
            action_input,
            embedded,
            thresholds(uniform, unimix, posterior.num_classes),
            unimix=unimix,
            eps=eps,
            steps=self.steps,
        )

    def _roll(
        self,
        step: BlockGRUStep,
        state: Tensor,
        belief: Tensor,
        keep: Tensor,
        action_input: Tensor,
        embedded: Tensor,
        uniform: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        posterior = self.rssm_posterior.module
        first, *rest = posterior.obs_rnn_to_post_projector
        belief_weight = first.weight[:, : step.core.belief_dim].t()
        states, beliefs, logits = [], [], []
        rows = zip(*(x.unbind(1) for x in (keep, action_input, embedded)), uniform, strict=True)
        for keep_t, action_t, embedded_t, uniform_t in rows:
            belief = step(state * keep_t, belief * keep_t, action_t)
            logit = torch.addmm(embedded_t, belief, belief_weight)
            for layer in rest:
                logit = layer(logit)
            grouped = logit.unflatten(-1, (posterior.num_categoricals, -1))
            state = sample_one_hot(grouped, posterior.unimix, uniform_t).flatten(-2)
            states.append(state)
            beliefs.append(belief)
            logits.append(logit)
        return torch.stack(states, 1), torch.stack(beliefs, 1), torch.stack(logits, 1)


class PriorHead:
    """The prior's head as imagination needs it.

    Built once per forward pass: on a CPU it holds a copy of its last layer that gives the classes
    first.

    Args:
        prior: The block-GRU prior.
    """

    def __init__(self, prior: RSSMPriorV3):
        *hidden, last = prior.rnn_to_prior_projector
        self.hidden: list[Any] = hidden
        self.sizes = (prior.num_classes, prior.num_categoricals)
        self.unimix = prior.unimix
        self.weight, self.bias = last.weight, last.bias
        self.classes_first = last.weight.device.type == "cpu"
        if self.classes_first:
            self.weight = last.weight.unflatten(0, self.sizes[::-1]).transpose(0, 1).flatten(0, 1)
            self.bias = last.bias.view(self.sizes[::-1]).t().flatten()

    def multiply_in(self, dtype: torch.dtype) -> None:
        """Cast what it multiplies by."""
        self.hidden = maps_in(dtype, self.hidden)
        self.weight, self.bias = self.weight.to(dtype), self.bias.to(dtype)

    def draw(self, belief: Tensor, uniform: Tensor) -> Tensor:
        """Draw states without a gradient: ``[N, D], [N, K]`` to ``[N, S]``."""
        logits = product(run_layers(self.hidden, belief), self.weight, self.bias)
        if self.classes_first:
            return _draw_one_hot(logits.unflatten(-1, self.sizes), self.unimix, uniform).flatten(-2)
        classes = self.sizes[0]
        probs = softmax_classes(logits, classes, uniform.dtype)
        drawn = drawn_classes(probs, thresholds(uniform, self.unimix, classes))
        every = torch.arange(classes, device=logits.device)
        return (drawn.unsqueeze(-1) == every).to(logits.dtype).flatten(-2)


class ActorInPrecision:
    """The actor's network with its linear maps cast: a plain object, for one forward pass.

    Args:
        actor: The network.
        dtype: Of the products.
    """

    def __init__(self, actor: GaussianActor, dtype: torch.dtype):
        self.hidden = maps_in(dtype, actor.backbone.model)
        heads = [head.model[0] for head in (actor.mean, actor.std)]  # a linear layer each
        weight, bias = (torch.cat([getattr(h, x) for h in heads]) for x in ("weight", "bias"))
        self.heads = Affine(weight.to(dtype), bias.to(dtype))
        self.squash = actor.squash

    def from_features(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """As the actor's."""
        mean, std = self.heads(run_layers(self.hidden, features)).chunk(2, -1)
        return self.squash(mean, std)


def imagine_step(
    step: BlockGRUStep,
    prior: PriorHead,
    actor: GaussianActor | ActorInPrecision,
    features: Tensor,
    state: Tensor,
    belief: Tensor,
    noise: Tensor,
    uniform: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """One imagined step, without gradients.

    Args:
        step: The block GRU.
        prior: The prior's head.
        actor: The policy's network.
        features: Belief and state side by side ``[N, D + S]``, in the products' precision.
        state: The state by itself ``[N, S]``, in the same.
        belief: The belief by itself ``[N, D]``.
        noise: Standard normal draws ``[N, A]``.
        uniform: Draws from U[0, 1) ``[N, K]``.

    Returns:
        State and belief after the step, and the action that led there ``[N, A]``.
    """
    mean, std = actor.from_features(features)
    action = mean + std * noise
    multiplied = belief
    if features.dtype is not belief.dtype:
        multiplied = features[:, : belief.shape[-1]]
    belief, multiplied = step.imagine(state, belief, multiplied, action)
    return prior.draw(multiplied, uniform), belief, action


def imagine(
    prior: RSSMPriorV3,
    actor: GaussianActor,
    state: Tensor,
    belief: Tensor,
    horizon: int,
    one_step: Callable[..., tuple[Tensor, Tensor, Tensor]] = imagine_step,
) -> tuple[Tensor, Tensor]:
    """Follow the policy in the model, without gradients.

    REINFORCE scores stopped actions in stopped states (DreamerV3, "Actor learning"), so nothing
    here needs a graph. Time comes first: every step is then one block of memory, and so are all
    steps but the last.

    Args:
        prior: The block-GRU prior.
        actor: The policy's network.
        state: Start states ``[N, S]``.
        belief: Start beliefs ``[N, D]``.
        horizon: H, imagined steps.
        one_step: :func:`imagine_step`, or the same compiled.

    Returns:
        Features of the latents, belief and state side by side ``[H + 1, N, D + S]``, the start
        included and under autocast in its precision, and the actions taken in the first H of them
        ``[H, N, A]``.
    """
    check_number("horizon", horizon, integer=True, minimum=1)
    with torch.no_grad():
        step, head = BlockGRUStep(prior), PriorHead(prior)
        acting: GaussianActor | ActorInPrecision = actor
        device, dtype = belief.device.type, belief.dtype
        if torch.is_autocast_enabled(device):
            # Once, and not at every step: autocast remembers parameters, not views of them, and
            # in a compiled step nothing.
            dtype = torch.get_autocast_dtype(device)
            step.multiply_in(dtype)
            head.multiply_in(dtype)
            acting = ActorInPrecision(actor, dtype)
        uniforms = torch.rand(horizon, len(state), prior.num_categoricals, device=state.device)
        actions_shape = (horizon, len(state), *prior.action_shape)
        noise = torch.randn_like(belief.new_empty(actions_shape))
        size = belief.shape[-1] + state.shape[-1]
        # Their readers only multiply by weights, so the products' precision is enough.
        features = belief.new_empty(horizon + 1, len(state), size, dtype=dtype)
        state = state.to(dtype)
        torch.cat((belief, state), -1, out=features[0])
        actions = []
        for t in range(horizon):
            state, belief, action = one_step(
                step, head, acting, features[t], state, belief, noise[t], uniforms[t]
            )
            torch.cat((belief, state), -1, out=features[t + 1])
            actions.append(action)
        return features, torch.stack(actions)

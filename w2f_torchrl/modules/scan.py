"""The posterior's recurrence with its backward pass written out.

Autograd would multiply every weight's gradient once a step and keep a graph of some 80 nodes a
step. Here the loop back in time carries only what must be carried, and each weight's gradient is
one product over all steps after it. No second derivatives.

Shape letters: B batch, T time, D belief, S state, H hidden, G blocks, w = D / G.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from w2f_torchrl.modules.layers import (
    ONEDNN_MULTIPLICATIONS,
    Normed,
    by_hand,
    norm,
    norm_backward,
    product,
)

#: Floats that a CPU handles at once: below it softmax is not vectorised over a row.
VECTOR = 16


class ScanWeights(NamedTuple):
    """What the recurrence multiplies by; views of TorchRL's parameters."""

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
    """``[G, 1, 3 w]``, the update's constant included."""
    posterior: Tensor
    """``[H, D]``, the belief's share of the posterior's first layer."""
    posterior_norm: Tensor
    """``[H]``."""
    logits: Tensor
    """``[S, H]``, with its bias."""
    logits_bias: Tensor


#: What is multiplied by, or added to a product: under autocast all the same, in its precision.
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


class _Saved(NamedTuple):
    """What one step keeps for the backward pass."""

    belief_in: Tensor
    state_in: Tensor
    by_input: Normed
    features: Tensor
    hidden: Tensor
    by_hidden: Normed
    opened: Tensor
    candidate_input: Tensor
    candidate: Tensor
    belief: Tensor
    by_posterior: Normed
    posterior: Tensor
    probs: Tensor


class _Gradients(NamedTuple):
    """Gradients of one step: to the step before, and of what its weights gave."""

    state: Tensor
    belief: Tensor
    logits: Tensor
    posterior_input: Tensor
    posterior_scaled: Tensor
    gates: Tensor
    hidden_input: Tensor
    hidden_scaled: Tensor
    inputs: Tensor
    inputs_scaled: Tensor


def scan(
    weights: ScanWeights,
    state: Tensor,
    belief: Tensor,
    keep: Tensor,
    action_input: Tensor,
    embedded: Tensor,
    threshold: Tensor,
    unimix: float,
    eps: float,
    steps: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Roll the posterior over a sequence.

    Args:
        weights: Of the block GRU and the posterior.
        state: Before the first step ``[B, S]``.
        belief: Before the first step ``[B, D]``.
        keep: 0 where an episode starts, else 1 ``[B, T, 1]``.
        action_input: The action's share of the hidden layer, bias included ``[B, T, D]``.
        embedded: The embedding's share of the posterior's first layer ``[B, T, H]``.
        threshold: What decides the draws ``[T, B, K, classes - 1]``: see :func:`thresholds`.
        unimix: Share of the uniform distribution in the posterior, below 1.
        eps: Of the norms.
        steps: :func:`step_forward` and :func:`step_backward`, or the same compiled.

    Returns:
        States, one-hot with straight-through gradient ``[B, T, S]``, beliefs ``[B, T, D]`` and
        posterior logits ``[B, T, S]``.
    """
    result: tuple[Tensor, Tensor, Tensor] = _Scan.apply(
        state,
        belief,
        keep,
        action_input,
        embedded,
        threshold,
        unimix,
        eps,
        steps or (step_forward, step_backward),
        *weights,
    )
    return result


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        state: Tensor,
        belief: Tensor,
        keep: Tensor,
        action_input: Tensor,
        embedded: Tensor,
        threshold: Tensor,
        unimix: float,
        eps: float,
        step_functions: tuple[Callable[..., Any], Callable[..., Any]],
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        forward_one, ctx.backward_one = step_functions
        device = belief.device.type
        ctx.autocast = (
            device,
            torch.get_autocast_dtype(device),
            torch.is_autocast_enabled(device),
        )
        # Once, and not at every step: autocast remembers parameters, not views of them.
        dtype = ctx.autocast[1] if ctx.autocast[2] else belief.dtype
        weights = _multiplied_in(dtype, ScanWeights(*tensors))
        # Draws and resets are zeros and ones, exact in any precision.
        state, classes = state.to(dtype), threshold.shape[-1] + 1
        one_hots = torch.eye(classes, dtype=dtype, device=belief.device)
        steps, states, logits = [], [], []
        inputs = (x.to(dtype).unbind(1) for x in (keep, action_input, embedded))
        rows = zip(*inputs, threshold, strict=True)
        for kept, action_t, embedded_t, threshold_t in rows:
            state, belief, logit, saved = forward_one(
                weights, state, belief, kept, action_t, embedded_t, threshold_t, one_hots, eps
            )
            steps.append(saved)
            states.append(state)
            logits.append(logit)
        ctx.save_for_backward(keep, *weights)
        ctx.steps, ctx.unimix = steps, unimix
        beliefs = torch.stack([saved.belief for saved in steps], 1)
        state, logit = (torch.stack(x, 1).to(belief.dtype) for x in (states, logits))
        return state, beliefs, logit

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_states: Tensor, grad_beliefs: Tensor, grad_logits: Tensor
    ) -> tuple[Tensor | None, ...]:
        keep, *tensors = ctx.saved_tensors
        weights, steps = ScanWeights(*tensors), ctx.steps
        state, belief = torch.zeros_like(grad_states[:, 0]), torch.zeros_like(grad_beliefs[:, 0])
        outer = [g.unbind(1) for g in (grad_states, grad_beliefs, grad_logits, keep)]
        grads: list[_Gradients] = []
        device, dtype, mixed = ctx.autocast
        with torch.autocast(device, dtype, enabled=mixed):
            for t in reversed(range(len(steps))):
                gs, gb, gl, kept = (g[t] for g in outer)
                grads.append(
                    ctx.backward_one(weights, steps[t], state, belief, gs, gb, gl, kept, ctx.unimix)
                )
                state, belief = grads[-1].state, grads[-1].belief
            grads.reverse()
            of_weights = _weight_gradients(weights, steps, grads)
        action_input = torch.stack([g.hidden_input for g in grads], 1)
        embedded = torch.stack([g.posterior_input for g in grads], 1)
        return (state, belief, None, action_input, embedded, None, None, None, None, *of_weights)


def _multiplied_in(dtype: torch.dtype, weights: ScanWeights) -> ScanWeights:
    cast = {name: getattr(weights, name).to(dtype) for name in MULTIPLIED}
    return weights._replace(**cast)


def step_forward(
    weights: ScanWeights,
    state: Tensor,
    belief: Tensor,
    keep: Tensor,
    action_input: Tensor,
    embedded: Tensor,
    threshold: Tensor,
    one_hots: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, _Saved]:
    """One step: state ``[B, S]``, belief ``[B, D]``, logits ``[B, S]``, what backward needs.

    State, logits, ``keep``, inputs and the weights of products have the products' precision, which
    is lower under autocast; belief, norms, gates and probabilities have their own.
    """
    state_in, belief_in = state * keep, belief * keep
    multiplied = belief_in.to(weights.belief.dtype)
    first = torch.addmm(weights.belief_bias, multiplied, weights.belief.t())
    second = torch.addmm(weights.state_bias, state_in, weights.state.t())
    projected = torch.cat((first, second), -1).unflatten(-1, (2, -1))  # [B, 2, H]
    by_input, features = norm(projected, weights.input_norm, eps)
    features = features.flatten(1)

    grouped = _blocks(belief_in, weights)  # [G, B, w]
    shared = torch.addmm(action_input, features, weights.features)
    hidden = torch.baddbmm(_blocks(shared, weights), _blocks(multiplied, weights), weights.blocks)
    by_hidden, hidden = norm(_flat(hidden), weights.hidden_norm, eps)
    gates = torch.baddbmm(weights.gates_bias, _blocks(hidden, weights), weights.gates)
    if gates.dtype is not belief.dtype:
        gates = gates.to(belief.dtype)
    opening, candidate_input = gates.tensor_split((2 * grouped.shape[-1],), -1)
    opened = opening.sigmoid()
    reset, update = opened.chunk(2, -1)
    candidate = torch.tanh(reset * candidate_input)
    belief = _flat(torch.lerp(grouped, candidate, update))

    projected = torch.addmm(embedded, belief, weights.posterior.t())
    by_posterior, posterior = norm(projected, weights.posterior_norm, eps)
    logits = torch.addmm(weights.logits_bias, posterior, weights.logits.t())
    probs = softmax_classes(logits, len(one_hots), belief.dtype)
    state = draw(probs, threshold, one_hots).view_as(logits)
    saved = _Saved(
        belief_in,
        state_in,
        by_input,
        features,
        hidden,
        by_hidden,
        opened,
        candidate_input,
        candidate,
        belief,
        by_posterior,
        posterior,
        probs,
    )
    return state, belief, logits, saved


def softmax_classes(logits: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """Probabilities ``[N, K, classes]`` of a dtype, of logits ``[N, K classes]``."""
    if not by_hand(logits) or classes >= VECTOR:
        # The kernel casts what it reads.
        other = None if logits.dtype is dtype else dtype
        return torch.softmax(logits.unflatten(-1, (-1, classes)), -1, other)
    # A CPU's kernel over few values in a row is slow, one over all rows at once is not.
    outermost = logits.reshape(-1, classes).t().contiguous()
    return torch.softmax(outermost, 0).t().view(len(logits), -1, classes)


def thresholds(uniform: Tensor, unimix: float, classes: int) -> Tensor:
    """What the cumulative probabilities are compared with, for all steps at once.

    A draw u takes the first class c with u <= (1 - m) F_c + m (c + 1) / classes, F the cumulative
    probabilities without the uniform share m.

    Args:
        uniform: Draws from U[0, 1) ``[..., K]``.
        unimix: m, below 1.
        classes: Classes of a categorical.

    Returns:
        ``[..., K, classes - 1]``: class c or a later one is taken above F_c.
    """
    share = torch.arange(1, classes, dtype=uniform.dtype, device=uniform.device)
    return (uniform.unsqueeze(-1) - share * (unimix / classes)) / (1 - unimix)


def draw(probs: Tensor, threshold: Tensor, one_hots: Tensor) -> Tensor:
    """One-hot draws ``[..., K, C]`` from probabilities, inverting their cumulative sum.

    Args:
        probs: Without the uniform share ``[..., K, C]``.
        threshold: From :func:`thresholds`. It has no last class: rounding can leave the last
            cumulative probability below 1, so it is not asked.
        one_hots: The identity ``[C, C]``.
    """
    index = (threshold > probs.cumsum(-1)[..., :-1]).sum(-1)
    return one_hots.index_select(0, index.flatten()).view(probs.shape)


def step_backward(
    weights: ScanWeights,
    saved: _Saved,
    state: Tensor,
    belief: Tensor,
    grad_state: Tensor,
    grad_belief: Tensor,
    grad_logits: Tensor,
    keep: Tensor,
    unimix: float,
) -> _Gradients:
    """One step back: gradients from the step after and from outside, to the step before."""
    # The sample's gradient is that of its probabilities (straight-through).
    sample = (state + grad_state).view(saved.probs.shape).mul_(1 - unimix)
    inner = (sample * saved.probs).sum(-1, keepdim=True)
    logits = grad_logits + ((sample - inner) * saved.probs).flatten(-2)
    grad = logits @ weights.logits
    posterior_input, posterior_scaled = norm_backward(
        grad, saved.by_posterior, weights.posterior_norm
    )
    # Sums outside the products: under autocast they stay in float32.
    belief = belief + grad_belief + posterior_input @ weights.posterior

    grouped = _blocks(belief, weights)
    reset, update = saved.opened.chunk(2, -1)
    through = grouped * update
    candidate: Tensor = torch.ops.aten.tanh_backward(through, saved.candidate)
    opening = torch.cat(
        (
            candidate * saved.candidate_input,
            grouped * (saved.candidate - _blocks(saved.belief_in, weights)),
        ),
        -1,
    )
    opening = torch.ops.aten.sigmoid_backward(opening, saved.opened)
    gates = torch.cat((opening, candidate * reset), -1)  # [G, B, 3 w]
    grad = _flat(torch.bmm(gates, weights.gates.transpose(1, 2)))
    hidden_input, hidden_scaled = norm_backward(grad, saved.by_hidden, weights.hidden_norm)
    multiplied = hidden_input.to(weights.blocks.dtype)
    direct = torch.bmm(_blocks(multiplied, weights), weights.blocks.transpose(1, 2))
    direct = grouped - through + direct
    features = (multiplied @ weights.features.t()).unflatten(-1, (2, -1))
    inputs, inputs_scaled = norm_backward(features, saved.by_input, weights.input_norm)
    by_belief, by_state = inputs.to(weights.belief.dtype).unbind(1)
    belief = (_flat(direct) + by_belief @ weights.belief) * keep
    state = (by_state @ weights.state) * keep
    return _Gradients(
        state,
        belief,
        logits,
        posterior_input,
        posterior_scaled,
        gates,
        hidden_input,
        hidden_scaled,
        inputs,
        inputs_scaled,
    )


def _weight_gradients(
    weights: ScanWeights, steps: list[_Saved], grads: list[_Gradients]
) -> ScanWeights:
    """Every weight's gradient, one product over all steps."""

    def all_steps(tensors: Iterable[Tensor], dim: int = 0) -> Tensor:
        return torch.cat(list(tensors), dim)  # [T B, ...], or [G, T B, ...]

    def gain(normed: Iterable[Tensor], scaled: Iterable[Tensor]) -> Tensor:
        return (all_steps(normed) * all_steps(scaled)).sum(0)

    belief_in = all_steps(s.belief_in for s in steps)
    hidden_input = all_steps(g.hidden_input for g in grads)
    by_belief, by_state = all_steps(g.inputs for g in grads).unbind(1)
    logits = all_steps(g.logits for g in grads)
    gates = all_steps((g.gates for g in grads), 1)
    hidden = _blocks(all_steps(s.hidden for s in steps), weights)
    posterior = all_steps(g.posterior_input for g in grads)
    return ScanWeights(
        belief=_outer(by_belief, belief_in),
        belief_bias=by_belief.sum(0),
        state=_outer(by_state, all_steps(s.state_in for s in steps)),
        state_bias=by_state.sum(0),
        input_norm=gain((s.by_input.normed for s in steps), (g.inputs_scaled for g in grads)),
        features=_outer(all_steps(s.features for s in steps), hidden_input),
        blocks=_outer_blocks(_blocks(belief_in, weights), _blocks(hidden_input, weights)),
        hidden_norm=gain((s.by_hidden.normed for s in steps), (g.hidden_scaled for g in grads)),
        gates=_outer_blocks(hidden, gates),
        gates_bias=gates.sum(1, keepdim=True),
        posterior=_outer(posterior, all_steps(s.belief for s in steps)),
        posterior_norm=gain(
            (s.by_posterior.normed for s in steps), (g.posterior_scaled for g in grads)
        ),
        logits=_outer(logits, all_steps(s.posterior for s in steps)),
        logits_bias=logits.sum(0),
    )


def _outer(x: Tensor, y: Tensor) -> Tensor:
    """``[N, I]`` and ``[N, O]`` to the sum of their outer products ``[I, O]``."""
    return product(x.t(), y.t())


def _outer_blocks(x: Tensor, y: Tensor) -> Tensor:
    """``[G, N, I]`` and ``[G, N, O]`` to ``[G, I, O]``."""
    if x[0].numel() * y.shape[-1] < 2 * ONEDNN_MULTIPLICATIONS or not by_hand(x):
        return x.transpose(1, 2) @ y
    return torch.stack([_outer(a, b) for a, b in zip(x, y, strict=True)])


def _blocks(x: Tensor, weights: ScanWeights) -> Tensor:
    """``[N, D]`` to ``[G, N, w]``."""
    grouped: Tensor = x.unflatten(-1, (len(weights.blocks), -1)).transpose(0, 1)
    return grouped


def _flat(x: Tensor) -> Tensor:
    """``[G, N, w]`` to ``[N, D]``."""
    return x.transpose(0, 1).flatten(1)

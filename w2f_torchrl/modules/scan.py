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
from torch.nn import functional as F


class ScanWeights(NamedTuple):
    """What the recurrence multiplies by; views of TorchRL's parameters."""

    belief: Tensor
    """``[H, D]``, with its bias and norm."""
    belief_bias: Tensor
    belief_norm: Tensor
    state: Tensor
    """``[H, S]``, with its bias and norm."""
    state_bias: Tensor
    state_norm: Tensor
    features: Tensor
    """``[2 H, D]``, from both projections to every block."""
    blocks: Tensor
    """``[G, w, w]``, from a block's belief to the block."""
    hidden_norm: Tensor
    """``[D]``."""
    gates: Tensor
    """``[G, w, 3 w]``: reset, candidate, update."""
    gates_bias: Tensor
    """``[G, 1, 3 w]``, the update's constant included."""
    posterior: Tensor
    """``[H, D]``, the belief's share of the posterior's first layer."""
    posterior_norm: Tensor
    """``[H]``."""
    logits: Tensor
    """``[S, H]``, with its bias."""
    logits_bias: Tensor


class _Normed(NamedTuple):
    """What the backward pass of ``silu(gain * x / rms(x))`` needs."""

    normed: Tensor
    scaled: Tensor
    scale: Tensor


class _Saved(NamedTuple):
    """What one step keeps for the backward pass."""

    belief_in: Tensor
    state_in: Tensor
    by_belief: _Normed
    by_state: _Normed
    features: Tensor
    hidden: Tensor
    by_hidden: _Normed
    reset: Tensor
    candidate_input: Tensor
    candidate: Tensor
    update: Tensor
    belief: Tensor
    by_posterior: _Normed
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
    belief_input: Tensor
    belief_scaled: Tensor
    state_input: Tensor
    state_scaled: Tensor


def scan(
    weights: ScanWeights,
    state: Tensor,
    belief: Tensor,
    keep: Tensor,
    action_input: Tensor,
    embedded: Tensor,
    uniform: Tensor,
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
        uniform: Draws from U[0, 1) ``[T, B, K]``.
        unimix: Share of the uniform distribution in the posterior.
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
        uniform,
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
        uniform: Tensor,
        unimix: float,
        eps: float,
        step_functions: tuple[Callable[..., Any], Callable[..., Any]],
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights = ScanWeights(*tensors)
        forward_one, ctx.backward_one = step_functions
        steps, states, logits = [], [], []
        rows = zip(*(x.unbind(1) for x in (keep, action_input, embedded)), uniform, strict=True)
        for kept, action_t, embedded_t, uniform_t in rows:
            state, belief, logit, saved = forward_one(
                weights, state, belief, kept, action_t, embedded_t, uniform_t, unimix, eps
            )
            steps.append(saved)
            states.append(state)
            logits.append(logit)
        ctx.save_for_backward(keep, *weights)
        ctx.steps, ctx.unimix = steps, unimix
        device = belief.device.type
        ctx.autocast = (
            device,
            torch.get_autocast_dtype(device),
            torch.is_autocast_enabled(device),
        )
        beliefs = torch.stack([saved.belief for saved in steps], 1)
        return torch.stack(states, 1), beliefs, torch.stack(logits, 1)

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


def step_forward(
    weights: ScanWeights,
    state: Tensor,
    belief: Tensor,
    keep: Tensor,
    action_input: Tensor,
    embedded: Tensor,
    uniform: Tensor,
    unimix: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, _Saved]:
    """One step: state ``[B, S]``, belief ``[B, D]``, logits ``[B, S]``, what backward needs."""
    state_in, belief_in = state * keep, belief * keep
    projected = torch.addmm(weights.belief_bias, belief_in, weights.belief.t())
    by_belief, first = _norm(projected, weights.belief_norm, eps)
    projected = torch.addmm(weights.state_bias, state_in, weights.state.t())
    by_state, second = _norm(projected, weights.state_norm, eps)
    features = torch.cat((first, second), -1)

    grouped = _blocks(belief_in, weights)  # [G, B, w]
    shared = torch.addmm(action_input, features, weights.features)
    hidden = torch.baddbmm(_blocks(shared, weights), grouped, weights.blocks)
    by_hidden, hidden = _norm(_flat(hidden), weights.hidden_norm, eps)
    gates = torch.baddbmm(weights.gates_bias, _blocks(hidden, weights), weights.gates)
    reset, candidate_input, update = gates.to(belief.dtype).chunk(3, -1)
    reset, update = reset.sigmoid(), update.sigmoid()
    candidate = torch.tanh(reset * candidate_input)
    belief = _flat(torch.lerp(grouped, candidate, update))

    projected = torch.addmm(embedded, belief, weights.posterior.t())
    by_posterior, posterior = _norm(projected, weights.posterior_norm, eps)
    logits = torch.addmm(weights.logits_bias, posterior, weights.logits.t()).to(belief.dtype)
    probs = torch.softmax(logits.unflatten(-1, (uniform.shape[-1], -1)), -1)
    state = draw(probs, unimix, uniform).flatten(-2)
    saved = _Saved(
        belief_in,
        state_in,
        by_belief,
        by_state,
        features,
        hidden,
        by_hidden,
        reset,
        candidate_input,
        candidate,
        update,
        belief,
        by_posterior,
        posterior,
        probs,
    )
    return state, belief, logits, saved


def draw(probs: Tensor, unimix: float, uniform: Tensor) -> Tensor:
    """One-hot draws ``[..., K, C]`` from mixed probabilities, inverting their sum."""
    classes = probs.shape[-1]
    cumulative = (probs * (1 - unimix) + unimix / classes).cumsum(-1)
    # Rounding can leave the last cumulative probability below 1, so it is not asked.
    index = (uniform.unsqueeze(-1) > cumulative[..., :-1]).sum(-1, keepdim=True)
    return torch.zeros_like(probs).scatter_(-1, index, 1.0)


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
    sample = (state + grad_state).view_as(saved.probs) * (1 - unimix)
    inner = (sample * saved.probs).sum(-1, keepdim=True)
    logits = grad_logits + ((sample - inner) * saved.probs).flatten(-2)
    grad = logits @ weights.logits
    posterior_input, posterior_scaled = _norm_backward(
        grad, saved.by_posterior, weights.posterior_norm
    )
    # Sums outside the products: under autocast they stay in float32.
    belief = belief + grad_belief + posterior_input @ weights.posterior

    grouped = _blocks(belief, weights)
    difference = saved.candidate - _blocks(saved.belief_in, weights)
    through = grouped * saved.update
    update = through * difference * (1 - saved.update)
    candidate = through * (1 - saved.candidate.square())
    reset = candidate * saved.candidate_input * saved.reset * (1 - saved.reset)
    gates = torch.cat((reset, candidate * saved.reset, update), -1)  # [G, B, 3 w]
    grad = _flat(torch.bmm(gates, weights.gates.transpose(1, 2)))
    hidden_input, hidden_scaled = _norm_backward(grad, saved.by_hidden, weights.hidden_norm)
    direct = torch.bmm(_blocks(hidden_input, weights), weights.blocks.transpose(1, 2))
    direct = grouped - through + direct
    features = hidden_input @ weights.features.t()
    first, second = features.chunk(2, -1)
    belief_input, belief_scaled = _norm_backward(first, saved.by_belief, weights.belief_norm)
    state_input, state_scaled = _norm_backward(second, saved.by_state, weights.state_norm)
    belief = (_flat(direct) + belief_input @ weights.belief) * keep
    state = (state_input @ weights.state).to(belief.dtype) * keep
    return _Gradients(
        state,
        belief,
        logits,
        posterior_input,
        posterior_scaled,
        gates,
        hidden_input,
        hidden_scaled,
        belief_input,
        belief_scaled,
        state_input,
        state_scaled,
    )


def _weight_gradients(
    weights: ScanWeights, steps: list[_Saved], grads: list[_Gradients]
) -> ScanWeights:
    """Every weight's gradient, one product over all steps."""

    def all_steps(tensors: Iterable[Tensor]) -> Tensor:
        return torch.cat(list(tensors), -2)  # [(G,) T B, features]

    belief_in = all_steps(s.belief_in for s in steps)
    hidden_input = all_steps(g.hidden_input for g in grads)
    belief_input = all_steps(g.belief_input for g in grads)
    state_input = all_steps(g.state_input for g in grads)
    logits = all_steps(g.logits for g in grads)
    gates = all_steps(g.gates for g in grads)
    hidden = _blocks(all_steps(s.hidden for s in steps), weights)

    def gain(normed: Iterable[Tensor], scaled: Iterable[Tensor]) -> Tensor:
        return (all_steps(normed) * all_steps(scaled)).sum(0)

    return ScanWeights(
        belief=belief_input.t() @ belief_in,
        belief_bias=belief_input.sum(0),
        belief_norm=gain((s.by_belief.normed for s in steps), (g.belief_scaled for g in grads)),
        state=state_input.t() @ all_steps(s.state_in for s in steps),
        state_bias=state_input.sum(0),
        state_norm=gain((s.by_state.normed for s in steps), (g.state_scaled for g in grads)),
        features=all_steps(s.features for s in steps).t() @ hidden_input,
        blocks=_blocks(belief_in, weights).transpose(1, 2) @ _blocks(hidden_input, weights),
        hidden_norm=gain((s.by_hidden.normed for s in steps), (g.hidden_scaled for g in grads)),
        gates=hidden.transpose(1, 2) @ gates,
        gates_bias=gates.sum(1, keepdim=True),
        posterior=all_steps(g.posterior_input for g in grads).t()
        @ all_steps(s.belief for s in steps),
        posterior_norm=gain(
            (s.by_posterior.normed for s in steps), (g.posterior_scaled for g in grads)
        ),
        logits=logits.t() @ all_steps(s.posterior for s in steps),
        logits_bias=logits.sum(0),
    )


def _norm(x: Tensor, gain: Tensor, eps: float) -> tuple[_Normed, Tensor]:
    """``silu(gain * x / rms(x))`` and what its backward pass needs."""
    x = x.to(gain.dtype)  # from an autocast product
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    normed = x * scale
    scaled = normed * gain
    return _Normed(normed, scaled, scale), F.silu(scaled)


def _norm_backward(grad: Tensor, saved: _Normed, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the norm's input and of its scaled output."""
    scaled: Tensor = torch.ops.aten.silu_backward(grad.to(gain.dtype), saved.scaled)
    normed = scaled * gain
    share = (normed * saved.normed).mean(-1, keepdim=True)
    return (normed - saved.normed * share) * saved.scale, scaled


def _blocks(x: Tensor, weights: ScanWeights) -> Tensor:
    """``[N, D]`` to ``[G, N, w]``."""
    grouped: Tensor = x.unflatten(-1, (len(weights.blocks), -1)).transpose(0, 1)
    return grouped


def _flat(x: Tensor) -> Tensor:
    """``[G, N, w]`` to ``[N, D]``."""
    return x.transpose(0, 1).flatten(1)

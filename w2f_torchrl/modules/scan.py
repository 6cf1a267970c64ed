"""The posterior's recurrence with its backward pass written out.

Autograd would multiply every weight's gradient once a step and keep a graph of some 80 nodes a
step. Here the loop back in time carries only what must be carried, and each weight's gradient is
one product over all steps after it. No second derivatives.

Shape letters: B batch, T time, D belief, S state, H hidden, G blocks, w = D / G.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

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


class Latent(NamedTuple):
    """The latent before a step, zeroed where an episode starts."""

    state: Tensor
    """``[B, S]``, in the products' precision."""
    belief: Tensor
    """``[B, D]``."""
    lower: Tensor | None
    """The belief in the products' precision; None where it has that."""

    @property
    def multiplied(self) -> Tensor:
        """The belief as products take it."""
        return self.belief if self.lower is None else self.lower


class _Saved(NamedTuple):
    """What one step keeps for the backward pass."""

    latent: Latent
    by_input: Normed
    features: Tensor
    hidden: Tensor
    by_hidden: Normed
    reset: Tensor
    update: Tensor
    candidate_input: Tensor
    candidate: Tensor
    belief: Tensor
    by_posterior: Normed
    posterior: Tensor
    probs: Tensor


class Carried(NamedTuple):
    """The gradient of a latent as separate summands from the later step.

    The earlier step adds them up, so that a compiler can fuse the sum with its first kernel.
    """

    state: Tensor
    """``[B, S]``."""
    belief: Tensor
    """Through the belief's projection ``[B, D]``."""
    blocks: Tensor
    """Through the blocks' weights ``[G, B, w]``."""
    kept: Tensor
    """Through the update gate ``[B, D]``."""
    keep: Tensor
    """0 where the step after starts an episode, else 1 ``[B, 1]``."""

    def sums(self) -> tuple[Tensor, Tensor]:
        """Gradients of state and belief."""
        return self.state * self.keep, (self.kept + _flat(self.blocks) + self.belief) * self.keep


class _Gradients(NamedTuple):
    """Gradients of the outputs of one step's weights."""

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
        threshold: What decides the draws ``[T, B, K, classes]``: see :func:`thresholds`.
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
        state, classes = state.to(dtype), threshold.shape[-1]
        one_hots = torch.eye(classes, dtype=dtype, device=belief.device)
        # Time first and in float32: rows start at addresses that are multiples of 16 bytes for
        # batches of 4 and more. Compiled code copies every other input before it reads it.
        keep = F.pad(keep, (0, 0, 0, 1), value=1).transpose(0, 1).contiguous()
        kept = keep.unbind()  # no episode starts after the last step
        inputs = [x.to(dtype).unbind(1) for x in (action_input, embedded)]
        latent = _start(state, belief, kept[0])
        steps, states, logits = [], [], []
        # Each step prepares the next one's latent, so that a compiler can fuse the masking.
        rows = zip(kept[1:], *inputs, threshold, strict=True)
        for keep_next, action_t, embedded_t, threshold_t in rows:
            latent, state, logit, saved = forward_one(
                weights, latent, keep_next, action_t, embedded_t, threshold_t, one_hots, eps
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
        projections = _side_by_side(weights)
        carried = _nothing(weights, grad_beliefs[:, 0], keep[-1])
        outer = [g.unbind(1) for g in (grad_states, grad_beliefs, grad_logits)]
        grads: list[_Gradients] = []
        device, dtype, mixed = ctx.autocast
        with torch.autocast(device, dtype, enabled=mixed):
            for t in reversed(range(len(steps))):
                gs, gb, gl = (g[t] for g in outer)
                gradients, carried = ctx.backward_one(
                    weights, projections, steps[t], carried, gs, gb, gl, keep[t], ctx.unimix
                )
                grads.append(gradients)
            state, belief = carried.sums()
            grads.reverse()
            of_weights = _weight_gradients(weights, steps, grads)
        action_input = torch.stack([g.hidden_input for g in grads], 1)
        embedded = torch.stack([g.posterior_input for g in grads], 1)
        return (state, belief, None, action_input, embedded, None, None, None, None, *of_weights)


def _start(state: Tensor, belief: Tensor, keep: Tensor) -> Latent:
    """Build the latent before a step; ``state`` has the products' precision."""
    belief = belief * keep
    lower = None if state.dtype is belief.dtype else belief.to(state.dtype)
    return Latent(state * keep.to(state.dtype), belief, lower)


def _nothing(weights: ScanWeights, belief: Tensor, keep: Tensor) -> Carried:
    """Zeros for the last step, with the dtypes and strides of the other steps' gradients.

    Otherwise the last step would be compiled separately.
    """
    dtype, (rows, width) = weights.belief.dtype, belief.shape
    sizes = (width, weights.state.shape[1])
    zeros = partial(belief.new_zeros, dtype=dtype)
    if _on_gpu(belief):
        of_belief, of_state = zeros(rows, sum(sizes)).split(sizes, -1)
    else:
        of_belief, of_state = (zeros(rows, size) for size in sizes)
    blocks = zeros(len(weights.blocks), rows, width // len(weights.blocks))
    return Carried(of_state, of_belief, blocks, torch.zeros_like(belief), keep)


def _side_by_side(weights: ScanWeights) -> Tensor | None:
    """Projections of belief and state as one block-diagonal matrix ``[2 H, D + S]``.

    On a GPU one product with it is faster than two; None on a CPU.
    """
    return torch.block_diag(weights.belief, weights.state) if _on_gpu(weights.belief) else None


def _multiplied_in(dtype: torch.dtype, weights: ScanWeights) -> ScanWeights:
    cast = {name: getattr(weights, name).to(dtype) for name in MULTIPLIED}
    return weights._replace(**cast)


def step_forward(
    weights: ScanWeights,
    latent: Latent,
    keep_next: Tensor,
    action_input: Tensor,
    embedded: Tensor,
    threshold: Tensor,
    one_hots: Tensor,
    eps: float,
) -> tuple[Latent, Tensor, Tensor, _Saved]:
    """Run one step: the next step's latent, state and logits ``[B, S]``, tensors for backward.

    State, logits, inputs and the weights of products have the products' precision, which is lower
    under autocast; belief, ``keep_next``, norms, gates and probabilities have their own.
    """
    dtype = latent.belief.dtype
    projected = _project(weights, latent)
    by_input, features = norm(projected, weights.input_norm, eps)
    features = features.flatten(1)

    hidden = _add_product(action_input, features, weights.features, dtype)
    own = _blocks(latent.multiplied, weights)
    hidden = _add_product(_blocks(hidden, weights), own, weights.blocks, dtype)
    by_hidden, hidden = norm(_flat(hidden), weights.hidden_norm, eps)
    reset, update, candidate_input = _open(_blocks(hidden, weights), weights, dtype)
    candidate = torch.tanh(reset * candidate_input)
    apart = torch.lerp(_apart(latent.belief, weights), candidate, update)
    belief, lower = _together(apart), weights.posterior.dtype

    multiplied = belief if lower is dtype else _together(apart.to(lower))
    projected = _add_product(embedded, multiplied, weights.posterior.t(), dtype)
    by_posterior, posterior = norm(projected, weights.posterior_norm, eps)
    logits = torch.addmm(weights.logits_bias, posterior, weights.logits.t())
    probs = softmax_classes(logits, len(one_hots), dtype)
    state = _draw(probs, threshold, one_hots).view_as(logits)
    saved = _Saved(
        latent,
        by_input,
        features,
        hidden,
        by_hidden,
        reset,
        update,
        candidate_input,
        candidate,
        belief,
        by_posterior,
        posterior,
        probs,
    )
    if not _on_gpu(belief):
        return _start(state, belief, keep_next), state, logits, saved
    # In the layout of the belief's kernel, so that both are fused.
    kept = apart * keep_next.unsqueeze(-1)
    cast = None if lower is dtype else kept.to(lower).flatten(1)
    following = Latent(state * keep_next.to(lower), kept.flatten(1), cast)
    return following, state, logits, saved


def _project(weights: ScanWeights, latent: Latent) -> Tensor:
    """Project belief and state ``[B, 2, H]``."""
    pairs = (
        (weights.belief_bias, latent.multiplied, weights.belief.t()),
        (weights.state_bias, latent.state, weights.state.t()),
    )
    if not torch.compiler.is_compiling():
        both = torch.cat([torch.addmm(*pair) for pair in pairs], -1)
    else:  # the biases become part of the next kernel
        both = torch.cat([x @ weight for _, x, weight in pairs], -1)
        both = both + torch.cat([bias for bias, _, _ in pairs]).to(latent.belief.dtype)
    projected: Tensor = both.unflatten(-1, (2, -1))
    return projected


def _add_product(summand: Tensor, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``summand + x @ weight``, for 2-dimensional or batched products.

    On a GPU ``addmm`` first copies its summand, unless that is a row and the result contiguous
    (which a part of a concatenation isn't). A compiler fuses the sum with the next kernel instead
    if it is in the belief's precision, which under autocast differs from the product's.
    """
    if not torch.compiler.is_compiling():
        add = torch.addmm if x.ndim == 2 else torch.baddbmm
        total: Tensor = add(summand, x, weight)
    else:
        total = summand.to(dtype) + x @ weight
    return total


def _open(
    hidden: Tensor, weights: ScanWeights, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Reset gate, update gate and the candidate's input, each in the layout of :func:`_apart`."""
    width = hidden.shape[-1]
    if not torch.compiler.is_compiling():  # the two sigmoids at once
        gates = torch.baddbmm(weights.gates_bias, hidden, weights.gates).to(dtype)
        opening, candidate_input = _turned(gates).tensor_split((2 * width,), -1)
        reset, update = opening.sigmoid().chunk(2, -1)
        return reset, update, candidate_input
    products = _turned(hidden @ weights.gates).split(width, -1)
    biases = _turned(weights.gates_bias.to(dtype)).split(width, -1)
    reset, update, candidate = (x + y for x, y in zip(products, biases, strict=True))
    return reset.sigmoid(), update.sigmoid(), candidate


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
        ``[..., K, classes]``: a class after c is taken above F_c. Above the last one there is none:
        its threshold is negative, since rounding can leave its cumulative probability below 1.
    """
    share = torch.arange(1, classes + 1, dtype=uniform.dtype, device=uniform.device)
    threshold = (uniform.unsqueeze(-1) - share * (unimix / classes)) / (1 - unimix)
    threshold[..., -1] = -1
    return threshold


def drawn_classes(probs: Tensor, threshold: Tensor) -> Tensor:
    """Draw classes ``[..., K]`` by inverting the cumulative sum of their probabilities.

    Args:
        probs: Without the uniform share ``[..., K, C]``.
        threshold: From :func:`thresholds`.
    """
    return (threshold > probs.cumsum(-1)).sum(-1)


def _draw(probs: Tensor, threshold: Tensor, one_hots: Tensor) -> Tensor:
    """One-hot draws ``[..., K, C]``; ``one_hots`` is the identity ``[C, C]``."""
    drawn = drawn_classes(probs, threshold)
    if not torch.compiler.is_compiling():
        return one_hots.index_select(0, drawn.flatten()).view(probs.shape)
    every = torch.arange(probs.shape[-1], device=probs.device)
    return (drawn.unsqueeze(-1) == every).to(one_hots.dtype)


def step_backward(
    weights: ScanWeights,
    projections: Tensor | None,
    saved: _Saved,
    carried: Carried,
    grad_state: Tensor,
    grad_belief: Tensor,
    grad_logits: Tensor,
    keep: Tensor,
    unimix: float,
) -> tuple[_Gradients, Carried]:
    """One step back, from the gradients of the step after and those from outside."""
    state, belief = carried.sums()
    # The sample's gradient is that of its probabilities (straight-through).
    sample = (state + grad_state).view(saved.probs.shape).mul_(1 - unimix)
    inner = (sample * saved.probs).sum(-1, keepdim=True)
    logits = (grad_logits.view_as(sample) + (sample - inner) * saved.probs).flatten(-2)
    grad = logits @ weights.logits
    posterior_input, posterior_scaled = norm_backward(
        grad, saved.by_posterior, weights.posterior_norm
    )
    # Sums outside the products: under autocast they stay in float32.
    belief = belief + grad_belief + posterior_input @ weights.posterior

    grouped = _apart(belief, weights)
    through = grouped * saved.update
    candidate: Tensor = torch.ops.aten.tanh_backward(through, saved.candidate)
    reset = torch.ops.aten.sigmoid_backward(candidate * saved.candidate_input, saved.reset)
    update = torch.ops.aten.sigmoid_backward(
        grouped * (saved.candidate - _apart(saved.latent.belief, weights)), saved.update
    )
    gates = _turned(torch.cat((reset, update, candidate * saved.reset), -1))  # [G, B, 3 w]
    grad = _flat(torch.bmm(gates, weights.gates.transpose(1, 2)))
    hidden_input, hidden_scaled = norm_backward(grad, saved.by_hidden, weights.hidden_norm)
    multiplied = hidden_input.to(weights.blocks.dtype)
    blocks = torch.bmm(_blocks(multiplied, weights), weights.blocks.transpose(1, 2))
    features = (multiplied @ weights.features.t()).unflatten(-1, (2, -1))
    inputs, inputs_scaled = norm_backward(features, saved.by_input, weights.input_norm)
    projected = inputs.to(weights.belief.dtype)
    if projections is None:
        by_belief, by_state = projected.unbind(1)
        of_belief, of_state = by_belief @ weights.belief, by_state @ weights.state
    else:
        sizes = (belief.shape[-1], state.shape[-1])
        of_belief, of_state = (projected.flatten(1) @ projections).split(sizes, -1)
    gradients = _Gradients(
        logits,
        posterior_input,
        posterior_scaled,
        gates,
        hidden_input,
        hidden_scaled,
        inputs,
        inputs_scaled,
    )
    return gradients, Carried(of_state, of_belief, blocks, _together(grouped - through), keep)


def _weight_gradients(
    weights: ScanWeights, steps: list[_Saved], grads: list[_Gradients]
) -> ScanWeights:
    """Every weight's gradient, one product over all steps."""

    def all_steps(tensors: Iterable[Tensor], dim: int = 0) -> Tensor:
        return torch.cat(list(tensors), dim)  # [T B, ...], or [G, T B, ...]

    def gain(normed: Iterable[Tensor], scaled: Iterable[Tensor]) -> Tensor:
        return (all_steps(normed) * all_steps(scaled)).sum(0)

    belief_in = all_steps(s.latent.belief for s in steps)
    hidden_input = all_steps(g.hidden_input for g in grads)
    by_belief, by_state = all_steps(g.inputs for g in grads).unbind(1)
    logits = all_steps(g.logits for g in grads)
    gates = all_steps((g.gates for g in grads), 1)
    hidden = _blocks(all_steps(s.hidden for s in steps), weights)
    posterior = all_steps(g.posterior_input for g in grads)
    return ScanWeights(
        belief=_outer(by_belief, belief_in),
        belief_bias=by_belief.sum(0),
        state=_outer(by_state, all_steps(s.latent.state for s in steps)),
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


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _apart(x: Tensor, weights: ScanWeights) -> Tensor:
    """Split ``[N, D]`` into blocks for elementwise operations.

    On a GPU to ``[N, G, w]``: no copies from and to ``[N, D]``; the outputs of block products are
    read with strides, which is free in a compiled kernel. On a CPU to ``[G, N, w]``, the layout of
    those outputs.
    """
    return x.unflatten(-1, (len(weights.blocks), -1)) if _on_gpu(x) else _blocks(x, weights)


def _turned(x: Tensor) -> Tensor:
    """Convert between the layouts of block products and of :func:`_apart`."""
    return x.transpose(0, 1) if _on_gpu(x) else x


def _together(x: Tensor) -> Tensor:
    """Undo :func:`_apart`."""
    return x.flatten(1) if _on_gpu(x) else _flat(x)


def _flat(x: Tensor) -> Tensor:
    """``[G, N, w]`` to ``[N, D]``."""
    return x.transpose(0, 1).flatten(1)

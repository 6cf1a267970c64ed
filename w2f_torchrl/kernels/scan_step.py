"""Forward and backward step of the posterior's recurrence.

On a GPU each is compiled separately, so both avoid operations that a compiler cannot fuse.

Shape letters: B batch, D belief, S state, H hidden, G blocks, w = D / G, K categoricals, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from w2f_torchrl.kernels import switch
from w2f_torchrl.kernels.categoricals import draw, softmax_classes
from w2f_torchrl.kernels.dense import norm, norm_backward
from w2f_torchrl.kernels.scan_types import (
    Carried,
    Latent,
    Saved,
    SavedGRU,
    ScanWeights,
    StepGradients,
)


def step_forward(
    weights: ScanWeights,
    latent: Latent,
    keep_next: Tensor,
    action_input: Tensor,
    embedded: Tensor,
    threshold: Tensor,
    one_hots: Tensor,
    eps: float,
) -> tuple[Latent, Tensor, Tensor, Saved]:
    """Run one step.

    State, logits, inputs and the weights of products have the precision of the products, which is
    lower under autocast; belief, ``keep_next``, norms, gates and probabilities have the belief's.

    Args:
        weights: Weights of the block GRU and the posterior.
        latent: Latent before the step.
        keep_next: 0 where the next step starts an episode, else 1 ``[B, 1]``.
        action_input: The action's share of the hidden layer ``[B, D]``.
        embedded: The embedding's share of the posterior's first layer ``[B, H]``.
        threshold: From :func:`~w2f_torchrl.kernels.categoricals.thresholds` ``[B, K, C]``.
        one_hots: The identity ``[C, C]``.
        eps: Constant of the norms.

    Returns:
        The next step's latent, this step's state and logits ``[B, S]``, and intermediates for
        :func:`step_backward`.
    """
    dtype, lower = latent.belief.dtype, weights.posterior.dtype
    gru, split = _gru_forward(weights, latent, action_input, eps)
    belief = merge_blocks(split)  # [B, D]
    multiplied = belief if lower is dtype else merge_blocks(split.to(lower))
    projected = _add_product(embedded, multiplied, weights.posterior.t(), dtype)  # [B, H]
    by_posterior, posterior = norm(projected, weights.posterior_norm, eps)
    logits = torch.addmm(weights.logits_bias, posterior, weights.logits.t())  # [B, S]
    probs = softmax_classes(logits, len(one_hots), dtype)  # [B, K, C]
    state = draw(probs, threshold, one_hots).view_as(logits)  # [B, S]
    saved = Saved(latent, gru, belief, by_posterior, posterior, probs)
    if not switch.on_gpu(belief):
        return start(state, belief, keep_next), state, logits, saved
    # In the layout of the belief's kernel, so that both are fused.
    kept = split * keep_next.unsqueeze(-1)
    cast = None if lower is dtype else kept.to(lower).flatten(1)
    following = Latent(state * keep_next.to(lower), kept.flatten(1), cast)
    return following, state, logits, saved


def start(state: Tensor, belief: Tensor, keep: Tensor) -> Latent:
    """Build the latent before a step.

    Args:
        state: ``[B, S]``, in the precision of the products.
        belief: ``[B, D]``.
        keep: 0 where an episode starts, else 1 ``[B, 1]``.
    """
    belief = belief * keep
    lower = None if state.dtype is belief.dtype else belief.to(state.dtype)
    return Latent(state * keep.to(state.dtype), belief, lower)


def _gru_forward(
    weights: ScanWeights, latent: Latent, action_input: Tensor, eps: float
) -> tuple[SavedGRU, Tensor]:
    """Advance the belief; return it in the layout of :func:`split_blocks`."""
    dtype = latent.belief.dtype
    projected = _project(weights, latent)
    by_input, features = norm(projected, weights.input_norm, eps)
    features = features.flatten(1)  # [B, 2 H]

    hidden = _add_product(action_input, features, weights.features, dtype)  # [B, D]
    own = to_blocks(latent.multiplied, weights)  # [G, B, w]
    hidden = _add_product(to_blocks(hidden, weights), own, weights.blocks, dtype)
    by_hidden, hidden = norm(from_blocks(hidden), weights.hidden_norm, eps)  # [B, D]
    reset, update, candidate_input = _gates(to_blocks(hidden, weights), weights, dtype)
    candidate = torch.tanh(reset * candidate_input)
    belief = torch.lerp(split_blocks(latent.belief, weights), candidate, update)
    saved = SavedGRU(
        by_input, features, hidden, by_hidden, reset, update, candidate_input, candidate
    )
    return saved, belief


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
    """Compute ``summand + x @ weight``, for 2-dimensional or batched products.

    On a GPU ``addmm`` first copies its summand, unless that is a row and the result is contiguous
    (which a part of a concatenation is not). A compiler fuses the sum with the next kernel instead
    if it is in the belief's precision, which under autocast differs from the product's.
    """
    if not torch.compiler.is_compiling():
        add = torch.addmm if x.ndim == 2 else torch.baddbmm
        total: Tensor = add(summand, x, weight)
    else:
        total = summand.to(dtype) + x @ weight
    return total


def _gates(
    hidden: Tensor, weights: ScanWeights, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute reset gate, update gate and the candidate's input from hidden ``[G, B, w]``.

    Each has the layout of :func:`split_blocks`.
    """
    width = hidden.shape[-1]
    if not torch.compiler.is_compiling():  # the two sigmoids at once
        gates = torch.baddbmm(weights.gates_bias, hidden, weights.gates).to(dtype)  # [G, B, 3 w]
        opening, candidate_input = turn(gates).tensor_split((2 * width,), -1)
        reset, update = opening.sigmoid().chunk(2, -1)
        return reset, update, candidate_input
    products = turn(hidden @ weights.gates).split(width, -1)
    biases = turn(weights.gates_bias.to(dtype)).split(width, -1)
    reset, update, candidate = (x + y for x, y in zip(products, biases, strict=True))
    return reset.sigmoid(), update.sigmoid(), candidate


def step_backward(
    weights: ScanWeights,
    projections: Tensor | None,
    saved: Saved,
    carried: Carried,
    grad_state: Tensor,
    grad_belief: Tensor,
    grad_logits: Tensor,
    keep: Tensor,
    unimix: float,
) -> tuple[StepGradients, Carried]:
    """Run one backward step.

    Args:
        weights: Weights of the block GRU and the posterior.
        projections: From :func:`side_by_side` ``[2 H, D + S]``, or None.
        saved: Intermediates from :func:`step_forward`.
        carried: Gradients from the later step.
        grad_state: Gradient from the losses ``[B, S]``.
        grad_belief: Gradient from the losses ``[B, D]``.
        grad_logits: Gradient from the losses ``[B, S]``.
        keep: 0 where this step starts an episode, else 1 ``[B, 1]``.
        unimix: Share of the uniform distribution in the posterior.
    """
    state, belief = carried.sums()
    # The sample's gradient is that of its probabilities (straight-through).
    sample = (state + grad_state).view(saved.probs.shape).mul_(1 - unimix)  # [B, K, C]
    inner = (sample * saved.probs).sum(-1, keepdim=True)
    logits = (grad_logits.view_as(sample) + (sample - inner) * saved.probs).flatten(-2)  # [B, S]
    grad = logits @ weights.logits  # [B, H]
    posterior_input, posterior_scaled = norm_backward(
        grad, saved.by_posterior, weights.posterior_norm
    )
    # Sums outside the products: under autocast they stay in float32.
    belief = belief + grad_belief + posterior_input @ weights.posterior  # [B, D]

    gates, kept = _gates_backward(weights, saved, belief)
    grad = from_blocks(torch.bmm(gates, weights.gates.transpose(1, 2)))  # [B, D]
    hidden_input, hidden_scaled = norm_backward(grad, saved.gru.by_hidden, weights.hidden_norm)
    multiplied = hidden_input.to(weights.blocks.dtype)
    blocks = torch.bmm(to_blocks(multiplied, weights), weights.blocks.transpose(1, 2))
    features = (multiplied @ weights.features.t()).unflatten(-1, (2, -1))  # [B, 2, H]
    inputs, inputs_scaled = norm_backward(features, saved.gru.by_input, weights.input_norm)
    projected = inputs.to(weights.belief.dtype)
    if projections is None:
        by_belief, by_state = projected.unbind(1)
        of_belief, of_state = by_belief @ weights.belief, by_state @ weights.state
    else:
        sizes = (belief.shape[-1], state.shape[-1])
        of_belief, of_state = (projected.flatten(1) @ projections).split(sizes, -1)
    gradients = StepGradients(
        logits=logits,
        posterior_input=posterior_input,
        posterior_scaled=posterior_scaled,
        gates=gates,
        hidden_input=hidden_input,
        hidden_scaled=hidden_scaled,
        inputs=inputs,
        inputs_scaled=inputs_scaled,
    )
    return gradients, Carried(of_state, of_belief, blocks, merge_blocks(kept), keep)


def _gates_backward(weights: ScanWeights, saved: Saved, belief: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the gates and, through the update gate, of the previous belief.

    Args:
        weights: The weights, for the number of blocks.
        saved: Intermediates from :func:`step_forward`.
        belief: The gradient of the belief ``[B, D]``.

    Returns:
        ``[G, B, 3 w]``, and in the layout of :func:`split_blocks`.
    """
    gru = saved.gru
    split = split_blocks(belief, weights)
    through = split * gru.update
    candidate: Tensor = torch.ops.aten.tanh_backward(through, gru.candidate)
    reset = torch.ops.aten.sigmoid_backward(candidate * gru.candidate_input, gru.reset)
    update = torch.ops.aten.sigmoid_backward(
        split * (gru.candidate - split_blocks(saved.latent.belief, weights)), gru.update
    )
    gates = turn(torch.cat((reset, update, candidate * gru.reset), -1))  # [G, B, 3 w]
    return gates, split - through


def side_by_side(weights: ScanWeights) -> Tensor | None:
    """Join the projections of belief and state in one block-diagonal matrix ``[2 H, D + S]``.

    On a GPU one product with it is faster than two; None on a CPU.
    """
    on_gpu = switch.on_gpu(weights.belief)
    return torch.block_diag(weights.belief, weights.state) if on_gpu else None


def to_blocks(x: Tensor, weights: ScanWeights) -> Tensor:
    """Split ``[N, D]`` into blocks for products: ``[G, N, w]``."""
    grouped: Tensor = x.unflatten(-1, (len(weights.blocks), -1)).transpose(0, 1)
    return grouped


def from_blocks(x: Tensor) -> Tensor:
    """Undo :func:`to_blocks`: ``[G, N, w]`` to ``[N, D]``."""
    return x.transpose(0, 1).flatten(1)


def split_blocks(x: Tensor, weights: ScanWeights) -> Tensor:
    """Split ``[N, D]`` into blocks for elementwise operations.

    On a GPU into ``[N, G, w]``, without copies from and to ``[N, D]``; there outputs of block
    products are read with strides, which is free in a compiled kernel. On a CPU into ``[G, N, w]``,
    the layout of those outputs.
    """
    split: Tensor = x.unflatten(-1, (len(weights.blocks), -1))  # [N, G, w]
    return split if switch.on_gpu(x) else split.transpose(0, 1)


def merge_blocks(x: Tensor) -> Tensor:
    """Undo :func:`split_blocks`: blocks to ``[N, D]``."""
    return x.flatten(1) if switch.on_gpu(x) else from_blocks(x)


def turn(x: Tensor) -> Tensor:
    """Convert between ``[G, N, w]`` and the layout of :func:`split_blocks`."""
    return x.transpose(0, 1) if switch.on_gpu(x) else x

"""The posterior's recurrence over a sequence, with its backward pass written out.

Autograd would multiply every weight's gradient once per step and keep a graph of about 80 nodes per
step. Here the loop back in time carries only what it needs, and each weight's gradient is one
product over all steps after the loop. Second derivatives are not supported.

Shape letters: B batch, T time, D belief, S state = K categoricals of C classes, H hidden, G blocks,
w = D / G.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torchrl.modules import RSSMPosteriorV3

from w2f_torchrl.kernels import scan_types, switch
from w2f_torchrl.kernels.block_gru import BlockGRUStep
from w2f_torchrl.kernels.categoricals import thresholds
from w2f_torchrl.kernels.products import outer, outer_blocks
from w2f_torchrl.kernels.scan_step import (
    side_by_side,
    start,
    step_backward,
    step_forward,
    to_blocks,
)
from w2f_torchrl.kernels.scan_types import Carried, Saved, ScanWeights, StepGradients

StepFunctions = tuple[Callable[..., Any], Callable[..., Any]]
"""Forward and backward step of the recurrence, plain or compiled."""

#: The step functions, not compiled.
STEP_FUNCTIONS: StepFunctions = (step_forward, step_backward)


def can_scan(step: BlockGRUStep, posterior: RSSMPosteriorV3) -> bool:
    """Return whether the layers are those of all presets, whose backward pass is written out."""
    # One dynamics layer (linear map, norm, SiLU), and one in the posterior before its logits.
    layers = (len(step.core.hidden_layers), len(posterior.obs_rnn_to_post_projector))
    return layers == (3, 4)


def scan(
    step: BlockGRUStep,
    posterior: RSSMPosteriorV3,
    state: Tensor,
    belief: Tensor,
    keep: Tensor,
    action_input: Tensor,
    embedded: Tensor,
    uniform: Tensor,
    step_functions: StepFunctions = STEP_FUNCTIONS,
) -> tuple[Tensor, Tensor, Tensor]:
    """Roll the posterior over a sequence.

    Args:
        step: The block GRU.
        posterior: The posterior.
        state: State before the first step ``[B, S]``.
        belief: Belief before the first step ``[B, D]``.
        keep: 0 where an episode starts, else 1 ``[B, T, 1]``.
        action_input: The action's share of the hidden layer, bias included ``[B, T, D]``.
        embedded: The embedding's share of the posterior's first layer ``[B, T, H]``.
        uniform: Draws from U[0, 1) ``[T, B, K]``.
        step_functions: Forward and backward step.

    Returns:
        States, one-hot with straight-through gradient ``[B, T, S]``, beliefs ``[B, T, D]`` and
        posterior logits ``[B, T, S]``.
    """
    unimix, eps = posterior.unimix, step.core.hidden_layers[1].eps
    threshold = thresholds(uniform, unimix, posterior.num_classes)  # [T, B, K, C]
    settings = (unimix, eps, step_functions)
    inputs = (state, belief, keep, action_input, embedded, threshold)
    result: tuple[Tensor, Tensor, Tensor] = _Scan.apply(
        *inputs, *settings, *_weights(step, posterior)
    )
    return result


def _weights(step: BlockGRUStep, posterior: RSSMPosteriorV3) -> ScanWeights:
    core = step.core
    first, posterior_norm, _, last = posterior.obs_rnn_to_post_projector
    return ScanWeights(
        belief=core.belief_projection[0].weight,
        belief_bias=core.belief_projection[0].bias,
        state=core.state_projection[0].weight,
        state_bias=core.state_projection[0].bias,
        input_norm=torch.stack((core.belief_projection[1].weight, core.state_projection[1].weight)),
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
        step_functions: StepFunctions,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        forward_one, ctx.backward_one = step_functions
        ctx.unimix, device = unimix, belief.device.type
        autocast = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        ctx.autocast = (device, *autocast)
        # Once, not at every step: autocast caches casts of parameters, not of views of them.
        dtype = autocast[0] if autocast[1] else belief.dtype
        weights = scan_types.cast_weights(dtype, ScanWeights(*tensors))
        # Draws and resets are zeros and ones, exact in any precision.
        state, classes = state.to(dtype), threshold.shape[-1]
        one_hots = torch.eye(classes, dtype=dtype, device=belief.device)
        # Time first and in float32: rows start at addresses that are multiples of 16 bytes for
        # batches of 4 and more. Compiled code copies every other input before it reads it.
        keep = F.pad(keep, (0, 0, 0, 1), value=1).transpose(0, 1).contiguous()  # [T + 1, B, 1]
        kept = keep.unbind()  # no episode starts after the last step
        inputs = [x.to(dtype).unbind(1) for x in (action_input, embedded)]
        latent = start(state, belief, kept[0])
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
        ctx.steps = steps
        beliefs = torch.stack([saved.belief for saved in steps], 1)  # [B, T, D]
        state, logit = (torch.stack(x, 1).to(belief.dtype) for x in (states, logits))  # [B, T, S]
        return state, beliefs, logit

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_states: Tensor, grad_beliefs: Tensor, grad_logits: Tensor
    ) -> tuple[Tensor | None, ...]:
        keep, *tensors = ctx.saved_tensors
        weights, steps = ScanWeights(*tensors), ctx.steps
        projections = side_by_side(weights)
        carried = _nothing(weights, grad_beliefs[:, 0], keep[-1])
        from_losses = [g.unbind(1) for g in (grad_states, grad_beliefs, grad_logits)]
        grads: list[StepGradients] = []
        device, dtype, enabled = ctx.autocast
        with torch.autocast(device, dtype, enabled=enabled):
            for t in reversed(range(len(steps))):
                gs, gb, gl = (g[t] for g in from_losses)
                gradients, carried = ctx.backward_one(
                    weights, projections, steps[t], carried, gs, gb, gl, keep[t], ctx.unimix
                )
                grads.append(gradients)
            state, belief = carried.sums()
            grads.reverse()
            of_weights = _weight_gradients(weights, steps, grads)
        action_input = torch.stack([g.hidden_input for g in grads], 1)  # [B, T, D]
        embedded = torch.stack([g.posterior_input for g in grads], 1)  # [B, T, H]
        return (state, belief, None, action_input, embedded, None, None, None, None, *of_weights)


def _nothing(weights: ScanWeights, belief: Tensor, keep: Tensor) -> Carried:
    """Return zeros for the last step, with the dtypes and strides of the other steps' gradients.

    Otherwise the last step would be compiled separately.
    """
    dtype, (rows, width) = weights.belief.dtype, belief.shape
    sizes = (width, weights.state.shape[1])
    zeros = partial(belief.new_zeros, dtype=dtype)
    if switch.on_gpu(belief):
        of_belief, of_state = zeros(rows, sum(sizes)).split(sizes, -1)
    else:
        of_belief, of_state = (zeros(rows, size) for size in sizes)
    blocks = zeros(len(weights.blocks), rows, width // len(weights.blocks))
    return Carried(of_state, of_belief, blocks, torch.zeros_like(belief), keep)


def _weight_gradients(
    weights: ScanWeights, steps: list[Saved], grads: list[StepGradients]
) -> ScanWeights:
    """Return every weight's gradient, one product over all steps."""

    def all_steps(tensors: Iterable[Tensor], dim: int = 0) -> Tensor:
        return torch.cat(list(tensors), dim)  # [T B, ...], or [G, T B, ...]

    def gain(normed: Iterable[Tensor], scaled: Iterable[Tensor]) -> Tensor:
        return (all_steps(normed) * all_steps(scaled)).sum(0)

    grus = [s.gru for s in steps]
    belief_in = all_steps(s.latent.belief for s in steps)
    hidden_input = all_steps(g.hidden_input for g in grads)
    by_belief, by_state = all_steps(g.inputs for g in grads).unbind(1)
    logits = all_steps(g.logits for g in grads)
    gates = all_steps((g.gates for g in grads), 1)
    hidden = to_blocks(all_steps(s.hidden for s in grus), weights)
    posterior = all_steps(g.posterior_input for g in grads)
    return ScanWeights(
        belief=outer(by_belief, belief_in),
        belief_bias=by_belief.sum(0),
        state=outer(by_state, all_steps(s.latent.state for s in steps)),
        state_bias=by_state.sum(0),
        input_norm=gain((s.by_input.normed for s in grus), (g.inputs_scaled for g in grads)),
        features=outer(all_steps(s.features for s in grus), hidden_input),
        blocks=outer_blocks(to_blocks(belief_in, weights), to_blocks(hidden_input, weights)),
        hidden_norm=gain((s.by_hidden.normed for s in grus), (g.hidden_scaled for g in grads)),
        gates=outer_blocks(hidden, gates),
        gates_bias=gates.sum(1, keepdim=True),
        posterior=outer(posterior, all_steps(s.belief for s in steps)),
        posterior_norm=gain(
            (s.by_posterior.normed for s in steps), (g.posterior_scaled for g in grads)
        ),
        logits=outer(logits, all_steps(s.posterior for s in steps)),
        logits_bias=logits.sum(0),
    )

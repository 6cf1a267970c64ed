"""TorchRL's block GRU cell, with all work that can be done in advance moved out of it.

TorchRL's cell repeats the projected features for every block and concatenates them with the block's
belief. The product with the block weights equals one dense product of the features plus one batched
product of the belief, and the share of the action (and the bias) can be computed for all steps at
once.

Shape letters: N rows, S state, D belief, A action, H hidden, G blocks, w = D / G.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchrl.modules import RSSMPriorV3

from w2f_torchrl.kernels import switch
from w2f_torchrl.kernels.dense import activate, cast_maps, linear, run_layers
from w2f_torchrl.kernels.products import block_product, product


class BlockGRUStep:
    """One step of the recurrence: ``h_t = f(h_{t-1}, z_{t-1}, a_{t-1})``.

    Built once per forward pass: it holds views of the parameters, so gradients reach them. The
    plain form is the prior's cell, ``prior.rnn``.

    Args:
        prior: A TorchRL prior with ``recurrent_model="block_gru"``.
    """

    def __init__(self, prior: RSSMPriorV3):
        core = prior.rnn
        self.core = core
        # For imagination.
        self.belief_layers: list[Any] = list(core.belief_projection)
        self.state_layers: list[Any] = list(core.state_projection)
        self.action_layers: list[Any] = list(core.action_projection)
        self.blocks = core.num_blocks
        first = core.hidden_layers[0]
        self.rest = list(core.hidden_layers[1:])
        width = core.belief_dim // self.blocks
        # [G, w + 3 H, w]: the block's own belief first, then the shared features.
        self.belief_weight = first.weight[:, :width]  # [G, w, w]
        self.features = first.weight[:, width:].transpose(0, 1).flatten(1)  # [3 H, D]
        hidden = self.features.shape[0] // 3
        self.feature_weight = self.features[: 2 * hidden]  # [2 H, D]
        self.action_weight = self.features[2 * hidden :]  # [H, D]
        self.bias = first.bias
        # Reset, update, candidate, unlike TorchRL's order: the two sigmoids side by side.
        order = (0, 2, 1)
        weights = core.gates.weight.chunk(3, -1)
        self.gate_weight = torch.cat([weights[i] for i in order], -1)  # [G, w, 3 w]
        biases = core.gates.bias.view(self.blocks, 1, 3 * width).chunk(3, -1)
        # The update gate starts at sigmoid(-1): the cell's constant goes into the bias.
        self.gate_bias = torch.cat((biases[0], biases[2] - 1, biases[1]), -1)  # [G, 1, 3 w]

    def cast_weights(self, dtype: torch.dtype) -> None:
        """Cast the weights that :meth:`imagine` multiplies by; the gates' bias stays in float32."""
        self.belief_layers = cast_maps(dtype, self.belief_layers)
        self.state_layers = cast_maps(dtype, self.state_layers)
        self.action_layers = cast_maps(dtype, self.action_layers)
        self.features, self.bias = self.features.to(dtype), self.bias.to(dtype)
        self.belief_weight = self.belief_weight.to(dtype)
        self.gate_weight = self.gate_weight.to(dtype)

    def _project_action(self, action: Tensor) -> Tensor:
        action = action / action.detach().abs().clamp_min(1)
        return run_layers(self.action_layers, action)

    def action_input(self, action: Tensor) -> Tensor:
        """Return the action's share of the first layer: ``[..., A]`` to ``[..., D]``."""
        return linear(self._project_action(action), self.action_weight.t(), self.bias)

    def __call__(self, state: Tensor, belief: Tensor, action_input: Tensor) -> Tensor:
        """Advance the belief: ``[N, S], [N, D], [N, D]`` to ``[N, D]``."""
        core, blocks = self.core, self.blocks
        features = torch.cat((core.belief_projection(belief), core.state_projection(state)), -1)
        grouped = belief.unflatten(-1, (blocks, -1)).transpose(0, 1)  # [G, N, w]
        shared = torch.addmm(action_input, features, self.feature_weight)  # [N, D]
        shared = shared.unflatten(-1, (blocks, -1)).transpose(0, 1)  # [G, N, w]
        hidden = torch.baddbmm(shared, grouped, self.belief_weight)
        hidden = hidden.transpose(0, 1).flatten(1)  # [N, D]
        for layer in self.rest:
            hidden = layer(hidden)
        hidden = hidden.unflatten(-1, (blocks, -1)).transpose(0, 1)  # [G, N, w]
        # In place: adding a broadcast bias out of place copies it to the product's size first.
        gates = torch.bmm(hidden, self.gate_weight).add_(self.gate_bias)  # [G, N, 3 w]
        return _update_belief(grouped, gates).transpose(0, 1).flatten(1)

    def imagine(
        self, state: Tensor, belief: Tensor, multiplied: Tensor, action: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Advance the belief of many rows, without a gradient.

        Args:
            state: ``[N, S]``.
            belief: ``[N, D]``.
            multiplied: The belief in the precision of the products ``[N, D]``.
            action: ``[N, A]``.

        Returns:
            The belief ``[N, D]``, and the same in the precision of ``multiplied``.
        """
        projected = (
            run_layers(self.belief_layers, multiplied),
            run_layers(self.state_layers, state),
            self._project_action(action),
        )
        hidden = product(torch.cat(projected, -1), self.features.t(), self.bias)  # [N, D]
        hidden = hidden.add_(block_product(multiplied, self.belief_weight))
        hidden = activate(hidden, self.rest[0])
        for layer in self.rest[2:]:  # more than one dynamics layer
            hidden = layer(hidden)
        gates = block_product(hidden, self.gate_weight, self.gate_bias.squeeze(1))  # [N, 3 D]
        gates = gates.unflatten(-1, (self.blocks, -1))  # [N, G, 3 w]
        belief = _imagine_belief(belief.unflatten(-1, (self.blocks, -1)), gates)
        # Cast in the layout that it was computed in: a compiler makes both at once.
        return belief.flatten(1), belief.to(multiplied.dtype).flatten(1)


def _update_belief(belief: Tensor, gates: Tensor) -> Tensor:
    """Update blocks ``[..., w]`` by gates ``[..., 3 w]``: reset, update, candidate."""
    # The belief keeps its precision, even under autocast.
    reset, update, candidate = gates.to(belief.dtype).chunk(3, -1)
    candidate = torch.tanh(reset.sigmoid() * candidate)
    return torch.lerp(belief, candidate, update.sigmoid())


def _imagine_belief(belief: Tensor, gates: Tensor) -> Tensor:
    """Compute :func:`_update_belief` without a gradient, in the memory of the gates.

    A CPU's logistic function takes a fifth of its tanh's time. With it, tanh(x) =
    2 / (1 + exp(-2 x)) - 1 is exact to 1e-7, float32's rounding of values near 1.
    """
    if not switch.on_cpu(gates):  # also in a compiled graph: rounding could flip a sampled class
        return _update_belief(belief, gates)
    opening, candidate = gates.tensor_split((2 * belief.shape[-1],), -1)
    reset, update = opening.sigmoid_().chunk(2, -1)
    zero, minus_one = gates.new_zeros(()), gates.new_full((), -1)
    candidate = torch.addcmul(zero, candidate, reset, value=2).sigmoid_()
    candidate = torch.add(minus_one, candidate, alpha=2)
    return torch.lerp(belief, candidate, update)

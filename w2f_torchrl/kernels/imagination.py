"""Networks prepared for imagination: many rows, no gradient, weights cast once.

Autocast caches casts of parameters, but not of views of them, and none inside a compiled step. So
all weights of an imagined step are cast before the first step.

Shape letters: N rows, S = K x C state (K categoricals, C classes), D belief, A action.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torchrl.modules import RSSMPriorV3

from w2f_torchrl.kernels.block_gru import BlockGRUStep
from w2f_torchrl.kernels.categoricals import (
    draw_classes_first,
    drawn_classes,
    one_hot,
    softmax_classes,
    thresholds,
)
from w2f_torchrl.kernels.dense import Affine, cast_maps, run_layers
from w2f_torchrl.kernels.products import product

Method = TypeVar("Method", bound=Callable[..., Any])


class Actor(Protocol):
    """A policy's network: layers, a linear head each for mean and deviation, and their ranges."""

    backbone: Any
    mean: Any
    std: Any

    def from_features(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``[..., D + S]`` to mean and standard deviation ``[..., A]``."""

    def squash(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Map the outputs of the two heads ``[..., A]`` to their ranges."""


def two_heads(from_features: Method) -> Method:
    """Mark the ``from_features`` that :class:`CastActor` computes: layers, two heads, their ranges.

    A subclass that replaces the method has no mark, and is called as it is.
    """
    from_features.two_heads = True  # type: ignore[attr-defined]
    return from_features


class PriorHead:
    """The prior ``p(z_t | h_t)``, from which imagination draws states.

    Built once per forward pass: on a CPU it holds a copy of its last layer whose output has the
    classes first. The plain form is ``prior.rnn_to_prior_projector`` and then a draw.

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

    def cast_weights(self, dtype: torch.dtype) -> None:
        """Cast the weights that :meth:`draw` multiplies by."""
        self.hidden = cast_maps(dtype, self.hidden)
        self.weight, self.bias = self.weight.to(dtype), self.bias.to(dtype)

    def draw(self, belief: Tensor, uniform: Tensor) -> Tensor:
        """Draw states without a gradient: ``[N, D], [N, K]`` to ``[N, S]``."""
        logits = product(run_layers(self.hidden, belief), self.weight, self.bias)  # [N, S]
        if self.classes_first:
            logits = logits.unflatten(-1, self.sizes)  # [N, C, K]
            return draw_classes_first(logits, self.unimix, uniform).flatten(-2)
        classes = self.sizes[0]
        probs = softmax_classes(logits, classes, uniform.dtype)  # [N, K, C]
        drawn = drawn_classes(probs, thresholds(uniform, self.unimix, classes))  # [N, K]
        return one_hot(drawn, classes, logits.dtype).flatten(-2)


class CastActor:
    """The actor's network with its linear maps cast: a plain object, for one forward pass.

    Args:
        actor: The network.
        dtype: Precision of the products.
    """

    def __init__(self, actor: Actor, dtype: torch.dtype):
        self.hidden = cast_maps(dtype, actor.backbone.model)
        heads = [head.model[0] for head in (actor.mean, actor.std)]  # a linear layer each
        weight, bias = (torch.cat([getattr(h, x) for h in heads]) for x in ("weight", "bias"))
        self.heads = Affine(weight.to(dtype), bias.to(dtype))
        self.squash = actor.squash

    def from_features(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``[..., D + S]`` to mean and standard deviation ``[..., A]``, as the actor does."""
        mean, std = self.heads(run_layers(self.hidden, features)).chunk(2, -1)
        return self.squash(mean, std)


class Prepared(NamedTuple):
    """The networks of an imagined step."""

    step: BlockGRUStep
    prior: PriorHead
    actor: Actor | CastActor
    dtype: torch.dtype
    """Precision of the products: under autocast lower than the belief's."""


def prepare(prior: RSSMPriorV3, actor: Actor, belief: Tensor) -> Prepared:
    """Prepare the networks for steps from beliefs ``[N, D]``, under autocast cast to its dtype."""
    step, head = BlockGRUStep(prior), PriorHead(prior)
    device = belief.device.type
    if not torch.is_autocast_enabled(device):
        return Prepared(step, head, actor, belief.dtype)
    dtype = torch.get_autocast_dtype(device)
    step.cast_weights(dtype)
    head.cast_weights(dtype)
    cast = getattr(type(actor).from_features, "two_heads", False)
    return Prepared(step, head, CastActor(actor, dtype) if cast else actor, dtype)

"""Networks prepared for imagination: many rows, no gradient, weights cast once.

Autocast caches casts of parameters, but not of views of them, and none inside a compiled step. So
all weights of an imagined step are cast before the first step.

Shape letters: N rows, S = K x C state (K categoricals, C classes), D belief, A action.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
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


class Actor(nn.Module):
    """A policy's network, its distribution, and how imagination draws actions from it."""

    from_features: Callable[[Tensor], tuple[Tensor, ...]]
    """Maps ``[..., D + S]`` to the parameters of the distribution, such as mean and deviation. An
    actor that computes them by ``backbone``, linear heads and ``squash`` marks this method with
    :func:`linear_heads`, so that its weights are cast once for all imagined steps."""
    noise: Callable[[Tensor], Tensor]
    """Returns noise for actions of the shape of its argument, ``[..., A]``."""
    draw: Callable[..., Tensor]
    """Draws actions ``[..., A]`` from the parameters, followed by the noise."""
    distribution: Callable[..., Any]
    """Makes a distribution of the parameters, with ``log_prob``, ``entropy`` and ``mode``."""


def linear_heads(*names: str) -> Callable[[Method], Method]:
    """Mark a ``from_features`` that :class:`CastActor` computes: ``backbone``, heads, ``squash``.

    A subclass that replaces the method has no mark, and is called as it is.

    Args:
        names: The actor's linear heads of ``[..., A]``, in the order in which ``squash`` takes
            their outputs.
    """

    def mark(from_features: Method) -> Method:
        from_features.heads = names  # type: ignore[attr-defined]
        return from_features

    return mark


two_heads = linear_heads("mean", "std")


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
        names: Its linear heads.
    """

    def __init__(self, actor: Any, dtype: torch.dtype, names: Sequence[str] = ("mean", "std")):
        self.hidden = cast_maps(dtype, actor.backbone.model)
        layers = [getattr(actor, name) for name in names]
        heads = [getattr(layer, "model", [layer])[0] for layer in layers]  # a linear layer each
        weight, bias = (torch.cat([getattr(h, x) for h in heads]) for x in ("weight", "bias"))
        self.heads, self.count = Affine(weight.to(dtype), bias.to(dtype)), len(heads)
        self.squash, self.draw = actor.squash, actor.draw

    def from_features(self, features: Tensor) -> tuple[Tensor, ...]:
        """Map ``[..., D + S]`` to the distribution's parameters ``[..., A]``, as the actor does."""
        outputs = self.heads(run_layers(self.hidden, features)).chunk(self.count, -1)
        parameters: tuple[Tensor, ...] = self.squash(*outputs)
        return parameters


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
    heads = getattr(type(actor).from_features, "heads", None)
    return Prepared(step, head, CastActor(actor, dtype, heads) if heads else actor, dtype)

"""Average gradients over ranks, with DistributedDataParallel or one flat buffer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from w2f_torchrl.objectives import World2FilterLoss

Forward = Callable[[TensorDictBase], tuple[Tensor, TensorDictBase]]


class ComposedLoss(nn.Module):
    """The sum of all losses, through which gradients flow, and the detached metrics.

    DistributedDataParallel wraps this module: one forward and one backward pass that use every
    parameter.

    Args:
        loss: The loss module, which holds the parameters.
    """

    def __init__(self, loss: World2FilterLoss):
        super().__init__()
        self.loss = loss

    def forward(self, sample: TensorDictBase) -> tuple[Tensor, TensorDictBase]:
        """Return the scalar to minimise and the scalars to log for a sample ``[B, T]``."""
        losses = self.loss.forward(sample)
        total: Tensor = sum(losses[name] for name in self.loss.out_keys)
        return total, losses.detach()


class SharedGradients:
    """Base class of the averaging of gradients; used directly by runs with a single process.

    Args:
        composed: The forward pass.
    """

    def __init__(self, composed: ComposedLoss):
        self.composed: Forward = composed.forward

    def average(self) -> None:
        """Average the gradients, between the backward pass and the optimizer's step."""


class DDPGradients(SharedGradients):
    """Average bucket by bucket during the backward pass.

    Buffers are sent once, at the start. Afterwards they change equally on every rank: the return
    statistics use the returns of all ranks, and the slow critic follows equal critics.

    Args:
        composed: The forward pass; takes rank 0's parameters and buffers.
    """

    def __init__(self, composed: ComposedLoss):
        parallel = DistributedDataParallel(composed, gradient_as_bucket_view=True)
        parallel.broadcast_buffers = False
        self.composed = parallel.__call__


class FlatGradients(SharedGradients):
    """Average all gradients in one all-reduce of one buffer, after the backward pass.

    A captured CUDA graph needs this: one call to the network per update, at a fixed address, and
    none in the backward pass.

    Args:
        composed: The forward pass; receives rank 0's parameters and buffers.
        parameters: The trained parameters, all of one dtype.
    """

    def __init__(self, composed: ComposedLoss, parameters: Sequence[nn.Parameter]):
        for tensor in composed.loss.state_dict().values():
            dist.broadcast(tensor, 0)
        super().__init__(composed)
        self._parameters = parameters
        sizes = [parameter.numel() for parameter in parameters]
        self._buffer = parameters[0].detach().new_zeros(sum(sizes))
        pieces = self._buffer.split(sizes)
        self._views = [v.view_as(p) for v, p in zip(pieces, parameters, strict=True)]

    @torch.no_grad()
    def average(self) -> None:
        """Replace every gradient by its mean over the ranks.

        Raises:
            RuntimeError: If a parameter has no gradient.
        """
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if len(gradients) < len(self._views):
            raise RuntimeError("a parameter has no gradient: the ranks' buffers would not match.")
        torch._foreach_copy_(self._views, gradients)
        dist.all_reduce(self._buffer)
        self._buffer.div_(dist.get_world_size())
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view


def share_gradients(
    kind: str, composed: ComposedLoss, parameters: Sequence[nn.Parameter]
) -> SharedGradients:
    """Choose how gradients are averaged, and share the return statistics too.

    Args:
        kind: ``none`` (one process), ``ddp`` or ``flat``; the latter two need a process group.
        composed: The forward pass.
        parameters: The trained parameters.
    """
    if kind == "none":
        return SharedGradients(composed)
    composed.loss.return_norm.shared = True
    if kind == "ddp":
        return DDPGradients(composed)
    return FlatGradients(composed, parameters)

"""Lambda-returns along imagined and replayed sequences, and their scale."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torchrl.modules import PercentileValueNorm

from w2f_torchrl.utils.checks import check_number
from w2f_torchrl.utils.tensors import FLOATING, check_tensor


class ReturnNorm(PercentileValueNorm):
    """TorchRL's percentile normaliser, over the returns of all ranks.

    The percentiles are computed exactly, from the values of all ranks together, and are equal on
    every rank. With separate ones each rank would scale the actor's gradient differently. The state
    dict is TorchRL's.
    """

    shared = False
    """Whether all ranks of the default process group take part; if so, all must call
    :meth:`update`."""

    @torch.no_grad()
    def update(self, value_target: Tensor) -> None:
        """Move the running percentiles towards those of the values ``[..., 1]``.

        Args:
            value_target: Values; with ``shared``, of the same shape on every rank.
        """
        if self.shared:
            own = value_target.detach().reshape(-1, *self.shape)
            value_target = own.new_empty((dist.get_world_size() * len(own), *self.shape))
            dist.all_gather_into_tensor(value_target, own)
        super().update(value_target)


def lambda_return(
    reward: Tensor,
    continuation: Tensor,
    value: Tensor,
    lmbda: float,
    last: Tensor | None = None,
) -> Tensor:
    r"""Compute the lambda-returns of a sequence (DreamerV3, "Critic learning").

    :math:`R_t = r_{t+1} + c_{t+1}((1 - \lambda_{t+1}) v_{t+1} + \lambda_{t+1} R_{t+1})`.
    Element 0 of reward and continuation is never read: the return of a state counts only what comes
    after it.

    Args:
        reward: Reward that came with each state ``[N, T]``.
        continuation: Discount times the probability of not having terminated ``[N, T]``.
        value: Value of each state, which bootstraps ``[N, T]``.
        lmbda: Weight of the longer return, in [0, 1].
        last: bool ``[N, T]``, true on the last observation of an episode. The next element belongs
            to another episode, so the return ends there with the value.

    Returns:
        Returns of the states 0 to T - 2, ``[N, T - 1]``.

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If shapes differ, T is below 2, or lmbda is out of range.

    Examples:
        Two rewards of 1, no discount, and a value of 5 at the end:

        >>> reward = torch.tensor([[0.0, 1.0, 1.0]])
        >>> value = torch.tensor([[9.0, 9.0, 5.0]])
        >>> lambda_return(reward, torch.ones(1, 3), value, lmbda=1.0)
        tensor([[7., 6.]])
        >>> lambda_return(reward, torch.ones(1, 3), value, lmbda=0.0)
        tensor([[10.,  6.]])
    """
    check_tensor("reward", reward, FLOATING, ("N", "T"))
    for name, other in (("continuation", continuation), ("value", value)):
        check_tensor(name, other, FLOATING, tuple(reward.shape))
    if last is not None:
        check_tensor("last", last, torch.bool, tuple(reward.shape))
    if reward.shape[1] < 2:
        raise ValueError(f"a return needs at least T=2 states, got {list(reward.shape)}.")
    check_number("lmbda", lmbda, minimum=0, maximum=1)
    longer = torch.full_like(value, lmbda)
    if last is not None:
        longer = longer * (~last).to(value.dtype)
    continuation, longer = continuation[:, 1:], longer[:, 1:]
    partial = (reward[:, 1:] + continuation * (1 - longer) * value[:, 1:]).unbind(1)
    weight = (continuation * longer).unbind(1)
    returns = [value[:, -1]]
    for t in reversed(range(len(partial))):
        returns.append(torch.addcmul(partial[t], weight[t], returns[-1]))
    return torch.stack(returns[:0:-1], 1)

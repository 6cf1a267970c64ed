"""Discrete actions: the policy's are one-hot, whatever the env's spec says."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.nn import functional as F
from torchrl.data import Binary, Categorical, Composite, MultiCategorical, MultiOneHot, OneHot
from torchrl.data import TensorSpec as Spec
from torchrl.envs import Transform

ACTION = "action"

MAX_ACTIONS = 4096
"""Above this a number of actions is taken for a mistake."""


def is_discrete(spec: Spec) -> bool:
    """Return whether an action is one of A: ``OneHot`` or ``Categorical``, and no list of them."""
    several = (Binary, MultiCategorical, MultiOneHot)
    return isinstance(spec, OneHot | Categorical) and not isinstance(spec, several)


class DiscreteActions(Transform):
    """Turn a one-hot action of the policy into what the env's spec says.

    The policy, the records and the recurrence see ``action`` float32 ``[*B, A]``, one-hot. The env
    gets the index of the largest entry if its spec is ``Categorical``, and a one-hot in the spec's
    dtype if it is ``OneHot``. All zeros, as in records that begin an episode, mean action 0.

    Args:
        spec: The env's action spec ``[*B]``, ``[*B, 1]`` (Categorical) or ``[*B, A]`` (OneHot).
        batch_dims: Dimensions of the env's batch, *B.
    """

    def __init__(self, spec: OneHot | Categorical, batch_dims: int) -> None:
        super().__init__(in_keys_inv=[ACTION], out_keys_inv=[ACTION])
        self.num_actions, self.action_dtype = int(spec.n), spec.dtype
        self.encodes_one_hot = isinstance(spec, OneHot)
        self.adds_dimension = not self.encodes_one_hot and len(spec.shape) > batch_dims

    def _inv_apply_transform(self, action: Tensor) -> Tensor:
        index = action.argmax(-1, keepdim=self.adds_dimension)  # [*B] or [*B, 1]
        if self.encodes_one_hot:
            index = F.one_hot(index, self.num_actions)  # [*B, A]
        return index.to(self.action_dtype)

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase:
        return tensordict.set(ACTION, self._inv_apply_transform(tensordict.get(ACTION)))

    def transform_input_spec(self, input_spec: Composite) -> Composite:
        """Replace the env's spec by a one-hot of float32."""
        old = input_spec["full_action_spec", ACTION]
        batch = old.shape[:-1] if self.encodes_one_hot or self.adds_dimension else old.shape
        input_spec["full_action_spec", ACTION] = OneHot(
            self.num_actions,
            shape=(*batch, self.num_actions),
            dtype=torch.float32,
            device=old.device,
        )
        return input_spec


def discrete_actions(spec: OneHot | Categorical, batch_dims: int, domain: str) -> DiscreteActions:
    """Make the transform for the discrete actions of an env.

    Args:
        spec: The env's action spec.
        batch_dims: Dimensions of the env's batch.
        domain: Name of the env, for the messages.

    Raises:
        ValueError: If it is no single choice, if there are fewer than two actions, or if a mask
            forbids some of them.
    """
    own = tuple(spec.shape[batch_dims:])
    wanted: list[tuple[int, ...]] = [(spec.n,)] if isinstance(spec, OneHot) else [(), (1,)]
    if own not in wanted or not 2 <= spec.n <= MAX_ACTIONS:
        kind = type(spec).__name__
        raise ValueError(
            f"domain {domain!r}: action is {kind} of {spec.n} with the shape {list(own)}; allowed: "
            f"one choice among 2 to {MAX_ACTIONS} actions, OneHot [A], or Categorical [] or [1]."
        )
    if spec.mask is not None:
        raise ValueError(
            f"domain {domain!r}: the action spec has a mask; actions that are sometimes forbidden "
            "are not supported: let the env ignore them."
        )
    return DiscreteActions(spec, batch_dims)

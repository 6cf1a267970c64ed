"""Map the policy's actions to an env's action spec."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Composite, OneHot, TensorSpec, Unbounded
from torchrl.envs import EnvBase, Transform

from w2f_torchrl.envs.discrete_actions import ACTION, discrete_actions, is_discrete

_UNLIMITED = 1e9
"""Larger bounds count as no limit: Gym and MuJoCo write large numbers instead of infinity."""


class BoxActions(Transform):
    """Clip and scale any proposed action into the env's box.

    The policy acts in [-1, 1] but samples from an unbounded distribution. Its proposal is clipped
    to [-1, 1] and then scaled: -1 becomes exactly the box's lower end and 1 its upper end, in every
    component. The tensordict of a step keeps the unclipped proposal, as the replay of the reference
    does; the recurrence scales larger values into [-1, 1].

    Args:
        low: Lower end of the box ``[*B, A]``.
        high: Upper end of the box ``[*B, A]``.
    """

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__(in_keys_inv=[ACTION], out_keys_inv=[ACTION])
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        self.is_unit = bool((low == -1).all() and (high == 1).all())

    def _inv_apply_transform(self, action: Tensor) -> Tensor:
        clipped = action.to(self.low.dtype).clamp(-1, 1)
        # A lerp, unlike centre + half the width, returns the exact ends.
        return clipped if self.is_unit else torch.lerp(self.low, self.high, (clipped + 1) / 2)

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase:
        return tensordict.set(ACTION, self._inv_apply_transform(tensordict.get(ACTION)))

    def transform_input_spec(self, input_spec: Composite) -> Composite:
        """Replace the env's box in the spec by [-1, 1]."""
        old = input_spec["full_action_spec", ACTION]
        input_spec["full_action_spec", ACTION] = Bounded(
            -1.0, 1.0, shape=old.shape, dtype=torch.float32, device=old.device
        )
        return input_spec


def action_transform(
    env: EnvBase, domain: str, action_range: Sequence[float] | None = None
) -> Transform:
    """Make the transform between the policy's actions and those of an env.

    Args:
        env: A single env, or a batch of envs.
        domain: Name of the env, for the messages.
        action_range: As for :func:`box_actions`; None for discrete actions.

    Raises:
        ValueError: If the action space is neither a box nor a choice among A actions, or if a
            setting does not fit it.
    """
    if list(env.action_keys) == [ACTION] and is_discrete(env.action_spec):
        if action_range is not None:
            raise ValueError(
                f"environment.action_range={list(action_range)} must be null for domain "
                f"{domain!r}, whose actions are discrete: {_describe(env.action_spec)}."
            )
        return discrete_actions(env.action_spec, len(env.batch_size), domain)
    return box_actions(env, domain, action_range)


def random_action(spec: OneHot | Bounded, generator: torch.Generator) -> Tensor:
    """Draw an action of equal chances from the spec of an env of a run, on the CPU.

    Args:
        spec: Of one-hot actions or of a box.
        generator: Source of the draw.
    """
    if isinstance(spec, OneHot):
        index = torch.randint(spec.n, spec.shape[:-1], generator=generator)
        return torch.nn.functional.one_hot(index, spec.n).to(spec.dtype)
    low, high = spec.space.low.cpu(), spec.space.high.cpu()
    action: Tensor = low + (high - low) * torch.rand(spec.shape, generator=generator)
    return action.to(spec.dtype)


def box_actions(
    env: EnvBase, domain: str, action_range: Sequence[float] | None = None
) -> BoxActions:
    """Make the transform that keeps an env's actions within its spec.

    Args:
        env: A single env, or a batch of envs.
        domain: Name of the env, for the messages.
        action_range: Lowest and highest value for components without limits in the spec.

    Raises:
        ValueError: If the action space is not a box, if it has no limits and ``action_range`` is
            missing, or if ``action_range`` would change nothing.
    """
    spec = _action_spec(env, domain)
    if isinstance(spec, Bounded):
        low, high = spec.space.low.clone(), spec.space.high.clone()
    else:
        low = torch.full(spec.shape, -torch.inf, dtype=spec.dtype, device=spec.device)
        high = -low
    no_low, no_high = ~(low > -_UNLIMITED), ~(high < _UNLIMITED)
    if action_range is None:
        if no_low.any() or no_high.any():
            raise ValueError(
                f"domain {domain!r}: action has no limits ({_describe(spec)}): declare the range "
                "that the policy should use, for example environment.action_range=[-1,1]."
            )
    else:
        if not (no_low.any() or no_high.any()):
            raise ValueError(
                f"environment.action_range={list(action_range)} must be null for domain "
                f"{domain!r}, whose action spec has limits: {_describe(spec)}."
            )
        low = torch.where(no_low, action_range[0], low)
        high = torch.where(no_high, action_range[1], high)
    if not (low < high).all():
        raise ValueError(
            f"domain {domain!r}: action must have a lower end below the upper one in every "
            f"component, got {low.tolist()} and {high.tolist()}."
        )
    return BoxActions(low, high)


def _action_spec(env: EnvBase, domain: str) -> Bounded | Unbounded:
    if list(env.action_keys) != [ACTION]:
        raise ValueError(
            f"domain {domain!r}: the actions are {list(env.action_keys)}; allowed: one, 'action'."
        )
    spec = env.action_spec
    wanted = len(env.batch_size) + 1
    is_box = isinstance(spec, Bounded | Unbounded) and spec.dtype.is_floating_point
    if not is_box or len(spec.shape) != wanted or spec.shape[-1] < 1:
        raise ValueError(
            f"domain {domain!r}: action is {_describe(spec)}; allowed: a box, Bounded of a "
            "floating dtype and the shape [A], A at least 1; or one choice, OneHot or Categorical."
        )
    return cast(Bounded | Unbounded, spec)


def _describe(spec: TensorSpec) -> str:
    kind = type(spec).__name__.removesuffix("Continuous").removesuffix("Discrete")
    return f"{kind} {str(spec.dtype).removeprefix('torch.')} {list(spec.shape)}"

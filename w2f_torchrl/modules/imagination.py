"""Imagination: the policy acts in the world model, which predicts with its prior.

Shape letters: N imagined trajectories, H horizon, S = K categoricals x classes state, D belief,
A action.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchrl.modules import RSSMPriorV3

from w2f_torchrl.kernels.block_gru import BlockGRUStep
from w2f_torchrl.kernels.imagination import Actor, CastActor, PriorHead, prepare
from w2f_torchrl.utils.checks import check_number


def imagine_step(
    step: BlockGRUStep,
    prior: PriorHead,
    actor: Actor | CastActor,
    features: Tensor,
    state: Tensor,
    belief: Tensor,
    noise: Tensor,
    uniform: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Imagine one step, without gradients.

    Args:
        step: The block GRU.
        prior: The prior's head.
        actor: The policy's network.
        features: Belief and state joined ``[N, D + S]``, in the precision of the products.
        state: The state ``[N, S]``, in the same precision.
        belief: The belief ``[N, D]``.
        noise: What the actor's ``draw`` needs: of :class:`GaussianActor` normal draws ``[N, A]``.
        uniform: Draws from U[0, 1) ``[N, K]``.

    Returns:
        State and belief after the step, and the action that led there ``[N, A]``.
    """
    action = actor.draw(*actor.from_features(features), noise)  # [N, A]
    same = features.dtype is belief.dtype
    multiplied = belief if same else features[:, : belief.shape[-1]]
    belief, multiplied = step.imagine(state, belief, multiplied, action)  # [N, D]
    return prior.draw(multiplied, uniform), belief, action


def imagine(
    prior: RSSMPriorV3,
    actor: Actor,
    state: Tensor,
    belief: Tensor,
    horizon: int,
    one_step: Callable[..., tuple[Tensor, Tensor, Tensor]] = imagine_step,
) -> tuple[Tensor, Tensor]:
    """Follow the policy in the model, without gradients.

    REINFORCE scores stopped actions in stopped states (DreamerV3, "Actor learning", eq. 6), so
    nothing here needs a graph. Time comes first, so that every step is one block of memory, and so
    are all steps except the last.

    Args:
        prior: The block-GRU prior.
        actor: The policy's network.
        state: Start states ``[N, S]``.
        belief: Start beliefs ``[N, D]``.
        horizon: H, imagined steps.
        one_step: :func:`imagine_step`, plain or compiled.

    Returns:
        Features of the latents, belief and state joined ``[H + 1, N, D + S]``, including the start
        and in autocast's precision under autocast, and the actions taken in the first H of them
        ``[H, N, A]``.
    """
    check_number("horizon", horizon, integer=True, minimum=1)
    with torch.no_grad():
        step, head, acting, dtype = prepare(prior, actor, belief)
        rows = len(state)
        uniforms = torch.rand(horizon, rows, prior.num_categoricals, device=state.device)  # [H,N,K]
        noise = actor.noise(belief.new_empty(horizon, rows, *prior.action_shape))  # [H, N, A]
        size = belief.shape[-1] + state.shape[-1]
        # Features are only multiplied by weights, so the precision of the products suffices.
        features = belief.new_empty(horizon + 1, rows, size, dtype=dtype)  # [H + 1, N, D + S]
        state = state.to(dtype)
        torch.cat((belief, state), -1, out=features[0])
        actions = []
        for t in range(horizon):
            state, belief, action = one_step(
                step, head, acting, features[t], state, belief, noise[t], uniforms[t]
            )
            torch.cat((belief, state), -1, out=features[t + 1])
            actions.append(action)
        return features, torch.stack(actions)  # [H, N, A]

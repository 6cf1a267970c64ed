"""Compare imagination with the true frames: open loop, and with the policy acting.

Shape letters: N windows of an episode, T time, C, H, W channels, height, width; ``context`` frames
are observed, the rest is imagined.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from w2f_torchrl.algorithms.masked_input import target_pixels
from w2f_torchrl.keys import NEXT_MASK
from w2f_torchrl.modules import Actor, WorldModel, compose
from w2f_torchrl.modules.rssm import RSSMRollout
from w2f_torchrl.segmenters import mask_iou

CONTEXT = 5
HORIZON = 15
OBSERVED = "observed"
"""The entry with the latents of an observed episode."""


class Imagination(NamedTuple):
    """The result of :func:`imagine_windows`."""

    comparison: dict[str, Tensor]
    """Truth, imagination with the recorded actions, and error; with masks also foreground,
    background and mask: label to ``[N, T, C, H, W]`` on the CPU, colours in [0, 1]."""
    imagined: dict[str, Tensor]
    """The same without truth and error, with the policy acting after the context."""
    context: int
    metrics: dict[str, float]
    """Mean absolute error of the colours, in [0, 1], and IoU of the mask."""


def observe(world_model: WorldModel, records: TensorDictBase) -> TensorDictBase:
    """Infer the latents of whole episodes, from their first record on.

    A window must continue from the latents before it: a model that is trained on slices which start
    from replayed latents has never seen one that starts without any in the middle of an episode.

    Args:
        world_model: The world model.
        records: ``[B, T]``, each row from the first record of an episode on.

    Returns:
        The records with ``observed``: ``state`` and ``belief``, with a background also
        ``background_state`` and ``background_belief``.
    """
    with torch.no_grad():
        latents = world_model.infer(records.select(*world_model.in_keys)).get("next")
    keys = [key for each in _rollouts(world_model) for key in (each.state_key, each.belief_key)]
    return records.copy().set(OBSERVED, latents.select(*keys))


def _rollouts(world_model: WorldModel) -> list[RSSMRollout]:
    background = world_model.background_rollout
    return [world_model.rollout] if background is None else [world_model.rollout, background]


def cut_windows(
    records: TensorDictBase, count: int, context: int = CONTEXT, horizon: int = HORIZON
) -> TensorDictBase | None:
    """Cut windows out of an episode, spread evenly over it.

    Args:
        records: One episode's records ``[1, T]``, for :func:`roll` those of :func:`observe`.
        count: N.
        context: Number of observed frames.
        horizon: Number of imagined frames; fewer if the episode is shorter.

    Returns:
        Records ``[N, context + horizon]``, or None if the episode has no frame after the context.
    """
    length = min(context + horizon, records.shape[1])
    if length <= context:
        return None
    starts = torch.linspace(0, records.shape[1] - length, count).long().tolist()
    windows: TensorDictBase = torch.cat([records[:, s : s + length] for s in starts])
    return windows


@torch.no_grad()
def roll(
    world_model: WorldModel,
    records: TensorDictBase,
    context: int,
    actor: Actor | None = None,
) -> TensorDict:
    """Continue the observed latents of the context with the priors only.

    The action of a record led to its observation, so the step to time t uses the action at t. The
    background's prior is stepped afterwards.

    Args:
        world_model: The world model.
        records: ``[N, T]`` without a beginning of an episode after the first; ``action``, and the
            latents of :func:`observe`, of which those after the context are not read.
        context: Number of observed frames, from 1 to T - 1.
        actor: The actor, whose mode is used after the context; None uses the records' actions.

    Returns:
        ``[N, T]``: ``state`` and ``belief``, latent ``split`` also ``background_state`` and
        ``background_belief``, and the ``action`` of each step.
    """
    seen = records[OBSERVED][:, :context]
    out: dict[str, Tensor] = {}
    actions = records.get("action").clone()
    for rollout in _rollouts(world_model):
        keys = (rollout.state_key, rollout.belief_key)
        states, beliefs = (list(seen.get(key).unbind(1)) for key in keys)
        prior = rollout.rssm_prior.module
        for t in range(context, records.shape[1]):
            state, belief = states[-1], beliefs[-1]
            if not rollout.has_action:
                action = state.new_zeros(len(state), 1)
            elif actor is None or rollout is not world_model.rollout:
                action = actions[:, t]  # a background's follows what the actor chose
            else:
                parameters = actor.from_features(torch.cat((belief, state), -1))
                action = actions[:, t] = actor.distribution(*parameters).mode
            _, state, belief = prior(state, belief, action)
            states.append(state)
            beliefs.append(belief)
        out |= dict(zip(keys, (torch.stack(states, 1), torch.stack(beliefs, 1)), strict=True))
    return TensorDict({**out, "action": actions}, records.shape)


@torch.no_grad()
def decode(world_model: WorldModel, latents: TensorDictBase) -> dict[str, Tensor]:
    """Decode latents ``[N, T]`` to labelled images ``[N, T, C, H, W]`` on the CPU, in [0, 1].

    ``imagined``, unless the model has no decoder; if it decodes a mask also ``mask`` and, if it
    decodes a background, ``foreground`` (times the mask) and ``background``.
    """
    if not world_model.decoder.out_keys:
        return {}
    flat = latents.exclude("action").flatten(0, 1)
    td = TensorDict({"next": flat}, flat.batch_size)
    out = world_model.decoder(td).get("next").unflatten(0, latents.shape).cpu()
    if "mask_logits" not in out.keys():
        return {"imagined": out["reconstructed_pixels"].clamp(0, 1)}
    mask = out["mask_logits"].sigmoid()
    foreground = out["foreground_pixels"].clamp(0, 1) * mask
    if "background_pixels" not in out.keys():
        return {"imagined": foreground, "mask": mask}
    background = out["background_pixels"].clamp(0, 1)
    whole = compose(out["foreground_pixels"].clamp(0, 1), out["mask_logits"], background)
    return {
        "imagined": whole.clamp(0, 1),
        "foreground": foreground,
        "background": background,
        "mask": mask,
    }


def imagine_windows(
    world_model: WorldModel,
    actor: Actor,
    records: TensorDictBase,
    *,
    count: int = 3,
    seed: int = 0,
) -> Imagination | None:
    """Imagine the continuation of windows, with the recorded actions and with the policy's.

    Torch's random state is not changed.

    Args:
        world_model: The world model.
        actor: The policy's network.
        records: One episode ``[1, T]``, with ``("next", "foreground_mask")`` if the model has
            masks.
        count: N, the number of windows.
        seed: Seed of the sampled states.

    Returns:
        The images and metrics, or None if the episode has no frame after the context, or the model
        no decoder.
    """
    if records.shape[1] <= CONTEXT or not world_model.decoder.out_keys:
        return None
    device = records.device or records["action"].device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        windows = cut_windows(observe(world_model, records), count)
        assert windows is not None, "the episode is long enough"
        taken = decode(world_model, roll(world_model, windows, CONTEXT))
        acted = decode(world_model, roll(world_model, windows, CONTEXT, actor))
    truth = target_pixels(world_model, windows).cpu().float() / 255
    true_mask = None
    if "mask" in taken and NEXT_MASK in windows.keys(include_nested=True):
        true_mask = windows[NEXT_MASK].cpu()
        if "background" not in taken:  # the model decodes only the foreground
            truth = truth * true_mask
    error = (taken["imagined"] - truth).abs()
    comparison = {
        "truth": truth,
        "imagined": taken.pop("imagined"),
        "error": error.mean(2, keepdim=True),
        **taken,
    }
    metrics = _metrics(error, taken.get("mask"), true_mask)
    return Imagination(comparison, acted, CONTEXT, metrics)


def _metrics(error: Tensor, mask: Tensor | None, true_mask: Tensor | None) -> dict[str, float]:
    prefix = "train/imagination"
    metrics = {
        f"{prefix}/context_error": float(error[:, :CONTEXT].mean()),
        f"{prefix}/error": float(error[:, CONTEXT:].mean()),
        f"{prefix}/last_error": float(error[:, -1].mean()),
    }
    if mask is not None and true_mask is not None:
        iou = mask_iou(mask > 0.5, true_mask if true_mask.dtype is torch.bool else true_mask > 0.5)
        metrics[f"{prefix}/mask_iou"] = float(iou[:, CONTEXT:].mean())
    return metrics

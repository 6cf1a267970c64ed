"""How well a world model predicts recorded episodes from their actions alone."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase

from w2f_torchrl.algorithms.masked_input import target_pixels
from w2f_torchrl.evaluation.imagination import CONTEXT, cut_windows, decode, observe, roll
from w2f_torchrl.keys import NEXT_MASK
from w2f_torchrl.modules import WorldModel
from w2f_torchrl.segmenters import mask_iou

HORIZON = 45
"""Frames that are predicted, at most; the first :data:`CONTEXT` frames of a window are observed."""


@torch.no_grad()
def predict_open_loop(
    world_model: WorldModel,
    records: TensorDictBase,
    *,
    count: int = 4,
    horizon: int = HORIZON,
    seed: int = 0,
) -> dict[str, float] | None:
    """Predict windows of an episode from their first frames and all of their actions.

    Torch's random state is not changed.

    Args:
        world_model: The world model.
        records: One episode ``[1, T]``, with ``("next", "reward")`` and, if the data have masks,
            ``("next", "foreground_mask")``.
        count: Number of windows, spread evenly.
        horizon: Frames that are predicted; fewer if the episode is shorter.
        seed: Seed of the sampled states.

    Returns:
        None if the episode has no frame after the context; otherwise ``reward_error``, the mean
        absolute error of the rewards. If the model has a decoder also mean absolute errors of
        colours in [0, 1]: ``context_error`` of the observed frames, ``error`` of the predicted
        ones, ``last_error`` of the last; ``still_error`` of a prediction that repeats the last
        observed frame, which a model must beat; and ``mask_iou`` of the predicted masks, if the
        model and the records have masks. A model that decodes only the foreground is compared with
        the foreground.
    """
    if records.shape[1] <= CONTEXT:
        return None
    device = records.device or records["action"].device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        windows = cut_windows(observe(world_model, records), count, CONTEXT, horizon)
        assert windows is not None, "the episode is long enough"
        latents = roll(world_model, windows, CONTEXT)
        pictures = decode(world_model, latents)
    features = torch.cat((latents["belief"], latents["state"]), -1)
    reward, _ = world_model.predict(features)
    missed = (reward.reshape(windows.shape) - windows["next", "reward"].squeeze(-1)).abs()
    found = {"reward_error": float(missed[:, CONTEXT:].mean())}
    if not pictures:
        return found
    truth = target_pixels(world_model, windows).cpu().float() / 255
    true_mask = None
    if "mask" in pictures and NEXT_MASK in windows.keys(include_nested=True):
        true_mask = windows[NEXT_MASK].cpu()
        if "background" not in pictures:
            truth = truth * true_mask
    error = (pictures["imagined"] - truth).abs()
    still = (truth[:, CONTEXT - 1 : CONTEXT] - truth[:, CONTEXT:]).abs()
    found |= {
        "context_error": float(error[:, :CONTEXT].mean()),
        "error": float(error[:, CONTEXT:].mean()),
        "last_error": float(error[:, -1].mean()),
        "still_error": float(still.mean()),
    }
    if true_mask is not None:
        iou = mask_iou(pictures["mask"] > 0.5, true_mask)
        found["mask_iou"] = float(iou[:, CONTEXT:].mean())
    return found

"""How far latents part that are rolled on from a clean and from a disturbed history.

Two episodes have the same actions and physics, but one shows scenery and the other does not. The
model observes the same part of both, and then its prior predicts on, with the same actions and the
same random draws. A model that filters ends up in the same latents.

Shape letters: N windows, T time, F features of belief and state; H horizon.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor

from w2f_torchrl.evaluation.episodes import Episode
from w2f_torchrl.evaluation.imagination import HORIZON, cut_windows, observe, roll
from w2f_torchrl.modules import WorldModel
from w2f_torchrl.utils.stopping import check_stop

CONTEXT = 16
"""Frames that the model observes of both episodes."""
WINDOWS = 8
"""Windows per pair of episodes."""


@torch.no_grad()
def latent_divergence(
    world_model: WorldModel,
    clean: Sequence[Episode],
    disturbed: Sequence[Episode],
    *,
    context: int = CONTEXT,
    horizon: int = HORIZON,
    windows: int = WINDOWS,
) -> dict[str, list[float]]:
    """Measure how far latents from clean and from disturbed histories part over the horizon.

    Args:
        world_model: The world model.
        clean: Episodes without scenery.
        disturbed: The same episodes with it.
        context: Observed frames.
        horizon: H, predicted steps.
        windows: Windows per pair of episodes.

    Returns:
        H + 1 numbers each, from the last observed frame to the last predicted one. ``latent``: the
        Euclidean distance of belief and state (what the actor reads) between the two histories,
        averaged over windows and divided by that between two random windows of the clean episodes,
        so that 0 is no influence and 1 as far apart as two random situations. ``reward``: the same
        of the predicted rewards' absolute difference. ``sampling``: that of ``latent`` between two
        clean histories with other random draws, which is the level of a perfect filter whose
        states are drawn independently.

    Raises:
        ValueError: If the numbers of episodes differ, or every episode is too short.
    """
    if len(clean) != len(disturbed):
        raise ValueError(
            f"clean and disturbed must be pairs, got {len(clean)} and {len(disturbed)}."
        )
    sides = [
        [each for each in episodes if len(each) >= context + horizon]
        for episodes in (clean, disturbed)
    ]
    if len(sides[0]) * windows < 2:
        raise ValueError(f"at least one episode must have {context + horizon} observations.")
    sizes = (windows, context, horizon)
    first, second = (_predict(world_model, side, sizes, seed=0) for side in sides)
    again = _predict(world_model, sides[0], sizes, seed=1)
    others = partners(len(first[0]))
    found = {}
    for name, ours, theirs in (
        ("latent", first[0], second[0]),
        ("reward", first[1], second[1]),
        ("sampling", first[0], again[0]),
    ):
        apart = (ours - theirs).norm(dim=-1).mean(0)  # [H + 1]
        spread = (ours - ours[others]).norm(dim=-1).mean(0)
        found[name] = (apart / spread.clamp(min=1e-8)).tolist()
    return found


def partners(count: int) -> Tensor:
    """Return for each of N windows, at least 2, the index of a random other one, int64 [N].

    Windows follow each other in a random circle, so that none is compared with itself, which would
    make the distance of two random windows too small.
    """
    circle = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    others = torch.empty_like(circle)
    others[circle] = circle.roll(1)
    return others


def _predict(
    world_model: WorldModel, episodes: Sequence[Episode], sizes: tuple[int, int, int], seed: int
) -> tuple[Tensor, Tensor]:
    """Return latents ``[N, H + 1, F]`` and predicted rewards ``[N, H + 1, 1]``, on the CPU.

    Args:
        world_model: The world model.
        episodes: Each at least as long as a window.
        sizes: Windows of an episode, observed frames, predicted steps.
        seed: Of the random draws.
    """
    count, context, horizon = sizes
    device = next(world_model.parameters()).device
    cut: list[TensorDictBase] = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for episode in episodes:
            check_stop()
            observed = observe(world_model, episode.records().to(device))
            # Both sides have the same draws, since their episodes are equally long.
            found = cut_windows(observed, count, context, horizon)
            assert found is not None, "the episode is long enough"
            cut.append(found.select("action", "observed"))
        latents = roll(world_model, torch.cat(cut), context)[:, context - 1 :]
    features = torch.cat((latents["belief"], latents["state"]), -1)
    reward, _ = world_model.predict(features)
    return features.float().cpu(), reward.unsqueeze(-1).float().cpu()

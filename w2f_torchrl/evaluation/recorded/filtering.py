"""The measures of filtering on recorded episodes, in place of episodes of a simulator."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from w2f_torchrl.data.recorded.episodes import Array, RecordedData, RecordedEpisode
from w2f_torchrl.data.recorded.form import load_episode
from w2f_torchrl.evaluation.episodes import PER_CLIP, Episode
from w2f_torchrl.evaluation.filtering import measure_filtering
from w2f_torchrl.objectives import World2FilterLoss
from w2f_torchrl.segmenters import Segmenter

logger = logging.getLogger(__name__)

MAX_STEPS = 128
"""Maximum observations of an episode."""


class RecordedMeter:
    """Measure any state of a model on the same recorded episodes.

    The data have passed :func:`~w2f_torchrl.data.recorded.open.check_measurable`.

    Held-out episodes are taken first, then others. Measured is what the data tell: with
    ``foreground_mask`` the reconstruction, with ``agent/NAME`` the content of the latents, with
    ``scenery/clip``, ``scenery/camera``, ``scenery/color`` and ``scenery/grid`` the leakage. An
    episode can't be repeated with other scenery, so replacement and removal are not measured.

    Args:
        data: The data set.
        count: Maximum number of episodes.
    """

    def __init__(self, data: RecordedData, count: int) -> None:
        self.episodes = _with_enough_of_each_clip(_load(data, count))

    def measure(
        self, model: World2FilterLoss, *, segment: Segmenter | None = None, **probing: Any
    ) -> Any:
        """Measure a model; see :func:`~w2f_torchrl.evaluation.measure_filtering`.

        Args:
            model: World model, actor and critic.
            segment: Makes the masks that the model acts on, if not the recorded ones.
            probing: ``seeds`` and ``probes``, as in that function.
        """
        episodes = self.episodes
        if segment is not None:
            episodes = [replace(each, seen_masks=segment(each.pixels)) for each in episodes]
        return measure_filtering(model, episodes, **probing)


def _load(data: RecordedData, count: int) -> list[Episode]:
    training, held_out = data.split()
    order = list(dict.fromkeys([*held_out, *training]))[:count]
    return [_as_played(place, load_episode(data, index)) for place, index in enumerate(order)]


def _with_enough_of_each_clip(episodes: list[Episode]) -> list[Episode]:
    """Leave out the clips' identity if a clip has too few episodes for a probe."""
    if not all("clip" in episode.scenery for episode in episodes):
        return episodes
    counts = Counter(int(episode.scenery["clip"][0, 0]) for episode in episodes)
    if min(counts.values()) >= PER_CLIP or len(counts) == 1:
        return episodes
    logger.warning(
        "recorded data: a clip has %d of %d episodes, a probe needs %d: which clip is shown is not "
        "probed (evaluation.filtering_episodes, or more episodes)",
        min(counts.values()),
        len(episodes),
        PER_CLIP,
    )
    kept = [{k: v for k, v in each.scenery.items() if k != "clip"} for each in episodes]
    return [replace(each, scenery=rest) for each, rest in zip(episodes, kept, strict=True)]


def _as_played(seed: int, recorded: RecordedEpisode) -> Episode:
    """Return the beginning of a recorded episode in the form of a played one."""
    mask = recorded.mask
    assert mask is not None, "checked above"

    def group(prefix: str) -> dict[str, Array]:
        return {
            name.removeprefix(prefix): values[:MAX_STEPS]
            for name, values in recorded.states.items()
            if name.startswith(prefix)
        }

    return Episode(
        seed,
        recorded.pixels[:MAX_STEPS],
        mask[:MAX_STEPS],
        torch.as_tensor(recorded.action[:MAX_STEPS]),
        group("agent/"),
        group("scenery/"),
        np.zeros((min(len(recorded), MAX_STEPS), 0)),
    )

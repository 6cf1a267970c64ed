"""Play recorded episodes as several envs would: one after the other, in each stream of records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase

from w2f_torchrl.data.recorded.episodes import DataError, RecordedData
from w2f_torchrl.data.recorded.form import load_episode
from w2f_torchrl.keys import MASK, NEXT_MASK, PIXELS
from w2f_torchrl.utils.seeding import derive_seed

SAMPLED_EPISODES = 64
"""Maximum number of episodes from which frames for a segmenter are taken."""


class EpisodeStreams:
    """Read the records of recorded episodes in S streams.

    Each stream takes the next episode of the epoch's order when it has finished one. An epoch
    contains every episode once, in an order that depends only on the seed and the epoch.

    Args:
        data: The data set.
        episodes: The episodes to read, by their place in ``data.spans``.
        num_streams: S.
        seed: Seed of the orders.
        masks: Whether records have masks, if the data have them.
    """

    def __init__(
        self,
        data: RecordedData,
        episodes: Sequence[int],
        num_streams: int,
        *,
        seed: int,
        masks: bool = True,
    ) -> None:
        self.data, self.episodes, self.seed, self.masks = data, list(episodes), seed, masks
        self.epoch = 0
        self._next = 0
        """Place in the epoch's order of the next episode."""
        self._playing: list[tuple[int, int] | None] = [None] * num_streams
        """Episode of each stream, and how many of its records have been read."""
        self._records: list[TensorDictBase | None] = [None] * num_streams

    @property
    def exhausted(self) -> bool:
        """Whether all of the epoch's episodes have been read to their end."""
        return self._next == len(self.episodes) and not any(self._playing)

    def read(self, count: int, *, repeat: bool) -> TensorDict | None:
        """Read up to ``count`` records of each stream.

        Args:
            count: Records per stream.
            repeat: Whether to begin another epoch when one is exhausted; otherwise streams
                without an episode have no records.

        Returns:
            Records ``[M]`` with ``stream`` int64 ``[M]``, each stream's in chronological order;
            None if nothing is left.
        """
        parts: list[TensorDictBase] = []
        for stream in range(len(self._playing)):
            wanted = count
            while wanted and self._begin(stream, repeat=repeat):
                part = self._advance(stream, wanted)
                wanted -= len(part)
                parts.append(part.set("stream", torch.full((len(part),), stream)))
        return TensorDict.cat(parts) if parts else None

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, the place in its order, and the place in each stream's episode."""
        playing = [None if place is None else list(place) for place in self._playing]
        return {"epoch": self.epoch, "next": self._next, "playing": playing}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of :meth:`state_dict`."""
        self.epoch, self._next = state["epoch"], state["next"]
        self._playing = [None if place is None else tuple(place) for place in state["playing"]]
        self._records = [None] * len(self._playing)

    def _begin(self, stream: int, *, repeat: bool) -> bool:
        """Give a stream the next episode if it has none; return whether it has one."""
        if self._playing[stream] is not None:
            return True
        if self._next == len(self.episodes):
            if not repeat:
                return False
            self.epoch, self._next = self.epoch + 1, 0
        order = np.random.default_rng(derive_seed(self.seed, "recorded", self.epoch))
        place = order.permutation(len(self.episodes))[self._next]
        self._playing[stream] = self.episodes[place], 0
        self._next += 1
        return True

    def _advance(self, stream: int, count: int) -> TensorDictBase:
        """Return the next records of a stream's episode, up to ``count``."""
        playing = self._playing[stream]
        assert playing is not None, "it has begun"
        episode, start = playing
        records = self._records[stream]
        if records is None:
            records = load_episode(self.data, episode).records()
            if not self.masks and NEXT_MASK in records.keys(True):
                records = records.exclude(NEXT_MASK)
            self._records[stream] = records
        part = records[start : start + count].clone()
        finished = start + len(part) == len(records)
        self._playing[stream] = None if finished else (episode, start + len(part))
        if finished:
            self._records[stream] = None
        return part


def frames_of(data: RecordedData, episodes: Sequence[int], count: int, seed: int) -> TensorDict:
    """Return frames from all over the episodes, on which a segmenter learns.

    Args:
        data: The data set.
        episodes: The episodes, by their place in ``data.spans``.
        count: Number of frames; fewer if the episodes have fewer.
        seed: Seed of the choice.

    Returns:
        ``pixels`` uint8 ``[N, 3, H, W]``, and ``foreground_mask`` bool ``[N, 1, H, W]`` if the data
        have masks.
    """
    places = np.linspace(0, len(episodes) - 1, min(SAMPLED_EPISODES, len(episodes)))
    chosen = [episodes[int(place)] for place in places.round()]
    generator, parts = np.random.default_rng(seed), []
    for position, index in enumerate(chosen):
        episode = load_episode(data, index)
        share = count * (position + 1) // len(chosen) - count * position // len(chosen)
        rows = generator.permutation(len(episode))[:share]
        part = {PIXELS: episode.pixels[rows]}
        if episode.mask is not None:
            part[MASK] = episode.mask[rows]
        parts.append(TensorDict(part, [len(rows)]))
    frames: TensorDict = TensorDict.cat(parts)
    return frames


def shared_out(data: RecordedData, rank: int, ranks: int) -> list[int]:
    """Return the training episodes of one rank: every so many, from the rank's place on.

    Raises:
        DataError: If a rank would have none.
    """
    training, _ = data.split()
    if len(training) < ranks:
        raise DataError(
            f"data.path={data.path} has {len(training)} episodes to train on for {ranks} ranks: "
            "each needs one."
        )
    return training[rank::ranks]

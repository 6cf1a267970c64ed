"""What takes the place of a run's workers when it trains on recorded episodes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase

from w2f_torchrl.config import ConfigError, RunConfig
from w2f_torchrl.data.recorded.episodes import RecordedData
from w2f_torchrl.data.recorded.reader import EpisodeStreams, frames_of, shared_out
from w2f_torchrl.data.replay.buffer import StreamReplayBuffer
from w2f_torchrl.utils.seeding import derive_seed

logger = logging.getLogger(__name__)

PIECE = 64
"""Records of each stream that are segmented and stored together while the replay is filled."""
Label = Callable[[TensorDictBase], TensorDictBase]
"""Adds masks to records ``[M]``."""


class OpenedReplay(Protocol):
    """The replay of a run, as in ``trainers/run_replay.py``."""

    records: Any
    """The records of a checkpoint; None for an empty replay."""

    @property
    def buffer(self) -> StreamReplayBuffer:
        """The buffer, once it is open."""
        ...

    @property
    def files(self) -> Any:
        """The files of the records, once it is open."""
        ...

    def open(self, *, seed: int, resume_episodes: bool) -> None:
        """Make the buffer, with the records of a checkpoint."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the sampler."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep a state of the sampler."""
        ...


class RecordedCollection:
    """Fill the replay with recorded episodes, in place of workers that step environments.

    If the episodes fit the replay, they are loaded once, before the first update. Otherwise as
    many as fit are, and afterwards each batch replaces the oldest records by the next ones, as
    many as workers would collect: the streams of the replay play the episodes as envs do.

    Steps are counted as in a run that collects, though nothing is stepped: the same settings give
    the same number of updates, evaluations and checkpoints, at the same places.

    Args:
        replay: The replay, not yet open.
        streams: The episodes.
        label: Adds masks to records.
        steps_per_batch: Agent steps of a batch in each stream.
        seed: The run's seed.
        rank: This process's place among the run's.
    """

    def __init__(
        self,
        replay: OpenedReplay,
        streams: EpisodeStreams,
        label: Label,
        *,
        num_streams: int,
        steps_per_batch: int,
        seed: int,
        rank: int = 0,
    ) -> None:
        self.run_replay, self.streams, self.label = replay, streams, label
        self.num_streams, self.steps_per_batch = num_streams, steps_per_batch
        self.seed, self.rank = seed, rank
        self.restarts = 0
        """Workers that were replaced: none."""
        self.resident = False
        """Whether the replay holds all episodes."""
        self._saved: dict[str, Any] | None = None

    @property
    def collector(self) -> Any:
        """Not available: nothing is collected.

        Raises:
            AttributeError: Always.
        """
        raise AttributeError("a run on recorded data has no collector.")

    @property
    def replay(self) -> StreamReplayBuffer:
        """The replay that holds the episodes."""
        return self.run_replay.buffer

    def frames(self, count: int, seed: int) -> TensorDict:
        """Return frames to train a segmenter; see :func:`frames_of`."""
        return frames_of(self.streams.data, self.streams.episodes, count, seed)

    def start(self, steps: int, *, resumed: bool) -> None:
        """Open the replay, and fill it unless a checkpoint's records are there.

        Args:
            steps: Agent steps of the run so far.
            resumed: Whether the run resumes from a checkpoint.

        Raises:
            ConfigError: If the episodes are not those of the checkpoint.
        """
        del steps
        kept = resumed and self.run_replay.records is not None and self._saved is not None
        self.run_replay.open(seed=derive_seed(self.seed, "replay", self.rank), resume_episodes=kept)
        if self._saved is not None:
            self._check_same(self._saved)
        if kept and self._saved is not None:
            self.streams.load_state_dict(self._saved["streams"])
            # A smaller replay.capacity keeps only the newest records.
            heads = self.replay.heads
            self.resident = self._saved["resident"] and bool((heads.stored == heads.written).all())
        else:
            self._fill()
        self._saved = None

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the episodes."""
        return {
            "streams": self.streams.state_dict(),
            "resident": self.resident,
            "fingerprint": self.streams.data.fingerprint(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep a state from :meth:`state_dict` for :meth:`start`."""
        self._saved = state

    def next_batch(self) -> TensorDictBase:
        """Return a batch ``[N, T]`` without entries, for the counters: nothing is stepped."""
        return TensorDict({}, [self.num_streams, self.steps_per_batch])

    def send_weights(self, policy: TensorDictModuleBase) -> None:
        """Do nothing: no worker acts."""

    @contextmanager
    def taking_a_batch(self) -> Iterator[None]:
        """Mark the time until the replay holds a batch; an interrupted one is read again."""
        before = self.streams.state_dict()
        try:
            yield
        except BaseException:
            self.streams.load_state_dict(before)
            raise

    def store(self, batch: TensorDictBase, label: Label) -> list[Any]:
        """Replace the oldest records by the next ones, unless the replay holds all episodes.

        Args:
            batch: From :meth:`next_batch`.
            label: Adds masks to records ``[M]``.

        Returns:
            Episodes that ended: none, as none was played.
        """
        del batch
        if not self.resident:
            records = self.streams.read(self.steps_per_batch, repeat=True)
            assert records is not None, "epochs repeat"
            self.replay.extend(label(records))
        return []

    def close(self) -> None:
        """Do nothing: no process runs."""

    def _fill(self) -> None:
        """Load episodes until all are there or a stream is full."""
        capacity = self.replay.heads.capacity
        while True:
            room = capacity - int(self.replay.heads.written.max())
            if not room:
                break
            records = self.streams.read(min(PIECE, room), repeat=False)
            if records is None:
                self.resident = True
                break
            self.replay.extend(self.label(records))
        self.resident |= self.streams.exhausted
        data = self.streams.data
        logger.info(
            "recorded data: %d of %d records of %d episodes are in the replay%s",
            len(self.replay),
            sum(len(data.spans[index]) for index in self.streams.episodes),
            len(self.streams.episodes),
            "" if self.resident else "; the others replace them as the run continues",
        )
        longest = int(self.replay.heads.stored.max())
        length = self.replay._sampler.batch_length
        if longest < length:
            raise ConfigError(
                f"data.path={data.path}: the fullest of environment.num_envs={self.num_streams} "
                f"streams holds {longest} records, too few for training.batch_length={length}: "
                "record more, or lower one of them."
            )

    def _check_same(self, saved: dict[str, Any]) -> None:
        data = self.streams.data
        if saved["fingerprint"] != data.fingerprint():
            raise ConfigError(
                f"data.path={data.path}: its episodes are not those that the run began with; "
                "allowed: the same files, wherever they are. New episodes need a new run."
            )


def make_recorded_collection(
    config: RunConfig,
    replay: OpenedReplay,
    data: RecordedData,
    label: Label,
    *,
    rank: int = 0,
    ranks: int = 1,
) -> RecordedCollection:
    """Build what fills a rank's replay with its share of the recorded episodes.

    Args:
        config: The run's settings.
        replay: The rank's replay, not yet open.
        data: The data set.
        label: Adds masks to records.
        rank: This process's place among the run's.
        ranks: Number of processes.

    Raises:
        DataError: If a rank would have no episodes.
    """
    streams = EpisodeStreams(
        data,
        shared_out(data, rank, ranks),
        config.environment.num_envs,
        seed=config.seed,
        masks=config.needs_masks,
    )
    return RecordedCollection(
        replay,
        streams,
        label,
        num_streams=config.environment.num_envs,
        steps_per_batch=config.collection.steps_per_batch,
        seed=config.seed,
        rank=rank,
    )

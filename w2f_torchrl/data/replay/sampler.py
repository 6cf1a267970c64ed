"""Draw the slices to replay: the newest records first, then uniformly."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchrl.data.replay_buffers.samplers import Sampler
from torchrl.data.replay_buffers.storages import TensorStorage

from w2f_torchrl.data.replay.streams import StreamHeads, read_state, write_state

MAX_DRAWS = 1000
"""Maximum draws of slices that reach into damaged records."""


class StreamSampler(Sampler):
    """Draw slices of consecutive records, newest first, then uniformly over all valid starts.

    A slice lies in one stream and does not cross the ring's write head; it may span the end of an
    episode, which ``is_init`` marks. Newest first (DreamerV3's online queue): the chunks
    ``[k T, (k + 1) T)`` of a stream are queued when they are complete, and each is drawn once
    before anything is drawn at random. Chunks that have been overwritten are dropped.

    Args:
        heads: The write heads.
        batch_length: Records in a slice (T).
        newest_first: Whether to queue new chunks.
    """

    def __init__(self, heads: StreamHeads, batch_length: int, newest_first: bool = True) -> None:
        self.heads = heads
        self.batch_length = batch_length
        self.newest_first = newest_first
        self._queue: deque[tuple[int, int]] = deque()  # (stream, position of the chunk's start)
        self._queued = [0] * heads.num_streams  # chunks queued so far, per stream

    def extend(self, index: Tensor) -> None:
        """Queue the chunks that the last write completed."""
        del index
        for stream, written in enumerate(self.heads.written.tolist()):
            complete = written // self.batch_length
            if self.newest_first:
                chunks = range(self._queued[stream], complete)
                self._queue.extend((stream, chunk * self.batch_length) for chunk in chunks)
            self._queued[stream] = complete
        # Otherwise the queue would grow while nothing is sampled.
        while self._queue and self._is_overwritten(*self._queue[0]):
            self._queue.popleft()

    def add(self, index: int) -> None:
        """Queue the chunk that the last write completed."""
        self.extend(torch.tensor([index]))

    def _is_overwritten(self, stream: int, start: int) -> bool:
        return start < int(self.heads.written[stream]) - self.heads.capacity

    def _reaches_hole(self, stream: int, start: int) -> bool:
        if not self.heads.holes:
            return False
        place = torch.tensor(stream), torch.tensor(start)
        return bool(self.heads.reach_holes(*place, self.batch_length))

    def _newest(self, limit: int) -> list[tuple[int, int]]:
        """Take up to ``limit`` queued chunks."""
        chunks: list[tuple[int, int]] = []
        while self._queue and len(chunks) < limit:
            chunk = self._queue.popleft()
            if not self._is_overwritten(*chunk) and not self._reaches_hole(*chunk):
                chunks.append(chunk)
        return chunks

    def _num_starts(self) -> Tensor:
        """Return the number of valid slice starts per stream: int64 ``[S]``."""
        return (self.heads.stored - self.batch_length + 1).clamp(min=0)

    def _uniform(self, num: int) -> tuple[Tensor, Tensor]:
        """Draw streams and start positions, each int64 ``[num]``, that avoid holes."""
        stream, start = self._draw(num)
        if not self.heads.holes:
            return stream, start
        for _ in range(MAX_DRAWS):
            bad = self.heads.reach_holes(stream, start, self.batch_length)
            if not bad.any():
                return stream, start
            stream[bad], start[bad] = self._draw(int(bad.sum()))
        raise RuntimeError(
            f"Every slice of batch_length={self.batch_length} has records that were damaged on "
            "disk. Delete the run's replay folder, so that it fills again."
        )

    def _draw(self, num: int) -> tuple[Tensor, Tensor]:
        """Draw streams and start positions of the stored records."""
        ends = self._num_starts().cumsum(0)
        total = int(ends[-1])
        if total == 0:
            stored = self.heads.stored
            raise RuntimeError(
                f"A slice of batch_length={self.batch_length} needs a stream with at least "
                f"{self.batch_length} records: the fullest of {self.heads.num_streams} streams "
                f"holds {int(stored.max())} ({int(stored.sum())} records in total). Collect more "
                "before sampling."
            )
        draw = torch.randint(total, (num,), generator=self._rng)
        stream = torch.searchsorted(ends, draw, right=True)
        oldest = self.heads.written - self.heads.stored
        return stream, oldest[stream] + draw - (ends - self._num_starts())[stream]

    def sample(self, storage: TensorStorage, batch_size: int) -> tuple[Tensor, dict[str, Any]]:
        """Draw slots int64 ``[B, T]``.

        Raises:
            RuntimeError: If no stream holds T records.
        """
        del storage
        newest = torch.tensor(self._newest(batch_size), dtype=torch.int64).reshape(-1, 2)
        stream, start = newest.unbind(-1)
        if len(newest) < batch_size:
            uniform_stream, uniform_start = self._uniform(batch_size - len(newest))
            stream = torch.cat([stream, uniform_stream])
            start = torch.cat([start, uniform_start])
        position = start.unsqueeze(-1) + torch.arange(self.batch_length)  # [B, T]
        return self.heads.slots(stream.unsqueeze(-1), position), {}

    # TorchRL's can_sample() calls this.
    def _sampleable_count(self, storage: TensorStorage, batch_size: int) -> int:
        del storage, batch_size
        return int(self._num_starts().sum())

    def _empty(self) -> None:
        self._queue.clear()
        self._queued = [0] * self.heads.num_streams

    def state_dict(self) -> dict[str, Any]:
        """Return the queue in plain Python types."""
        return {
            "batch_length": self.batch_length,
            "queue": [list(chunk) for chunk in self._queue],
            "queued": list(self._queued),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a saved queue.

        Raises:
            ValueError: If its chunks have another length.
        """
        if state_dict["batch_length"] != self.batch_length:
            raise ValueError(
                f"The saved replay queued chunks of batch_length={state_dict['batch_length']}, "
                f"this one has batch_length={self.batch_length}: it must not change."
            )
        queue = state_dict["queue"] if self.newest_first else []
        self._queue = deque((stream, start) for stream, start in queue)
        self._queued = list(state_dict["queued"])

    def dumps(self, path: str | Path) -> None:
        """Save the queue in a folder."""
        write_state(path, self.state_dict())

    def loads(self, path: str | Path) -> None:
        """Load the queue from a folder."""
        self.load_state_dict(read_state(path))

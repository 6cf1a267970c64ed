"""One ring of records per env stream, in one flat storage.

TorchRL's slice samplers find trajectories by reading keys of the whole storage after every change,
and they join unrelated records if several envs write to a flat storage. Here each stream owns a
segment of the storage and a counter, which suffices to draw contiguous slices.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data.replay_buffers.checkpointers import StorageCheckpointerBase
from torchrl.data.replay_buffers.storages import TensorStorage
from torchrl.data.replay_buffers.writers import Writer

from w2f_torchrl.data.replay.latents import PREVIOUS, LatentStore

STATE_FILE = "state.json"


class StreamHeads:
    """The streams' write heads, shared by writer, sampler and checkpointer.

    Record ``position`` (counted from the stream's beginning) of stream s is at slot
    ``s * ring + position % ring`` of the storage.

    Args:
        num_streams: Streams S.
        capacity: Records that one stream keeps (C).
        ring: Slots of a stream, at least C; None for C. The additional slots hold records that are
            no longer sampled, but that a checkpoint may need.

    Attributes:
        written: int64 ``[S]``, the number of records written so far to each stream.
        first: int64 ``[S]``, the position of each stream's first record; not 0 if a checkpoint of
            a smaller replay was loaded.
        holes: Stream, first position and last position + 1 of records that were damaged on disk;
            slices do not contain them.
    """

    def __init__(self, num_streams: int, capacity: int, ring: int | None = None) -> None:
        self.num_streams = num_streams
        self.capacity = capacity
        self.ring = ring or capacity
        self.written = torch.zeros(num_streams, dtype=torch.int64)
        self.first = torch.zeros(num_streams, dtype=torch.int64)
        self.holes: list[tuple[int, int, int]] = []

    def reach_holes(self, stream: Tensor, start: Tensor, length: int) -> Tensor:
        """Return as bool which slices of ``length`` at ``start`` of ``stream`` overlap a hole."""
        found = torch.zeros_like(start, dtype=torch.bool)
        for hole, begin, end in self.holes:
            found |= (stream == hole) & (start < end) & (start + length > begin)
        return found

    @property
    def stored(self) -> Tensor:
        """Number of records currently in each stream: int64 ``[S]``."""
        return (self.written - self.first).clamp(max=self.capacity)

    def slots(self, stream: Tensor, position: Tensor) -> Tensor:
        """Return the slots of the records at ``position`` of ``stream`` (broadcast)."""
        return stream * self.ring + position % self.ring

    def places(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return streams and positions of the records that are currently in ``slots``."""
        stream = slots // self.ring
        newest = self.written[stream] - 1
        return stream, newest - (newest - slots) % self.ring

    def slot(self, stream: int, position: int) -> int:
        """Return the storage slot of one record."""
        return stream * self.ring + position % self.ring

    def state_dict(self) -> dict[str, Any]:
        """Return the layout and the heads in plain Python types."""
        return {
            "num_streams": self.num_streams,
            "capacity": self.capacity,
            "ring": self.ring,
            "written": self.written.tolist(),
            "first": self.first.tolist(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load saved heads.

        Raises:
            ValueError: If they belong to another layout.
        """
        self.check_layout(state_dict)
        self.written.copy_(torch.tensor(state_dict["written"], dtype=torch.int64))
        self.first.copy_(torch.tensor(state_dict["first"], dtype=torch.int64))

    def check_layout(self, state_dict: dict[str, Any]) -> None:
        """Raise a ValueError if the saved layout differs from this one."""
        saved = (state_dict["num_streams"], state_dict["capacity"], state_dict["ring"])
        if saved != (self.num_streams, self.capacity, self.ring):
            raise ValueError(
                f"The saved replay has {saved[0]} streams of {saved[1]} records, this one has "
                f"{self.num_streams} of {self.capacity}: the number of envs and the replay's "
                "capacity must not change."
            )


class StreamWriter(Writer):
    """Append records to their streams' rings.

    Args:
        heads: The write heads, advanced by each write.
        latents: The storage of the records' preceding latents, if they are stored.
    """

    def __init__(self, heads: StreamHeads, latents: LatentStore | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.latents = latents

    def extend(self, data: TensorDictBase) -> Tensor:
        """Write records ``[M]`` in order; ``stream`` int64 ``[M]`` is the stream of each.

        Returns:
            The slots written, int64. If one call adds more records to a stream than it keeps, only
            the last ones are written.

        Raises:
            ValueError: If a stream's index is out of range.
        """
        heads = self.heads
        stream = data["stream"].cpu()
        if stream.numel() and not 0 <= int(stream.min()) <= int(stream.max()) < heads.num_streams:
            raise ValueError(
                f"Records of streams {int(stream.min())} to {int(stream.max())}, but the replay "
                f"was made for num_streams={heads.num_streams}."
            )
        new = torch.bincount(stream, minlength=heads.num_streams)  # [S]
        order = stream.argsort(stable=True)
        stream = stream[order]
        # Rank of each record among its stream's new ones.
        rank = torch.arange(len(stream)) - (new.cumsum(0) - new)[stream]
        kept = rank >= (new - heads.capacity)[stream]
        slots = heads.slots(stream, heads.written[stream] + rank)[kept]
        if slots.numel():
            rows = data.exclude("stream")[order[kept].to(data.device or "cpu")]
            if self.latents is not None:
                previous = rows.get(PREVIOUS, None)
                self.latents.write(slots, {} if previous is None else dict(previous.items()))
                rows = rows.exclude(PREVIOUS)
            self._storage.set(slots, rows, set_cursor=False)
            # TorchRL refuses to read at and above the storage's length. Segments fill in
            # parallel, so this is the highest slot in use, not the number of records.
            self._storage._len = max(self._storage._len, int(slots.max()) + 1)
        heads.written += new
        return slots

    def add(self, data: TensorDictBase) -> int:
        """Write one record (batch size ``[]``)."""
        return int(self.extend(data.unsqueeze(0)))

    def _empty(self, empty_write_count: bool = True) -> None:
        self.heads.written.zero_()
        self.heads.first.zero_()

    @property
    def _write_count(self) -> int:
        return int(self.heads.written.sum())

    def state_dict(self) -> dict[str, Any]:
        """Return the heads."""
        return self.heads.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load saved heads."""
        self.heads.load_state_dict(state_dict)

    def dumps(self, path: str | Path) -> None:
        """Save the heads in a folder."""
        write_state(path, self.state_dict())

    def loads(self, path: str | Path) -> None:
        """Load the heads from a folder."""
        self.load_state_dict(read_state(path))


class StreamCheckpointer(StorageCheckpointerBase):
    """Save only the stored records; TorchRL's checkpointer also writes unused segments.

    Args:
        heads: The write heads.
    """

    def __init__(self, heads: StreamHeads) -> None:
        super().__init__()
        self.heads = heads

    def dumps(self, storage: TensorStorage, path: str | Path) -> None:
        """Write the records stream by stream as a memory-mapped tensordict."""
        if not storage.initialized:
            raise RuntimeError("An empty replay cannot be saved: nothing has been written to it.")
        rows = storage._storage
        used = self.heads.written.clamp(max=self.heads.ring)
        saved = rows[:1].cpu().expand(int(used.sum())).memmap_like(str(path))
        for packed, ring in self._segments(used):
            saved[packed] = rows[ring]
        write_state(path, self.heads.state_dict())

    def loads(self, storage: TensorStorage, path: str | Path) -> None:
        """Read the records of :meth:`dumps` into the rings."""
        state = read_state(path)
        self.heads.check_layout(state)
        saved = TensorDict.load_memmap(str(path))
        if not storage.initialized:
            storage._init(saved[0])
        used = torch.tensor(state["written"]).clamp(max=self.heads.ring)
        for packed, ring in self._segments(used):
            storage._storage[ring] = saved[packed]
            storage._len = max(storage._len, ring.stop)

    def _segments(self, used: Tensor) -> list[tuple[slice, slice]]:
        """Return for each non-empty stream its rows in the file and in the storage."""
        starts = (used.cumsum(0) - used).tolist()
        return [
            (
                slice(start, start + num),
                slice(stream * self.heads.ring, stream * self.heads.ring + num),
            )
            for stream, (start, num) in enumerate(zip(starts, used.tolist(), strict=True))
            if num
        ]


def write_state(path: str | Path, state: dict[str, Any]) -> None:
    """Write plain Python values into a folder."""
    Path(path).mkdir(parents=True, exist_ok=True)
    (Path(path) / STATE_FILE).write_text(json.dumps(state))


def read_state(path: str | Path) -> dict[str, Any]:
    """Read the values that :func:`write_state` wrote."""
    state: dict[str, Any] = json.loads((Path(path) / STATE_FILE).read_text())
    return state

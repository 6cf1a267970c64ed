"""The replay: TorchRL's buffer with one ring of records per env."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from w2f_torchrl.data.replay.latents import PREVIOUS, LatentStore
from w2f_torchrl.data.replay.record_files import RecordFiles, fields_of
from w2f_torchrl.data.replay.sampler import StreamSampler
from w2f_torchrl.data.replay.streams import StreamCheckpointer, StreamHeads, StreamWriter
from w2f_torchrl.data.replay.write_back import LatentWriteBack
from w2f_torchrl.keys import NEXT_MASK
from w2f_torchrl.masks.packing import pack_mask, unpack_mask
from w2f_torchrl.modules.packed_latents import INITIAL

LATENTS_FILE = "latents.pt"
ALLOCATED_ROWS = 1024
"""Number of rows for which disk space is reserved at a time."""


class StreamReplayBuffer(TensorDictReplayBuffer):
    """A replay of records, written by S env streams and sampled in slices ``[B, T]``.

    Made by :func:`make_replay`. A record (see :func:`~w2f_torchrl.data.records_from_rollout`) is
    one observation with the action that led to it. It is stored once, its mask with one bit per
    pixel. Samples contain ``index`` int64 ``[B, T]``, the storage slots.

    Writing and sampling are safe from several threads of one process. Samples are drawn when they
    are requested: samples drawn ahead would have to be part of checkpoints.

    With ``latents`` each record is stored with the packed latent of the previous observation, as
    computed by the acting policy or, after it was replayed, by the last update. Samples then
    contain, under ``initial``, the latent before each slice's first record, and :meth:`write_back`
    replaces latents with those that an update has computed.

    Args:
        storage: Storage of ``num_streams * capacity`` records.
        heads: The streams' write heads.
        batch_size: Slices in a sample (B).
        batch_length: Records in a slice (T).
        newest_first: Whether each new chunk of T records is sampled once before older ones.
        pin_memory: Whether samples lie in page-locked memory.
        generator: Random generator of the samples; by default torch's own.
        folder: Folder of the storage's memory-mapped files; None if it is in memory.
        latents: Storage of the records' preceding latents, one row per slot.
    """

    def __init__(
        self,
        storage: LazyTensorStorage,
        heads: StreamHeads,
        *,
        batch_size: int,
        batch_length: int,
        newest_first: bool = True,
        pin_memory: bool = False,
        generator: torch.Generator | None = None,
        folder: Path | None = None,
        latents: LatentStore | None = None,
    ) -> None:
        super().__init__(
            storage=storage,
            sampler=StreamSampler(heads, batch_length, newest_first),
            writer=StreamWriter(heads, latents),
            checkpointer=StreamCheckpointer(heads),
            batch_size=batch_size,
            pin_memory=pin_memory,
            generator=generator,
        )
        self.heads = heads
        self.folder = folder
        self.latents = latents
        self._write_back: LatentWriteBack | None = None
        if latents is not None:
            self._write_back = LatentWriteBack(latents, heads, self._is_init)
        self._allocated: set[int] = set()
        self._cuts: list[tuple[int, int]] = []

    def __len__(self) -> int:
        """Return the number of records that can be sampled."""
        return int(self.heads.stored.sum())

    def extend(self, records: TensorDictBase, *, update_priority: bool | None = None) -> Tensor:
        """Append records ``[M]``, in chronological order within each stream.

        Args:
            records: Records from :func:`~w2f_torchrl.data.records_from_rollout`, with masks as
                bool ``[M, 1, H, W]`` or without masks.
            update_priority: Unused, because this replay has no priorities.

        Returns:
            The slots written, int64.

        Raises:
            ValueError: If keys, shapes or dtypes differ from earlier records, the index of a stream
                is out of range, or a mask's width is not a multiple of 8.
        """
        del update_priority
        records = self._transform.inv(records)
        if NEXT_MASK in records.keys(include_nested=True):
            records = records.copy().set(NEXT_MASK, pack_mask(records[NEXT_MASK]))
        self._check_records(records)
        if self.latents is not None and PREVIOUS in records.keys():
            self.latents.check(dict(records[PREVIOUS].items()), len(records))
        if self.folder is not None:
            self._allocate(records)
        slots: Tensor = self._extend(records)
        return slots

    def add(self, data: TensorDictBase) -> int:
        """Append one record with an empty batch size: ``pixels`` is ``[3, H, W]``."""
        return int(self.extend(data.unsqueeze(0)))

    def write_back(self, index: Tensor, latents: TensorDictBase, applied: Tensor) -> None:
        """Store the latents of an update as initial latents of later slices.

        They are written at the next call, and those of the previous call now: see
        :class:`~w2f_torchrl.data.replay.write_back.LatentWriteBack`.

        Args:
            index: ``index`` of the sample, int64 ``[B, T]``; nothing may have been written since
                it was drawn.
            latents: The update's packed posterior latents ``[B, T]``.
            applied: Whether the update was applied: a scalar, 0 or 1, on the latents' device.

        Raises:
            RuntimeError: If the replay was made without latents.
        """
        if self._write_back is None:
            raise RuntimeError("This replay does not store latents: pass latents= to make_replay.")
        with self._replay_lock, self._write_lock:
            self._write_back.add(index, dict(latents.items()), applied)

    def dumps(self, path: str | Path) -> None:
        """Save the whole replay in a folder."""
        super().dumps(path)
        if self.latents is not None:
            torch.save(self._all_latents(), Path(path) / LATENTS_FILE)

    def loads(self, path: str | Path) -> None:
        """Load a folder from :meth:`dumps`; latents that were not saved become zero."""
        super().loads(path)
        file = Path(path) / LATENTS_FILE
        self._load_latents(torch.load(file, weights_only=True) if file.exists() else None)

    def state_dict(self) -> dict[str, Any]:
        """Return the whole replay."""
        return {**super().state_dict(), "latents": self._all_latents()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state from :meth:`state_dict`; latents that were not saved become zero."""
        state = dict(state_dict)
        latents = state.pop("latents", None)
        super().load_state_dict(state)
        self._load_latents(latents)

    def _all_latents(self) -> dict[str, Any] | None:
        if self.latents is None or self._write_back is None:
            return None
        return {"rows": self.latents.state_dict(), "pending": self._write_back.state_dict()}

    def _load_latents(self, state: dict[str, Any] | None) -> None:
        if self.latents is None or self._write_back is None:
            return
        state = state or {"rows": {}, "pending": None}
        self.latents.load_state_dict(state["rows"])
        self._write_back.load_state_dict(state["pending"])

    def empty(self, empty_write_count: bool = True) -> None:
        """Remove all records."""
        if self._write_back is not None:
            self._write_back.clear()
        super().empty(empty_write_count)

    # ---------------------------------------------------------------- for checkpoints

    @property
    def initialized(self) -> bool:
        """Whether records have been written, so that their entries are known."""
        return bool(self._storage.initialized)

    @property
    def rows(self) -> TensorDictBase:
        """The storage ``[S * ring]``, with one bit per mask pixel."""
        rows: TensorDictBase = self._storage._storage
        return rows

    def initialize(self, record: TensorDictBase) -> None:
        """Allocate the storage ``[S * ring]`` for records like this one, unless it exists."""
        if not self.initialized:
            self._storage._init(record.to(self._storage.device))

    def place(self, stream: int, start: int, rows: Mapping[str, Tensor]) -> None:
        """Restore consecutive records to their slots; the caller sets the heads.

        Args:
            stream: Their stream.
            start: Position of the first record.
            rows: Entries ``[M, ...]`` as stored, by the path of their key.
        """
        count, ring = len(next(iter(rows.values()))), self.heads.ring
        slots = self.heads.slots(torch.tensor(stream), torch.arange(start, start + count))
        if self.folder is not None:
            self._allocate_slots(slots)
        # If a block is longer than the ring, its last records remain.
        kept = slice(max(count - ring, 0), None)
        for name, entry in rows.items():
            self.rows[tuple(name.split("/"))][slots[kept]] = entry[kept].to(self._storage.device)
        self._storage._len = max(self._storage._len, int(slots.max()) + 1)

    def end_episodes(self) -> None:
        """Mark the last record of every stream as the last of its episode in samples.

        Checkpoints share records, so records never change: the marks are stored separately.
        """
        written = self.heads.written.tolist()
        oldest = (self.heads.written - self.heads.stored).tolist()
        cuts = [*self._cuts, *((stream, end - 1) for stream, end in enumerate(written) if end)]
        self._cuts = [(stream, place) for stream, place in cuts if place >= oldest[stream]]

    def _mark_cuts(self, data: TensorDictBase, index: Tensor) -> None:
        stream, position = torch.tensor(self._cuts).unbind(-1)
        # Slots of positions that have been overwritten belong to other records.
        kept = position >= (self.heads.written - self.heads.stored)[stream]
        slots = self.heads.slots(stream, position)[kept]
        data["next", "done"][torch.isin(index, slots)] = True

    def gather(self, slots: Tensor) -> TensorDictBase:
        """Return the records at ``slots``, int64 ``[B, T]``, in the form of a sample."""
        data = self._gather(slots.cpu())
        if self._cuts:
            self._mark_cuts(data, slots.cpu())
        if NEXT_MASK in data.keys(include_nested=True):
            data.set(NEXT_MASK, unpack_mask(data[NEXT_MASK]))
        if self.latents is not None:
            data.set(INITIAL, self.latents.before(slots.cpu()))
        return data

    def sampling_state(self) -> dict[str, Any]:
        """Return the state of sampling, without the records and the heads."""
        return {
            "sampler": self._sampler.state_dict(),
            "generator": self._rng.get_state(),
            "cuts": [list(cut) for cut in self._cuts],
            "holes": [list(hole) for hole in self.heads.holes],
            "latents": None if self._write_back is None else self._write_back.state_dict(),
        }

    def load_sampling_state(self, state: dict[str, Any]) -> None:
        """Continue sampling from a state of :meth:`sampling_state`.

        Raises:
            ValueError: If its slices have another length.
        """
        self._sampler.load_state_dict(state["sampler"])
        self._rng.set_state(state["generator"].cpu())
        self._cuts = [(stream, place) for stream, place in state["cuts"]]
        holes = {*self.heads.holes, *map(tuple, state.get("holes", ()))}
        oldest = (self.heads.written - self.heads.stored).tolist()
        self.heads.holes = sorted(hole for hole in holes if hole[2] > oldest[hole[0]])
        if self._write_back is not None:
            self._write_back.load_state_dict(state.get("latents"))

    def _allocate(self, records: TensorDictBase) -> None:
        """Reserve disk space for the records that are about to be written."""
        if not self.initialized:
            self.initialize(records.exclude("stream", PREVIOUS)[0])
        new = torch.bincount(records["stream"].cpu(), minlength=self.heads.num_streams)
        for stream, count in enumerate(new.tolist()):
            position = int(self.heads.written[stream]) + torch.arange(count)
            self._allocate_slots(self.heads.slots(torch.tensor(stream), position))

    def _allocate_slots(self, slots: Tensor) -> None:
        new = {slot // ALLOCATED_ROWS for slot in slots.tolist()} - self._allocated
        if new:
            assert self.folder is not None, "only memory-mapped files need allocation"
            with RecordFiles(self.folder, fields_of(self.rows), create=True) as files:
                for block in new:
                    rows = min(ALLOCATED_ROWS, len(self.rows) - block * ALLOCATED_ROWS)
                    files.allocate(block * ALLOCATED_ROWS, rows)
                    if self.latents is not None:
                        self.latents.allocate(block * ALLOCATED_ROWS, rows)
            self._allocated |= new

    # ---------------------------------------------------------------- sampling

    def _check_records(self, records: TensorDictBase) -> None:
        if records.ndim != 1:
            raise ValueError(f"Records have batch size [M], got {tuple(records.batch_size)}.")
        if not self._storage.initialized:
            return
        kept_apart = () if self.latents is None else (PREVIOUS,)
        new, stored = (
            {key: (tuple(leaf.shape[1:]), leaf.dtype) for key, leaf in td.items(True, True)}
            for td in (records.exclude("stream", *kept_apart), self._storage._storage)
        )
        for key in sorted(new.keys() | stored.keys(), key=str):
            if new.get(key) != stored.get(key):
                raise ValueError(
                    f"The replay stores {key} as {stored.get(key)}, got {new.get(key)} (shape per "
                    "record and dtype; None if the key is missing)."
                )

    def _sample(self, batch_size: int) -> tuple[TensorDictBase, dict[str, Any]]:
        with self._replay_lock, self._write_lock:
            index, info = self._sampler.sample(self._storage, batch_size)
            data = self._gather(index)
            if self._cuts:
                self._mark_cuts(data, index)
            if self.latents is not None:
                data.set(INITIAL, self.latents.before(index, pin_memory=self._pin_memory))
        if NEXT_MASK in data.keys(include_nested=True):
            data.set(NEXT_MASK, unpack_mask(data[NEXT_MASK], pin_memory=self._pin_memory))
        data = self._transform(data)
        info["index"] = index.to(data.device)
        return data, info

    def _is_init(self, slots: Tensor) -> Tensor:
        flags: Tensor = self.rows["is_init"][slots.to(self._storage.device)]
        return flags.as_subclass(torch.Tensor).flatten().cpu()

    def _gather(self, index: Tensor) -> TensorDict:
        """Read slots ``[B, T]``.

        ``index_select`` copies whole records; indexing with a tensor, as TorchRL does, copies byte
        by byte and takes nine times as long. It writes directly into page-locked memory.
        """
        rows = self._storage._storage
        flat = index.reshape(-1).to(self._storage.device)  # [B * T]

        def read(leaf: Tensor) -> Tensor:
            leaf = leaf.as_subclass(torch.Tensor)  # methods of memory-mapped tensors are slower
            shape = (len(flat), *leaf.shape[1:])
            out = leaf.new_empty(shape, pin_memory=self._pin_memory)
            return torch.index_select(leaf, 0, flat, out=out).view(*index.shape, *leaf.shape[1:])

        out: TensorDict = TensorDict(
            {key: read(leaf) for key, leaf in rows.items(True, True)},
            index.shape,
            device=self._storage.device,
        )
        return out

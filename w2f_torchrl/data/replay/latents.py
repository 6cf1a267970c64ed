"""The latent that precedes each record of a replay, in a separate storage.

Records are written once and shared by checkpoints; latents change with every update that replays
them. Their storage has one row per row of the records' storage.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import torch
from tensordict import TensorDict
from torch import Tensor

from w2f_torchrl.config.model import ModelConfig
from w2f_torchrl.data.replay.record_files import Field, Fields, RecordFiles
from w2f_torchrl.modules.packed_latents import packed_state_dtype

PREVIOUS = "previous"
"""Key in records of the packed latent of the previous observation."""

Snapshot = list[tuple[Tensor, dict[str, Tensor]]]
"""Slots, and their contents when a snapshot began."""


def latent_fields(config: ModelConfig, latent: str) -> Fields:
    """List the entries of a packed latent.

    Args:
        config: Sizes of the world model.
        latent: ``whole``, ``split``, ``shared`` or ``foreground``.
    """
    sizes = {"": (config.belief_size, config.num_classes)}
    if latent == "split":
        sizes["background_"] = (config.background_belief_size, config.background_num_classes)
    fields = {}
    for prefix, (belief, classes) in sizes.items():
        dtype = str(packed_state_dtype(classes)).removeprefix("torch.")
        fields[f"{prefix}belief"] = Field("float16", (belief,))
        fields[f"{prefix}state"] = Field(dtype, (config.num_categoricals,))
    return fields


class LatentStore:
    """Rows of packed latents: the latent of the observation before each record.

    Row i belongs to the record in slot i. A zero row means that it has none: slices that begin
    there start from zero. Each record and its row are written in the same call.

    Args:
        fields: Entries of a row, from :func:`latent_fields`.
        rows: Number of slots of the replay.
        device: Device of the rows, without a folder.
        folder: Folder of their memory-mapped files; None keeps them in memory, which is allocated
            as rows are written.
    """

    def __init__(
        self,
        fields: Fields,
        rows: int,
        *,
        device: torch.device | str = "cpu",
        folder: Path | None = None,
    ) -> None:
        self.fields, self.num_rows, self.folder = fields, rows, folder
        self.device = torch.device(device)
        if folder is not None:
            RecordFiles(folder, fields, create=True, rows=rows).close()
        self._entries = {name: self._make(name, field) for name, field in fields.items()}
        self._lock = threading.Lock()
        self._snapshot: Snapshot | None = None
        self._kept = torch.zeros(0, dtype=torch.bool)

    def _make(self, name: str, field: Field) -> Tensor:
        shape = (self.num_rows, *field.shape)
        if self.folder is None:
            return torch.empty(shape, dtype=field.torch_dtype, device=self.device)
        path, size = self.folder / f"{name}.memmap", torch.Size(shape).numel()
        return torch.from_file(str(path), shared=True, size=size, dtype=field.torch_dtype).view(
            shape
        )

    def allocate(self, row: int, count: int) -> None:
        """Reserve disk space for rows of a memory-mapped store.

        Raises:
            OSError: If the disk is full.
        """
        assert self.folder is not None, "only memory-mapped files need allocation"
        with RecordFiles(self.folder, self.fields, create=True) as files:
            files.allocate(row, count)

    def check(self, values: Mapping[str, Tensor], rows: int) -> None:
        """Check values before they are written.

        Raises:
            ValueError: If an entry is missing or has another shape or dtype. The background's
                entries may be missing: acting does not compute them.
        """
        for name, field in self.fields.items():
            value = values.get(name)
            if value is None and name.startswith("background_"):
                continue
            found = None if value is None else (value.dtype, tuple(value.shape))
            if found != (field.torch_dtype, (rows, *field.shape)):
                raise ValueError(
                    f"The replay stores ({PREVIOUS!r}, {name!r}) as {field.torch_dtype} "
                    f"{(rows, *field.shape)}, got {found}."
                )

    def read(self, slots: Tensor, *, pin_memory: bool = False) -> dict[str, Tensor]:
        """Read rows.

        Args:
            slots: int64 ``[N]``.
            pin_memory: Whether the result lies in page-locked memory.

        Returns:
            Entries ``[N, ...]``, by name.
        """
        slots = slots.to(self.device)
        read = {}
        for name, entry in self._entries.items():
            out = entry.new_empty((len(slots), *entry.shape[1:]), pin_memory=pin_memory)
            read[name] = torch.index_select(entry, 0, slots, out=out)
        return read

    def before(self, index: Tensor, *, pin_memory: bool = False) -> TensorDict:
        """Read the initial latents of slices.

        Args:
            index: Slots of the slices, int64 ``[B, T]``.
            pin_memory: Whether the result lies in page-locked memory.

        Returns:
            Entries ``[B, T, ...]``: one row per slice, expanded to T without a copy.
        """
        first = self.read(index[:, 0], pin_memory=pin_memory)
        shown = {
            name: value.unsqueeze(1).expand(*index.shape, *value.shape[1:])
            for name, value in first.items()
        }
        return TensorDict(shown, index.shape, device=self.device)

    def write(self, slots: Tensor, values: Mapping[str, Tensor]) -> None:
        """Overwrite rows.

        Args:
            slots: int64 ``[N]``, each at most once.
            values: Entries ``[N, ...]`` by name; missing ones become zero.
        """
        if not slots.numel():
            return
        slots = slots.to(self.device)
        with self._lock:
            self._keep_for_snapshot(slots)
            for name, entry in self._entries.items():
                value = values.get(name)
                if value is None:
                    entry.index_fill_(0, slots, 0)
                else:
                    entry.index_copy_(0, slots, value.to(self.device))

    def rows(self, start: int, stop: int) -> dict[str, Tensor]:
        """Return consecutive rows without a copy."""
        return {name: entry[start:stop] for name, entry in self._entries.items()}

    # ---------------------------------------------------------------- for checkpoints

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of all rows."""
        return {name: entry.clone() for name, entry in self._entries.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a state from :meth:`state_dict`; missing entries become zero."""
        self.write(torch.arange(self.num_rows), state)

    def begin_snapshot(self) -> None:
        """Keep from now on a copy of each row that is overwritten.

        A thread can then copy the whole store while updates change it, and correct its copy with
        the rows from :meth:`end_snapshot`. A snapshot that was begun and not ended is discarded.
        """
        with self._lock:
            self._snapshot = []
            self._kept = torch.zeros(self.num_rows, dtype=torch.bool)

    def end_snapshot(self) -> Snapshot:
        """Return the original values of the rows overwritten since, each slot once."""
        with self._lock:
            snapshot, self._snapshot = self._snapshot, None
            self._kept = torch.zeros(0, dtype=torch.bool)
        return snapshot or []

    def _keep_for_snapshot(self, slots: Tensor) -> None:
        if self._snapshot is None:
            return
        slots = slots.cpu()
        new = slots[~self._kept[slots]]
        if new.numel():
            self._kept[new] = True
            self._snapshot.append((new, self.read(new)))

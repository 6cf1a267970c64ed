"""Rows of records in raw files, one per key, in the layout of memory-mapped TensorDicts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from w2f_torchrl.utils.closing import Closing


class RecordsError(RuntimeError):
    """Records on disk are damaged; the message names the place."""


class MissingRecordsError(RecordsError):
    """The files of a checkpoint's records do not exist."""


class Field(NamedTuple):
    """One entry of a record.

    Attributes:
        dtype: Name of the torch dtype, such as ``"uint8"``.
        shape: Shape of one record's entry.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def size(self) -> int:
        """Bytes of one record's entry."""
        return torch.Size(self.shape).numel() * self.torch_dtype.itemsize


Fields = dict[str, Field]


def fields_of(rows: TensorDictBase) -> Fields:
    """Return the entries of records ``[M]``, by the path of their file without its suffix."""
    return {
        "/".join(key if isinstance(key, tuple) else (key,)): Field(
            str(leaf.dtype).removeprefix("torch."), tuple(leaf.shape[1:])
        )
        for key, leaf in sorted(rows.items(True, True), key=lambda item: str(item[0]))
    }


def zero_record(fields: Fields) -> TensorDict:
    """Return a record of zeros with batch size ``[]``."""
    out = TensorDict({}, [])
    for name, field in fields.items():
        out[tuple(name.split("/"))] = torch.zeros(field.shape, dtype=field.torch_dtype)
    return out


class RecordFiles(Closing):
    """The open files of one folder.

    Args:
        folder: The folder.
        fields: The entries of a record.
        create: Whether to create missing files.
        write: Whether existing files can be written; otherwise they are read-only.
        rows: Rows of created files; rows that were never written use no disk space.

    Raises:
        MissingRecordsError: If a file is missing and ``create`` is False.
    """

    def __init__(
        self,
        folder: Path,
        fields: Fields,
        *,
        create: bool = False,
        write: bool = False,
        rows: int = 0,
    ) -> None:
        write |= create
        self.folder, self.fields = folder, fields
        self._descriptors: dict[str, int] = {}
        try:
            for name, field in fields.items():
                path = folder / f"{name}.memmap"
                if create:
                    path.parent.mkdir(parents=True, exist_ok=True)
                flags = os.O_RDWR | (os.O_CREAT if create else 0) if write else os.O_RDONLY
                # Folders are not trusted: with a link, its target would be overwritten.
                self._descriptors[name] = os.open(path, flags | os.O_NOFOLLOW, 0o644)
                if create and os.fstat(self._descriptors[name]).st_size < rows * field.size:
                    os.ftruncate(self._descriptors[name], rows * field.size)
        except FileNotFoundError as error:
            self.close()
            raise MissingRecordsError(f"Replay records {error.filename} are missing.") from error

    def write(self, row: int, entries: Mapping[str, Tensor]) -> None:
        """Write consecutive rows, starting at ``row``.

        Raises:
            OSError: If the disk is full.
        """
        for name, field in self.fields.items():
            data = memoryview(_as_bytes(entries[name]).numpy().data)
            offset = row * field.size
            while data:
                count = os.pwrite(self._descriptors[name], data, offset)
                data, offset = data[count:], offset + count

    def read(self, row: int, count: int) -> dict[str, Tensor]:
        """Read ``count`` rows, starting at ``row``."""
        return {
            name: torch.frombuffer(
                bytearray(self._read(name, field, row, count)), dtype=field.torch_dtype
            ).view(count, *field.shape)
            for name, field in self.fields.items()
        }

    def digest(self, row: int, count: int) -> bytes:
        """Return the SHA-256 of ``count`` rows starting at ``row``, entry by entry."""
        digest = hashlib.sha256()
        for name, field in self.fields.items():
            digest.update(self._read(name, field, row, count))
        return digest.digest()

    def allocate(self, row: int, count: int) -> None:
        """Reserve disk space for rows; mapped files need it before a write.

        Writing to a mapped page when the disk is full kills the process.

        Raises:
            OSError: If the disk is full.
        """
        for name, field in self.fields.items():
            os.posix_fallocate(self._descriptors[name], row * field.size, count * field.size)

    def sync(self) -> None:
        """Force everything to disk."""
        for descriptor in self._descriptors.values():
            os.fdatasync(descriptor)

    def _read(self, name: str, field: Field, row: int, count: int) -> bytes:
        size = count * field.size
        data = os.pread(self._descriptors[name], size, row * field.size)
        while len(data) < size:
            more = os.pread(self._descriptors[name], size - len(data), row * field.size + len(data))
            if not more:
                raise RecordsError(f"{self.folder / name}.memmap is truncated.")
            data += more
        return data

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors = {}


def _as_bytes(entry: Tensor) -> Tensor:
    entry = entry.detach().as_subclass(Tensor).cpu().contiguous()
    return entry.reshape(-1).view(torch.uint8)

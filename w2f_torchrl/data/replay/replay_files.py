"""A replay's records on disk, shared by checkpoints: each record is written once.

Every stream owns a ring of rows. The ring has more rows than the replay's capacity, so that newer
records do not overwrite those that an older checkpoint needs. A checkpoint contains the streams'
heads and a SHA-256 digest of each block of rows, but no records. Latents, which updates change, are
in files that belong to a single checkpoint (``latent_files``).
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from w2f_torchrl.data.replay import latent_files
from w2f_torchrl.data.replay.buffer import StreamReplayBuffer
from w2f_torchrl.data.replay.record_files import (
    Field,
    Fields,
    MissingRecordsError,
    RecordFiles,
    RecordsError,
    fields_of,
    zero_record,
)

logger = logging.getLogger(__name__)

BLOCK = 256
"""Number of rows of a stream per digest."""
COPY_LIMIT = 2**28
"""Maximum bytes to copy for a write in the background; more are written immediately."""

_NAME = re.compile(r"\w+(/\w+)*", re.ASCII)

Manifest = dict[str, Any]
"""The entry of a checkpoint for the replay, in plain values."""


class Piece(NamedTuple):
    """Consecutive records of one stream."""

    stream: int
    start: int
    rows: dict[str, Tensor]


class Pending(NamedTuple):
    """The result of :meth:`ReplayFiles.prepare`, for :meth:`ReplayFiles.commit`."""

    written: list[int]
    first: list[int]
    pieces: list[Piece]


def ring_rows(capacity: int, slack: int) -> int:
    """Return the rows of a stream's ring: capacity plus slack, in whole blocks."""
    return (-(-(capacity + slack) // BLOCK) + 1) * BLOCK


def new_generation(folder: Path) -> str:
    """Return an unused name for a subfolder of records in ``folder``."""
    used = [int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit()]
    return f"{max(used, default=-1) + 1:04d}"


class ReplayFiles:
    """Write a replay's new records, and read all of them back.

    A replay on disk uses the same files: its new records only have to be flushed.

    Args:
        replay: The replay, still empty.
        folder: The folder; each of its subfolders holds a generation of records.
        generation: The name of the current subfolder.
        ring: Rows of a stream's ring, from :func:`ring_rows`.
    """

    def __init__(
        self, replay: StreamReplayBuffer, folder: Path, generation: str, ring: int
    ) -> None:
        self.replay, self.folder = replay, folder
        self.generation, self.ring = generation, ring
        self.mapped = replay.folder is not None
        streams = range(replay.heads.num_streams)
        self._saved = [0 for _ in streams]
        self._digests: list[dict[int, tuple[int, bytes]]] = [{} for _ in streams]

    def prepare(self, newest: Manifest | None) -> Pending:
        """Copy the new records, so that the replay can continue; call :meth:`commit` afterwards.

        Args:
            newest: Manifest of the newest checkpoint. If its records would be overwritten, all
                records are written to new files.
        """
        heads = self.replay.heads
        if self.replay.latents is not None:
            self.replay.latents.begin_snapshot()
        written, first = heads.written.tolist(), heads.first.tolist()
        pending = Pending(written, first, [])
        if self.mapped or not self.replay.initialized:
            return pending
        if any(self._saved) and not self._files_exist():
            logger.warning("%s is missing: all records are written again", self.folder)
            self._begin_generation()
        if self.overwrites(written, newest):
            self._begin_generation()
        starts = [
            max(saved, end - heads.capacity, begin)
            for saved, end, begin in zip(self._saved, written, first, strict=True)
        ]
        rows = sum(written) - sum(starts)
        copy = rows * sum(field.size for field in self._fields().values()) <= COPY_LIMIT
        for stream, (start, end) in enumerate(zip(starts, written, strict=True)):
            for begin, stop in _runs(start, end, heads.ring):
                piece = Piece(stream, begin, self._rows(stream, begin, stop))
                if copy:
                    rows_now = {name: entry.clone() for name, entry in piece.rows.items()}
                    pending.pieces.append(piece._replace(rows=rows_now))
                else:
                    self._write(piece)
        return pending

    def commit(self, pending: Pending) -> Manifest | None:
        """Write the copied records, force them to disk, and return the checkpoint's manifest.

        Raises:
            OSError: If the disk is full.
        """
        if not self.replay.initialized:
            return None
        for piece in pending.pieces:
            self._write(piece)
        with self._open() as files:
            files.sync()
            for stream, (end, begin) in enumerate(zip(pending.written, pending.first, strict=True)):
                self._digest(files, stream, end, begin)
        self._saved = list(pending.written)
        heads = self.replay.heads
        manifest: Manifest = {
            "generation": self.generation,
            "capacity": heads.capacity,
            "ring": self.ring,
            "written": list(pending.written),
            "first": list(pending.first),
            "fields": {name: list(field) for name, field in self._fields().items()},
            # None for a stream without records: torch.load refuses empty bytes.
            "digests": [b"".join(d[b][1] for b in sorted(d)) or None for d in self._digests],
        }
        if self.replay.latents is not None:
            snapshot = {**manifest, "ring": heads.ring}
            manifest[latent_files.FOLDER] = latent_files.write_snapshot(
                self.replay.latents, snapshot, self.folder
            )
        return manifest

    def overwrites(self, written: list[int], manifest: Manifest | None) -> bool:
        """Return whether records up to ``written`` overwrite some that a checkpoint needs."""
        if not manifest or manifest["generation"] != self.generation:
            return False
        return any(
            end - self.ring > blocks.start * BLOCK
            for end, blocks in zip(written, windows(manifest), strict=True)
        )

    def load(
        self, manifest: Manifest, folder: Path, damage: Collection[tuple[int, int]] = ()
    ) -> None:
        """Fill the replay with the records of a checkpoint; they must have been verified.

        Args:
            manifest: The manifest, from :meth:`commit`.
            folder: The folder of records to which it belongs.
            damage: Streams and blocks to leave out, from :func:`find_damage`.
        """
        heads = self.replay.heads
        here = folder.resolve() == self.folder.resolve()
        here &= (manifest["generation"], manifest["ring"]) == (self.generation, self.ring)
        with open_records(manifest, folder) as files:
            self.replay.initialize(zero_record(files.fields))
            for stream, blocks in enumerate(windows(manifest)):
                for block in blocks:
                    count = _count(manifest, stream, block)
                    if (stream, block) in damage:
                        place = stream, block * BLOCK, block * BLOCK + count
                        heads.holes = sorted({*heads.holes, place})
                    elif not (here and self.mapped):  # a mapped replay has them already
                        rows = files.read(_row(manifest, stream, block), count)
                        piece = Piece(stream, block * BLOCK, rows)
                        self.replay.place(*piece)
                        if not here and not self.mapped:
                            self._write(piece)
                    digest = _digest_of(manifest, stream, block)
                    self._digests[stream][block] = (count, digest)
        self._saved = list(manifest["written"])
        written, first = torch.tensor(manifest["written"]), torch.tensor(manifest["first"])
        heads.written.copy_(written)
        heads.first.copy_(first.maximum(written - min(manifest["capacity"], heads.capacity)))
        latent_files.load_snapshot(self.replay, manifest, folder)

    def remove_unused(self, manifests: Iterable[Manifest | None]) -> None:
        """Delete the files that none of the given checkpoints needs."""
        needed = [manifest for manifest in manifests if manifest]
        latent_files.remove_unused(needed, self.folder)
        used = {manifest["generation"] for manifest in needed} | {self.generation}
        for path in self.folder.glob("[0-9]*"):
            if path.name not in used and path.is_dir():
                shutil.rmtree(path)

    def _begin_generation(self) -> None:
        # A new name even if its folder is missing: checkpoints still refer to the old one.
        after = f"{int(self.generation) + 1:04d}"
        self.generation = max(new_generation(self.folder), after, key=int)
        self._saved = [0 for _ in self._saved]
        self._digests = [{} for _ in self._digests]

    def _digest(self, files: RecordFiles, stream: int, end: int, begin: int) -> None:
        """Digest the blocks that are new or have grown, and drop those outside the window."""
        known = self._digests[stream]
        blocks = _window(end, self.replay.heads.capacity, begin)
        for block in blocks:
            count = min(BLOCK, end - block * BLOCK)
            if known.get(block, (0, b""))[0] != count:
                row = stream * self.ring + block * BLOCK % self.ring
                known[block] = count, files.digest(row, count)
        self._digests[stream] = {block: known[block] for block in blocks}

    def _files_exist(self) -> bool:
        try:
            self._open().close()
        except MissingRecordsError:
            return False
        return True

    def _open(self, *, create: bool = False, write: bool = False) -> RecordFiles:
        rows = self.ring * self.replay.heads.num_streams
        folder = self.folder / self.generation
        return RecordFiles(folder, self._fields(), create=create, write=write, rows=rows)

    def _fields(self) -> Fields:
        return fields_of(self.replay.rows)

    def _rows(self, stream: int, start: int, stop: int) -> dict[str, Tensor]:
        slot = self.replay.heads.slot(stream, start)
        rows = self.replay.rows[slot : slot + stop - start]
        return {name: rows[tuple(name.split("/"))] for name in self._fields()}

    def _write(self, piece: Piece) -> None:
        count = len(next(iter(piece.rows.values())))
        # Do not create files again after the first write: they would hold zeros for earlier rows.
        with self._open(create=not any(self._saved), write=True) as files:
            for begin, stop in _runs(piece.start, piece.start + count, self.ring):
                part = slice(begin - piece.start, stop - piece.start)
                row = piece.stream * self.ring + begin % self.ring
                files.write(row, {name: entry[part] for name, entry in piece.rows.items()})


def find_damage(manifest: Manifest, folder: Path) -> list[tuple[int, int]]:
    """Compare a checkpoint's records with their digests.

    Args:
        manifest: The checkpoint's entry for the replay.
        folder: The folder of records to which it belongs.

    Returns:
        Stream and block of altered or truncated records.

    Raises:
        MissingRecordsError: If the files do not exist.
        RecordsError: If the name of a generation or of an entry is invalid.
    """
    found = []
    with open_records(manifest, folder) as files:
        for stream, blocks in enumerate(windows(manifest)):
            for block in blocks:
                row, count = _row(manifest, stream, block), _count(manifest, stream, block)
                try:
                    whole = files.digest(row, count) == _digest_of(manifest, stream, block)
                except RecordsError:  # truncated
                    whole = False
                if not whole:
                    found.append((stream, block))
    return found


def describe_damage(place: tuple[int, int], manifest: Manifest, folder: Path) -> str:
    """Describe the damaged records at a place from :func:`find_damage`."""
    stream, block = place
    return (
        f"{folder / str(manifest['generation'])} is damaged: records {block * BLOCK} and following "
        f"of stream {stream} do not match their SHA-256 digest."
    )


def open_records(manifest: Manifest, folder: Path) -> RecordFiles:
    """Open the files of a checkpoint's records for reading.

    Checkpoints are not trusted: their names must not lead out of the folder.

    Raises:
        MissingRecordsError: If the files do not exist.
        RecordsError: If the name of a generation or of an entry is invalid.
    """
    names = [*manifest["fields"], str(manifest["generation"])]
    for name in names:
        if not _NAME.fullmatch(name):
            raise RecordsError(f"{name!r} in a checkpoint's replay is not a valid name of records.")
    fields = {
        name: Field(dtype, tuple(shape)) for name, (dtype, shape) in manifest["fields"].items()
    }
    return RecordFiles(folder / str(manifest["generation"]), fields)


def read_streams(
    files: RecordFiles, manifest: Manifest, damage: Collection[tuple[int, int]] = ()
) -> Iterator[dict[str, Tensor] | None]:
    """Yield the records of a checkpoint, block after block of each stream.

    Args:
        files: From :func:`open_records`.
        manifest: The checkpoint's manifest.
        damage: Streams and blocks to leave out, from :func:`find_damage`.

    Yields:
        Entries ``[M, ...]`` as stored, by the path of their key; None between streams, and in
        place of a damaged block. The first block begins with the oldest record that can be sampled.
    """
    for stream, blocks in enumerate(windows(manifest)):
        oldest = _oldest(manifest, stream)
        for block in blocks:
            if (stream, block) in damage:
                yield None
            else:
                # Rows of the block before the oldest may never have been written.
                skipped = max(0, oldest - block * BLOCK)
                count = _count(manifest, stream, block) - skipped
                yield files.read(_row(manifest, stream, block) + skipped, count)
        yield None


def windows(manifest: Manifest) -> list[range]:
    """Return for each stream the blocks of the records that can be sampled."""
    return [
        _window(end, manifest["capacity"], begin)
        for end, begin in zip(manifest["written"], manifest["first"], strict=True)
    ]


def _window(end: int, capacity: int, begin: int) -> range:
    return range(max(end - capacity, begin, 0) // BLOCK, -(-end // BLOCK))


def _oldest(manifest: Manifest, stream: int) -> int:
    end, begin = manifest["written"][stream], manifest["first"][stream]
    return int(max(end - manifest["capacity"], begin, 0))


def _count(manifest: Manifest, stream: int, block: int) -> int:
    return int(min(BLOCK, manifest["written"][stream] - block * BLOCK))


def _row(manifest: Manifest, stream: int, block: int) -> int:
    return int(stream * manifest["ring"] + block * BLOCK % manifest["ring"])


def _digest_of(manifest: Manifest, stream: int, block: int) -> bytes:
    place = 32 * (block - windows(manifest)[stream].start)
    digest: bytes = manifest["digests"][stream][place : place + 32]
    return digest


def _runs(start: int, stop: int, ring: int) -> Iterator[tuple[int, int]]:
    """Split a range of positions at the ends of the ring."""
    while start < stop:
        end = min(stop, (start // ring + 1) * ring)
        yield start, end
        start = end

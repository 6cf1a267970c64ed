"""Snapshots of a replay's latents: one folder of files per checkpoint.

Latents change with every update, so checkpoints cannot share them as they share records. A snapshot
is written while updates continue (:meth:`LatentStore.begin_snapshot`). The checkpoint contains its
name and a SHA-256 digest of each block of its rows. If the snapshot is missing or damaged, the run
resumes with zero latents: weights and records do not depend on them.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from w2f_torchrl.data.replay.latents import LatentStore
from w2f_torchrl.data.replay.record_files import RecordFiles, RecordsError
from w2f_torchrl.data.replay.streams import StreamHeads

if TYPE_CHECKING:
    from w2f_torchrl.data.replay.buffer import StreamReplayBuffer

logger = logging.getLogger(__name__)

FOLDER = "latents"
"""Name of the subfolder in the folder of a replay's records."""
BLOCK = 1024
"""Number of rows per digest."""

_NAME = re.compile(r"\d+", re.ASCII)


class Run(NamedTuple):
    """Consecutive records of a stream in consecutive slots."""

    stream: int
    start: int
    """Position of the first record."""
    slot: int
    """Slot of the first record."""
    length: int


def write_snapshot(store: LatentStore, heads: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write the latents at the time when the snapshot began, and force them to disk.

    Args:
        store: The latents.
        heads: ``written``, ``first``, ``capacity`` and ``ring`` of the streams at that time.
        folder: Folder of the replay's records.

    Returns:
        The entry for the checkpoint.

    Raises:
        OSError: If the disk is full.
    """
    parent = folder / FOLDER
    used = [int(path.name) for path in parent.glob("[0-9]*") if path.name.isdigit()]
    name = f"{max(used, default=-1) + 1:08d}"
    runs = list(_runs(heads))
    try:
        with RecordFiles(parent / name, store.fields, create=True) as files:
            for run in runs:
                files.write(run.slot, store.rows(run.slot, run.slot + run.length))
            _correct(files, store)
            files.sync()
            digests = b"".join(files.digest(run.slot, run.length) for run in runs)
    finally:
        store.end_snapshot()
    fields = {name: list(field) for name, field in store.fields.items()}
    return {"name": name, "ring": heads["ring"], "fields": fields, "digests": digests}


def load_snapshot(replay: StreamReplayBuffer, manifest: dict[str, Any], folder: Path) -> None:
    """Load the latents of a checkpoint, after its records.

    If that is impossible, latents become zero, and a line is logged.

    Args:
        replay: The replay, with its heads already loaded.
        manifest: The checkpoint's entry for the replay.
        folder: Folder of the records to which it belongs.
    """
    store = replay.latents
    if store is None:
        return
    if store.folder is not None:
        for run in _runs(replay.heads.state_dict()):
            store.allocate(run.slot, run.length)
    saved = manifest.get(FOLDER)
    try:
        if saved is None:
            logger.info("the checkpoint has no latents: slices start from zero until replayed")
        else:
            _place_all(store, replay.heads, manifest, saved, folder)
            return
    except RecordsError as error:
        logger.warning("%s Slices start from zero until they are replayed.", error)
    for run in _runs(replay.heads.state_dict()):
        store.write(torch.arange(run.slot, run.slot + run.length), {})


def remove_unused(manifests: Iterable[dict[str, Any]], folder: Path) -> None:
    """Delete the snapshots that none of the given checkpoints needs."""
    saved = [manifest.get(FOLDER) for manifest in manifests]
    used = {snapshot["name"] for snapshot in saved if snapshot}
    for path in (folder / FOLDER).glob("[0-9]*"):
        if path.name not in used:
            shutil.rmtree(path, ignore_errors=True)


def _correct(files: RecordFiles, store: LatentStore) -> None:
    """Undo in the copy the changes of updates during the copying."""
    for slots, values in store.end_snapshot():
        for row, slot in enumerate(slots.tolist()):
            files.write(slot, {name: value[row : row + 1] for name, value in values.items()})


def _place_all(
    store: LatentStore,
    heads: StreamHeads,
    manifest: dict[str, Any],
    saved: dict[str, Any],
    folder: Path,
) -> None:
    fields = {name: list(field) for name, field in store.fields.items()}
    if not _NAME.fullmatch(str(saved["name"])):
        raise RecordsError(f"{saved['name']!r} in a checkpoint is not a valid name of latents.")
    if {name: [dtype, list(shape)] for name, (dtype, shape) in saved["fields"].items()} != {
        name: [dtype, list(shape)] for name, (dtype, shape) in fields.items()
    }:
        raise RecordsError("The checkpoint's latents have other shapes or dtypes.")
    runs = list(_runs({**manifest, "ring": saved["ring"]}))
    oldest = (heads.written - heads.stored).tolist()
    with RecordFiles(folder / FOLDER / str(saved["name"]), store.fields) as files:
        for number, run in enumerate(runs):
            if files.digest(run.slot, run.length) != saved["digests"][32 * number :][:32]:
                raise RecordsError(
                    f"{files.folder} is damaged: latents of records {run.start} and following of "
                    f"stream {run.stream} do not match their SHA-256 digest."
                )
            skip = max(oldest[run.stream] - run.start, 0)
            if skip >= run.length:
                continue
            rows = files.read(run.slot + skip, run.length - skip)
            positions = torch.arange(run.start + skip, run.start + run.length)
            store.write(heads.slots(torch.tensor(run.stream), positions), rows)


def _runs(heads: dict[str, Any]) -> Iterator[Run]:
    """Split the records that can be sampled into blocks that do not cross a ring's end."""
    ring, capacity = heads["ring"], heads["capacity"]
    for stream, (end, first) in enumerate(zip(heads["written"], heads["first"], strict=True)):
        start = max(end - capacity, first, 0)
        while start < end:
            count = min(BLOCK, end - start, ring - start % ring)
            yield Run(stream, start, stream * ring + start % ring, count)
            start += count

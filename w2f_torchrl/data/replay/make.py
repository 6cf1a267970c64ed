"""Make a replay in memory or on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from torchrl.data import LazyMemmapStorage, LazyTensorStorage

from w2f_torchrl.data.replay.buffer import StreamReplayBuffer
from w2f_torchrl.data.replay.latents import LatentStore
from w2f_torchrl.data.replay.record_files import Fields
from w2f_torchrl.data.replay.streams import StreamHeads
from w2f_torchrl.utils.checks import check_number


def make_replay(
    *,
    capacity: int,
    num_streams: int,
    batch_size: int,
    batch_length: int,
    path: str | Path | None = None,
    ring: int | None = None,
    exist_ok: bool = False,
    newest_first: bool = True,
    pin_memory: bool = False,
    seed: int | None = None,
    latents: Fields | None = None,
) -> StreamReplayBuffer:
    """Make a replay in memory or on disk.

    Memory is used as it fills: per record, 13 kB at 64 x 64 with masks, plus its latent.

    Args:
        capacity: Total records; each stream keeps ``capacity // num_streams``.
        num_streams: Envs that write to it (S).
        batch_size: Slices in a sample (B).
        batch_length: Records in a slice (T).
        path: A folder for memory-mapped files; None keeps the records in memory.
        ring: Slots of a stream, at least the records that it keeps; None for as many. Records in
            the other slots are not sampled, but checkpoints may need them.
        exist_ok: Whether files of an earlier replay in that folder may be overwritten.
        newest_first: Whether each new chunk of T records is sampled once before older ones.
        pin_memory: Whether samples lie in page-locked memory, for asynchronous copies to CUDA.
        seed: Seed of the samples; None uses torch's global generator.
        latents: Entries of the latent that is stored with each record, from
            :func:`~w2f_torchrl.data.latent_fields`; None stores none.

    Raises:
        ValueError: If a size is not positive, a stream cannot hold a slice, or options exclude
            each other.
        FileExistsError: If the folder is not empty and ``exist_ok`` is False.
    """
    _check_sizes(
        capacity=capacity,
        num_streams=num_streams,
        batch_size=batch_size,
        batch_length=batch_length,
    )
    heads = StreamHeads(num_streams, capacity // num_streams, ring)
    if pin_memory and not torch.cuda.is_available():
        raise ValueError("pin_memory=True needs a CUDA device to copy to; CUDA is not available.")
    rows = num_streams * heads.ring
    storage = _make_storage(rows, path, exist_ok)
    store = None
    if latents is not None:
        folder = None if path is None else Path(path) / "latents"
        store = LatentStore(latents, rows, folder=folder)
    return StreamReplayBuffer(
        storage,
        heads,
        batch_size=batch_size,
        batch_length=batch_length,
        newest_first=newest_first,
        pin_memory=pin_memory,
        generator=None if seed is None else torch.Generator().manual_seed(seed),
        folder=None if path is None else Path(path),
        latents=store,
    )


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        check_number(name, value, integer=True)
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}.")
    per_stream = sizes["capacity"] // sizes["num_streams"]
    if sizes["batch_length"] > per_stream:
        raise ValueError(
            f"batch_length={sizes['batch_length']} exceeds the {per_stream} records that each of "
            f"num_streams={sizes['num_streams']} streams keeps with capacity={sizes['capacity']}: "
            f"it needs a capacity of at least {sizes['batch_length'] * sizes['num_streams']}."
        )


def _make_storage(size: int, path: str | Path | None, exist_ok: bool) -> LazyTensorStorage:
    if path is None:
        return LazyTensorStorage(size)
    folder = Path(path)
    if not exist_ok and folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"The replay's folder {folder} is not empty: choose another one.")
    folder.mkdir(parents=True, exist_ok=True)
    # Without auto_cleanup=False TorchRL may install handlers for SIGINT and SIGTERM.
    return LazyMemmapStorage(size, scratch_dir=str(folder), existsok=exist_ok, auto_cleanup=False)

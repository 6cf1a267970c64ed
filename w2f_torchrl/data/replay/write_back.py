"""Writes the latents of updates back into the replay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from w2f_torchrl.data.replay.latents import LatentStore
from w2f_torchrl.data.replay.streams import StreamHeads

if TYPE_CHECKING:
    from collections.abc import Callable


class PendingLatents(NamedTuple):
    """Posterior latents of an update that are not yet written."""

    stream: Tensor
    """Stream of each slice: int64 ``[B]``."""
    start: Tensor
    """Position of each slice's first record: int64 ``[B]``."""
    values: dict[str, Tensor]
    """Packed latents ``[B, T, ...]``."""
    applied: Tensor
    """Whether the update was applied: a scalar, 0 or 1."""
    ready: torch.cuda.Event | None
    """Set when ``values`` and ``applied`` have arrived."""


class LatentWriteBack:
    """Write the posterior latents of each update into the replay when the next update is added.

    They are written one update late, so that on CUDA the host waits only for an update behind which
    another one is already queued. CPUs do the same: results depend neither on the device nor on
    timing.

    The latent of step t of a slice is stored with the record of step t + 1, which it precedes, and
    that of the last step with the record after the slice. Skipped are records that were overwritten
    since the slice was sampled, a record after the slice that does not exist yet, and the first
    observations of episodes, which nothing precedes. If slices of a sample overlap, the later slice
    wins. An update that was not applied (its gradients were not finite) writes nothing.

    Args:
        store: The replay's latents.
        heads: The replay's write heads.
        is_init: Maps slots ``[N]`` to whether their records begin an episode, bool ``[N]``.
    """

    def __init__(
        self, store: LatentStore, heads: StreamHeads, is_init: Callable[[Tensor], Tensor]
    ) -> None:
        self._store, self._heads, self._is_init = store, heads, is_init
        self._pending: PendingLatents | None = None
        self._side_stream: torch.cuda.Stream | None = None

    def add(self, index: Tensor, latents: Mapping[str, Tensor], applied: Tensor) -> None:
        """Take the latents of an update, and write those of the previous one.

        Args:
            index: The sample's slots, int64 ``[B, T]``. Nothing may have been written to the
                replay since it was drawn.
            latents: Packed posterior latents ``[B, T, ...]``, on any device.
            applied: Whether the update was applied: a scalar on the same device.
        """
        stream, start = self._heads.places(index[:, 0].cpu())
        # The copy is queued before the host waits for the previous one.
        values, ready = self._to_store({**latents, "": applied})
        pending = PendingLatents(stream, start, values, values.pop(""), ready)
        self._write(self._pending)
        self._pending = pending

    def clear(self) -> None:
        """Discard the latents that are not yet written."""
        self._pending = None

    def state_dict(self) -> dict[str, Any] | None:
        """Return the latents that are not yet written; None without any."""
        pending = self._pending
        if pending is None or not _was_applied(pending):
            return None
        return {
            "stream": pending.stream,
            "start": pending.start,
            "values": {name: value.cpu() for name, value in pending.values.items()},
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Load a state from :meth:`state_dict`."""
        self._pending = None
        if state is not None:
            applied = torch.ones(())
            self._pending = PendingLatents(
                state["stream"], state["start"], dict(state["values"]), applied, None
            )

    def _to_store(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
        """Copy tensors to the store's device; on CUDA asynchronously, during computation."""
        device = next(iter(tensors.values())).device
        if device.type != "cuda" or self._store.device.type != "cpu":
            return {k: v.detach().clone() for k, v in tensors.items()}, None
        if self._side_stream is None:
            self._side_stream = torch.cuda.Stream(device)
        side = self._side_stream
        side.wait_stream(torch.cuda.current_stream(device))
        copies = {}
        with torch.cuda.stream(side):
            for name, tensor in tensors.items():
                copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                copies[name].copy_(tensor.detach(), non_blocking=True)
                tensor.record_stream(side)  # its memory must not be reused before the copy
            return copies, side.record_event()

    def _write(self, pending: PendingLatents | None) -> None:
        if pending is None or not _was_applied(pending):
            return
        heads = self._heads
        length = next(iter(pending.values.values())).shape[1]
        stream = pending.stream.unsqueeze(-1).expand(-1, length)  # [B, T]
        position = pending.start.unsqueeze(-1) + torch.arange(1, length + 1)
        oldest = heads.written - heads.stored
        rows = ((position >= oldest[stream]) & (position < heads.written[stream])).flatten()
        rows = rows.nonzero().squeeze(-1)  # of [B * T]
        slots = heads.slots(stream, position).flatten()
        rows = rows[~self._is_init(slots[rows])]
        rows = _last_of_each(slots[rows], rows)
        values = {
            name: value.flatten(0, 1).index_select(0, rows.to(value.device))
            for name, value in pending.values.items()
        }
        self._store.write(slots[rows], values)


def _was_applied(pending: PendingLatents) -> bool:
    """Return whether the update was applied; wait until its latents have been copied."""
    if pending.ready is not None:
        pending.ready.synchronize()
    return bool(pending.applied)


def _last_of_each(keys: Tensor, rows: Tensor) -> Tensor:
    """Return for each distinct key ``[N]`` the last of its rows ``[N]``."""
    order = keys.argsort(stable=True)
    last = torch.ones(len(order), dtype=torch.bool)
    last[:-1] = keys[order][1:] != keys[order][:-1]
    return rows[order[last]]

"""From environments to training batches: collection, records, replay and the update schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from w2f_torchrl._lazy import lazy_exports

if TYPE_CHECKING:
    from w2f_torchrl.data.collector.make import make_collector, sync_policy_weights
    from w2f_torchrl.data.collector.overlap import OverlappedCollector
    from w2f_torchrl.data.collector.resumable import collector_state, load_collector_state
    from w2f_torchrl.data.collector.workers import WorkerError
    from w2f_torchrl.data.records import records_from_rollout
    from w2f_torchrl.data.replay.buffer import StreamReplayBuffer
    from w2f_torchrl.data.replay.latents import latent_fields
    from w2f_torchrl.data.replay.make import make_replay
    from w2f_torchrl.data.schedule import UpdateSchedule
    from w2f_torchrl.masks.packing import pack_mask, unpack_mask
    from w2f_torchrl.masks.store import MaskStore, load_masks
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "collector.make": ("make_collector", "sync_policy_weights"),
            "collector.resumable": ("collector_state", "load_collector_state"),
            "replay.latents": ("latent_fields",),
            "w2f_torchrl.masks.store": ("MaskStore", "load_masks"),
            "w2f_torchrl.masks.packing": ("pack_mask", "unpack_mask"),
            "collector.overlap": ("OverlappedCollector",),
            "records": ("records_from_rollout",),
            "replay.buffer": ("StreamReplayBuffer",),
            "replay.make": ("make_replay",),
            "schedule": ("UpdateSchedule",),
            "collector.workers": ("WorkerError",),
        },
    )

__all__ = [
    "MaskStore",
    "OverlappedCollector",
    "StreamReplayBuffer",
    "UpdateSchedule",
    "WorkerError",
    "collector_state",
    "latent_fields",
    "load_collector_state",
    "load_masks",
    "make_collector",
    "make_replay",
    "pack_mask",
    "records_from_rollout",
    "sync_policy_weights",
    "unpack_mask",
]

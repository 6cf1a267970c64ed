"""From environments to training batches: collection, records, replay and the update schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from w2f_torchrl._lazy import lazy_exports

if TYPE_CHECKING:
    from w2f_torchrl.data.collection import make_collector, sync_policy_weights
    from w2f_torchrl.data.latents import latent_fields
    from w2f_torchrl.data.mask_store import MaskStore, load_masks
    from w2f_torchrl.data.masks import pack_mask, unpack_mask
    from w2f_torchrl.data.overlap import OverlappedCollector
    from w2f_torchrl.data.records import records_from_rollout
    from w2f_torchrl.data.replay import StreamReplayBuffer, make_replay
    from w2f_torchrl.data.resumable import collector_state, load_collector_state
    from w2f_torchrl.data.schedule import UpdateSchedule
    from w2f_torchrl.data.workers import WorkerError
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "collection": ("make_collector", "sync_policy_weights"),
            "resumable": ("collector_state", "load_collector_state"),
            "latents": ("latent_fields",),
            "mask_store": ("MaskStore", "load_masks"),
            "masks": ("pack_mask", "unpack_mask"),
            "overlap": ("OverlappedCollector",),
            "records": ("records_from_rollout",),
            "replay": ("StreamReplayBuffer", "make_replay"),
            "schedule": ("UpdateSchedule",),
            "workers": ("WorkerError",),
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

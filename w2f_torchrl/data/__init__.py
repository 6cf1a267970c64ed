"""From environments to training batches: collection, records, replay and the update schedule."""

from __future__ import annotations

from w2f_torchrl.data.collection import make_collector, sync_policy_weights
from w2f_torchrl.data.mask_store import MaskStore, load_masks
from w2f_torchrl.data.masks import pack_mask, unpack_mask
from w2f_torchrl.data.records import records_from_rollout
from w2f_torchrl.data.replay import StreamReplayBuffer, make_replay
from w2f_torchrl.data.schedule import UpdateSchedule

__all__ = [
    "MaskStore",
    "StreamReplayBuffer",
    "UpdateSchedule",
    "load_masks",
    "make_collector",
    "make_replay",
    "pack_mask",
    "records_from_rollout",
    "sync_policy_weights",
    "unpack_mask",
]

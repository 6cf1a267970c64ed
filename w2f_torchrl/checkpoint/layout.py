"""The payload of a run's checkpoint, and that of older formats brought into its form.

Format 3 holds one entry per part of a run (:data:`SHARED_PARTS`, :data:`RANK_PARTS`), each what the
part's ``state_dict`` returned. Formats 1 and 2 spread the same values over the payload and over an
entry ``resume``; format 1 had no replay, random streams or environments.
"""

from __future__ import annotations

from typing import Any

HEADER = ("config", "action_size", "ranks", "exception")
"""Plain values about the run; only rank 0 writes them."""
SHARED_PARTS = ("learner", "counters", "masks", "evaluations")
"""Parts whose state is equal on all ranks. Rank 0 writes them; ``best.pt`` holds nothing else."""
RANK_PARTS = ("metrics", "failures", "diagnostics", "log", "collection", "sampling", "random")
"""Parts of which each rank writes its own."""
REPLAY = "replay"
"""The manifest of a rank's records, which the writer adds when they are on disk."""

_COUNTERS = ("steps", "frames", "first_steps", "schedule")
# Part, its entries, and what each was called under "resume" in format 2.
_RANK_ENTRIES = {
    "metrics": {"sums": "sums", "summed": "summed", "window": "window"},
    "log": {"bytes": "metrics_bytes", "wandb": "wandb"},
    "collection": {
        "collector": "collector",
        "held": "held",
        "worker_restarts": "worker_restarts",
        "environment": "environment",
    },
}
_OPTIONAL = ("held", "worker_restarts", "metrics_bytes", "wandb")
"""Entries that the first releases of format 2 did not write."""


def upgrade(payload: dict[str, Any], *, updates: int, frames: int) -> dict[str, Any]:
    """Bring the payload of format 1 or 2 into the form of format 3.

    Args:
        payload: As it was read. One that is not of a run is returned as it is.
        updates: Of the checkpoint.
        frames: Of the checkpoint.

    Raises:
        KeyError: If an entry that every file of its format has is missing.
    """
    if "learner" not in payload and "resume" not in payload:
        return payload
    made = {name: payload[name] for name in (*HEADER, REPLAY, "exported") if name in payload}
    saved = payload.get("resume") or {}
    if "learner" in payload:
        made["learner"] = payload["learner"]
    if "segmentation" in payload:
        ranks = payload.get("ranks", 1)
        made |= {
            "ranks": ranks,
            "masks": payload["segmentation"],
            "counters": {name: payload[name] for name in _COUNTERS if name in payload}
            | {"updates": updates, "ranks": ranks, "last_return": saved.get("last_return")},
            "evaluations": {
                "last": saved.get("evaluated", payload.get("frames", frames)),
                "best": saved.get("best"),
            },
        }
    return made | (_rank_parts(saved) if saved else {})


def _rank_parts(saved: dict[str, Any]) -> dict[str, Any]:
    parts: dict[str, Any] = {
        part: {
            name: saved.get(former) if former in _OPTIONAL else saved[former]
            for name, former in entries.items()
        }
        for part, entries in _RANK_ENTRIES.items()
    }
    return parts | {
        "failures": dict(saved.get("failures") or {}),
        "diagnostics": {"videos_at": saved["videos_at"]},
        "sampling": saved["sampling"],
        "random": saved["random"],
    }

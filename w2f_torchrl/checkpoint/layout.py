"""The payload of a run's checkpoint, and the conversion of older formats.

Format 3 holds one entry per part of a run (:data:`SHARED_PARTS`, :data:`RANK_PARTS`), the result of
the part's ``state_dict``. Formats 1 and 2 spread the same values over the payload and an entry
``resume``; format 1 had no replay, random streams or environments.
"""

from __future__ import annotations

from typing import Any

HEADER = ("config", "action_size", "discrete_actions", "ranks", "exception")
"""Plain values about the run, written only by rank 0. Without ``discrete_actions``, as in older
files, actions are continuous."""
SHARED_PARTS = ("learner", "counters", "masks", "evaluations")
"""Parts with equal state on all ranks, written by rank 0; the only parts in ``best.pt``."""
RANK_PARTS = ("metrics", "failures", "diagnostics", "log", "collection", "sampling", "random")
"""Parts that every rank writes separately."""
REPLAY = "replay"
"""The manifest of a rank's records, added by the writer when they are on disk."""

_COUNTERS = ("steps", "frames", "first_steps", "schedule")
# Parts and their entries, with the name of each under "resume" in format 2.
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
    """Convert the payload of format 1 or 2 to format 3.

    Args:
        payload: The payload of the file. It is returned unchanged if it does not belong to a run.
        updates: Updates of the checkpoint.
        frames: Frames of the checkpoint.

    Raises:
        KeyError: If a required entry of its format is missing.
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

"""``metrics.jsonl``: reading it, and mending what a crash left. Needs no torch."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def read_metrics(run_dir: str | os.PathLike[str]) -> list[dict[str, float]]:
    """Read the metrics of a run, which may still be going on.

    Args:
        run_dir: A run directory.

    Returns:
        One dict per line with ``frames`` and ``updates`` (int) and the metrics (float; NaN where
        the line has null). A last line that is still being written, or was torn, is left out.

    Raises:
        FileNotFoundError: If there is no ``metrics.jsonl``.
        ValueError: If a line before the last is damaged; names the file and the line.
    """
    path = Path(run_dir) / "metrics.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: {run_dir} is not a run directory.")
    return [
        {name: math.nan if value is None else value for name, value in record.items()}
        for record in read_records(path)
    ]


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Read the lines of a file as they are, null where a value wasn't finite.

    Raises:
        ValueError: If a line before the last is damaged; names the file and the line.
    """
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            record = _parse(line)
            if record is not None:
                yield record
            elif line.endswith(b"\n"):
                raise ValueError(f"{path}, line {number}: not a metrics record: {line[:80]!r}.")


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not {"frames", "updates"} <= record.keys():
        return None
    return record


def repair(path: Path) -> None:
    """Make the file end with a whole line."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole, newline, tail = content.rpartition(b"\n")
    if not tail:
        return
    if _parse(tail) is not None:
        with path.open("ab") as stream:  # only the line's end is missing
            stream.write(b"\n")
        return
    logger.warning("%s: removed an incomplete last line of %d bytes.", path, len(tail))
    os.truncate(path, len(whole) + len(newline))


def last_counters(path: Path) -> tuple[int, int]:
    """Return the highest frames and updates in the file."""
    frames = updates = 0
    if path.exists():
        for record in read_records(path):
            frames, updates = max(frames, record["frames"]), max(updates, record["updates"])
    return frames, updates

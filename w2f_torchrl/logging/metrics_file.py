"""Read ``metrics.jsonl``, and repair it after a crash. Needs no torch."""

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
    """Read the metrics of a run, which may still be in progress.

    Args:
        run_dir: A run directory.

    Returns:
        One dict per line with ``frames`` and ``updates`` (int) and the metrics (float; NaN for
        null). An incomplete last line is skipped, and any other damaged line with a warning.

    Raises:
        FileNotFoundError: If ``metrics.jsonl`` does not exist.
    """
    path = Path(run_dir) / "metrics.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: {run_dir} is not a run directory.")
    return [
        {name: math.nan if value is None else value for name, value in record.items()}
        for record in read_records(path)
    ]


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Read the lines of a file unchanged, with null for values that were not finite.

    Damaged ones are skipped, with a warning for those before the last.
    """
    damaged: list[int] = []
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            record = _parse(line)
            if record is not None:
                yield record
            elif line.endswith(b"\n"):
                damaged.append(number)
    if damaged:
        logger.warning("%s: skipped damaged lines %s", path, _listed(damaged))


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:10])) + (" ..." if len(numbers) > 10 else "")


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    counters = [record.get("frames"), record.get("updates")]
    numbers = all(v is None or isinstance(v, (int, float)) for v in record.values())
    return record if numbers and all(type(value) is int for value in counters) else None


def repair(path: Path) -> None:
    """Make the file end with a complete line."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole, newline, tail = content.rpartition(b"\n")
    if not tail:
        return
    if _parse(tail) is not None:
        with path.open("ab") as stream:  # only the newline is missing
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

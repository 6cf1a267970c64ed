"""The data of the report's curves, thinned so that a page stays small."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from w2f_torchrl.logging.metric_names import METRICS, meaning_of
from w2f_torchrl.report.runs import Run

POINTS = 500
"""Maximum number of points per curve; longer curves are averaged in equal parts."""
SECTIONS = {
    "Returns": ("eval", "episode"),
    "World model": ("wm",),
    "Actor and critic": ("ac",),
    "Masks and imagination": ("segmentation", "train"),
    "Recorded episodes": ("recorded",),
    "Speed": ("speed",),
    "Weights": ("weights",),
    "Gradients": ("gradients",),
    "Latents": ("latents",),
}
FOLDED = {"Weights", "Gradients", "Latents"}
_BANDS = {"eval/return_mean": "eval/return_std"}
_HIDDEN = {"eval/return_std"}

Point = tuple[int, int, float | None]


def thin(points: Sequence[tuple[int, int, float]], most: int = POINTS) -> list[Point]:
    """Average neighbours until at most ``most`` points remain.

    Args:
        points: Frames, updates and value, in order of time.
        most: At least 1.

    Returns:
        The last frames and updates of each part with the mean of its finite values, or None.
    """
    size = max(1, -(-len(points) // most))
    out: list[Point] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        finite = [value for _, _, value in part if math.isfinite(value)]
        mean = sum(finite) / len(finite) if finite else None
        out.append((part[-1][0], part[-1][1], mean))
    return out


def chart_data(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return every metric of the runs, by section.

    Returns:
        Sections with ``title``, ``folded`` and ``charts``. A chart has ``name``, ``unit``,
        ``text``, ``dots`` (points are not connected) and ``series``: for each run with the metric
        its index, its points, and for the evaluations' mean the standard deviations.
    """
    names = {name for run in runs for row in run.records for name in row} - {"frames", "updates"}
    order = {name: place for place, name in enumerate(METRICS)}
    ordered = sorted(names - _HIDDEN, key=lambda name: (order.get(name, len(order)), name))
    sections = []
    for title, groups in SECTIONS.items():
        chosen = [name for name in ordered if name.split("/")[0] in groups]
        charts = [chart for chart in (_chart(name, runs) for name in chosen) if chart["series"]]
        if charts:
            sections.append({"title": title, "folded": title in FOLDED, "charts": charts})
    return sections


def _chart(name: str, runs: Sequence[Run]) -> dict[str, Any]:
    series = []
    for index, run in enumerate(runs):
        points = thin(run.series(name))
        if not points:
            continue
        entry: dict[str, Any] = {"run": index, "points": points}
        if name in _BANDS:
            entry["band"] = [value for _, _, value in thin(run.series(_BANDS[name]))]
        series.append(entry)
    unit, text = meaning_of(name)
    dots = name.startswith("episode/")  # several episodes may end at the same frame
    return {"name": name, "unit": unit, "text": text, "dots": dots, "series": series}

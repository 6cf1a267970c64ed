"""Compute the statistics of a generalisation table with rliable; format and draw it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from rliable import library, metrics

Array = npt.NDArray[np.float64]

OWN = "own"
"""The environment that a run was trained in."""
MAX_RETURN = 1000.0
"""Of an episode of the Control Suite."""
FEWEST_SEEDS = 3
"""From this many seeds on intervals are over seeds; below, over all episodes."""
RESAMPLES = 2000


class Played(NamedTuple):
    """What one run scored in one evaluation set.

    Attributes:
        method: The algorithm and its latent.
        task: Domain and task.
        seed: The run's.
        set: The evaluation set's name.
        returns: One per episode.
        mask_iou: Mean over the episodes; None without masks.
    """

    method: str
    task: str
    seed: int
    set: str
    returns: list[float]
    mask_iou: float | None


class Estimate(NamedTuple):
    """A mean, or another aggregate, with its 95 % interval."""

    value: float
    low: float
    high: float
    over: str
    """The samples that were resampled: seeds or episodes."""


def cell(played: Sequence[Played]) -> Estimate:
    """The mean return of the runs of one method, task and set.

    With 3 seeds or more a sample is a seed's mean; with fewer every episode is one, and the
    interval leaves out what differs between seeds.
    """
    over_seeds = len(played) >= FEWEST_SEEDS
    samples = (
        [float(np.mean(each.returns)) for each in played]
        if over_seeds
        else [value for each in played for value in each.returns]
    )
    scores = np.array(samples)[:, None]
    return estimate(scores, metrics.aggregate_mean, "seeds" if over_seeds else "episodes")


def aggregate(played: Sequence[Played]) -> Estimate:
    """The interquartile mean over tasks and seeds of one method in one set, as a share of 1000.

    Raises:
        ValueError: If the tasks have different numbers of seeds.
    """
    by_task: dict[str, list[float]] = {}
    for each in played:
        by_task.setdefault(each.task, []).append(float(np.mean(each.returns)) / MAX_RETURN)
    if len({len(scores) for scores in by_task.values()}) > 1:
        counts = ", ".join(f"{task}: {len(scores)}" for task, scores in by_task.items())
        raise ValueError(f"an aggregate needs as many seeds of every task, got {counts}.")
    scores = np.array(list(by_task.values())).T  # [seeds, tasks]
    return estimate(scores, metrics.aggregate_iqm, "seeds, stratified by task")


def estimate(scores: Array, statistic: Callable[[Array], float], over: str) -> Estimate:
    """Return a statistic of scores ``[runs, tasks]`` with its stratified bootstrap interval.

    Args:
        scores: A row for each run, a column for each task.
        statistic: Maps scores to a number.
        over: What a row is, for :class:`Estimate`.
    """
    # rliable resamples with numpy's global generator, whatever random_state it is given.
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    try:
        points, intervals = library.get_interval_estimates(
            {"scores": scores}, lambda sample: np.array([statistic(sample)]), reps=RESAMPLES
        )
    finally:
        np.random.set_state(before)  # noqa: NPY002
    low, high = intervals["scores"][:, 0]
    return Estimate(float(points["scores"][0]), float(low), float(high), over)


def summarise(played: Sequence[Played], difficulty: str) -> dict[str, object]:
    """All cells, gaps and aggregates, as plain values.

    Args:
        played: Of all runs and sets.
        difficulty: The gap is the mean return before training videos of this difficulty less that
            in front of unseen ones.
    """
    cells, gaps = [], []
    for method, task in _pairs(played):
        means = {}
        for name in _sets(played):
            runs = [p for p in played if (p.method, p.task, p.set) == (method, task, name)]
            if not runs:
                continue
            estimate = cell(runs)
            means[name] = estimate.value
            ious = [p.mask_iou for p in runs if p.mask_iou is not None]
            cells.append(
                {"method": method, "task": task, "set": name, "seeds": len(runs)}
                | {"episodes": sum(len(p.returns) for p in runs)}
                | {"mask_iou": float(np.mean(ious)) if ious else None}
                | estimate._asdict()
            )
        seen, unseen = f"train_videos_{difficulty}", f"unseen_videos_{difficulty}"
        if seen in means and unseen in means:
            gaps.append({"method": method, "task": task, "gap": means[seen] - means[unseen]})
    aggregates, missing = [], []
    for method in dict.fromkeys(p.method for p in played):
        for name in _sets(played):
            runs = [p for p in played if (p.method, p.set) == (method, name)]
            if absent := sorted({p.task for p in played} - {p.task for p in runs}):
                missing.append(f"{method}, {name}: not played on {', '.join(absent)}")
                continue
            try:
                aggregates.append({"method": method, "set": name} | aggregate(runs)._asdict())
            except ValueError as error:
                missing.append(f"{method}, {name}: {error}")
    return {"cells": cells, "gaps": gaps, "aggregates": aggregates, "not_aggregated": missing}


def _pairs(played: Sequence[Played]) -> list[tuple[str, str]]:
    return sorted(dict.fromkeys((p.method, p.task) for p in played), key=lambda pair: pair[::-1])


def _sets(played: Sequence[Played]) -> list[str]:
    return list(dict.fromkeys(p.set for p in played))


def markdown(summary: dict[str, list[dict[str, object]]]) -> str:
    """The table: a row for each task and method, the aggregates at the end."""
    cells = summary["cells"]
    sets = list(dict.fromkeys(str(c["set"]) for c in cells))
    gaps = {(g["method"], g["task"]): f"{g['gap']:.0f}" for g in summary["gaps"]}
    found = {(c["method"], c["task"], c["set"]): c for c in cells}
    lines = [["task", "method", *sets, "gap", *(f"IoU {name}" for name in sets)]]
    lines.append(["---"] * len(lines[0]))
    for method, task in dict.fromkeys((c["method"], c["task"]) for c in cells):
        row = [found.get((method, task, name)) for name in sets]
        texts = [
            "-" if c is None else f"{c['value']:.0f} [{c['low']:.0f}, {c['high']:.0f}]" for c in row
        ]
        ious = ["-" if c is None or c["mask_iou"] is None else f"{c['mask_iou']:.2f}" for c in row]
        lines.append([str(task), str(method), *texts, gaps.get((method, task), "-"), *ious])
    overall = {(a["method"], a["set"]): a for a in summary["aggregates"]}
    for method in dict.fromkeys(a["method"] for a in summary["aggregates"]):
        row = [overall.get((method, name)) for name in sets]
        texts = [
            "-" if a is None else f"{a['value']:.3f} [{a['low']:.3f}, {a['high']:.3f}]" for a in row
        ]
        lines.append(["all (IQM / 1000)", str(method), *texts, "", *[""] * len(sets)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(summary: dict[str, list[dict[str, object]]]) -> Figure:
    """Bars of the mean return with its interval: a panel for each task, a group for each set."""
    cells = summary["cells"]
    tasks = list(dict.fromkeys(str(c["task"]) for c in cells))
    methods = list(dict.fromkeys(str(c["method"]) for c in cells))
    sets = list(dict.fromkeys(str(c["set"]) for c in cells))
    figure = Figure(figsize=(1.6 + 1.5 * len(sets), 3.2 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), 1, squeeze=False)[:, 0]
    width = 0.8 / len(methods)
    for axes, task in zip(panels, tasks, strict=True):
        for index, method in enumerate(methods):
            chosen = [c for c in cells if (c["task"], c["method"]) == (task, method)]
            places = np.array([sets.index(str(c["set"])) for c in chosen]) + index * width
            values = np.array([[c["value"], c["low"], c["high"]] for c in chosen], dtype=float).T
            if not chosen:
                continue
            error = np.clip([values[0] - values[1], values[2] - values[0]], 0, None)
            # The color is the method's in every panel, whoever else is in it.
            axes.bar(
                places, values[0], width, yerr=error, capsize=2, label=method, color=f"C{index}"
            )
        axes.set_xticks(np.arange(len(sets)) + 0.4 - width / 2, sets, rotation=20, ha="right")
        axes.set_ylabel("mean return")
        axes.set_title(task)
    named = dict(zip(*panels[0].get_legend_handles_labels()[::-1], strict=True))
    for axes in panels[1:]:
        named = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True)) | named
    figure.legend(
        [named[method] for method in methods], methods, loc="outside upper center",
        ncols=len(methods), fontsize="small", frameon=False,
    )  # fmt: skip
    return figure

"""Aggregate measures of methods in worlds with rliable; format and draw them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from generalisation_table import MAX_RETURN, Estimate, estimate
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rliable import metrics

Array = npt.NDArray[np.float64]
COLORS = ("#3b6fb6", "#c8553d", "#4f9d69", "#8d6cab", "#b8923a", "#5b5b5b", "#3fa7b5", "#a3355e")
SCENERIES = ("seen", "unseen", "real")
COLUMNS = {
    "clip": "leakage/foreground/clip/linear",
    "chance": "leakage/foreground/clip/chance",
    "camera R2": "leakage/foreground/camera/linear",
    "colour R2": "leakage/foreground/color/linear",
    "grid R2": "leakage/foreground/grid/linear",
    "pose R2": "content/foreground/pose/linear",
    "velocity R2": "content/foreground/velocity/linear",
    "action, replaced": "replacement/action_change_relative",
    "value, replaced": "replacement/value_change_relative",
    "action, removed": "removal/action_change_relative",
    "value, removed": "removal/value_change_relative",
    "apart, first": "divergence/latent/first",
    "apart, last": "divergence/latent/last",
}
"""Columns of the second table, and the measures that they show."""


class Measured(NamedTuple):
    """What was measured of one run.

    Attributes:
        method: Name of the method.
        world: Name of the scenery that it was trained with.
        task: Domain and task.
        seed: The run's.
        frames: That it was trained for.
        seen: Returns of episodes before the scenery of training.
        unseen: Returns in front of unseen scenery; empty in a world without scenery.
        real: Returns in front of unseen real clips, after training with computed ones.
        measures: All others by name, see :data:`COLUMNS`.
        divergence: Distance of latents from histories with and without scenery, relative to
            random ones, over the horizon; empty in a world without scenery.
    """

    method: str
    world: str
    task: str
    seed: int
    frames: int = 0
    seen: Sequence[float] = ()
    unseen: Sequence[float] = ()
    real: Sequence[float] = ()
    measures: dict[str, float] = {}  # noqa: RUF012  # never written to
    divergence: Sequence[float] = ()


def read_entries(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the runs of results files of methods.py.

    Raises:
        OSError: If a file can't be read.
        ValueError: If it is no such file, or an old one, which lacks the settings of its runs.
    """
    entries = []
    for path in paths:
        found = json.loads(path.read_text())
        runs = found.get("runs") if isinstance(found, dict) else None
        wanted = {"overrides", "measured_with", *Measured._fields}
        if not runs or not all(wanted <= run.keys() for run in runs):
            raise ValueError(f"--add {path} is not a results file of methods.py with settings.")
        entries += runs
    return entries


def summarise(measured: Sequence[Measured]) -> dict[str, Any]:
    """Aggregate over tasks and seeds.

    Args:
        measured: The runs.

    Returns:
        ``returns``: a row for each method, world and scenery with the interquartile mean over
        tasks and seeds of mean returns / 1000, its 95 % interval, and every run's; an aggregate
        needs as many seeds of every task, and is None otherwise. ``measures``: a row for each
        method and world with means over tasks and seeds, and the divergence over the horizon.
    """
    returns, rows = [], []
    for method, world in dict.fromkeys((m.method, m.world) for m in measured):
        runs = [m for m in measured if (m.method, m.world) == (method, world)]
        for scenery in SCENERIES:
            played = [(m, getattr(m, scenery)) for m in runs if getattr(m, scenery)]
            if not played:
                continue
            scores: dict[str, dict[int, float]] = {}
            for run, values in played:
                scores.setdefault(run.task, {})[run.seed] = float(np.mean(values)) / MAX_RETURN
            found = aggregate([list(each.values()) for each in scores.values()])
            returns.append(
                {"method": method, "world": world, "scenery": scenery, "scores": scores}
                | {"estimate": None if found is None else found._asdict()}
            )
        names = dict.fromkeys(name for m in runs for name in m.measures)
        means = {
            name: float(np.mean([m.measures[name] for m in runs if name in m.measures]))
            for name in names
        }
        curves = [m.divergence for m in runs if m.divergence]
        rows.append(
            {"method": method, "world": world, "measures": means, "runs": len(runs)}
            | {"divergence": np.mean(curves, 0).tolist() if curves else []}
        )
    return {"returns": returns, "measures": rows}


def aggregate(scores: Sequence[Sequence[float]]) -> Estimate | None:
    """Return the interquartile mean with its interval; None if tasks differ in their seeds.

    Args:
        scores: A list per task, with a number per seed.
    """
    if len({len(each) for each in scores}) > 1:
        return None
    table = np.array(scores).T  # [seeds, tasks]
    return estimate(table, metrics.aggregate_iqm, "seeds, stratified by task")


def markdown(summary: dict[str, Any], missing: Sequence[str] = ()) -> str:
    """Return the tables: returns, then all other measures of each world with scenery.

    Args:
        summary: Of :func:`summarise`.
        missing: Names of runs that are not finished.
    """
    rows = summary["returns"]
    columns = list(dict.fromkeys((r["world"], r["scenery"]) for r in rows))
    found = {(r["method"], r["world"], r["scenery"]): r for r in rows}
    methods = list(dict.fromkeys(r["method"] for r in rows))
    head = ["IQM of returns / 1000", *(f"{world}, {scenery}" for world, scenery in columns)]
    table = [[m, *(_cell(found.get((m, *each))) for each in columns)] for m in methods]
    text = _table(head, table)
    tasks = dict.fromkeys(task for r in rows for task in r["scores"])
    head = ["mean return", *(f"{world}, {scenery}" for world, scenery in columns)]
    table = [
        [f"{m}, {task}", *(_each(found.get((m, *each)), task) for each in columns)]
        for task in tasks
        for m in methods
    ]
    text += "\n" + _table(head, table)
    for world in dict.fromkeys(r["world"] for r in summary["measures"]):
        chosen = [r for r in summary["measures"] if r["world"] == world]
        shown = [n for n, key in COLUMNS.items() if any(key in r["measures"] for r in chosen)]
        body = [
            [r["method"], str(r["runs"]), *(_number(r["measures"].get(COLUMNS[n])) for n in shown)]
            for r in chosen
        ]
        text += "\n" + _table([f"world: {world}", "runs", *shown], body)
    if missing:
        text += f"\nNot finished: {', '.join(missing)}.\n"
    return text


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not run"
    if (found := row["estimate"]) is None:
        return "seeds differ"
    return f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def _each(row: dict[str, Any] | None, task: str) -> str:
    if row is None or task not in row["scores"]:
        return "not run"
    return ", ".join(f"{MAX_RETURN * value:.0f}" for value in row["scores"][task].values())


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(summary: dict[str, Any]) -> Figure:
    """Draw a column for each world: returns with intervals, and the divergence over the horizon.

    Args:
        summary: Of :func:`summarise`.
    """
    worlds = list(dict.fromkeys(r["world"] for r in summary["returns"]))
    methods = list(dict.fromkeys(r["method"] for r in summary["returns"]))
    figure = Figure(figsize=(1.2 + 2.6 * len(worlds), 6.4), layout="constrained")
    panels = figure.subplots(2, len(worlds), squeeze=False, sharey="row")
    for column, world in enumerate(worlds):
        above, below = panels[:, column]
        above.set_title(f"scenery: {world}", fontsize=10)
        _draw_returns(above, [r for r in summary["returns"] if r["world"] == world], methods)
        for row in (r for r in summary["measures"] if r["world"] == world):
            curve, color = row["divergence"], COLORS[methods.index(row["method"])]
            if curve:
                below.plot(range(len(curve)), curve, color=color, lw=1.5)
        if not below.lines:
            below.text(0.5, 0.5, "no scenery", ha="center", transform=below.transAxes, fontsize=9)
        below.set_xlabel("predicted agent steps", fontsize=9)
    marks = "filled: scenery of training\nhollow: unseen, diamond: real clips"
    panels[0, 0].set_ylabel(f"interquartile mean of returns / 1000\n{marks}", fontsize=8)
    panels[1, 0].set_ylabel("distance of latents with and\nwithout scenery (1: random)", fontsize=9)
    panels[0, 0].set_ylim(0, 1)
    panels[1, 0].set_ylim(bottom=0)
    return figure


def _draw_returns(axes: Axes, rows: Sequence[dict[str, Any]], methods: Sequence[str]) -> None:
    """Mark each method's mean in seen scenery, filled, and in unseen and real scenery, hollow."""
    for row in rows:
        if (found := row["estimate"]) is None:
            continue
        place, kind = methods.index(row["method"]), SCENERIES.index(row["scenery"])
        value = found["value"]
        error = [[max(value - found["low"], 0)], [max(found["high"] - value, 0)]]
        color = COLORS[place]
        axes.errorbar(
            [place + 0.2 * kind], [value], yerr=error, color=color, marker="ood"[kind], ms=6,
            mfc="white" if kind else color, capsize=2, lw=1.2,
        )  # fmt: skip
    axes.set_xticks(range(len(methods)), methods, rotation=60, ha="right", fontsize=8)

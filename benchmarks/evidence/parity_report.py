"""Report the runs of :mod:`parity`: a comparison at equal updates, and curves."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from parity_settings import PROJECTS, ROW, SETTINGS_NAME, Settings, read_settings
from results_file import write_results

from w2f_torchrl.logging.metrics_file import read_metrics
from w2f_torchrl.logging.pictures.plotting import metric_series, save_figure

LOSSES = {
    "image_loss": "wm/image_loss",
    "kl": "wm/kl_value",
    "reward_loss": "wm/reward_loss",
}
LOWER_IS_BETTER = {"image_loss": True, "reward_loss": True, "return": False}
"""The KL is neither: it is the information that the picture's reconstruction pays for."""
UNITS = {
    "image_loss": "squared colour, summed over the picture",
    "kl": "nats, summed over the categoricals, without free nats",
    "reward_loss": "nats",
    "return": "return of training episodes",
}
FIRST_WINDOWS = (50, 100, 200, 400, 800, 1400)
COLORS = {"r2dreamer": "#c8553d", "ours": "#3b6fb6"}


@dataclass(frozen=True)
class Run:
    """A run's metrics."""

    project: str
    settings: Settings
    facts: dict[str, Any]
    """What :func:`~parity_settings.note_settings` wrote."""
    rows: list[dict[str, float]]
    usage: list[dict[str, Any]]
    """One entry for each process: commits and times."""

    @property
    def updates(self) -> int:
        """The last row's."""
        return max((int(row["updates"]) for row in self.rows), default=0)


def load_runs(folder: Path) -> list[Run]:
    """Read the runs below a folder that have logged something.

    Raises:
        FileNotFoundError: If no run has.
    """
    runs = []
    for path in sorted(folder.glob(f"*/{SETTINGS_NAME}")):
        run_dir = path.parent
        if not (run_dir / "metrics.jsonl").exists() or not (rows := read_metrics(run_dir)):
            continue
        facts, settings = read_settings(run_dir)
        usage = run_dir / "usage.jsonl"
        lines = usage.read_text().splitlines() if usage.exists() else []
        runs.append(Run(facts["project"], settings, facts, rows, [json.loads(x) for x in lines]))
    if not runs:
        raise FileNotFoundError(f"{folder} holds no runs that have logged anything.")
    return runs


def windows(updates: int) -> list[int]:
    """Numbers of updates at which losses are compared, in a run of so many."""
    centres = [*FIRST_WINDOWS, *range(2_000, updates + 1, 1_000)]
    return [centre for centre in centres if centre + ROW <= updates]


def loss_at(run: Run, name: str, centre: int) -> float | None:
    """Mean of a loss over the ``2 x ROW`` updates around a number of updates.

    Args:
        run: The run.
        name: The metric in its rows.
        centre: A multiple of ROW; the updates are ``(centre - ROW, centre + ROW]``.

    Returns:
        None where the run doesn't reach that far.
    """
    found = {int(row["updates"]): row[name] for row in run.rows if name in row}
    if not {centre, centre + ROW} <= set(found):
        return None
    return (found[centre] + found[centre + ROW]) / 2


def return_at(run: Run, last: int) -> float | None:
    """Mean return of the episodes that ended in the round of episodes up to an update."""
    updates, returns = _series(run, "episode/return")
    if run.updates < last:
        return None
    chosen = returns[(updates > last - run.settings.episode_round) & (updates <= last)]
    return float(chosen.mean()) if len(chosen) else None


def compare(ours: Sequence[float], peers: Sequence[float], lower: bool | None) -> dict[str, Any]:
    """Compare a quantity of several seeds of both projects.

    Args:
        ours: One value a seed.
        peers: One value a seed.
        lower: Whether less is better; None if neither is.

    Returns:
        Means, ``gap`` (ours less theirs), ``ratio`` (None where theirs is not positive),
        ``spread`` (the larger range over the seeds; None with one seed of each) and ``verdict``:
        "level within the spread" if the gap is not larger than it, otherwise its direction.
    """
    mean_ours, mean_peers = float(np.mean(ours)), float(np.mean(peers))
    gap = mean_ours - mean_peers
    spread = max(float(np.ptp(ours)), float(np.ptp(peers)))
    single = len(ours) == 1 and len(peers) == 1
    if single:
        verdict = "one seed: no spread"
    elif abs(gap) <= spread:
        verdict = "level within the spread"
    elif lower is None:
        verdict = "higher" if gap > 0 else "lower"
    else:
        verdict = "better" if (gap < 0) == lower else "worse"
    return {
        "ours": list(ours),
        "r2dreamer": list(peers),
        "ours_mean": mean_ours,
        "r2dreamer_mean": mean_peers,
        "gap": gap,
        "ratio": mean_ours / mean_peers if mean_peers > 0 else None,
        "spread": None if single else spread,
        "verdict": verdict,
    }


def compare_group(runs: Sequence[Run]) -> dict[str, Any]:
    """Compare both projects' runs of a task and shape.

    Returns:
        By metric, by number of updates, what :func:`compare` says of the ``seeds`` with which both
        projects have got there.
    """
    missing = [name for name in PROJECTS if all(run.project != name for run in runs)]
    if missing:
        return {"missing": missing}
    updates = max(run.updates for run in runs)
    result: dict[str, Any] = {}
    for metric, name in LOSSES.items():
        at = {
            centre: _compare_seeds(runs, partial(loss_at, name=name, centre=centre), metric)
            for centre in windows(updates)
        }
        result[metric] = {centre: found for centre, found in at.items() if found}
    a_round = runs[0].settings.episode_round
    at = {
        last: _compare_seeds(runs, partial(return_at, last=last), "return")
        for last in range(a_round, updates + 1, a_round)
    }
    return result | {"return": {last: found for last, found in at.items() if found}}


def _compare_seeds(
    runs: Sequence[Run], measure: Callable[[Run], float | None], metric: str
) -> dict[str, Any] | None:
    values: dict[str, dict[int, float]] = {project: {} for project in PROJECTS}
    for run in runs:
        if (value := measure(run)) is not None:
            values[run.project][run.settings.seed] = value
    seeds = sorted(set(values["ours"]) & set(values["r2dreamer"]))
    if not seeds:
        return None
    ours, peers = ([values[p][seed] for seed in seeds] for p in ("ours", "r2dreamer"))
    return {"seeds": seeds, **compare(ours, peers, LOWER_IS_BETTER.get(metric))}


def times(run: Run) -> dict[str, Any]:
    """Wall and CPU time of a run.

    Returns:
        ``seconds_per_update`` is the median over rows, collection included. The others are of its
        processes from start to end, None where one was killed together with the list: imports and
        prefill included.
    """
    _, rates = _series(run, "speed/updates_per_second")
    counted = sum(int(entry["updates"]) for entry in run.usage) >= run.updates
    totals = {
        key: sum(entry[key] for entry in run.usage) if counted else None
        for key in ("wall_seconds", "cpu_seconds")
    }
    peak = max((entry["peak_megabytes"] for entry in run.usage), default=None)
    per_update = float(np.median(1 / rates)) if len(rates) else None
    return {"seconds_per_update": per_update, **totals, "peak_megabytes": peak}


def summarize(runs: Sequence[Run]) -> dict[str, Any]:
    """All comparisons, and every run's own numbers."""
    names = sorted({run.settings.group for run in runs})
    groups = {name: [run for run in runs if run.settings.group == name] for name in names}
    return {
        "units": UNITS,
        "comparisons": {name: compare_group(group) for name, group in groups.items()},
        "runs": [_describe(run) for run in runs],
    }


def _describe(run: Run) -> dict[str, Any]:
    losses = {
        metric: {at: loss_at(run, name, at) for at in windows(run.updates)}
        for metric, name in LOSSES.items()
    }
    updates, returns = _series(run, "episode/return")
    return {
        **run.facts,
        "commits": _different(run, "commit"),
        "peer_commits": _different(run, "peer_commit"),
        "prefill_steps": run.settings.prefill,
        "discount_horizon": run.settings.horizon,
        "updates": run.updates,
        "frames": max(int(row["frames"]) for row in run.rows),
        **losses,
        "episodes": [[int(at), round(float(x), 2)] for at, x in zip(updates, returns, strict=True)],
        **times(run),
    }


def _different(run: Run, name: str) -> list[str]:
    return list(dict.fromkeys(entry[name] for entry in run.usage if entry.get(name)))


def _series(run: Run, name: str) -> tuple[np.ndarray, np.ndarray]:
    rows = [row for row in run.rows if name in row]
    _, values = metric_series(rows, name)
    return np.array([row["updates"] for row in rows], dtype=np.float64), values


def write_report(folder: Path, json_path: Path, picture: Path) -> list[str]:
    """Write the comparison and its curves.

    Args:
        folder: Of the runs.
        json_path: Where the numbers go.
        picture: Where the curves go, PNG.

    Returns:
        The comparison, line by line.
    """
    runs = load_runs(folder)
    results = summarize(runs)
    write_results(json_path, results)
    draw(runs, picture)
    return describe(results)


def describe(results: Mapping[str, Any]) -> list[str]:
    """A comparison in words, one line for each task, shape, metric and number of updates."""
    lines = []
    for group, comparison in results["comparisons"].items():
        if "missing" in comparison:
            lines.append(f"{group}: no runs of {', '.join(comparison['missing'])}")
        for metric in UNITS:
            for at, found in comparison.get(metric, {}).items():
                lines.append(
                    f"{group} {metric} at {at}: ours {found['ours_mean']:.3g}, r2dreamer "
                    f"{found['r2dreamer_mean']:.3g}: {found['verdict']}"
                )
    return lines


def draw(runs: Sequence[Run], path: Path) -> Path:
    """Draw losses and returns against updates: seeds thin, their mean thick.

    Args:
        runs: Of one task and shape or more, a row of panels each.
        path: PNG.
    """
    groups = sorted({run.settings.group for run in runs})
    figure = Figure(figsize=(13, 0.5 + 2.5 * len(groups)), layout="constrained")
    panels = [*LOSSES.items(), ("return", "episode/return")]
    grid = figure.subplots(len(groups), len(panels), squeeze=False)
    for row, group in zip(grid, groups, strict=True):
        for axes, (metric, name) in zip(row, panels, strict=True):
            for project in PROJECTS:
                chosen = [r for r in runs if r.settings.group == group and r.project == project]
                _draw_project(axes, project, [_series(run, name) for run in chosen])
            _style(axes, metric, group)
    grid[0, 0].legend(fontsize=8, frameon=False)
    return save_figure(figure, path)


def _draw_project(
    axes: Axes, project: str, series: Sequence[tuple[np.ndarray, np.ndarray]]
) -> None:
    color = COLORS[project]
    series = [_mean_at_each(*one) for one in series]  # envs end their episodes together
    for updates, values in series:
        axes.plot(updates, values, color=color, linewidth=0.7, alpha=0.5)
    series = [(updates, values) for updates, values in series if len(updates)]
    if not series:
        return
    # As far as all seeds have got.
    grid = np.linspace(
        max(updates[0] for updates, _ in series), min(updates[-1] for updates, _ in series), 200
    )
    means = np.mean([np.interp(grid, updates, values) for updates, values in series], 0)
    axes.plot(grid, means, color=color, linewidth=1.8, label=project)


def _mean_at_each(updates: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    at, which = np.unique(updates, return_inverse=True)
    return at, np.bincount(which, values, len(at)) / np.bincount(which, minlength=len(at))


def _style(axes: Axes, metric: str, group: str) -> None:
    axes.set_title(f"{group}: {metric.replace('_', ' ')}", fontsize=8)
    if metric != "return":
        axes.set_yscale("log")
    axes.set_xlabel("updates", fontsize=8)
    axes.tick_params(which="both", labelsize=7)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)

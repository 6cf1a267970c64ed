"""The curves of a run as one image.

Drawn with only :class:`matplotlib.figure.Figure` and the Agg canvas: pyplot's global state and the
user's backend are not changed.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from w2f_torchrl._known_noise import drop_known_messages
from w2f_torchrl.logging.metric_names import is_own_loss
from w2f_torchrl.logging.metrics import read_metrics
from w2f_torchrl.logging.pictures.published import Published, published_scores
from w2f_torchrl.utils.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Matplotlib is imported when a figure is drawn: its import delays the start of every run.
drop_known_messages(logging.getLogger("matplotlib.font_manager"))

Array = NDArray[np.float64]

TRAIN_COLOR, EVAL_COLOR = "#3b6fb6", "#c8553d"
RETURN_WINDOW, PANEL_WINDOW = 0.05, 0.02
"""Shares of a run's frames over which the returns and the other metrics are averaged."""
_COLORS = ("#3b6fb6", "#c8553d", "#4f9d69", "#8d6cab", "#b8923a", "#5b5b5b")


_SET_RETURN = re.compile(r"eval/[^/]+/return_mean")


class _Panel(NamedTuple):
    """A small panel: its title, and a label for each metric in it."""

    title: str
    metrics: dict[str, str]
    scale: str = "linear"
    limits: tuple[float, float] | None = None


_OPEN_LOOP = _Panel(
    "mean error of colours in open-loop prediction of recorded episodes, 0 to 1",
    {"recorded/error": "the model", "recorded/still_error": "the last observed picture, repeated"},
)
_PANELS = (
    _Panel(
        "world-model losses",
        {
            "wm/image_loss": "image",
            "wm/fg_loss": "foreground",
            "wm/bg_loss": "background",
            "wm/reward_loss": "reward",
            "wm/continue_loss": "continue",
        },
        "log",
    ),
    _Panel("KL (nats)", {"wm/kl_loss": "loss", "wm/kl_value": "value"}),
    _Panel(
        "mask IoU",
        {
            "train/mask_iou": "training",
            "wm/mask_iou": "evaluation",
            "segmentation/iou": "segmenter",
        },
        limits=(0.0, 1.0),
    ),
    _Panel("policy entropy (nats)", {"ac/entropy": "entropy"}),
    _Panel("value", {"ac/value_mean": "value"}),
    _Panel(
        "speed",
        {"speed/frames_per_second": "frames/s", "speed/updates_per_second": "updates/s"},
        "log",
    ),
)


def metric_series(records: Sequence[dict[str, float]], name: str) -> tuple[Array, Array]:
    """Select one metric from a run's records.

    Args:
        records: From :func:`~w2f_torchrl.logging.metrics.read_metrics`.
        name: The metric.

    Returns:
        Frames and values, float64 ``[N]`` each, ordered by frames; NaN is kept.
    """
    points = sorted(((r["frames"], r[name]) for r in records if name in r), key=lambda p: p[0])
    table = np.array(points, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def mean_over_frames(frames: Array, values: Array, window: float) -> tuple[Array, Array]:
    """Average values over a window of frames.

    Several values may share one count of frames, such as the returns of envs whose episodes end
    together. They become one point, so that the curve never runs up and down at one place.

    Args:
        frames: float64 ``[N]``, ascending.
        values: float64 ``[N]``; NaN entries are excluded from the averages.
        window: Frames, not negative. A point is the mean of all values with the same count of
            frames or less than ``window`` fewer.

    Returns:
        Distinct frames and their means, float64 ``[M]`` each; NaN if a window holds no number.
    """
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    distinct = np.unique(frames)
    end = np.searchsorted(frames, distinct, side="right")
    begin = np.searchsorted(frames, distinct - window, side="right")
    begin = np.minimum(begin, np.searchsorted(frames, distinct, side="left"))
    number = counts[end] - counts[begin]
    means = np.full(len(distinct), np.nan)
    np.divide(sums[end] - sums[begin], number, out=means, where=number > 0)
    return distinct, means


def plot_curves(
    run_dir: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
) -> Path:
    """Plot a run's returns and its main metrics against environment frames.

    The top panel shows the return of each training episode as a point and their mean over
    :data:`RETURN_WINDOW` of the run's frames as a curve, and the evaluations' mean with a band of
    one standard deviation over their episodes; the next one the returns of evaluation sets, if the
    run has any. Without an environment the first panel has the errors of open-loop prediction.
    Published scores are drawn in both if the run follows their protocol. Below is a panel for each
    group of metrics that the run has, each averaged over :data:`PANEL_WINDOW` of the frames.

    Args:
        run_dir: A run directory with ``metrics.jsonl``.
        out: Path of the PNG; None for ``run_dir/curves.png``.
        title: Title of the figure; None for the directory's name.

    Returns:
        The path of the PNG.

    Raises:
        FileNotFoundError: If ``metrics.jsonl`` does not exist.
        ValueError: If the run has nothing to plot yet.
    """
    run_dir = Path(run_dir)
    records = read_metrics(run_dir)
    names = {name for record in records for name in record}
    panels = [panel for panel in _panels(names) if names.intersection(panel.metrics)]
    if not panels and not names & {"episode/return", "eval/return_mean"}:
        raise ValueError(f"{run_dir / 'metrics.jsonl'} holds nothing to plot.")
    from matplotlib.figure import Figure

    published = published_scores(_settings(run_dir))
    sets = sorted(name for name in names if _SET_RETURN.fullmatch(name))
    wide = 2 if sets else 1
    rows, last = math.ceil(len(panels) / 3), max(record["frames"] for record in records)
    figure = Figure(figsize=(10, 3.6 + 2.3 * (rows + wide - 1)), layout="constrained")
    figure.suptitle(title or run_dir.resolve().name, fontsize=11)
    heights = [1.6] + [1.0] * (rows + wide - 1)
    grid = figure.add_gridspec(wide + rows, 3, height_ratios=heights)
    if names & {"episode/return", "eval/return_mean"} or "recorded/error" not in names:
        _draw_returns(figure.add_subplot(grid[0, :]), records, RETURN_WINDOW * last, published)
    else:  # nothing was played
        _draw_panel(figure.add_subplot(grid[0, :]), _OPEN_LOOP, records, 0.0)
    if sets:
        _draw_sets(figure.add_subplot(grid[1, :]), records, sets, published)
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(grid[wide + index // 3, index % 3])
        _draw_panel(axes, panel, records, PANEL_WINDOW * last)
    for axes in figure.axes:
        style_frames_axis(axes, last)
    return save_figure(figure, run_dir / "curves.png" if out is None else out)


def _panels(names: Collection[str]) -> list[_Panel]:
    """Return the panels; losses added by a subclass join those of the world model."""
    losses, *others = _PANELS
    own = {name: _label_of(name) for name in sorted(names) if is_own_loss(name)}
    return [losses._replace(metrics=losses.metrics | own), *others]


def _label_of(name: str) -> str:
    return name.removeprefix("wm/").removesuffix("_loss").replace("_", " ")


def _rounded(frames: float) -> str:
    """Return a number of frames with two digits, such as ``1.2k``."""
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")(float(f"{frames:.2g}"))


def save_figure(figure: Figure, path: str | os.PathLike[str], dpi: int = 120) -> Path:
    """Write a figure as PNG, atomically.

    Args:
        figure: The figure.
        path: Path of the file; directories are created.
        dpi: Dots per inch.

    Returns:
        The path.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)
    return path


def style_frames_axis(axes: Axes, last_frame: float) -> None:
    """Format an axis of environment frames: ticks (``50k``), limits, label and a light grid.

    Args:
        axes: The axes.
        last_frame: Right end of the axis.
    """
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.set_xlim(0, max(last_frame, 1.0))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("environment frames", fontsize=8)


def draw_published(axes: Axes, published: Published, color: str = "black") -> None:
    """Draw a published curve with its band, or a single score as a horizontal line.

    Args:
        axes: The axes, of returns over environment frames.
        published: The scores.
        color: Colour of the line.
    """
    if len(published.frames) == 1:
        axes.axhline(published.means[0], color=color, ls=":", lw=1.2, label=published.label)
        return
    frames, means = np.array(published.frames), np.array(published.means)
    style: dict[str, Any] = {"color": color, "ls": "--", "lw": 1.2, "marker": "s", "ms": 3.5}
    axes.plot(frames, means, label=published.label, **style)
    if published.deviations is not None:
        deviations = np.array(published.deviations)
        axes.fill_between(frames, means - deviations, means + deviations, color=color, alpha=0.1)


def _settings(run_dir: Path) -> dict[str, Any]:
    """Return the run's settings; empty if they are missing or damaged."""
    try:
        settings = yaml.safe_load((run_dir / "config.yaml").read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _draw_sets(
    axes: Axes,
    records: Sequence[dict[str, float]],
    names: Sequence[str],
    published: Sequence[Published],
) -> None:
    """Draw the returns of evaluation sets, each with the published scores in its colour."""
    for color, name in zip(cycle(_COLORS), names, strict=False):
        frames, values = metric_series(records, name)
        label = name.removeprefix("eval/").removesuffix("/return_mean")
        axes.plot(frames, values, color=color, marker="o", ms=3.5, lw=1.2, label=label)
        for each in published:
            if each.metric == name:
                draw_published(axes, replace(each, label=f"{label}: {each.label}"), color)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]) if axes.dataLim.y0 < 0 else 0.0)
    axes.set_ylabel("return, evaluation sets", fontsize=9)
    axes.legend(fontsize=7, frameon=False, loc="best", ncols=2)


def _draw_returns(
    axes: Axes,
    records: Sequence[dict[str, float]],
    window: float,
    published: Sequence[Published],
) -> None:
    frames, returns = metric_series(records, "episode/return")
    if len(frames):
        axes.scatter(
            frames, returns, s=12, color=TRAIN_COLOR, alpha=0.4, lw=0, label="training episodes"
        )
        places, means = mean_over_frames(frames, returns, window)
        if len(places) > 1:
            label = f"their mean over {_rounded(window)} frames"
            axes.plot(places, means, color=TRAIN_COLOR, label=label)
    frames, means = metric_series(records, "eval/return_mean")
    if len(frames):
        axes.plot(
            frames,
            means,
            color=EVAL_COLOR,
            marker="o",
            markersize=4,
            label="evaluation, mean ± std",
        )
        deviation_frames, deviations = metric_series(records, "eval/return_std")
        if np.array_equal(deviation_frames, frames):
            axes.fill_between(
                frames, means - deviations, means + deviations, color=EVAL_COLOR, alpha=0.18, lw=0
            )
    for each in published:
        if each.metric == "episode/return":
            draw_published(axes, each)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]) if axes.dataLim.y0 < 0 else 0.0)
    axes.set_ylabel("episode return", fontsize=9)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False, loc="best")


def _draw_panel(
    axes: Axes, panel: _Panel, records: Sequence[dict[str, float]], window: float
) -> None:
    drawn = 0
    smallest = math.inf
    for color, (name, label) in zip(cycle(_COLORS), panel.metrics.items(), strict=False):
        frames, values = metric_series(records, name)
        if not np.isfinite(values).any():
            continue
        drawn += 1
        smallest = min(smallest, float(np.nanmin(values)))
        places, means = mean_over_frames(frames, values, window)
        raw = mean_over_frames(frames, values, 0.0)[1]
        if not np.array_equal(raw, means, equal_nan=True):
            axes.plot(places, raw, color=color, alpha=0.2, linewidth=0.8)
        marker = "o" if len(places) == 1 else None
        axes.plot(places, means, color=color, lw=1.2, label=label, marker=marker)
    if panel.scale == "log" and 0 < smallest < math.inf:
        axes.set_yscale("log")
    if panel.limits is not None:
        axes.set_ylim(*panel.limits)
    # The legend is placed between title and axes, so that it hides no curve.
    axes.set_title(panel.title, fontsize=9, pad=18 if drawn > 1 else 6)
    if drawn > 1:
        axes.legend(
            fontsize=7,
            frameon=False,
            loc="lower center",
            bbox_to_anchor=(0.5, 0.99),
            ncols=drawn,
            handlelength=1.0,
            columnspacing=0.8,
            borderpad=0.2,
        )

"""The curves of a run as one image.

Drawn with only :class:`matplotlib.figure.Figure` and the Agg canvas: pyplot's global state and the
user's backend are not changed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import NDArray

from w2f_torchrl.logging.metric_names import is_own_loss
from w2f_torchrl.logging.metrics import read_metrics
from w2f_torchrl.utils.files import atomic_path

Array = NDArray[np.float64]

TRAIN_COLOR, EVAL_COLOR = "#3b6fb6", "#c8553d"
_COLORS = ("#3b6fb6", "#c8553d", "#4f9d69", "#8d6cab", "#b8923a", "#5b5b5b")


class _Panel(NamedTuple):
    """A small panel: its title, and a label for each metric in it."""

    title: str
    metrics: dict[str, str]
    scale: str = "linear"
    limits: tuple[float, float] | None = None


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


def trailing_mean(values: Array, window: int) -> Array:
    """Average each value with up to ``window - 1`` before it.

    Args:
        values: float64 ``[N]``; NaN entries are excluded from the averages.
        window: At least 1.

    Returns:
        float64 ``[N]``; NaN if a window holds no number.
    """
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    end = np.arange(1, len(values) + 1)
    begin = np.maximum(end - window, 0)
    number = counts[end] - counts[begin]
    total = sums[end] - sums[begin]
    means = np.full(len(values), np.nan)
    np.divide(total, number, out=means, where=number > 0)
    return means


def plot_curves(
    run_dir: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
) -> Path:
    """Plot a run's returns and its main metrics against environment frames.

    The top panel shows the return of each training episode and its trailing mean, and the
    evaluations' mean with a band of one standard deviation over their episodes. Below is a panel
    for each group of metrics that the run has.

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
    rows = math.ceil(len(panels) / 3)
    figure = Figure(figsize=(10, 3.6 + 2.3 * rows), layout="constrained")
    figure.suptitle(title or run_dir.resolve().name, fontsize=11)
    grid = figure.add_gridspec(1 + rows, 3, height_ratios=[1.6] + [1.0] * rows)
    _draw_returns(figure.add_subplot(grid[0, :]), records)
    for index, panel in enumerate(panels):
        _draw_panel(figure.add_subplot(grid[1 + index // 3, index % 3]), panel, records)
    for axes in figure.axes:
        style_frames_axis(axes, max(record["frames"] for record in records))
    return save_figure(figure, run_dir / "curves.png" if out is None else out)


def _panels(names: Collection[str]) -> list[_Panel]:
    """Return the panels; losses added by a subclass join those of the world model."""
    losses, *others = _PANELS
    own = {name: _label_of(name) for name in sorted(names) if is_own_loss(name)}
    return [losses._replace(metrics=losses.metrics | own), *others]


def _label_of(name: str) -> str:
    return name.removeprefix("wm/").removesuffix("_loss").replace("_", " ")


def save_figure(figure: Figure, path: str | os.PathLike[str], dpi: int = 120) -> Path:
    """Write a figure as PNG, atomically.

    Args:
        figure: The figure.
        path: Path of the file; directories are created.
        dpi: Dots per inch.

    Returns:
        The path.
    """
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
    axes.set_xlim(0, max(last_frame, 1.0))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("environment frames", fontsize=8)


def _draw_returns(axes: Axes, records: Sequence[dict[str, float]]) -> None:
    frames, returns = metric_series(records, "episode/return")
    if len(frames):
        window = max(1, min(20, len(frames) // 15))
        axes.scatter(
            frames, returns, s=9, color=TRAIN_COLOR, alpha=0.35, lw=0, label="training episodes"
        )
        if len(frames) > 1:
            label = f"mean of the last {window}" if window > 1 else None
            axes.plot(frames, trailing_mean(returns, window), color=TRAIN_COLOR, label=label)
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
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]) if axes.dataLim.y0 < 0 else 0.0)
    axes.set_ylabel("episode return", fontsize=9)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False, loc="best")


def _draw_panel(axes: Axes, panel: _Panel, records: Sequence[dict[str, float]]) -> None:
    drawn = 0
    smallest = math.inf
    for color, (name, label) in zip(cycle(_COLORS), panel.metrics.items(), strict=False):
        frames, values = metric_series(records, name)
        if not np.isfinite(values).any():
            continue
        drawn += 1
        smallest = min(smallest, float(np.nanmin(values)))
        window = max(1, len(frames) // 50)
        if window > 1:
            axes.plot(frames, values, color=color, alpha=0.2, linewidth=0.8)
        marker = "o" if len(frames) == 1 else None
        axes.plot(
            frames, trailing_mean(values, window), color=color, lw=1.2, label=label, marker=marker
        )
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

"""The first lines of a run, the loggers that its settings select, and the summary at its end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

from torchrl.record.loggers.common import Logger

from w2f_torchrl.config import RunConfig, config_to_dict
from w2f_torchrl.learner.learner import Learner
from w2f_torchrl.logging.announcement import RunPlan, announce, make_plan
from w2f_torchrl.logging.file_loggers import make_csv_logger, make_tensorboard_logger
from w2f_torchrl.logging.metrics import MetricsLogger, read_metrics
from w2f_torchrl.logging.pictures.plotting import plot_curves
from w2f_torchrl.logging.progress import ProgressBar, format_duration
from w2f_torchrl.logging.wandb import make_wandb_logger
from w2f_torchrl.report import write_report
from w2f_torchrl.trainers.collecting import count_workers
from w2f_torchrl.trainers.counters import RunCounters
from w2f_torchrl.utils.ranks import Ranks, Silent

logger = logging.getLogger(__name__)

LAST_EPISODES = 10


def build_loggers(config: RunConfig) -> list[Logger]:
    """Build the TorchRL loggers of a run.

    Args:
        config: The run's settings.

    Raises:
        ModuleNotFoundError: If a package is missing; names the command that installs it.
    """
    settings, run_dir = config.logging, Path(config.run_dir)
    loggers: list[Logger] = []
    if settings.csv:
        loggers.append(make_csv_logger(run_dir))
    if settings.tensorboard:
        loggers.append(make_tensorboard_logger(run_dir))
    if settings.use_wandb:
        loggers.append(
            make_wandb_logger(
                run_dir,
                project=settings.wandb_project,
                entity=settings.wandb_entity,
                config=config_to_dict(config),
                mode=settings.wandb_mode,  # type: ignore[arg-type]
                name=config.name,
                group=config.group,
            )
        )
    return loggers


Bar: TypeAlias = ProgressBar | Silent


def announce_run(
    config: RunConfig, ranks: Ranks, learner: Learner, masks: str, counters: RunCounters, last: int
) -> RunPlan:
    """Log what a run is about to do, on rank 0.

    Args:
        config: The run's settings.
        ranks: The run's processes.
        learner: The learner.
        masks: Name of the source of masks.
        counters: Steps and updates so far.
        last: Frames at the last evaluation; 0 before the first.

    Returns:
        What the run is about to do.
    """
    counts = {"steps": counters.steps, "frames": counters.frames, "updates": counters.updates}
    plan = make_plan(config, counters.schedule, **counts, last=last)
    lines = announce(
        config,
        plan,
        device=config.torch_device(),
        execution=learner.execution,
        parameters=sum(weight.numel() for weight in learner.parameters_trained),
        workers=count_workers(config, ranks.local_size),
        masks=masks,
    )
    for line in lines if ranks.is_first else ():
        logger.info("%s", line)
    return plan


def start_bar(config: RunConfig, ranks: Ranks, plan: RunPlan) -> Bar:
    """Show a run's progress, on rank 0."""
    return ranks.on_first_or_silent(
        lambda: ProgressBar(
            config.training.total_frames,
            total_updates=plan.total_updates,
            evaluations=plan.evaluations,
            initial_frames=plan.frames,
            initial_updates=plan.updates,
            plays=config.has_environment,
        )
    )


class RunClock:
    """Count the seconds of training, including earlier processes, and the rates since the start.

    Args:
        run_dir: A run directory; its metrics contain the seconds of earlier processes.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._before, self._start = 0.0, time.monotonic()
        self._frames, self._updates = 0, 0
        self._stopped: float | None = None
        self._row: tuple[float, int, int] | None = None
        """Time and counters of the last row of metrics."""

    def start(self, frames: int, updates: int) -> None:
        """Start counting; the metrics must end where this process continues.

        Args:
            frames: Environment frames so far.
            updates: Updates so far.
        """
        rows = read_metrics(self.run_dir) if (self.run_dir / "metrics.jsonl").exists() else []
        self._before = max((row.get("speed/seconds", 0.0) for row in rows), default=0.0)
        self._start, self._frames, self._updates = time.monotonic(), frames, updates

    def stop(self) -> None:
        """Stop counting at the end of training."""
        self._stopped = time.monotonic()

    def seconds(self) -> float:
        """Return the seconds of training so far, without the time between processes."""
        return self._before + (self._stopped or time.monotonic()) - self._start

    def metrics(self, frames: int, updates: int) -> dict[str, float]:
        """Return the ``speed/*`` metrics of a row; rates are since the previous row."""
        now, row = time.monotonic(), {}
        if self._row is not None:
            then, frames_then, updates_then = self._row
            row["speed/frames_per_second"] = (frames - frames_then) / (now - then)
            row["speed/updates_per_second"] = (updates - updates_then) / (now - then)
        self._row = (now, frames, updates)
        return row | {"speed/seconds": self.seconds()}

    def rates(self, frames: int, updates: int) -> tuple[float, float]:
        """Return frames and updates per second since this process started."""
        seconds = max(self.seconds() - self._before, 1e-9)
        return (frames - self._frames) / seconds, (updates - self._updates) / seconds


def finish_run(
    config: RunConfig,
    metrics_logger: MetricsLogger,
    clock: RunClock,
    *,
    frames: int,
    updates: int,
    draw: bool = True,
) -> None:
    """Finish the videos, draw the curves, write the report, log the summary, and close.

    Arguments as in :func:`summarize_run`, and ``draw``: whether to draw, which takes seconds.
    """
    run_dir, background = metrics_logger.run_dir, metrics_logger.background
    clock.stop()
    began = time.monotonic()
    jobs: dict[str, Callable[[], Path]] = {}
    if draw and metrics_logger.path.stat().st_size:
        jobs["curves.png"] = partial(plot_curves, run_dir)
        if config.logging.report:
            jobs["report.html"] = partial(write_report, [run_dir], run_dir / "report.html")
    labels = [*background.unfinished(), *jobs]
    if labels:
        logger.info("making %s ...", count_jobs(labels))
    metrics_logger.flush()  # the report holds the videos
    for label, job in jobs.items():
        background.submit(label, job)
    metrics_logger.flush()
    if labels:
        logger.info("made in %.0f s", time.monotonic() - began)
    for line in summarize_run(config, metrics_logger, clock, frames=frames, updates=updates):
        logger.info("%s", line)
    metrics_logger.close()


def count_jobs(labels: Sequence[str]) -> str:
    """Return labels of background jobs in a few words, such as ``2 videos, curves.png``."""
    counts: dict[str, int] = {}
    for label in labels:
        kind = label.partition(" ")[0]  # "video train/... at frame 4096"
        counts[kind] = counts.get(kind, 0) + 1
    plural = {"video": "videos", "picture": "pictures"}
    return ", ".join(
        f"{count} {plural[kind] if count > 1 else kind}" if kind in plural else kind
        for kind, count in counts.items()
    )


def summarize_run(
    config: RunConfig,
    metrics_logger: MetricsLogger,
    clock: RunClock,
    *,
    frames: int,
    updates: int,
) -> list[str]:
    """Return the lines that summarize a run.

    Args:
        config: The run's settings.
        metrics_logger: The run's logger; its file must be complete.
        clock: The run's clock.
        frames: Total environment frames.
        updates: Total updates.
    """
    run_dir, rows = Path(config.run_dir), read_metrics(Path(config.run_dir))
    frame_rate, update_rate = clock.rates(frames, updates)
    total = config.training.total_frames
    lines = [
        f"{config.name}: {frames:,} of {total:,} frames, {updates:,} updates in "
        f"{format_duration(clock.seconds())}; {frame_rate:.1f} frames/s, "
        f"{update_rate:.2f} updates/s since the start",
        *_evaluations(rows),
        *_episodes(rows),
    ]
    if frames < total:
        lines.append("continue with resume=auto")
    lines += [f"{label}: {path}" for label, path in _files(run_dir) if path.exists()]
    page = run_dir / "report.html"
    if page.exists():
        lines.append(f"everything on one page: {page.resolve().as_uri()}")
    failed = [*metrics_logger.background.failed, *metrics_logger.sinks.failed]
    if failed:
        lines.append(f"NOT MADE, see the errors above: {'; '.join(failed)}")
    return lines


def _evaluations(rows: Sequence[dict[str, float]]) -> list[str]:
    evaluations = [row for row in rows if "eval/return_mean" in row]
    if not evaluations:
        return _predictions(rows)
    last, best = evaluations[-1], max(evaluations, key=lambda row: row["eval/return_mean"])
    line = f"evaluation: return {last['eval/return_mean']:.1f}"
    line += f" +- {last['eval/return_std']:.1f} at frame {last['frames']:,}"
    line += f"; best {best['eval/return_mean']:.1f} at frame {best['frames']:,}"
    if "wm/mask_iou" in last:
        line += f"; mask IoU {last['wm/mask_iou']:.2f}"
    return [line]


def _predictions(rows: Sequence[dict[str, float]]) -> list[str]:
    """Return a line about the open-loop prediction of recorded episodes, if a run had only that."""
    found = [row for row in rows if "recorded/error" in row]
    if not found:
        return []
    last, best = found[-1], min(found, key=lambda row: row["recorded/error"])
    return [
        f"evaluation: open-loop error {last['recorded/error']:.4f} at frame {last['frames']:,}; "
        f"best {best['recorded/error']:.4f} at frame {best['frames']:,}; of a still picture "
        f"{last['recorded/still_error']:.4f}"
    ]


def _episodes(rows: Sequence[dict[str, float]]) -> list[str]:
    returns = [row["episode/return"] for row in rows if "episode/return" in row][-LAST_EPISODES:]
    if not returns:
        return []
    mean, listed = sum(returns) / len(returns), ", ".join(f"{value:.0f}" for value in returns)
    return [f"last {len(returns)} training episodes: return {mean:.1f} ({listed})"]


def _files(run_dir: Path) -> list[tuple[str, Path]]:
    return [
        ("metrics", run_dir / "metrics.jsonl"),
        ("curves", run_dir / "curves.png"),
        ("videos", run_dir / "videos"),
        ("pictures", run_dir / "images"),
        ("checkpoints", run_dir / "checkpoints"),
    ]

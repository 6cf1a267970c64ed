"""Measure how long each kind of logging delays the next update.

Measures, with the demo's model and batch on random pictures, in milliseconds of CPU time of the
calling thread (what other programs do on the machine doesn't count) and of wall-clock time:

- an update, to compare with;
- handing an evaluation episode's two videos over, and encoding them in the background;
- computing the imagination of three windows and handing its two videos over;
- a row of the spread of weights, gradients and latents; the pictures of a training batch;
- a row of metrics, with and without CSV files.

Also, in CPU time of the whole process, what a run makes after its last frame: the four videos of
an evaluation, curves.png and report.html; and the first two videos again, each image 256 pixels
high, as they were before. One thread makes them, so on quiet cores the wall-clock time is the same.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "shared"))

import torch
from results_file import RESULTS, write_results
from tensordict import TensorDict

from w2f_torchrl.config import LoggingConfig
from w2f_torchrl.evaluation.evaluator import Evaluation
from w2f_torchrl.logging.diagnostics import Diagnostics
from w2f_torchrl.logging.file_loggers import make_csv_logger
from w2f_torchrl.logging.metrics import MetricsLogger
from w2f_torchrl.logging.pictures.plotting import plot_curves
from w2f_torchrl.logging.pictures.video import panel, write_video
from w2f_torchrl.modules import PRESETS
from w2f_torchrl.report import write_report
from w2f_torchrl.trainers import Learner

BATCH, LENGTH, EPISODE, ACTION = 8, 16, 501, 6


def measure(
    action: Callable[[], object],
    rounds: int,
    before: Callable[[], object] = lambda: None,
    cpu_clock: Callable[[], float] = time.thread_time,
) -> dict[str, float]:
    """Median CPU time of this thread and wall-clock time, milliseconds; the first round is free."""
    cpu, wall = [], []
    for _ in range(rounds + 1):
        before()
        start, thread = time.perf_counter(), cpu_clock()
        action()
        cpu.append(1e3 * (cpu_clock() - thread))
        wall.append(1e3 * (time.perf_counter() - start))
    medians = {"cpu_ms": statistics.median(cpu[1:]), "wall_ms": statistics.median(wall[1:])}
    return {name: round(value, 3) for name, value in medians.items()}


def make_records(rows: int, length: int) -> TensorDict:
    """Records ``[rows, length]`` of squares that move before a texture that moves."""
    texture = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    texture = texture.repeat_interleave(4, -2).repeat_interleave(4, -1)
    scenery = torch.stack([texture.roll(t, -1) for t in range(length)])
    pixels = scenery.expand(rows, -1, -1, -1, -1)
    mask = torch.zeros(rows, length, 1, 64, 64, dtype=torch.bool)
    for t in range(length):
        left = t % 48
        mask[:, t, :, 24:40, left : left + 16] = True
    is_init = torch.zeros(rows, length, 1, dtype=torch.bool)
    following = {
        "pixels": torch.where(mask, 200, pixels).to(torch.uint8),
        "foreground_mask": mask,
        "reward": torch.rand(rows, length, 1),
        "terminated": torch.zeros_like(is_init),
        "done": torch.zeros_like(is_init),
    }
    action = torch.rand(rows, length, ACTION) * 2 - 1
    return TensorDict({"action": action, "is_init": is_init, "next": following}, [rows, length])


def measure_all(run_dir: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Every measurement by its name."""
    torch.manual_seed(0)
    learner = Learner(PRESETS["size1m"], action_size=ACTION)
    sample, episode = make_records(BATCH, LENGTH), make_records(1, EPISODE)
    frames = episode["next", "pixels"][0]
    columns = dict.fromkeys(("frame", "true mask", "mask", "fg", "bg", "composed"), frames)
    evaluation = Evaluation({}, frames, columns, episode)
    settings = LoggingConfig(histograms_every_updates=1, images_every_updates=1)
    metrics_logger = MetricsLogger(run_dir)
    diagnostics = Diagnostics(settings, learner, metrics_logger)
    counts = {"frames": 0, "updates": 1}
    row = {f"wm/metric_{n}": torch.tensor(float(n)) for n in range(30)}
    results = {"update": measure(lambda: learner.update(sample), rounds)}

    # Each round with an empty queue, so that nothing but the call is measured.
    settled = partial(measure, rounds=rounds, before=metrics_logger.flush)
    results["hand over an episode's two videos"] = settled(
        lambda: diagnostics._log_episode(evaluation, 0)
    )
    results["imagine three windows, hand over two videos"] = settled(
        lambda: diagnostics._log_imagination(evaluation, 0, 1)
    )
    results |= measure_end(diagnostics, evaluation, rounds)
    for name, off in (("spreads", "images"), ("pictures", "histograms")):
        setattr(settings, f"{off}_every_updates", 0)
        label = "a row of spreads" if name == "spreads" else "pictures of a training batch"
        results[label] = settled(partial(diagnostics.after_update, sample, **counts))
        setattr(settings, f"{off}_every_updates", 1)
    results["a row of 30 metrics"] = measure(lambda: metrics_logger.log(row, **counts), rounds)
    metrics_logger.close()
    with MetricsLogger(run_dir / "csv_too", [make_csv_logger(run_dir)]) as both:
        results["the same with CSV files"] = measure(lambda: both.log(row, **counts), rounds)
    return results


def measure_end(
    diagnostics: Diagnostics, evaluation: Evaluation, rounds: int
) -> dict[str, dict[str, float]]:
    """What a run makes at its end: the process's CPU time, and wall-clock time."""
    metrics_logger = diagnostics.logger
    run_dir = metrics_logger.run_dir
    for frame in range(100):
        row = {"wm/image_loss": 100.0 / (frame + 1), "episode/return": float(frame)}
        metrics_logger.log(row, frames=frame, updates=frame)

    def episode() -> None:
        diagnostics._log_episode(evaluation, 100)
        metrics_logger.flush()

    def imagination() -> None:
        diagnostics._log_imagination(evaluation, 100, 100)
        metrics_logger.flush()

    def as_before() -> None:
        write_video(run_dir / "before" / "a.mp4", evaluation.pixels, scale=4)
        write_video(run_dir / "before" / "b.mp4", panel(evaluation.columns, scale=4), scale=1)

    jobs: dict[str, Callable[[], object]] = {
        "make an episode's two videos": episode,
        "make them 256 pixels high": as_before,
        "make two videos of the imagination": imagination,
        "draw curves.png": lambda: plot_curves(run_dir),
        "write report.html": lambda: write_report([run_dir], run_dir / "report.html"),
    }
    return {name: measure(job, rounds, cpu_clock=time.process_time) for name, job in jobs.items()}


def main() -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS / "logging_cost.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        results = measure_all(Path(folder), arguments.rounds)
    document = {
        "model": f"size1m, split, batch {BATCH} x {LENGTH}, 64 x 64; an episode of {EPISODE}",
        "medians": results,
    }
    print(write_results(arguments.out, document).read_text())


if __name__ == "__main__":
    main()

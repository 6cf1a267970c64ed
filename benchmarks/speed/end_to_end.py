"""Measure environment frames per second of whole runs, and where the time is spent.

    python benchmarks/speed/end_to_end.py
    python benchmarks/speed/end_to_end.py --overrides model=size12m environment.num_envs=16 \
        training.execution=cuda_graph optimizer.precision=bfloat16

Runs that differ in ``collection.overlap`` alone, ``--repeats`` times in turn. The clock starts
after the first updates, which compile, and stops at the last, before the last evaluation and
checkpoint. ``updates`` is the time in updates without drawing their samples, ``samples`` that of
drawing them and sending them to the device, ``store`` records and masks on their way into the
replay, ``evaluation`` and ``checkpoints`` what their names say; the rest, ``collection``, is
waiting for the workers and sending them weights. On CUDA the device is waited for at the end of
each round of updates, so that its time is not counted as another part's. Where other programs want
the processor, ``cpu_milliseconds`` of the learner's process tell better what an update and a sample
cost.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "shared"))

import torch
from hydra import compose, initialize_config_module
from results_file import RESULTS, write_results

import sota_configs.world2filter  # noqa: F401  # registers the settings
from w2f_torchrl.trainers import RunConfig, Trainer, to_run_config

#: A small run on two cores: the demo's task and shapes.
SMALL = [
    "environment.distraction=easy",
    "model=size1m",
    "environment.domain=walker",
    "environment.task=walk",
    "training.batch_size=8",
    "training.batch_length=32",
    "training.train_ratio=32",
    "training.prefill_steps=512",
    "training.total_frames=4096",
    "evaluation.every_frames=0",
]
#: Agent steps after the first updates at which the clock starts.
WARM_UP_ROUNDS = 2


class TimedTrainer(Trainer):
    """A trainer that notes how long each part of its loop takes."""

    def __init__(self, config: RunConfig):
        super().__init__(config)
        self.seconds: dict[str, float] = defaultdict(float)
        self.cpu_seconds: dict[str, float] = defaultdict(float)
        self.begin: tuple[float, int, int] | None = None
        self.end: tuple[float, int, int] | None = None
        self._rounds = 0

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        begin, cpu = time.perf_counter(), time.process_time()
        yield
        if self.begin is not None:
            self.seconds[name] += time.perf_counter() - begin
            self.cpu_seconds[name] += time.process_time() - cpu

    def start(self) -> None:
        """Start the run, and time what it does from then on."""
        super().start()
        self.replay.sample = self._as_sample(self.replay.sample)  # type: ignore[method-assign]
        self._updates.to_device = self._as_sample(  # type: ignore[assignment]
            self._updates.to_device
        )

    def _as_sample(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            with self._timed("samples"):
                return function(*args)

        return timed

    def _take(self, *args: Any) -> None:
        with self._timed("store"):
            super()._take(*args)

    def _learn(self, *args: Any) -> None:
        updates = self.updates
        with self._timed("updates"):
            super()._learn(*args)
            if self.run.device.type == "cuda":
                torch.cuda.synchronize()
        self._rounds += self.updates > updates
        now = (time.perf_counter(), self.frames, self.updates)
        if self._rounds == WARM_UP_ROUNDS and self.begin is None:
            self.begin = now
        self.end = now

    def _evaluate_if_due(self) -> None:
        with self._timed("evaluation"):
            super()._evaluate_if_due()

    def _checkpoint_if_due(self) -> None:
        with self._timed("checkpoints"):
            super()._checkpoint_if_due()


def measure(overrides: list[str]) -> dict[str, Any]:
    """Train once.

    Returns:
        Frames and updates a second of wall-clock time, and the share of it that each part took.
    """
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        with initialize_config_module("sota_configs", version_base="1.3"):
            config = compose("config", [*overrides, f"run_dir={folder}/run"])
        trainer = TimedTrainer(to_run_config(config))
        trainer.train()
    if trainer.begin is None or trainer.end is None or trainer.end[1] == trainer.start[1]:
        raise SystemExit(
            f"training.total_frames={trainer.config.training.total_frames} is too short: the clock "
            f"starts after {WARM_UP_ROUNDS} rounds of updates."
        )
    seconds, frames, updates = (b - a for a, b in zip(trainer.begin, trainer.end, strict=True))
    parts, cpu = dict(trainer.seconds), dict(trainer.cpu_seconds)
    for table in (parts, cpu):
        table["updates"] -= table["samples"]
    parts["collection"] = seconds - sum(parts.values())
    return {
        "env_frames_per_second": round(frames / seconds, 2),
        "updates_per_second": round(updates / seconds, 3),
        "env_frames": frames,
        "updates": updates,
        "seconds": round(seconds, 2),
        "share": {name: round(value / seconds, 4) for name, value in parts.items()},
        "cpu_milliseconds": {
            "update": round(1e3 * cpu["updates"] / updates, 3),
            "sample": round(1e3 * cpu["samples"] / updates, 3),
        },
        "load_before": round(load, 2),
    }


def run(overrides: list[str], repeats: int = 1) -> dict[str, Any]:
    """Both kinds of run in turn, and the ratio of their speeds."""
    rows: dict[str, list[dict[str, Any]]] = {"synchronous": [], "overlap": []}
    for _ in range(repeats):
        for name, runs in rows.items():
            runs.append(measure([*overrides, f"collection.overlap={name == 'overlap'}"]))
            print(name, runs[-1], flush=True)
    speeds = ([row["env_frames_per_second"] for row in runs] for runs in rows.values())
    ratios = [overlap / synchronous for synchronous, overlap in zip(*speeds, strict=True)]
    return {"runs": rows, "overlap_speed_to_synchronous": round(statistics.median(ratios), 3)}


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--overrides", nargs="*", default=[], help="settings, after the small run's"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "end_to_end.json")
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    results = run([*SMALL, *args.overrides], args.repeats)
    settings = {"overrides": [*SMALL, *args.overrides], "repeats": args.repeats}
    print(write_results(args.out, {"settings": settings, **results}).read_text())


if __name__ == "__main__":
    main()

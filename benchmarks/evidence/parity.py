"""Train World2Filter's DreamerV3 and r2dreamer on the same tasks and environments.

python benchmarks/evidence/parity.py --r2dreamer CHECKOUT --out-dir runs/parity --updates 4000
python benchmarks/evidence/parity.py --out-dir runs/parity --report

The first form trains ``algo=dreamer_v3`` and, from a checkout of r2dreamer, ``rep_loss=dreamer`` in
separate processes, each on one thread of a CPU in float32. Ctrl+C or SIGTERM ends the list with
everything saved, and the same command continues exactly there. A crash costs r2dreamer's run up to
three minutes, ours up to 500 updates. ``--updates`` is a multiple of 100 and may be
raised later. The second form compares what there is.

The same in both: environments and their seeds, pictures, action repeat (PlaNet's: 8, and 4 for
ball_in_cup), widths of the model, batch, prefill, one update per agent step, weights synced after
each step of the envs, learning rate, warm-up, discount horizon (666 control steps). All else is
each project's own, ours with ``--override`` on top. Known differences of r2dreamer: it samples its
replay uniformly and not the newest first; its KL loss is that of the logits without their share of
the uniform distribution; its continuation learns 1 where ours learns the discount.

Compared are quantities of the same unit, means over the updates around a number of updates:

- image loss: squared errors of colours in [0, 1], summed over pixels and channels;
- KL of posterior and prior: nats, summed over the categoricals, without free nats, of the
  distributions that are sampled from (with 1 % of the uniform one), by one function for both;
- reward loss: nats of the two-hot's cross-entropy over the same 255 bins;
- returns of the training episodes, actions sampled.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "shared"))

from curve_runs import SCRIPT, is_finished
from parity_report import write_report
from parity_settings import (
    ACTION_REPEATS,
    PROJECTS,
    Settings,
    as_dict,
    note_settings,
    run_name,
)
from results_file import RESULTS

from w2f_torchrl.logging.metrics_file import last_counters

HERE = Path(__file__).parent
USAGE_NAME = "usage.jsonl"


@dataclass(frozen=True)
class Job:
    """A run of one project."""

    project: str
    settings: Settings
    updates: int
    overrides: tuple[str, ...] = ()
    """More settings of ours."""

    @property
    def name(self) -> str:
        """Its directory."""
        return run_name(self.project, self.settings)

    def command(self, run_dir: Path, checkout: Path) -> list[str]:
        """What trains it, or continues it."""
        if self.project == "r2dreamer":
            program = str(HERE / "peer_run.py")
            options = ["--r2dreamer", str(checkout), "--updates", str(self.updates)]
            return [sys.executable, program, str(run_dir), *options]
        settings = [*self.settings.overrides(self.updates), *self.overrides]
        return [sys.executable, str(SCRIPT), *settings, f"run_dir={run_dir}", "resume=auto"]

    def is_complete(self, run_dir: Path) -> bool:
        """Whether it has done its last update and saved it."""
        if last_counters(run_dir / "metrics.jsonl")[1] < self.updates:
            return False
        return self.project == "r2dreamer" or is_finished(run_dir)


def make_jobs(args: argparse.Namespace) -> list[Job]:
    """List the runs so that a list that is interrupted has pairs to compare.

    Raises:
        ValueError: If a setting is out of range.
    """
    jobs = []
    shapes = [read_shape(text) for text in args.shapes]
    for seed, shape, task in itertools.product(args.seeds, shapes, args.tasks):
        repeat = args.action_repeat or ACTION_REPEATS.get(task, 2)
        settings = Settings(
            task, *shape, seed=seed, action_repeat=repeat, lr=args.lr, warmup=args.warmup
        )
        settings.total_frames(args.updates)  # a bad number of updates shows here
        for project in PROJECTS:
            more = tuple(args.override) if project == "ours" else ()
            jobs.append(Job(project, settings, args.updates, more))
    return jobs


def read_shape(text: str) -> tuple[int, int]:
    """Read ``<B>x<T>``.

    Raises:
        ValueError: If the text has another form.
    """
    size, _, length = text.partition("x")
    if not (size.isdigit() and length.isdigit()):
        raise ValueError(f"--shapes has {text!r}: must be slices x records, for example 8x16.")
    return int(size), int(length)


class Runs:
    """Trains the runs of a list, each in a process of one thread.

    Args:
        folder: Run directories are created here, each next to its ``.log``.
        checkout: r2dreamer's.
        say: Gets a line for each start and end.
    """

    def __init__(self, folder: Path, checkout: Path, say: Callable[[str], object] = print) -> None:
        self.folder, self.checkout, self.say = folder.resolve(), checkout.resolve(), say
        self._commits = {"commit": commit_of(HERE), "peer_commit": commit_of(self.checkout)}
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def train(self, jobs: Sequence[Job], parallel: int = 1) -> None:
        """Train the runs that are not complete; Ctrl+C and SIGTERM end them once they have saved.

        Args:
            jobs: In this order.
            parallel: Runs at a time.

        Raises:
            ValueError: If a run was begun with other settings.
            RuntimeError: If runs failed, once the others have ended; with the names of their logs.
        """
        for job in jobs:
            run = {"project": job.project, "settings": as_dict(job.settings)}
            note_settings(self.folder / job.name, run | {"overrides": list(job.overrides)})
        previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            with ThreadPoolExecutor(parallel) as pool:
                try:
                    failed = [log for log in pool.map(self._train, jobs) if log is not None]
                except BaseException:
                    self._stop()
                    raise
        finally:
            signal.signal(signal.SIGTERM, previous)
        if failed:
            raise RuntimeError(f"{len(failed)} of {len(jobs)} runs failed: see {', '.join(failed)}")

    def _stop(self) -> None:
        self._stopped = True
        for process in tuple(self._processes):
            process.terminate()

    def _train(self, job: Job) -> str | None:
        """Train one run; returns its log's name if it failed."""
        run_dir, log = self.folder / job.name, self.folder / f"{job.name}.log"
        if self._stopped:
            return None
        if job.is_complete(run_dir):
            self.say(f"{job.name}: done before")
            return None
        self.say(f"{job.name}: training, see {log}")
        begun, updates = time.monotonic(), last_counters(run_dir / "metrics.jsonl")[1]
        with log.open("a") as output:
            # In its own session, so that Ctrl+C reaches it only once, from here.
            process = subprocess.Popen(
                job.command(run_dir, self.checkout),
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(os.environ) | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
            self._processes.add(process)
            if self._stopped:  # while it was being started
                process.terminate()
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            self._processes.discard(process)
        wall, done = time.monotonic() - begun, job.is_complete(run_dir)
        usage = {
            **self._commits,
            "wall_seconds": wall,
            "cpu_seconds": used.ru_utime + used.ru_stime,
            "updates": last_counters(run_dir / "metrics.jsonl")[1] - updates,
            "peak_megabytes": used.ru_maxrss / 1024,
        }
        with (run_dir / USAGE_NAME).open("a") as stream:
            stream.write(json.dumps(usage) + "\n")
        ended = "done" if done else f"ended with {process.returncode}"
        self.say(f"{job.name}: {ended} after {wall / 60:.1f} min")
        return None if done or self._stopped else str(log)


def commit_of(folder: Path) -> str | None:
    """The commit of a checkout, with ``+`` if files differ from it; None outside of one."""
    git = ["git", "-C", str(folder)]
    found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if found.returncode:
        return None
    status = [*git, "status", "--porcelain", "--untracked-files=no"]
    changed = subprocess.run(status, capture_output=True, text=True, check=False).stdout.strip()
    return found.stdout.strip() + ("+" if changed else "")


def parse(arguments: Sequence[str] | None = None) -> Any:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--r2dreamer", type=Path, help="its checkout; needed for training")
    parser.add_argument("--out-dir", type=Path, default=Path("runs/parity"), help="of the runs")
    parser.add_argument("--tasks", nargs="+", default=list(ACTION_REPEATS))
    parser.add_argument("--shapes", nargs="+", default=["8x16", "4x64"], help="slices x records")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--updates", type=int, default=4000, help="of each run, in all")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--action-repeat", type=int, help="control steps, instead of PlaNet's")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--warmup", type=int, default=200, help="updates")
    parser.add_argument(
        "--override", nargs="+", default=[], metavar="KEY=VALUE", help="more settings of ours"
    )
    parser.add_argument("--report", action="store_true", help="compare the runs, train none")
    parser.add_argument("--json", type=Path, default=RESULTS / "parity.json", help="the report's")
    images = HERE.parents[1] / "docs" / "images"
    parser.add_argument("--picture", type=Path, default=images / "parity.png", help="the report's")
    args = parser.parse_args(arguments)
    if not args.report and args.r2dreamer is None:
        parser.error("--r2dreamer CHECKOUT is needed for training.")
    return args


def main() -> None:
    """Train the list, or compare its runs."""
    args = parse()
    try:
        if args.report:
            for line in write_report(args.out_dir, args.json, args.picture):
                print(line)
        else:
            Runs(args.out_dir, args.r2dreamer).train(make_jobs(args), args.jobs)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the runs are saved; the same command continues them.")


if __name__ == "__main__":
    main()

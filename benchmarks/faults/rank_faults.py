"""Repeatedly kill one of a run's two ranks, and check that it ends, names the rank, and resumes.

``python benchmarks/faults/rank_faults.py --json benchmarks/results/rank_faults.json``

torchrun starts a tiny run on two gloo ranks. At a random update a random rank gets SIGKILL. From
the kill it measures until torchrun's log names the rank, and until all its processes are gone.
torchrun starts the ranks again, they resume, and the next kill comes. After the last one it may not
start again: its end is that of a run without restarts, and resume=auto finishes the run. At the end
every update's line must be in metrics.jsonl once.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "shared"))

from results_file import write_results
from tiny_run import EVERY, missing_and_repeated, tiny_overrides

from w2f_torchrl.logging.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]


class Run:
    """A run under torchrun, its log and its processes."""

    def __init__(self, run_dir: Path, log: Path, restarts: int, **settings: Any):
        self.run_dir, self.log = run_dir, log
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
            f"--max-restarts={restarts}", "sota_configs/world2filter.py",
            *tiny_overrides(run_dir=run_dir, **settings),
        ]  # fmt: skip
        with log.open("ab") as stream:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream)

    def rank_pids(self) -> dict[int, int]:
        """Process of each rank of the present attempt."""
        found = {}
        for pid in descendants(self.process.pid):
            try:
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            ranks = [v for v in variables if v.startswith(b"RANK=")]
            if ranks and parent(pid) == self.process.pid:
                found[int(ranks[0][5:])] = pid
        return found

    def updates(self) -> int:
        """Updates that the metrics reach."""
        if not (self.run_dir / "metrics.jsonl").exists():
            return 0
        return max((int(row["updates"]) for row in read_metrics(self.run_dir)), default=0)

    def wait_for_updates(self, updates: int, timeout: float = 600) -> None:
        """Wait until the metrics reach an update.

        Raises:
            RuntimeError: If the run ends before, or time is up.
        """
        end = time.monotonic() + timeout
        while self.updates() < updates:
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"no update {updates} in {timeout} s:\n{self.log.read_text()}")
            time.sleep(0.2)


def parent(pid: int) -> int:
    """The process's parent, 0 if it has gone or is a zombie."""
    try:
        state, parent_pid = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return 0
    return 0 if state == "Z" else int(parent_pid)


def descendants(pid: int) -> Iterator[int]:
    """All living processes below one."""
    everyone = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    parents = {other: parent(other) for other in everyone}
    below, previous = {pid}, set[int]()
    while below != previous:
        previous = set(below)
        below |= {child for child, of in parents.items() if of in below}
    yield from below - {pid}


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie doesn't."""
    return parent(pid) != 0


def kill_a_rank(run: Run, chosen: random.Random, timeout: float = 60) -> dict[str, Any]:
    """Kill a rank and watch the attempt end.

    Returns:
        The rank and update of the kill, and the seconds until the rank was named and all were gone.
    """
    run.wait_for_updates(run.updates() + chosen.randint(2 * EVERY, 6 * EVERY))
    time.sleep(chosen.uniform(0, 0.5))
    ranks, attempt = run.rank_pids(), list(descendants(run.process.pid))
    rank, told = chosen.choice(sorted(ranks)), len(run.log.read_text())
    updates, start = run.updates(), time.monotonic()
    os.kill(ranks[rank], signal.SIGKILL)
    pattern = re.compile(rf"exitcode\s*: -9\)? *(\(pid: {ranks[rank]}\)|local_rank: {rank} )")
    named = gone = None
    while (named is None or gone is None) and time.monotonic() < start + timeout:
        time.sleep(0.05)
        elapsed = round(time.monotonic() - start, 2)
        if named is None and pattern.search(run.log.read_text()[told:]):
            named = elapsed
        if gone is None and not any(alive(pid) for pid in attempt):
            gone = elapsed
    message = re.search(r"rank \d: another of the .* has stopped", run.log.read_text()[told:])
    return {
        "killed_rank": rank,
        "at_update": updates,
        "seconds_until_named": named,
        "seconds_until_all_gone": gone,
        "survivor_said": message.group(0) if message else None,
    }


def check_metrics(run_dir: Path) -> dict[str, Any]:
    """Look for missing and duplicate lines of training metrics."""
    rows = read_metrics(run_dir)
    missing, repeated = missing_and_repeated(rows)
    frames = [row["frames"] for row in rows]
    return {
        "last_update": int(rows[-1]["updates"]),
        "lines_missing": missing,
        "lines_repeated": repeated,
        "frames_never_go_back": frames == sorted(frames),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the kills and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--workers", type=int, default=0, help="collector's processes of a rank")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(arguments)
    chosen, kills = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as folder:
        run_dir, log = Path(folder) / "run", Path(folder) / "log"
        settings = {"collection__num_workers": args.workers}
        run = Run(run_dir, log, args.kills - 1, training__total_frames=1_000_000, **settings)
        sys.stderr.write(f"log: {log}\n")
        for number in range(args.kills):
            kills.append(kill_a_rank(run, chosen))
            sys.stderr.write(f"{number + 1}/{args.kills}: {kills[-1]}\n")
            if number < args.kills - 1:  # it has resumed when it goes beyond
                run.wait_for_updates(kills[-1]["at_update"] + EVERY)
        code = run.process.wait(60)
        root_cause = re.search(r"Root Cause[^=]*?rank\s*: (\d)", log.read_text(), re.DOTALL)
        frames = int(read_metrics(run_dir)[-1]["frames"]) + 1024
        last = Run(run_dir, log, 0, training__total_frames=frames, resume="auto", **settings)
        results = {
            "kills": kills,
            "exit_code_after_the_last": code,
            "torchrun_names_rank": root_cause and int(root_cause.group(1)),
            "resumed_and_finished": last.process.wait(600) == 0,
            "metrics": check_metrics(run_dir),
        }
    write_results(args.json, results)


if __name__ == "__main__":
    main()

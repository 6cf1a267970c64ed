"""Sweeps on a real SLURM, started for these tests: requeued, out of time, on several ranks.

``W2F_SLURM_LOG=benchmarks/results/slurm_sweep.log pytest tests/test_slurm.py`` keeps the log.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import curves
import pytest
from helpers.checkout import ROOT
from slurm_cluster import SlurmCluster, missing_requirement
from tiny_run import missing_and_repeated, tiny_overrides

from w2f_torchrl.checkpoint import latest_checkpoint, load_checkpoint
from w2f_torchrl.logging.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(3000)]

FRAMES = 1600


class Journal:
    """What happened when, without this machine's names and paths."""

    def __init__(self, path: Path | None, hidden: dict[str, str]):
        self.path, self.hidden = path, hidden
        self.start = time.monotonic()
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        for name, substitute in self.hidden.items():
            text = text.replace(name, substitute)
        for line in text.splitlines():
            self.lines.append(f"{time.monotonic() - self.start:7.1f} s  {line}")
        if self.path is not None:
            self.path.write_text("\n".join(self.lines) + "\n")


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    if (reason := missing_requirement()) is not None:
        pytest.skip(reason)
    pytest.importorskip("submitit")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # munged's user has to come in
        with SlurmCluster(Path(folder) / "slurm") as running:
            yield running


@pytest.fixture(scope="module")
def journal(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Journal:
    path = os.environ.get("W2F_SLURM_LOG")
    hidden = {str(cluster.folder.parent): "<cluster>", str(ROOT): "<checkout>"}
    hidden |= {str(tmp_path_factory.getbasetemp()): "<folder>"}
    hidden |= {sys.executable: "python", socket.gethostname(): "<host>"}
    return Journal(Path(path) if path else None, hidden)


class Sweep:
    """``world2filter.py --multirun`` on the cluster, in the background."""

    def __init__(self, cluster: SlurmCluster, journal: Journal, folder: Path, *overrides: str):
        self.cluster, self.journal, self.folder = cluster, journal, folder
        self.states: dict[str, str] = {}
        arguments = ["--multirun", "hydra/launcher=submitit_slurm", f"hydra.sweep.dir={folder}"]
        arguments += ["hydra.launcher.gpus_per_node=null", "hydra.launcher.cpus_per_task=1"]
        arguments += ["hydra.launcher.mem_gb=4", "hydra.launcher.partition=main", *overrides]
        journal.note("$ python sota_configs/world2filter.py " + " ".join(arguments) + " <tiny run>")
        tiny = tiny_overrides(training__total_frames=FRAMES)
        self.output = (folder.parent / f"{folder.name}.out").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "sota_configs/world2filter.py", *arguments, *tiny],
            cwd=ROOT,
            env=cluster.environment,
            stdout=self.output,
            stderr=self.output,
        )

    def look(self) -> None:
        """Note what changed in the queue."""
        states = self.cluster.queue()
        for job in sorted(states | self.states):
            now = states.get(job, "ended")
            if self.states.get(job) != now:
                self.journal.note(f"job {job}: {now}")
        self.states = states

    def wait(self, until: Callable[[], bool], what: str, seconds: float = 900) -> None:
        end = time.monotonic() + seconds
        while not until():
            self.look()
            if time.monotonic() > end or (self.process.poll() or 0) != 0:
                self.output.seek(0)
                pytest.fail(f"not: {what}\n{self.output.read()}\n" + "\n".join(self.journal.lines))
            time.sleep(1)

    def updates(self, run: str) -> int:
        path = self.folder / run
        if not (path / "metrics.jsonl").exists():
            return 0
        return max((int(row["updates"]) for row in read_metrics(path)), default=0)

    def logs(self, job: str) -> str:
        paths = sorted((self.folder / ".submitit").rglob(f"{job}_*_log.out"))
        return "\n".join(path.read_text() for path in paths)


def check_run(sweep: Sweep, run: str) -> None:
    """It is complete, and every update's line and every frame is there once."""
    rows = read_metrics(sweep.folder / run)
    missing, repeated = missing_and_repeated(rows)
    frames = [row["frames"] for row in rows]
    assert (missing, repeated) == ([], [])
    assert frames == sorted(frames)
    newest = latest_checkpoint(sweep.folder / run / "checkpoints")
    assert newest is not None
    saved = load_checkpoint(newest)
    assert saved.frames >= FRAMES
    sweep.journal.note(
        f"{run}: {saved.frames} frames, {saved.updates} updates, {len(rows)} lines of metrics, "
        "none missing, none twice"
    )


def test_a_sweep_of_three_runs_one_requeued_and_one_out_of_time(cluster, journal, tmp_path):
    sweep = Sweep(cluster, journal, tmp_path / "sweep", "seed=0,1,2")
    runs = [f"{seed}_world2filter_cartpole_balance_{seed}" for seed in range(3)]
    jobs = {}
    for run, command in (
        (runs[0], ("scontrol", "requeue")),
        (runs[1], ("scancel", "--signal=USR2")),  # what SLURM sends before the time is up
    ):
        sweep.wait(lambda run=run: sweep.updates(run) >= 15, f"{run} trains")
        job = jobs[run] = array_id(cluster, run)
        journal.note(f"{run} (job {job}) is at update {sweep.updates(run)}")
        journal.note("$ " + " ".join([*command, job]))
        cluster.call(*command, job)
    sweep.wait(lambda: sweep.process.poll() == 0, "the sweep ends", 1800)
    sweep.look()
    for run in runs:
        check_run(sweep, run)
    for job in jobs.values():
        resumed = re.findall(r"resumed .* at \d+ frames, \d+ updates", sweep.logs(job))
        journal.note(f"job {job}'s log: {resumed}")
        assert len(resumed) == 1
    found = curves.collect_runs([sweep.folder])
    assert [path.name for path in found] == runs


def array_id(cluster: SlurmCluster, run: str) -> str:
    """The array job whose number is the run's in the sweep."""
    return next(job for job in cluster.queue() if job.endswith(f"_{run[0]}"))


def test_two_tasks_are_two_ranks_and_resume_together(cluster, journal, tmp_path):
    sweep = Sweep(cluster, journal, tmp_path / "ranks", "hydra.launcher.tasks_per_node=2", "seed=5")
    run = "0_world2filter_cartpole_balance_5"
    sweep.wait(lambda: sweep.updates(run) >= 15, "the ranks train")
    job = next(iter(cluster.queue()))
    journal.note(f"two ranks (job {job}) are at update {sweep.updates(run)}")
    journal.note(f"$ scancel --signal=USR2 {job}")
    cluster.call("scancel", "--signal=USR2", job)
    sweep.wait(lambda: sweep.process.poll() == 0, "the sweep ends", 1800)
    sweep.look()
    check_run(sweep, run)
    log = sweep.logs(job)
    assert "2 ranks of 2 sequences" in log
    assert len(re.findall(r"resumed .* at \d+ frames", log)) == 1

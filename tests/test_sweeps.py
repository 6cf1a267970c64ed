"""Sweeps on one machine: one process after the other, and submitit's local processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import curves
import pytest
from test_trainers import ROOT
from tiny_run import missing_and_repeated, tiny_overrides

from w2f_torchrl.utils.logging import read_metrics

FRAMES = 800


def start_sweep(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    settings = [*overrides, f"hydra.sweep.dir={folder}"]
    settings += tiny_overrides(training__total_frames=FRAMES)
    return subprocess.Popen(
        [sys.executable, "sota_configs/world2filter.py", "--multirun", *settings],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_curves_collect_a_sweeps_runs(tmp_path):
    runs = [tmp_path / "sweep" / name for name in ("0_a", "1_b", "10_c")]
    for run in runs:
        run.mkdir(parents=True)
        (run / "config.yaml").touch()
        (run / "metrics.jsonl").touch()
    (tmp_path / "sweep" / "2_not_begun").mkdir()
    assert set(curves.collect_runs([tmp_path / "sweep"])) == set(runs)
    assert curves.collect_runs([runs[2], runs[0]]) == [runs[2], runs[0]]
    with pytest.raises(FileNotFoundError, match="is no run directory and holds none"):
        curves.collect_runs([tmp_path / "sweep" / "2_not_begun"])


def updates(run: Path) -> int:
    if not (run / "metrics.jsonl").exists():
        return 0
    return max((int(row["updates"]) for row in read_metrics(run)), default=0)


def check_run(run: Path) -> None:
    rows = read_metrics(run)
    assert missing_and_repeated(rows) == ([], [])
    assert rows[-1]["frames"] == FRAMES
    assert (run / "config.yaml").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_basic_launcher_gives_each_run_its_directory(tmp_path):
    sweep = start_sweep(tmp_path, "seed=3,4")
    output = sweep.communicate()[0]
    assert sweep.returncode == 0, output
    runs = [tmp_path / f"{n}_world2filter_cartpole_balance_{seed}" for n, seed in enumerate((3, 4))]
    assert sorted(path for path in tmp_path.iterdir() if path.is_dir()) == runs
    for run in runs:
        check_run(run)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_local_job_that_is_preempted_goes_on(tmp_path):
    """submitit's signal, as SLURM sends it at a preemption or before the time is up."""
    pytest.importorskip("submitit")
    sweep = start_sweep(tmp_path, "hydra/launcher=submitit_local", "seed=3")
    run = tmp_path / "0_world2filter_cartpole_balance_3"
    end = time.monotonic() + 600
    while updates(run) < 15 and time.monotonic() < end:
        time.sleep(0.5)
    [trainer] = [pid for pid in submitit_tasks(str(tmp_path)) if pid != sweep.pid]
    os.kill(trainer, signal.SIGUSR2)
    output = sweep.communicate()[0]
    log = "\n".join(path.read_text() for path in tmp_path.rglob("*_log.out"))
    assert sweep.returncode == 0, output + log
    check_run(run)
    assert len(re.findall(r"resumed .* at \d+ frames", log)) == 1, log


def submitit_tasks(folder: str) -> list[int]:
    """Processes that run a job below a folder."""
    found = []
    for path in Path("/proc").iterdir():
        try:
            words = (path / "cmdline").read_bytes().decode().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        if "submitit.core._submit" in words and any(word.startswith(folder) for word in words):
            found.append(int(path.name))
    return found

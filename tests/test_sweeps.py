"""Sweeps on one machine: one process after the other, and submitit's local processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import curve_runs
import curves
import pytest
import yaml
from helpers.checkout import ROOT
from hydra import compose, initialize_config_module
from tiny_run import missing_and_repeated, tiny_overrides

import sota_configs.world2filter as program
from w2f_torchrl.logging.metrics import read_metrics
from w2f_torchrl.trainers import Trainer

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
    with pytest.raises(FileNotFoundError, match="is not a run directory and contains none"):
        curves.collect_runs([tmp_path / "sweep" / "2_not_begun"])


def write_list(path: Path, **changes: object) -> Path:
    content = {
        "overrides": ["experiment=smoke"],
        "seeds": [0, 1],
        "configurations": {"a": ["algo=dreamer_v3"], "b": None},
    }
    path.write_text(yaml.safe_dump(content | changes))
    return path


def test_a_list_of_configurations_is_all_of_them_with_each_seed(tmp_path):
    jobs = curve_runs.read_jobs(write_list(tmp_path / "list.yaml"))
    assert [job.name for job in jobs] == ["a_seed0", "b_seed0", "a_seed1", "b_seed1"]
    assert jobs[0].overrides == ("experiment=smoke", "algo=dreamer_v3")
    for path in (ROOT / "benchmarks" / "evidence" / "curves").glob("*.yaml"):
        assert curve_runs.read_jobs(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [1, 1]}, "names a seed twice"),
        ({"seeds": "0"}, "seeds is '0': must be a list of integers"),
        ({"configurations": {}}, "configurations is {}: must be a mapping"),
        ({"configurations": {"a b": []}}, "configurations has 'a b'"),
        ({"configurations": {"a": ["seed=3"]}}, "a sets seed, which the list sets"),
        ({"configurations": {"a": ["loss.mask=-1"]}}, r"configuration a: loss\.mask=-1"),
        ({"configurations": {"a": ["loss.masc=1"]}}, "configuration a: .*masc"),
        ({"other": 1}, "must hold seeds, configurations"),
    ],
)
def test_a_bad_list_is_refused_before_anything_runs(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        curve_runs.read_jobs(write_list(tmp_path / "list.yaml", **changes))


STUB = """
import json, os, pathlib, sys
settings = dict(argument.split("=", 1) for argument in sys.argv[1:])
assert settings["resume"] == "auto"
run = pathlib.Path(settings["run_dir"])
(run / "checkpoints").mkdir(parents=True, exist_ok=True)
total = int(settings["training.total_frames"])
metrics = run / "metrics.jsonl"
frames = total if metrics.exists() else total // 2  # the first start is interrupted
if not metrics.exists():
    from omegaconf import OmegaConf
    from hydra import compose, initialize_config_module
    import sota_configs.world2filter
    with initialize_config_module("sota_configs", version_base="1.3"):
        OmegaConf.save(compose("config", sys.argv[1:]), run / "config.yaml")
with metrics.open("a") as file:
    print(json.dumps({"frames": frames, "updates": frames}), file=file)
(run / "checkpoints" / f"checkpoint_{frames:012d}.pt").touch()
"""


LENGTH = "training.total_frames=100"
SHORT_PREFILL = "training.prefill_steps=16"  # so that 100 frames are enough for an update


def stub_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stub: str) -> list[str]:
    """Let the lists' runs be those of a stub; returns the lines that are said."""
    (tmp_path / "stub.py").write_text(stub)
    monkeypatch.setattr(curve_runs, "SCRIPT", tmp_path / "stub.py")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return []


def test_a_list_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    lines = stub_runs(tmp_path, monkeypatch, STUB)
    path = write_list(
        tmp_path / "list.yaml", overrides=["experiment=smoke", LENGTH, SHORT_PREFILL], seeds=[3]
    )
    jobs = curve_runs.read_jobs(path)
    runs = curve_runs.Runs(tmp_path / "runs", 2, lines.append)
    with pytest.raises(RuntimeError, match=r"2 of 2 runs failed: see .*a_seed3\.log"):
        runs.train(jobs)
    found = runs.train(jobs)
    assert found == {label: [tmp_path / "runs" / f"{label}_seed3"] for label in "ab"}
    lines.clear()
    assert runs.train(jobs) == found
    assert sorted(lines) == [f"{job.name}: done before" for job in jobs]
    changed = ["experiment=smoke", LENGTH, SHORT_PREFILL, "optimizer.lr=0.5"]
    jobs = curve_runs.read_jobs(write_list(path, overrides=changed, seeds=[3]))
    with pytest.raises(ValueError, match=r"was trained with optimizer\.lr=.*the list has 0\.5"):
        runs.train(jobs)


WAITING = """
import pathlib, signal, sys
run = pathlib.Path(dict(argument.split("=", 1) for argument in sys.argv[1:])["run_dir"])
run.mkdir(parents=True)
signal.signal(signal.SIGTERM, lambda *_: (run / "saved").touch() or sys.exit(0))
(run / "started").touch()
signal.pause()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_lists_runs_with_their_checkpoints(tmp_path, monkeypatch, number):
    lines = stub_runs(tmp_path, monkeypatch, WAITING)
    jobs = curve_runs.read_jobs(write_list(tmp_path / "list.yaml"))
    folder = tmp_path / "runs"

    def interrupt() -> None:
        while len(list(folder.glob("*/started"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    before = signal.getsignal(signal.SIGTERM)
    # A job in the background of a shell has SIGINT ignored, and then no Ctrl+C.
    ctrl_c = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            curve_runs.Runs(folder, 2, lines.append).train(jobs)
    finally:
        signal.signal(signal.SIGINT, ctrl_c)
    assert {p.parent.name for p in folder.glob("*/saved")} == {"a_seed0", "b_seed0"}
    assert not (folder / "a_seed1").exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interrupted_list_ends_with_a_sentence(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(curve_runs.Runs, "train", interrupted)
    path = write_list(tmp_path / "list.yaml")
    outputs = ["--out", str(tmp_path / "a.png"), "--json", str(tmp_path / "a.json")]
    with pytest.raises(SystemExit) as ended:
        curves.main(["--train", str(path), "--runs", str(tmp_path / "runs"), *outputs])
    assert ended.value.code == 130
    assert "run the same command to continue" in capsys.readouterr().err


def test_ctrl_c_before_the_first_update_ends_a_run_without_a_traceback(tmp_path, monkeypatch):
    def interrupted(self):
        self._close()
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train", interrupted)
    with initialize_config_module("sota_configs", version_base="1.3"):
        config = compose("config", [*tiny_overrides(), f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(SystemExit) as ended:
        program.train(config)
    assert ended.value.code == 130


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

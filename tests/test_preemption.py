"""Jobs that a scheduler takes away and starts again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
from helpers.checkout import ROOT
from helpers.runs import tiny_run

from w2f_torchrl.trainers import Trainer
from w2f_torchrl.trainers.preemption import hand_over, is_restart, stop_signals


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("SUBMITIT_EXECUTOR", "SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_launchers_restart_is_recognised(run_dir, monkeypatch, name):
    assert not is_restart(run_dir)
    for count, expected in (("", False), ("0", False), ("1", True), ("12", True)):
        monkeypatch.setenv(name, count)
        assert is_restart(run_dir) is expected


def test_a_run_outside_submitit_just_ends(run_dir):
    names = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP")
    assert stop_signals() == tuple(signal.Signals[name] for name in names)
    hand_over([signal.SIGTERM], run_dir, is_first=True)
    assert not is_restart(run_dir)


def test_submitits_signal_reaches_its_handler_after_the_checkpoint(run_dir, monkeypatch):
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "17")
    assert stop_signals()[-1] == signal.SIGUSR2

    def requeue(number: int, frame: object) -> None:
        raise SystemExit(122)

    previous = signal.signal(signal.SIGUSR2, requeue)
    try:
        with pytest.raises(SystemExit) as left:
            hand_over([signal.SIGUSR2], run_dir, is_first=True)
        assert left.value.code == 122
        # The other ranks leave it to rank 0, without an error that could end it.
        with pytest.raises(SystemExit) as left:
            hand_over([signal.SIGUSR2], run_dir, is_first=False)
        assert left.value.code == 0
    finally:
        signal.signal(signal.SIGUSR2, previous)
    assert is_restart(run_dir)
    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "18")  # another job on the same directory
    assert not is_restart(run_dir)


def test_a_terminated_submitit_job_is_not_done(run_dir, monkeypatch):
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    with pytest.raises(SystemExit) as left:
        hand_over([signal.SIGTERM], run_dir, is_first=True)
    assert left.value.code == 143
    assert not is_restart(run_dir)


def test_a_signal_while_a_run_is_opened_requeues_the_job(run_dir, monkeypatch):
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "17")

    def preempt(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGUSR2)

    def requeue(number: int, frame: object) -> None:
        raise SystemExit(122)

    previous = signal.signal(signal.SIGUSR2, requeue)
    config = tiny_run(run_dir)
    try:
        for function in ("opening.find_resumption", "trainer.build_parts"):
            monkeypatch.setattr(f"w2f_torchrl.trainers.{function}", preempt)
            with pytest.raises(SystemExit) as left:
                Trainer(config)
            assert left.value.code == 122
            assert is_restart(run_dir)
            monkeypatch.undo()
            (run_dir / ".requeued").unlink()
            monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
            monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "17")
    finally:
        signal.signal(signal.SIGUSR2, previous)


PRESETS = {
    "submitit_slurm": {"nodes": 1, "tasks_per_node": 1, "gpus_per_node": 1},
    "submitit_slurm_node": {"nodes": 1, "tasks_per_node": 8, "gpus_per_node": 8},
    "submitit_slurm_nodes": {"nodes": 2, "tasks_per_node": 8, "gpus_per_node": 8},
    "submitit_local": {"nodes": 1, "tasks_per_node": 1, "gpus_per_node": None},
}


@pytest.mark.slow
def test_launchers_presets_and_a_sweeps_directories():
    """One process composes them all."""
    pytest.importorskip("submitit")
    script = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
import sota_configs.world2filter as program
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
found = {{}}
with initialize_config_dir({str(ROOT / "sota_configs")!r}, version_base="1.3"):
    for name in {list(PRESETS)}:
        config = compose("config", [f"hydra/launcher={{name}}"], return_hydra_config=True)
        found[name] = OmegaConf.to_container(config.hydra.launcher, resolve=False)
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for name, wanted in PRESETS.items():
        assert {key: found[name][key] for key in wanted} == wanted
        if "slurm" in name:
            assert found[name]["max_num_timeout"] > 0
            assert found[name]["setup"] == ["export SLURM_KILL_BAD_EXIT=1"]
            assert found[name]["_target_"].endswith("SlurmLauncher")

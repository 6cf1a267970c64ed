"""The benchmarks run, and the acceptance run keeps what it has when it is cut."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import same_losses

from w2f_torchrl.trainers.checkpointing import latest_checkpoint, load_checkpoint, save_checkpoint

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_acceptance.py"


def accept(out: Path, *arguments: str) -> tuple[int, dict]:
    """Run the small acceptance: exit code and the stages' rows."""
    command = [sys.executable, str(SCRIPT), "--small", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert out.exists(), done.stderr
    results = json.loads(out.read_text())
    assert results["settings"]["small"]
    return done.returncode, results["stages"]


def test_stages_without_time_are_failures_and_are_written(tmp_path):
    code, stages = accept(tmp_path / "cut.json", "--minutes", "0", "--stages", "losses", "run")
    assert code == 2
    assert stages == {name: {"failed": "no time left"} for name in ("losses", "run")}


@pytest.mark.slow
@pytest.mark.render
def test_every_stage_of_the_acceptance_runs_on_the_cpu(tmp_path):
    code, stages = accept(tmp_path / "small.json")
    assert code == 0, stages
    assert list(stages) == ["environment", "render", "losses", "learner", "masks", "run"]
    result = {name: row["result"] for name, row in stages.items()}
    assert result["losses"]["split, eager"]["largest_difference_of_first_3"] == 0  # one seed
    update = result["learner"]["update"]
    assert update["split"]["operations"] > update["dreamer_v3"]["operations"] > 1000
    assert 0.5 < update["dreamer_v3"]["gflop"] / update["torchrl_parts"]["gflop"] < 1.2
    assert result["masks"]["student"] > 0
    for run in result["run"]["runs"].values():
        assert run["updates"] > 0
        assert abs(sum(run["share"].values()) - 1) < 0.01


@pytest.mark.render
@pytest.mark.usefixtures("no_curves")
def test_the_first_difference_of_two_runs_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(same_losses, "FRAMES", 96)
    first, second = tmp_path / "first", tmp_path / "second"
    assert same_losses.train(first, "foreground", workers=0) == 6
    shutil.copytree(first, second)
    assert same_losses.first_difference(first, second) is None
    path = latest_checkpoint(second / "checkpoints")
    saved = load_checkpoint(path)
    name, weights = next(iter(saved.payload["learner"]["loss"].items()))
    weights.view(-1)[0] += 1
    save_checkpoint(path.parent, saved.payload, updates=saved.updates, frames=saved.frames)
    expected = f"loss.{name} differs in the last checkpoints"
    assert same_losses.first_difference(first, second) == expected
    metrics = second / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    changed = json.loads(lines[-1]) | {"wm/kl_loss": 7.5}
    metrics.write_text("".join([*lines[:-1], json.dumps(changed)]))
    found = same_losses.first_difference(first, second)
    assert found.startswith(f"row {len(lines) - 1}, update 6: wm/kl_loss is ")
    assert found.endswith(" and 7.5")
    metrics.write_text("".join(lines[:-1]))
    found = same_losses.first_difference(first, second)
    assert found == f"row {len(lines) - 1} is in one run only"


@pytest.mark.slow
@pytest.mark.render
@pytest.mark.timeout(1500)
def test_a_version_trains_as_itself(tmp_path):
    root, out = SCRIPT.parents[1], tmp_path / "same.json"
    command = [sys.executable, str(SCRIPT.with_name("same_losses.py")), str(root), str(root)]
    command += ["--algorithms", "foreground", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(out.read_text())
    assert results["identical"]
    assert str(root) not in out.read_text()
    assert results["runs"]["foreground"]["updates"] == 48

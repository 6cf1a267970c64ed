"""The benchmarks run, and the acceptance run keeps what it has when it is cut."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
    for (run,) in result["run"]["runs"].values():
        assert run["updates"] > 0
        assert abs(sum(run["share"].values()) - 1) < 0.01

"""The benchmarks run, and the acceptance run keeps what it has when it is cut."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import decoders
import gpu_acceptance
import gpu_stages
import learner_growth
import learner_parts
import pytest
import same_losses
import torch
import versions
from helpers.models import TINY
from tensordict import TensorDict

from w2f_torchrl.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_acceptance.py"


def accept(out: Path, *arguments: str) -> tuple[int, dict]:
    """Run the small acceptance: exit code and the stages' rows."""
    command = [sys.executable, str(SCRIPT), "--small", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert (out / gpu_acceptance.RESULTS).exists(), done.stderr
    return done.returncode, json.loads((out / gpu_acceptance.RESULTS).read_text())["stages"]


def test_the_stages_fit_a_machine_that_is_lent_for_nine_minutes():
    assert all(hasattr(gpu_stages, name) for name in gpu_acceptance.LIMITS)
    before_the_curves = [gpu_acceptance.LIMITS[n] for n in gpu_acceptance.DEFAULT_STAGES[:-1]]
    assert gpu_acceptance.DEFAULT_STAGES[-1] == "curves"
    assert gpu_acceptance.SECONDS <= 520
    assert gpu_acceptance.SECONDS - sum(before_the_curves) >= 200


def test_stages_without_time_are_failures_and_are_written(tmp_path):
    code, stages = accept(tmp_path, "--seconds", "0", "--stages", "equality", "render")
    assert code == 2
    assert stages == {name: {"failed": "no time left"} for name in ("equality", "render")}


def supervised(tmp_path: Path, monkeypatch, bodies: dict[str, str], **limits: float) -> dict:
    """The results of stages with these bodies, in workers as the command starts them."""
    script = tmp_path / "acceptance.py"
    stages = "".join(
        f"def {name}(options):\n    {body}\ngpu_stages.{name} = {name}\n"
        for name, body in bodies.items()
    )
    script.write_text(
        "import os, sys, time\n"
        f"sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "import gpu_acceptance, gpu_stages\n"
        f"gpu_acceptance.LIMITS |= {limits!r}\n"
        f"{stages}gpu_acceptance.main()\n"
    )
    monkeypatch.setattr(gpu_acceptance, "__file__", str(script))
    monkeypatch.setattr(gpu_acceptance, "LIMITS", gpu_acceptance.LIMITS | limits)
    monkeypatch.setattr(gpu_acceptance, "PATIENCE", 1)
    out = tmp_path / "out"
    out.mkdir()
    args = argparse.Namespace(small=True, seconds=300.0, out=out, r2dreamer=None, limit=[])
    gpu_acceptance.supervise(list(bodies), args)
    return json.loads((out / gpu_acceptance.RESULTS).read_text())["stages"]


def test_a_stage_that_raises_or_ends_its_process_stops_no_other(tmp_path, monkeypatch):
    stages = supervised(
        tmp_path,
        monkeypatch,
        {
            "environment": "options.keep({'first': 1}); raise ValueError('broken')",
            "smoke": "options.keep({'second': 2}); os._exit(3)",
            "render": "return {'third': options.small}",
        },
    )
    assert stages["environment"]["failed"] == "ValueError: broken"
    assert stages["smoke"]["second"] == 2
    assert stages["smoke"]["failed"] == "its process ended with exit code 3"
    assert stages["render"]["third"] is True
    assert gpu_stages.failures(stages) == 2


def test_a_stage_that_takes_too_long_is_cut_and_keeps_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_acceptance, "GRACE", 1)
    stages = supervised(
        tmp_path,
        monkeypatch,
        {
            "equality": "options.keep({'first': 1}); time.sleep(1000)",
            "render": "return {'second': 2}",
        },
        equality=2,
        render=120,  # it needs no time, but a busy machine may not give it any
    )
    assert stages["equality"]["first"] == 1
    assert stages["equality"]["failed"].startswith("not done after")
    assert stages["render"]["second"] == 2


def test_a_row_that_fails_stops_no_other_row():
    kept = []
    options = gpu_stages.Options(Path(), True, None, lambda rows: kept.append(dict(rows)), 0.0)
    rows = gpu_stages.Rows(options)
    rows.add("bad", lambda: 1 / 0)
    rows.add("good", lambda: {"value": 1})
    assert rows["bad"]["failed"].startswith("ZeroDivisionError")
    assert "1 / 0" in " ".join(rows["bad"]["trace"])
    assert rows["good"]["value"] == 1
    assert [list(row) for row in kept] == [["bad"], ["bad", "good"]]
    assert gpu_stages.failures(rows) == 1


@pytest.mark.slow
@pytest.mark.render
@pytest.mark.timeout(3000)
def test_the_acceptance_runs_on_a_cpu(tmp_path):
    code, stages = accept(tmp_path, "--seconds", "2500")
    assert code == 0, stages
    assert list(stages) == list(gpu_acceptance.DEFAULT_STAGES)
    for name in ("world2filter", "dreamer_v3"):
        assert stages["curves"][name]["updates"] > 0
        assert (tmp_path / f"{name}.jsonl").exists()
        assert (tmp_path / f"{name}.png").exists()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) <= 8  # as many as come back from a lent machine
    assert {path.parent for path in files} == {tmp_path}


def test_decoders_are_compared_at_equal_updates_and_at_equal_time():
    errors = [400.0, 200.0, 100.0]  # after 0, 25 and 50 updates
    same = decoders.summarise(errors, ratio=1.0)
    assert same == {"at_updates": {"50": 100.0}, "at_equal_time": {"50": 100.0}}
    assert decoders.summarise(errors, ratio=2.0)["at_equal_time"] == {"50": 200.0}
    between = decoders.summarise(errors, ratio=4 / 3)["at_equal_time"]["50"]  # 37.5 updates
    assert between == pytest.approx((100 * 200) ** 0.5, abs=0.1)
    assert decoders.summarise(errors, ratio=0.5)["at_equal_time"] == {}  # no look so late
    assert decoders.BASELINE in decoders.combinations()


def test_slices_of_the_decoders_benchmark_stay_in_an_episode_and_repeat():
    step = torch.arange(2 * 40).view(2, 40)  # two episodes
    records = TensorDict({"step": step}, [2, 40])
    batches, again = (decoders.slices(records, seed=3) for _ in range(2))
    starts = set()
    for _ in range(20):
        batch = next(batches)["step"]
        assert batch.shape == (decoders.BATCH, decoders.LENGTH)
        assert torch.equal(batch, next(again)["step"])
        assert (batch.diff(dim=1) == 1).all()
        assert torch.equal(batch[:, 0] // 40, batch[:, -1] // 40)
        starts |= set(batch[:, 0].tolist())
    assert {0, 40 - decoders.LENGTH, 40, 80 - decoders.LENGTH} <= starts  # the ends too


def test_a_growth_varies_one_thing_at_a_time():
    base = {"batch_size": 8, "model": "size1m", "threads": 1}
    table = learner_growth.points(base, {"batch_size": (4, 8, 16), "model": ("size1m", "size12m")})
    assert table.pop("base") == base
    assert list(table) == ["batch_size=4", "batch_size=16", "model=size12m"]
    for settings in table.values():
        assert sum(settings[key] != base[key] for key in base) == 1


def test_a_larger_batch_takes_more_of_everything(monkeypatch):
    monkeypatch.setitem(learner_growth.PRESETS, "tiny", TINY)
    base = {"model": "tiny", "latent": "split", "batch_size": 2, "batch_length": 8, "rounds": 1}
    base |= {"image_size": 16, "execution": "eager", "precision": "float32", "threads": 1}
    result = learner_growth.run(base | {"device": "cpu"}, {"batch_length": (8, 256)}, 1)
    grown = result["update"]["batch_length=256"]["times_base"]
    assert grown["million_parameters"] == 1
    assert grown["gflop"] == pytest.approx(32, rel=0.2)
    assert 2 < grown["operations"] < 32  # imagination's don't depend on it
    assert grown["peak_mib"] > 1


def test_the_kinds_of_an_update_add_up():
    weight, pictures = torch.randn(64, 64, 3, 3), torch.randn(8, 64, 32, 32)
    table = learner_parts.by_kind(
        lambda sample: torch.conv2d(pictures, weight), TensorDict(), rounds=3
    )
    assert table["products"] == 0
    assert table["convolutions"] > 0.5 * table["update"] > 0
    total = table["products"] + table["convolutions"] + table["rest"]
    assert total == pytest.approx(table["update"], abs=1e-4)
    square = torch.randn(512, 512)
    table = learner_parts.by_kind(lambda sample: square @ square, TensorDict(), rounds=3)
    assert table["products"] > 0.5 * table["update"]
    assert table["convolutions"] == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_each_part_is_timed_eager_and_compiled(monkeypatch):
    monkeypatch.setitem(learner_parts.PRESETS, "tiny", TINY)
    monkeypatch.setattr(learner_parts, "HEAP", 1)
    threads = torch.get_num_threads()
    results = learner_parts.run("tiny", (2, 4), 1, threads)
    assert list(results["parts"]) == ["encoder", "decoder", "recurrence", "imagination"]
    assert all(row[mode] > 0 for row in results["parts"].values() for mode in ("eager", "compiled"))
    for table in results["seconds_by_kind"].values():
        assert min(table["products"], table["convolutions"]) > 0


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


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_version_is_timed_against_itself():
    arguments = ["--model", "size1m", "--shape", "2", "4", "--latents", "whole", "--setting"]
    checkout = Path(__file__).parents[1]
    row = versions.compare(checkout, checkout, arguments, rounds=3, warm_up=1)
    assert len(row["ratios"]) == 3
    assert row["before_median_seconds"] > 0
    assert 0.2 < row["ratio"] < 5
    with pytest.raises(RuntimeError, match="a version ended with exit code"):
        versions.compare(checkout, checkout, ["--model", "size0m", *arguments[2:]], rounds=1)

"""The benchmarks run, and the acceptance run keeps what it has when it is cut."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import decoders
import gpu_acceptance
import learner_growth
import learner_parts
import pytest
import same_losses
import torch
from tensordict import TensorDict
from test_objectives import TINY

from w2f_torchrl.trainers.checkpointing import latest_checkpoint, load_checkpoint, save_checkpoint

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_acceptance.py"


def accept(out: Path, *arguments: str) -> tuple[int, dict]:
    """Run the small acceptance: exit code and the stages' rows."""
    command = [sys.executable, str(SCRIPT), "--small", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert out.exists(), done.stderr
    results = json.loads(out.read_text())
    assert results["settings"]["small"]
    return done.returncode, results["stages"]


def test_stages_without_time_are_failures_and_are_written(tmp_path):
    code, stages = accept(tmp_path / "cut.json", "--minutes", "0", "--stages", "losses", "run")
    assert code == 2
    assert stages == {name: {"failed": "no time left"} for name in ("losses", "run")}


def test_limits_fit_the_time_of_the_machine_and_name_every_stage():
    assert set(gpu_acceptance.LIMITS) == set(gpu_acceptance.STAGES)
    assert sum(gpu_acceptance.LIMITS.values()) <= 60 * gpu_acceptance.MINUTES < 25 * 60


@pytest.mark.parametrize(
    ("body", "failed"),
    [
        ("raise SystemExit(3)", "exit code 3"),
        ("raise ValueError('broken')", "ValueError: broken"),
    ],
)
def test_a_stage_that_breaks_keeps_its_parts(body, failed, monkeypatch, tmp_path):
    script = tmp_path / "acceptance.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "import gpu_acceptance as acceptance\n"
        "def stage(options):\n"
        "    assert options.small and options.r2dreamer is None\n"
        "    options.keep({'first': 1})\n"
        f"    {body}\n"
        "acceptance.STAGES['environment'] = stage\n"
        "acceptance.main()\n"
    )
    monkeypatch.setattr(gpu_acceptance, "__file__", str(script))
    row = gpu_acceptance.run_stage("environment", ["--small"], limit=600)
    assert row["result"] == {"first": 1}
    assert failed in row["failed"]


def test_a_stage_that_is_cut_keeps_its_parts(monkeypatch):
    def cut(command, *, timeout, **options):
        assert command[-3:-1] == ["--one", "losses"]
        Path(command[-1]).write_text('{"first": 1}')
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(gpu_acceptance.subprocess, "run", cut)
    row = gpu_acceptance.run_stage("losses", ["--small"], limit=30)
    assert row["result"] == {"first": 1}
    assert row["failed"] == "not done after 30 seconds"


def test_what_a_stage_keeps_is_whole(tmp_path, monkeypatch):
    seen = []

    def stage(options):
        options.keep({"first": 1})
        seen.append(json.loads((tmp_path / "result.json").read_text()))
        return {"first": 1, "second": 2}

    monkeypatch.setitem(gpu_acceptance.STAGES, "losses", stage)
    options = gpu_acceptance.Options(True, None, lambda result: None)
    gpu_acceptance.run_one("losses", tmp_path / "result.json", options)
    assert seen == [{"first": 1}]
    assert json.loads((tmp_path / "result.json").read_text()) == {"first": 1, "second": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


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


@pytest.mark.slow
@pytest.mark.render
@pytest.mark.timeout(3000)
def test_every_stage_of_the_acceptance_runs_on_the_cpu(tmp_path):
    code, stages = accept(tmp_path / "small.json")
    assert code == 0, stages
    names = ["environment", "render", "learner", "losses", "run", "masks", "peers"]
    assert list(stages) == names
    result = {name: row["result"] for name, row in stages.items()}
    for latent in ("whole", "split"):
        one_by_one = result["losses"][f"{latent}, eager"]["one_by_one"]
        # One seed.
        assert one_by_one["world_model"]["largest"] == one_by_one["change"]["largest"] == 0
    update = result["learner"]["update"]
    assert update["split"]["operations"] > update["dreamer_v3"]["operations"] > 1000
    assert 0.5 < update["dreamer_v3"]["gflop"] / update["torchrl_parts"]["gflop"] < 1.2
    assert set(result["peers"]["update"]) == {"torchrl_parts", "dreamer_v3"}
    assert result["masks"]["student"] > 0
    for (run,) in result["run"]["runs"].values():
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

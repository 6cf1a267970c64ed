"""Everything a run logs, read back from its files and by the tools of wandb and TensorBoard."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.checkout import ROOT
from helpers.runs import tiny_run
from PIL import Image
from torchrl.record.loggers.csv import CSVLogger
from wandb_stub import wandb_stub

from w2f_torchrl.config import validation as config_module
from w2f_torchrl.logging import wandb as wandb_logging
from w2f_torchrl.logging.background_worker import BackgroundWorker
from w2f_torchrl.logging.environment import read_environment
from w2f_torchrl.logging.file_loggers import make_csv_logger
from w2f_torchrl.logging.metrics import MetricsLogger, read_metrics
from w2f_torchrl.logging.pictures.video import read_video
from w2f_torchrl.trainers import ConfigError, Trainer

HAS = {name: importlib.util.find_spec(name) is not None for name in ("wandb", "tensorboard")}
needs_wandb = pytest.mark.skipif(not HAS["wandb"], reason="needs wandb: make extras")
needs_tensorboard = pytest.mark.skipif(
    not HAS["tensorboard"], reason="needs tensorboard: make extras"
)

VIDEOS = {
    "train/observation_video",
    "train/reconstruction_video",
    "train/imagination/comparison",
    "train/imagination/imagined",
}
IMAGES = {
    "train/original",
    "train/reconstructed",
    "segmentation/mask",
    "segmentation/predicted_mask",
}
METRICS = """
wm/total_loss wm/image_loss wm/fg_loss wm/bg_loss wm/mask_iou wm/kl_loss wm/kl_value wm/reward_loss
wm/continue_loss wm/grad_norm ac/actor_loss ac/critic_loss ac/entropy ac/value_mean
ac/advantage_mean episode/return episode/length eval/return_mean eval/return_std eval/length_mean
segmentation/iou train/imagination/error speed/seconds weights/encoder/q50 gradients/actor/rms
latents/background_posterior_entropy/q95
"""


def logged_run(run_dir: Path, **settings):
    """A run whose episodes are 50 steps long and whose masks come from a segmenter."""
    values = {
        "environment": {"action_repeat": 20},
        "training": {"total_frames": 3200, "prefill_steps": 64},
        "segmentation": {"source": "median"},
        "evaluation": {"every_frames": 1600},
        "logging": {
            "every_updates": 5,
            "histograms_every_updates": 8,
            "images_every_updates": 8,
            "csv": True,
            "tensorboard": HAS["tensorboard"],
            "use_wandb": HAS["wandb"],
            "wandb_project": "tests",
        },
    }
    return tiny_run(run_dir, **(values | settings))


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> Iterator[Path]:
    """The directory of a run with every logger, which was resumed."""
    home, run_dir = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("logged") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("NETRC", str(home / "netrc"))
        for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
            patch.delenv(name, raising=False)
        Trainer(logged_run(run_dir)).train()
        longer = {"total_frames": 4800, "prefill_steps": 64}
        Trainer(logged_run(run_dir, resume="auto", training=longer)).train()
        yield run_dir


@pytest.mark.render
def test_a_run_logs_every_name(logged):
    rows = read_metrics(logged)
    names = {name for row in rows for name in row}
    assert set(METRICS.split()) <= names
    assert all(math.isfinite(value) for row in rows for value in row.values())
    seconds = [row["speed/seconds"] for row in rows if "speed/seconds" in row]
    assert seconds == sorted(seconds)
    for name in VIDEOS:
        files = sorted((logged / "videos").glob(f"{name.replace('/', '_')}_*.mp4"))
        assert [int(file.stem[-9:]) for file in files] == [1600, 3200, 4800], name
        assert len(read_video(files[0])) == (20 if "imagination" in name else 51)
    for name in IMAGES:
        files = sorted((logged / "images").glob(f"{name.replace('/', '_')}_*.png"))
        assert files, name
        assert Image.open(files[0]).size[0] == 8 * 96  # eight steps of 16 pixels, enlarged
    assert not list(logged.rglob("*.tmp"))
    assert [entry["frames"] for entry in read_environment(logged / "environment.json")] == [
        "0",
        "3200",
    ]


@pytest.mark.render
def test_histograms_come_every_so_many_updates_and_agree_with_their_quantiles(logged):
    rows = [row for row in read_metrics(logged) if "weights/encoder/q50" in row]
    assert [row["updates"] for row in rows] == list(range(8, 8 * len(rows) + 1, 8))
    for row in rows:
        for name in (key.removesuffix("/q05") for key in row if key.endswith("/q05")):
            low, middle, high = (row[f"{name}/{q}"] for q in ("q05", "q50", "q95"))
            assert low <= middle <= high <= row[f"{name}/max_abs"] + 1e-6, name
            assert row[f"{name}/rms"] <= row[f"{name}/max_abs"] + 1e-6


@pytest.mark.render
def test_csv_has_the_rows_of_the_metrics_file_also_after_a_resume(logged):
    rows = read_metrics(logged)
    files = {
        path.relative_to(logged / "csv/scalars").with_suffix("").as_posix(): path
        for path in (logged / "csv/scalars").rglob("*.csv")
    }
    assert set(files) == {name for row in rows for name in row} - {"frames", "updates"}
    for name, path in files.items():
        table = [line.split(",") for line in path.read_text().splitlines()]
        wanted = [(row["frames"], row[name]) for row in rows if name in row]
        assert [(int(frames), float(value)) for frames, value in table] == wanted


# ------------------------------------------------------------------ wandb


def inspect(path: Path) -> list[dict]:
    """The records of a .wandb file, by wandb's own inspector."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def wandb_records(logged) -> list[list[dict]]:
    return [inspect(path) for path in sorted(logged.glob("wandb/offline-run-*/*.wandb"))]


@needs_wandb
@pytest.mark.render
def test_wandb_goes_on_in_the_same_run_and_counts_its_rows_on(logged, wandb_records):
    assert len(wandb_records) == 2  # wandb begins a file at each start
    runs = [record["run"] for part in wandb_records for record in part if "run" in record]
    identity = json.loads((logged / "wandb_run.json").read_text())
    assert {run["run_id"] for run in runs} == {identity["id"]}
    assert {run["display_name"] for run in runs} == {"world2filter_cartpole_balance_0"}
    assert {run["run_group"] for run in runs} == {"world2filter_cartpole_balance"}
    assert {run["project"] for run in runs} == {"tests"}
    assert all(run["resume"] for run in runs)
    assert runs[0]["config"]["update"]["environment"]["action_repeat"] == 20
    steps = [item["_step"] for item in history(wandb_records)]
    assert steps == list(range(identity["rows"]))


def history(parts: list[list[dict]]) -> list[dict]:
    return [r["history"]["item"] for part in parts for r in part if "history" in r]


@needs_wandb
@pytest.mark.render
def test_wandb_has_every_number_at_its_frame(logged, wandb_records):
    items = history(wandb_records)
    for row in read_metrics(logged):
        names = row.keys() - {"frames", "updates"}
        found = [
            item
            for item in items
            if names <= item.keys()
            and all(item[name] == pytest.approx(row[name], rel=1e-12) for name in names)
        ]
        assert found, row
        for name in names:
            group = name.rpartition("/")[0]
            assert found[0][f"{group}/step"] == row["frames"]
    metrics = {
        record["metric"]["name"]: record["metric"].get("step_metric")
        for part in wandb_records
        for record in part
        if "metric" in record
    }
    assert metrics["wm/kl_loss"] == "wm/step"
    assert metrics["train/imagination/comparison"] == "train/imagination/step"


@needs_wandb
@pytest.mark.render
def test_wandb_has_every_picture_video_and_histogram_with_its_file(logged, wandb_records):
    kinds: dict[str, set[str]] = {}
    for folder, part in zip(sorted(logged.glob("wandb/offline-run-*")), wandb_records, strict=True):
        for item in history([part]):
            for key in item:
                if not key.endswith("._type"):
                    continue
                name = key.removesuffix("._type")
                kinds.setdefault(item[key], set()).add(name)
                if f"{name}.path" in item:
                    file = folder / "files" / item[f"{name}.path"]
                    assert file.stat().st_size == item[f"{name}.size"]
                if item[key] == "video-file":
                    frames = item[f"{name.rpartition('/')[0]}/step"]
                    ours = logged / "videos" / f"{name.replace('/', '_')}_{frames:09d}.mp4"
                    assert file.read_bytes() == ours.read_bytes()
    assert kinds["video-file"] == VIDEOS
    assert kinds["image-file"] == IMAGES
    quantiles = {name for row in read_metrics(logged) for name in row if name.endswith("/q05")}
    assert kinds["histogram"] == {name.removesuffix("/q05") for name in quantiles}


@needs_wandb
def test_auto_is_online_with_a_key_and_offline_without(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    assert wandb_logging.choose_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert wandb_logging.choose_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_logging.choose_mode("auto") == "offline"
    assert wandb_logging.choose_mode("online") == "online"


def run_online(folder: Path, port: int, kept: str, meanwhile: str = "") -> str:
    """A run logged online, in a process of its own: wandb reads its server's address once.

    Args:
        folder: The run's directory is made here.
        port: Of the server.
        kept: The folder, below wandb's, with the file that has to hold both rows.
        meanwhile: Python, between two rows of metrics.

    Returns:
        What it wrote to stderr.
    """
    code = f"""
import json, logging, os
logging.basicConfig(level=logging.INFO, format="%(message)s")
from w2f_torchrl.logging import wandb as wandb_logging
from w2f_torchrl.logging.metrics import MetricsLogger
wandb_logging.INIT_SECONDS = 3.0 if {port} == 9 else 60.0
wandb_logging.FINISH_SECONDS = 3.0
sink = wandb_logging.make_wandb_logger({str(folder / "run")!r}, project="p", mode="online")
with MetricsLogger({str(folder / "run")!r}, [sink]) as metrics:
    metrics.log({{"wm/kl_loss": 0.5}}, frames=7, updates=1)
    {meanwhile}
    metrics.log({{"wm/kl_loss": 0.25}}, frames=8, updates=2)
"""
    variables = {
        "PYTHONPATH": str(ROOT),
        "HOME": str(folder),
        "WANDB_BASE_URL": f"http://127.0.0.1:{port}",
        "WANDB_API_KEY": "x" * 40,
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    (path,) = (folder / "run").glob(f"wandb/{kept}/*.wandb")
    logged = [(item["wm/kl_loss"], item["wm/step"]) for item in history([inspect(path)])]
    assert logged == [(0.5, 7), (0.25, 8)]
    assert [row["wm/kl_loss"] for row in read_metrics(folder / "run")] == [0.5, 0.25]
    return done.stderr


@needs_wandb
@pytest.mark.slow
def test_an_unreachable_server_costs_a_wait_and_a_warning(tmp_path):
    assert "logged offline. Upload it later: wandb sync" in run_online(tmp_path, 9, "offline-run-*")


@needs_wandb
@pytest.mark.slow
def test_a_server_that_goes_away_costs_a_wait_and_a_warning(tmp_path):
    with wandb_stub(tmp_path / "server.log") as (server, port):
        said = run_online(tmp_path, port, "run-*", meanwhile=f"os.kill({server.pid}, 9)")
    assert "UpsertBucket" in (tmp_path / "server.log").read_text()  # it was online
    assert "does not respond. The data is kept" in said


@needs_wandb
def test_a_server_that_takes_nothing_more_is_not_waited_for(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(wandb_logging, "FINISH_SECONDS", 0.1)
    sink = wandb_logging.make_wandb_logger(tmp_path, project="p", mode="offline")
    finish, release = sink.experiment.finish, threading.Event()
    monkeypatch.setattr(sink.experiment, "finish", lambda: release.wait(60))
    with caplog.at_level(logging.WARNING):
        sink.close()
    assert "does not respond. The data is kept; upload it later: wandb sync" in caplog.text
    release.set()
    finish()


# ------------------------------------------------------------------ TensorBoard


@needs_tensorboard
@pytest.mark.render
def test_tensorboard_has_every_number_picture_video_and_histogram(logged):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sizes = {"scalars": 0, "images": 0, "histograms": 0}
    accumulator = EventAccumulator(str(logged / "tensorboard"), size_guidance=sizes).Reload()
    rows = read_metrics(logged)
    tags = accumulator.Tags()
    assert set(tags["scalars"]) == {n for row in rows for n in row} - {"frames", "updates"}
    for name in tags["scalars"]:
        events = [(event.step, event.value) for event in accumulator.Scalars(name)]
        wanted = [(row["frames"], row[name]) for row in rows if name in row]
        assert events == [(step, pytest.approx(value, rel=1e-6)) for step, value in wanted]
    assert set(tags["images"]) == VIDEOS | IMAGES
    (first, *_) = accumulator.Images("train/imagination/comparison")
    assert first.step == 1600
    assert first.encoded_image_string.startswith(b"GIF8")
    assert set(tags["histograms"]) == {
        name.removesuffix("/q05") for row in rows for name in row if name.endswith("/q05")
    }


@needs_tensorboard
def test_tensorboard_hides_what_a_resume_takes_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from w2f_torchrl.logging.file_loggers import make_tensorboard_logger

    for first, last in ((1, 5), (4, 6)):
        with MetricsLogger(tmp_path, [make_tensorboard_logger(tmp_path)]) as metrics:
            metrics.truncate_after(first - 1)
            for frames in range(first, last + 1):
                metrics.log({"wm/kl_loss": float(frames + 10 * first)}, frames=frames, updates=0)
        time.sleep(1.1)  # its files are named by the second
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("wm/kl_loss")
    assert [(e.step, e.value) for e in events] == [
        (1, 11.0),
        (2, 12.0),
        (3, 13.0),
        (4, 44.0),
        (5, 45.0),
        (6, 46.0),
    ]


# ------------------------------------------------------------------ how often, and what it costs


@pytest.mark.slow
@pytest.mark.render
def test_how_much_is_logged_changes_no_number(tmp_path):
    quiet = {
        "every_updates": 5,
        "histograms_every_updates": 0,
        "images_every_updates": 0,
        "imagination_windows": 0,
        "report": False,
    }
    loud = quiet | {
        "histograms_every_updates": 3,
        "images_every_updates": 2,
        "imagination_windows": 2,
    }
    results = []
    for name, settings in (("quiet", quiet), ("loud", loud)):
        run = logged_run(
            tmp_path / name, logging=settings, training={"total_frames": 1600, "prefill_steps": 64}
        )
        trainer = Trainer(run)
        trainer.train()
        rows = [
            {k: v for k, v in row.items() if k.startswith(("wm/", "ac/", "ep", "eval/"))}
            for row in read_metrics(tmp_path / name)
        ]
        results.append((trainer.learner.state_dict(), [row for row in rows if row]))
    assert results[0][1] == results[1][1]
    for key, value in results[0][0].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, results[1][0][key]), key
    assert not (tmp_path / "quiet" / "images").exists()
    assert len(list((tmp_path / "quiet" / "videos").iterdir())) == 2


@pytest.mark.slow
@pytest.mark.render
def test_videos_no_oftener_than_asked(tmp_path):
    settings = {"videos_every_frames": 2500, "images_every_updates": 0, "report": False}
    Trainer(
        logged_run(
            tmp_path,
            logging=settings,
            evaluation={"every_frames": 800},
            segmentation={"source": "simulator"},
            training={"total_frames": 4000, "prefill_steps": 64, "train_ratio": 1},
        )
    ).train()
    frames = {int(path.stem[-9:]) for path in (tmp_path / "videos").iterdir()}
    assert frames == {960, 2560}  # evaluations at 960, 1600, 2560, 3200, 4000


@pytest.mark.render
def test_the_end_says_what_the_run_came_to(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="w2f_torchrl"):
        Trainer(logged_run(tmp_path, logging={"images_every_updates": 8})).train()
    text, rows = caplog.text, read_metrics(tmp_path)
    best = max(row["eval/return_mean"] for row in rows if "eval/return_mean" in row)
    last = [row["eval/return_mean"] for row in rows if "eval/return_mean" in row][-1]
    assert "world2filter_cartpole_balance_0: 3,200 of 3,200 frames, 24 updates in 0:" in text
    assert f"evaluation: return {last:.1f} +- 0.0 at frame 3,200; best {best:.1f}" in text
    returns = [row["episode/return"] for row in rows if "episode/return" in row]
    assert (
        f"last {len(returns)} training episodes: return {sum(returns) / len(returns):.1f}" in text
    )
    for name in ("metrics.jsonl", "curves.png", "videos", "images", "checkpoints"):
        assert f": {tmp_path / name}" in text
        assert (tmp_path / name).exists()
    page = Path(text.rpartition("everything on one page: file://")[2].strip())
    assert page == tmp_path / "report.html"
    assert page.exists()
    assert "continue with resume=auto" not in text  # it has all its frames
    assert "NOT MADE" not in text


@pytest.mark.parametrize(("setting", "package"), [("use_wandb", "wandb"), ("tensorboard",) * 2])
def test_a_missing_package_is_an_early_error_with_the_command(
    tmp_path, monkeypatch, setting, package
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        config_module.importlib.util,
        "find_spec",
        lambda name, *args: None if name == package else find(name, *args),
    )
    with pytest.raises(ConfigError, match=rf"logging\.{setting}=true needs {package}.*pip install"):
        tiny_run(tmp_path, logging={setting: True}).validate()
    tiny_run(tmp_path, logging={setting: False}).validate()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"images_every_updates": -1}, r"logging\.images_every_updates=-1 must be at least 0"),
        ({"imagination_windows": -2}, r"logging\.imagination_windows=-2"),
        ({"wandb_mode": "dryrun"}, r"logging\.wandb_mode='dryrun' is unknown; allowed: auto"),
    ],
)
def test_bad_logging_settings_are_named(tmp_path, settings, match):
    with pytest.raises(ConfigError, match=match):
        tiny_run(tmp_path, logging=settings).validate()


# ------------------------------------------------------------------ work beside the training


def test_logging_a_video_takes_no_longer_than_queueing_it(tmp_path):
    release = threading.Event()

    def slow() -> torch.Tensor:
        release.wait(30)
        return torch.zeros(3, 3, 16, 16, dtype=torch.uint8)

    with MetricsLogger(tmp_path) as metrics:
        start = time.monotonic()
        paths = [metrics.log_video("train/observation_video", slow, frames=n) for n in range(4)]
        picture = metrics.log_image(
            "train/original", torch.zeros(3, 8, 8, dtype=torch.uint8), frames=0
        )
        metrics.log({"wm/kl_loss": 1.0}, frames=4, updates=0)
        assert time.monotonic() - start < 0.5
        assert not any(path.exists() for path in (*paths, picture))
        release.set()
        metrics.flush()
        assert all(len(read_video(path)) == 3 for path in paths)
        assert picture.exists()
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_full_queue_leaves_out_and_says_so(caplog):
    worker, release, done = BackgroundWorker(pending=2, patience=0.05), threading.Event(), []
    jobs = [worker.submit(f"job {n}", partial(_after, release, done, n)) for n in range(4)]
    assert jobs == [True, True, False, False]
    assert worker.failed == ["job 2", "job 3"]
    assert "job 2 was dropped" in caplog.text
    release.set()
    worker.flush()
    assert worker.submit("job 4", partial(done.append, 4))
    worker.close()
    assert done == [0, 1, 4]


def _after(release: threading.Event, done: list[int], number: int) -> None:
    release.wait(30)
    done.append(number)


def test_a_job_that_waits_is_not_queued_twice():
    worker, release, done = BackgroundWorker(), threading.Event(), []
    worker.submit("first", partial(release.wait, 30))
    for number in range(3):
        worker.submit("curves", partial(done.append, number))
    release.set()
    worker.close()
    assert done == [0]


def test_what_fails_beside_the_training_is_reported_and_ends_nothing(tmp_path, caplog):
    with MetricsLogger(tmp_path) as metrics:
        wrong = torch.zeros(3, 3, 16, 16)  # no bytes
        metrics.log_video("train/observation_video", wrong, frames=1)
        good = torch.zeros(3, 3, 16, 16, dtype=torch.uint8)
        path = metrics.log_video("train/observation_video", good, frames=2)
        metrics.flush()
        assert metrics.background.failed == ["video train/observation_video at frame 1"]
    assert "frames must be uint8" in caplog.text  # with its traceback
    assert path.exists()
    assert len(list(tmp_path.joinpath("videos").iterdir())) == 1


def test_everything_queued_is_made_before_the_process_exits(tmp_path):
    code = f"""
import time, torch
from w2f_torchrl.logging.metrics import MetricsLogger
metrics = MetricsLogger({str(tmp_path)!r})
def slow():
    time.sleep(0.5)
    return torch.zeros(3, 3, 16, 16, dtype=torch.uint8)
for frames in range(3):
    metrics.log_video("train/observation_video", slow, frames=frames)
raise SystemExit(3)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT)}, timeout=120, check=False
    )
    assert done.returncode == 3
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 3


def test_a_logger_that_raises_is_given_up_and_the_others_go_on(tmp_path, caplog):
    class Broken(CSVLogger):
        def log_metrics(self, *args, **kwargs):
            raise ConnectionError("the server is gone")

    broken, whole = Broken("broken", log_dir=str(tmp_path)), make_csv_logger(tmp_path)
    with MetricsLogger(tmp_path, [broken, whole]) as metrics:
        for frames in (1, 2):
            metrics.log({"wm/kl_loss": 0.5}, frames=frames, updates=0)
        assert metrics.sinks.failed == ["Broken"]
    assert caplog.text.count("is disabled for this run") == 1
    assert "the server is gone" in caplog.text
    assert (tmp_path / "csv/scalars/wm/kl_loss.csv").read_text() == "1,0.5\n2,0.5\n"
    assert len(read_metrics(tmp_path)) == 2


def test_without_pyav_a_run_says_once_that_it_makes_no_videos(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("w2f_torchrl.logging.metrics.importlib.util.find_spec", lambda name: None)
    video = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    with MetricsLogger(tmp_path) as metrics:
        paths = [metrics.log_video("train/observation_video", video, frames=n) for n in range(2)]
        metrics.log_image("train/original", video[0], frames=2)
    assert paths == [None, None]
    assert not (tmp_path / "videos").exists()
    assert len(list((tmp_path / "images").iterdir())) == 1
    assert [r.message for r in caplog.records] == ["this run makes no videos: pip install av"]


def test_a_trainer_is_imported_without_pyav():
    """As on a GPU machine that has no media packages."""
    script = "import sys; sys.modules['av'] = None; import w2f_torchrl.trainers as t; t.Trainer"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)

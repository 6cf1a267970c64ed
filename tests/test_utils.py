"""Metrics, progress, videos and curves."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import _pylab_helpers
from PIL import Image
from torchrl.record.loggers.csv import CSVLogger

from w2f_torchrl.logging import wandb as wandb_logging
from w2f_torchrl.logging.metric_names import meaning_of
from w2f_torchrl.logging.metrics import MetricsLogger, make_wandb_logger, read_metrics
from w2f_torchrl.logging.pictures import plotting
from w2f_torchrl.logging.pictures.plotting import mean_over_frames, metric_series, plot_curves
from w2f_torchrl.logging.pictures.video import (
    contact_sheet,
    panel,
    read_video,
    to_uint8,
    write_video,
)
from w2f_torchrl.utils.seeding import derive_seed

REFERENCE = Path(__file__).parents[1] / "benchmarks" / "reference"
PUBLISHED = REFERENCE / "dmc_vision_dreamerv3.csv"


# ------------------------------------------------------------------------------------- seeding


def test_seeds_differ_between_all_parts_of_a_run():
    seeds = {
        derive_seed(seed, name, index)
        for seed in range(20)
        for name in ("env", "train")
        for index in range(20)
    }
    assert len(seeds) == 20 * 2 * 20
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert derive_seed(3, "env", 1) == derive_seed(3, "env", 1)


# ------------------------------------------------------------------------------------- metrics


def lines(run_dir: Path) -> list[str]:
    return (run_dir / "metrics.jsonl").read_text().splitlines()


def strict(line: str) -> dict:
    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_a_line_is_json_with_counters_and_numbers(tmp_path):
    with MetricsLogger(tmp_path) as metrics:
        metrics.log(
            {
                "wm/kl_loss": torch.tensor(1.5, requires_grad=True),
                "ac/entropy": 2,
                "eval/return_mean": torch.tensor([16777217], dtype=torch.int64),
                "speed/frames_per_second": np.float32(0.5),
            },
            frames=100,
            updates=7,
        )
        assert strict(lines(tmp_path)[0]) == {  # readable before the logger is closed
            "frames": 100,
            "updates": 7,
            "wm/kl_loss": 1.5,
            "ac/entropy": 2.0,
            "eval/return_mean": 16777217.0,
            "speed/frames_per_second": 0.5,
        }


def test_not_finite_is_null_in_the_file_nan_when_read_and_warned_of_once(tmp_path, caplog):
    with MetricsLogger(tmp_path) as metrics, caplog.at_level(logging.WARNING):
        for frames in (1, 2):
            returned = metrics.log(
                {"wm/kl_loss": float("nan"), "ac/entropy": torch.tensor(-math.inf)},
                frames=frames,
                updates=0,
            )
    assert returned["ac/entropy"] == -math.inf
    assert strict(lines(tmp_path)[0])["wm/kl_loss"] is None
    assert math.isnan(read_metrics(tmp_path)[1]["ac/entropy"])
    assert len(caplog.messages) == 2
    assert "-inf" in caplog.messages[1]


def test_tensors_come_to_the_host_in_one_transfer(tmp_path, monkeypatch):
    transfers = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(
        torch.Tensor, "tolist", lambda self: transfers.append(self.shape) or original(self)
    )
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("one transfer per metric"))
    with MetricsLogger(tmp_path) as metrics:
        values = metrics.log(
            {f"wm/m{i}": torch.tensor(float(i)) for i in range(9)}, frames=0, updates=0
        )
    assert transfers == [(9,)]
    assert values == {f"wm/m{i}": float(i) for i in range(9)}


@pytest.mark.parametrize(
    "name", ["loss", "wm", "wm/", "vm/kl_loss", "wm/kl loss", "xwm/kl", "wm//a"]
)
def test_unknown_names_are_refused(tmp_path, name):
    with MetricsLogger(tmp_path) as metrics, pytest.raises(ValueError, match="metric name"):
        metrics.log({name: 1.0}, frames=0, updates=0)
    assert lines(tmp_path) == []


def test_values_that_are_no_number_are_refused(tmp_path):
    with MetricsLogger(tmp_path) as metrics:
        with pytest.raises(ValueError, match=r"wm/a must hold one element, got shape \(2,\)"):
            metrics.log({"wm/a": torch.zeros(2)}, frames=0, updates=0)
        with pytest.raises(TypeError, match="wm/a must be a number"):
            metrics.log({"wm/a": "1"}, frames=0, updates=0)


@given(cut=st.integers(0, 200))
def test_a_torn_last_line_is_repaired_wherever_it_was_torn(tmp_path_factory, cut):
    run_dir = tmp_path_factory.mktemp("run")
    with MetricsLogger(run_dir) as metrics:
        for frames in range(4):
            metrics.log({"wm/kl_loss": frames + 0.5}, frames=frames, updates=0)
    path = run_dir / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: max(0, len(whole) - cut)])
    survivors = read_metrics(run_dir)
    with MetricsLogger(run_dir) as metrics:
        metrics.log({"wm/kl_loss": 9.0}, frames=10, updates=0)
    records = read_metrics(run_dir)
    assert records[:-1] == survivors
    assert records[-1]["frames"] == 10
    assert len(survivors) >= 4 - math.ceil(cut / min(map(len, whole.splitlines(keepends=True))))
    assert [strict(line) for line in lines(run_dir)]


def test_a_damaged_line_is_left_out_and_named(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_text(
        '{"frames": 1, "updates": 0}\n{"fra\n{"frames": 2, "updates": 0}\n'
    )
    assert [row["frames"] for row in read_metrics(tmp_path)] == [1, 2]
    assert "metrics.jsonl: skipped damaged lines 2" in caplog.text
    with pytest.raises(FileNotFoundError, match="not a run directory"):
        read_metrics(tmp_path / "none")


def test_a_resumed_run_neither_repeats_nor_skips(tmp_path):
    def run(metrics: MetricsLogger, first: int, last: int) -> None:
        for update in range(first, last + 1):  # two updates share a count of frames
            metrics.log({"wm/kl_loss": float(update)}, frames=update // 2 * 8, updates=update)

    with MetricsLogger(tmp_path / "once") as metrics:
        run(metrics, 1, 20)
    with MetricsLogger(tmp_path / "twice") as metrics:
        run(metrics, 1, 17)  # the checkpoint was saved at update 12
    with MetricsLogger(tmp_path / "twice") as metrics:
        with pytest.raises(ValueError, match="truncate_after"):
            metrics.log({"wm/kl_loss": 13.0}, frames=48, updates=13)
        assert metrics.truncate_after(48, 12) == 5
        run(metrics, 13, 20)
    assert read_metrics(tmp_path / "twice") == read_metrics(tmp_path / "once")


def test_truncating_keeps_null_and_everything_up_to_the_frames(tmp_path):
    with MetricsLogger(tmp_path) as metrics:
        for frames in (1, 5, 9):
            metrics.log({"wm/kl_loss": math.nan}, frames=frames, updates=0)
        assert metrics.truncate_after(5) == 1
    assert [record["frames"] for record in map(strict, lines(tmp_path))] == [1, 5]


def test_torchrl_loggers_get_every_scalar_and_video(tmp_path):
    sink = CSVLogger("csv", log_dir=str(tmp_path / "sink"))
    video = torch.zeros(3, 3, 16, 16, dtype=torch.uint8)
    with MetricsLogger(tmp_path, [sink]) as metrics:
        metrics.log({"wm/kl_loss": torch.tensor(0.25)}, frames=40, updates=1)
        path = metrics.log_video("train/reconstruction_video", video, frames=40)
    assert (tmp_path / "sink/csv/scalars/wm/kl_loss.csv").read_text() == "40,0.25\n"
    assert list((tmp_path / "sink/csv/videos").rglob("*.pt"))
    assert path == tmp_path / "videos" / "train_reconstruction_video_000000040.mp4"
    assert len(read_video(path)) == 3


# --------------------------------------------------------------------------------------- wandb


def test_wandb_missing_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install 'wandb"):
        make_wandb_logger(tmp_path, project="p")


def test_wandb_gets_one_id_per_run_directory_and_no_secrets(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(wandb_logging, "RunWandbLogger", lambda *a, **k: calls.append((a, k)))
    for _ in range(2):
        config = {"seed": 3, "optimizer": {"max_tokens": 1}}
        make_wandb_logger(tmp_path / "run", project="p", entity="e", config=config, mode="offline")
    assert calls[0] == calls[1]
    (name,), settings = calls[0]
    assert (name, settings["mode"], settings["project"]) == ("run", "offline", "p")
    assert settings["config"] == config
    for config in ({"api_key": "x"}, {"a": {"HF_TOKEN": "x"}}, {"wandb_password": "x"}):
        with pytest.raises(ValueError, match="looks like a secret"):
            make_wandb_logger(tmp_path, project="p", config=config)
    with pytest.raises(ValueError, match="mode 'of'"):
        make_wandb_logger(tmp_path, project="p", mode="of")
    assert len(calls) == 2


# ------------------------------------------------------------------------------------ progress


# --------------------------------------------------------------------------------------- video


def moving_square(steps: int = 6, height: int = 64, width: int = 64) -> torch.Tensor:
    video = torch.zeros(steps, 3, height, width, dtype=torch.uint8)
    for step in range(steps):
        video[step, 0, 8:24, 4 * step : 4 * step + 16] = 255
        video[step, 2, 40:56] = 200
    return video


@pytest.mark.parametrize(("height", "width", "scale"), [(64, 64, 4), (64, 64, None), (33, 47, 1)])
def test_a_video_comes_back_at_its_scale_in_its_order_and_colours(tmp_path, height, width, scale):
    video = moving_square(height=height, width=width)
    path = write_video(tmp_path / "deep" / "v.mp4", video, fps=15, scale=scale)
    back = read_video(path)
    scale = scale or 4
    even = [(size * scale + 1) // 2 * 2 for size in (height, width)]
    assert list(back.shape) == [6, 3, *even]
    large = video.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    error = (back[:, :, : height * scale, : width * scale].float() - large.float()).abs()
    assert error.mean() < 6  # colour is stored at half resolution
    assert [name.name for name in path.parent.iterdir()] == ["v.mp4"]


def test_a_failed_encoding_leaves_the_earlier_video_and_no_temporary_file(tmp_path, monkeypatch):
    path = write_video(tmp_path / "v.mp4", moving_square())
    before = path.read_bytes()
    monkeypatch.setattr(np, "pad", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_video(path, moving_square())
    assert path.read_bytes() == before
    assert [name.name for name in tmp_path.iterdir()] == ["v.mp4"]


@pytest.mark.parametrize(
    "frames",
    [
        torch.zeros(2, 3, 8, 8),
        torch.zeros(2, 8, 8, 3, dtype=torch.uint8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        torch.zeros(0, 3, 8, 8, dtype=torch.uint8),
    ],
)
def test_write_video_wants_bytes_in_channels_first(tmp_path, frames):
    with pytest.raises(ValueError, match=r"uint8 \[T, 3, H, W\]"):
        write_video(tmp_path / "v.mp4", frames)


def test_ranges_are_explicit():
    dark = torch.ones(1, 1, 2, 2, dtype=torch.uint8)
    assert (to_uint8(dark) == 1).all()  # a dark picture in bytes is not a white one in floats
    assert (to_uint8(torch.ones(1, 1, 2, 2)) == 255).all()
    assert (to_uint8(torch.ones(1, 1, 2, 2, dtype=torch.bool)) == 255).all()
    assert to_uint8(torch.full((1, 3, 2, 2), 0.5)).unique().tolist() == [128]
    assert to_uint8(dark).shape == (1, 3, 2, 2)
    for wrong in (1.001, -0.001, math.nan):
        with pytest.raises(ValueError, match=r"mask is float and must lie in \[0, 1\]"):
            to_uint8(torch.full((1, 1, 2, 2), wrong), "mask")
    with pytest.raises(TypeError, match="int64"):
        to_uint8(torch.ones(1, 1, 2, 2, dtype=torch.int64))


def test_a_panel_puts_each_video_under_its_label():
    rows = {
        "frame": moving_square(),
        "mask": moving_square()[:, :1] > 0,
        "composed": moving_square().float() / 255,
    }
    picture = panel(rows, scale=2)
    assert picture.dtype == torch.uint8
    assert picture.shape == (6, 3, 14 + 128, 3 * (128 + 4) - 4)
    large = moving_square().repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(picture[:, :, 14:, :128], large)
    assert torch.equal(picture[:, :, 14:, 2 * 132 : 2 * 132 + 128], large)
    assert torch.equal(picture[:, 1, 14:, 132 : 132 + 128], large[:, 0])
    titles = [picture[0, :, :14, start : start + 128] for start in (0, 132, 264)]
    assert all((title < 128).any() for title in titles)  # something is written above each
    assert (picture[:, :, :, 128:132] == 255).all()
    with pytest.raises(ValueError, match="same length and size"):
        panel({"a": moving_square(), "b": moving_square(steps=3)})
    with pytest.raises(ValueError, match="No video"):
        panel({})


def test_a_contact_sheet_has_a_row_for_every_nth_step(tmp_path):
    path = contact_sheet(tmp_path / "sheet.png", {"a": moving_square()}, every=2, scale=1)
    sheet = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    assert sheet.shape == (3, 14 + 3 * 64 + 2 * 4, 64)
    for row, step in enumerate((0, 2, 4)):
        top = 14 + row * 68
        assert torch.equal(sheet[:, top : top + 64], moving_square()[step])


# -------------------------------------------------------------------------------------- curves


@given(
    points=st.lists(
        st.tuples(st.integers(0, 50), st.floats(-100, 100) | st.just(math.nan)),
        min_size=1,
        max_size=30,
    ),
    window=st.integers(0, 20),
)
def test_the_mean_over_frames_is_the_mean_of_the_frames_before(points, window):
    points.sort(key=lambda point: point[0])
    frames, values = np.array(points, dtype=np.float64).T
    places, means = mean_over_frames(frames, values, window)
    assert places.tolist() == sorted({frame for frame, _ in points})
    for place, mean in zip(places, means, strict=True):
        part = [
            value
            for frame, value in points
            if (frame == place or place - window < frame < place) and not math.isnan(value)
        ]
        expected = sum(part) / len(part) if part else math.nan
        assert mean == pytest.approx(expected, abs=1e-9, nan_ok=True)


def make_run(run_dir: Path, count: int = 60, algo: str = "world2filter", seed: int = 0) -> Path:
    with MetricsLogger(run_dir) as metrics:
        for step in range(1, count + 1):
            row = {"wm/image_loss": 100.0 / step, "wm/fg_loss": 10.0 / step, "ac/entropy": -0.1}
            if step % 2 == 0:
                row["episode/return"] = 10.0 * step
            if step % 10 == 0:
                row |= {"eval/return_mean": 9.0 * step, "eval/return_std": 5.0}
            if step % 7 == 0:
                row["speed/seconds"] = 2.0 * step
            metrics.log(row, frames=1000 * step, updates=step)
    (run_dir / "config.yaml").write_text(
        f"algo: {{name: {algo}, latent: null}}\n"
        "environment: {domain: cartpole, task: balance, image_size: 64, action_repeat: 2, "
        "distraction: none}\n"
        f"training: {{path: /somewhere/private}}\nevaluation: {{episodes: 4}}\nseed: {seed}\n"
        f"run_dir: {run_dir}\n"
    )
    return run_dir


def test_curves_show_the_logged_points_and_leave_pyplot_alone(tmp_path, monkeypatch):
    figures = []
    save = plotting.save_figure
    monkeypatch.setattr(
        plotting, "save_figure", lambda figure, path: figures.append(figure) or save(figure, path)
    )
    path = plot_curves(make_run(tmp_path))
    assert path == tmp_path / "curves.png"
    assert Image.open(path).size[0] >= 1000
    assert _pylab_helpers.Gcf.figs == {}
    returns, losses, entropy = figures[0].axes
    assert [losses.get_title(), entropy.get_title()] == [
        "world-model losses",
        "policy entropy (nats)",
    ]
    points = returns.collections[0].get_offsets()
    assert points[:, 0].tolist() == [2000.0 * i for i in range(1, 31)]
    assert points[:, 1].tolist() == [20.0 * i for i in range(1, 31)]
    by_label = {line.get_label(): line for line in returns.lines}
    assert by_label["evaluation, mean ± std"].get_ydata().tolist() == [
        90.0 * i for i in range(1, 7)
    ]
    assert returns.get_ylim()[0] == 0
    assert losses.get_yscale() == "log"
    assert returns.get_xlim() == (0, 60_000)


def test_episodes_that_end_together_are_points_and_one_place_of_the_curve(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plotting, "save_figure", lambda figure, path: figures.append(figure))
    returns = {4000: [2.5, 10.5, 6.5, 10.0], 8000: [20.0, 10.0, 30.0, 40.0]}
    with MetricsLogger(tmp_path) as metrics:
        for frames, ended in returns.items():
            for value in ended:
                metrics.log({"episode/return": value}, frames=frames, updates=frames // 100)
            for loss in (3.0, 5.0):  # two rows before the next frame
                metrics.log({"wm/image_loss": loss}, frames=frames, updates=frames // 100)
    plot_curves(tmp_path)
    top, losses = figures[0].axes
    points = top.collections[0].get_offsets().tolist()
    assert points == [[frames, value] for frames, ended in returns.items() for value in ended]
    [mean] = top.lines
    assert mean.get_label() == "their mean over 400 frames"
    assert mean.get_xdata().tolist() == [4000.0, 8000.0]
    assert mean.get_ydata().tolist() == [7.375, 25.0]
    assert [line.get_ydata().tolist() for line in losses.lines] == [[4.0, 4.0]]


def test_a_loss_of_ones_own_is_in_the_curves(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plotting, "save_figure", lambda figure, path: figures.append(figure))
    row = {"wm/image_loss": 2.0, "wm/mask_area_loss": 3.0, "wm/total_loss": 5.0}
    with MetricsLogger(tmp_path) as metrics:
        for frames in (100, 200):
            metrics.log(row, frames=frames, updates=frames)
    plot_curves(tmp_path)
    drawn = {line.get_label(): list(line.get_ydata()) for line in figures[0].axes[1].lines}
    assert drawn == {"image": [2.0, 2.0], "mask area": [3.0, 3.0]}
    assert meaning_of("wm/mask_area_loss").text == "a loss added by a subclass, weighted"


def test_curves_of_a_run_with_gaps(tmp_path):
    with MetricsLogger(tmp_path) as metrics:
        metrics.log({"train/x": 1.0}, frames=0, updates=0)
        with pytest.raises(ValueError, match="nothing to plot"):
            plot_curves(tmp_path)
        metrics.log({"wm/image_loss": math.nan, "episode/return": -3.0}, frames=0, updates=0)
    assert plot_curves(tmp_path, tmp_path / "other.png", title="one").exists()
    frames, values = metric_series(read_metrics(tmp_path), "episode/return")
    assert (frames.tolist(), values.tolist()) == ([0.0], [-3.0])


# ---------------------------------------------------------------------------------- benchmarks


@pytest.fixture
def curves(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["curves.py"])
    return importlib.import_module("curves")


def test_bins_are_half_open_and_count_their_episodes(curves):
    edges = np.array([0.0, 10.0, 20.0, 30.0])
    frames, values = np.array([1.0, 10.0, 11.0, 20.0]), np.array([1.0, 3.0, 5.0, 9.0])
    bins = curves.bin_means(frames, values, edges)
    assert [(b["episodes"], b["mean"]) for b in bins] == [(2, 2.0), (2, 7.0), (0, None)]
    assert bins[0]["sd"] == pytest.approx(math.sqrt(2))


def test_curves_compare_runs_with_the_published_points(curves, tmp_path, capsys):
    runs = [make_run(tmp_path / name, algo=name, seed=i) for i, name in enumerate(("a", "b"))]
    starts = [{"commit": "abc"}, {"frames": "5"}, {"commit": "def"}, {"commit": "abc"}]
    (runs[0] / "environment.json").write_text(json.dumps(starts))
    out, result = tmp_path / "o.png", tmp_path / "o.json"
    arguments = [*map(str, runs), "--task", "cartpole_balance", "--out", str(out)]
    curves.main([*arguments, "--json", str(result)])
    assert Image.open(out).size[0] > 500
    data = json.loads(result.read_text())
    assert {"command", "versions", "machine"} <= data.keys()
    assert [run["name"] for run in data["runs"]] == ["a, seed 0", "b, seed 1"]
    assert [run["commits"] for run in data["runs"]] == [["abc", "def"], []]
    run = data["runs"][0]
    assert run["at_published_points"] == [
        {
            "frames": 50000,
            "published_mean": pytest.approx(554.81, abs=0.01),
            "published_sd_over_seeds": pytest.approx(51.43, abs=0.01),
            "episodes": 3,  # ended at 48k, 50k and 52k frames
            "mean": 500.0,
            "sd": 20.0,
        }
    ]
    assert run["final_evaluation"] == {
        "frames": 60000,
        "updates": 60,
        "seconds": 112,  # as logged at 56k frames
        "mean": 540.0,
        "std_over_episodes": 5.0,
        "episodes": 4,
    }
    assert run["final_training_return"] == {
        "over": "the last 10 % of frames",
        "episodes": 3,
        "mean": 580.0,
        "sd": 20.0,
    }
    assert "/somewhere" not in json.dumps(run["settings"])
    assert "run_dir" not in run["settings"]
    assert capsys.readouterr().out.split() == [str(out), str(result)]


def test_another_protocol_is_not_compared_with_the_published_curve(curves, tmp_path, capsys):
    run = make_run(tmp_path / "a")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("action_repeat: 2", "action_repeat: 8"))
    result = tmp_path / "o.json"
    out = ["--out", str(tmp_path / "o.png"), "--json", str(result)]
    curves.main([str(run), "--task", "cartpole_balance", *out])
    assert json.loads(result.read_text())["runs"][0]["at_published_points"] == []
    assert "world2filter, seed 0 ran another protocol" in capsys.readouterr().err


def test_another_env_is_drawn_without_a_published_curve_in_its_own_range(
    curves, tmp_path, capsys, monkeypatch
):
    run = make_run(tmp_path / "a")
    config = run / "config.yaml"
    text = config.read_text().replace("domain: cartpole", "domain: gym")
    config.write_text(text.replace("task: balance", "task: Ant-v5"))
    with (run / "metrics.jsonl").open("a") as stream:
        for frames in (1000, 2000):
            line = {"frames": frames, "updates": 9, "episode/return": 4000.0}
            stream.write(json.dumps(line) + "\n")
    drawn = []
    monkeypatch.setattr(curves, "save_figure", lambda figure, *a, **k: drawn.append(figure))
    out = ["--out", str(tmp_path / "o.png"), "--json", str(tmp_path / "o.json")]
    curves.main([str(run), *out])
    assert "none of gym_Ant-v5" in capsys.readouterr().err
    assert drawn[0].axes[0].get_ylim()[1] > 2000
    curves.main([str(make_run(tmp_path / "b")), *out])
    assert drawn[1].axes[0].get_ylim() == (0, 1030)
    # A run on recorded data plays no training episodes.
    curves.main([str(make_run(tmp_path / "c", count=1)), *out])
    names = [[text.get_text() for text in each.legends[0].get_texts()] for each in drawn[1:]]
    assert ["training" in " ".join(each) for each in names] == [True, False]


def test_curves_compare_evaluation_sets_with_published_scores(curves, tmp_path):
    """Only if all runs follow the protocol and have played the set."""
    runs, name = [], "eval/dmcgb_video_easy/return_mean"
    for seed, repeat in ((0, 8), (1, 8), (2, 2)):
        run = make_run(tmp_path / str(seed), seed=seed)
        text = (run / "config.yaml").read_text().replace("task: balance", "task: swingup")
        (run / "config.yaml").write_text(text.replace("repeat: 2", f"repeat: {repeat}"))
        with (run / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps({"frames": 60_000, "updates": 9, name: 300.0 + seed}) + "\n")
        runs.append(str(run))
    result = tmp_path / "o.json"
    rest = ["--out", str(tmp_path / "o.png"), "--json", str(result)]
    for chosen, scores in ((runs[:2], [[782.0]]), (runs[2:], [])):
        curves.main([*chosen, "--task", "cartpole_swingup", *rest])
        found = json.loads(result.read_text())["published_scores_of_sets"]
        assert [score["means"] for score in found] == scores
        assert all(score["metric"] == name for score in found)


def test_curves_name_what_is_wrong(curves, tmp_path):
    run = make_run(tmp_path / "a")
    rest = ["--out", str(tmp_path / "o.png"), "--json", str(tmp_path / "o.json")]
    with pytest.raises(SystemExit):
        curves.main([str(run), "--task", "walker_walk", *rest])
    (run / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(ValueError, match=r"lacks algo\.name, environment\.domain"):
        curves.load_run(run)


def test_the_published_table_is_whole(curves):
    rows = curves.read_published(PUBLISHED, "cartpole_balance")
    assert [row["env_steps"] for row in rows[:2]] == [50_000, 100_000]
    assert rows[1]["mean"] == pytest.approx(934, abs=0.5)
    assert rows[1]["sd_over_seeds"] == pytest.approx(41, abs=0.5)
    tasks = {line.split(",")[0] for line in PUBLISHED.read_text().splitlines()[2:]}
    assert len(tasks) == 20


def test_a_random_policy_sums_the_rewards_of_every_control_step(monkeypatch):
    random_policy = importlib.import_module("random_policy")
    steps = []

    class Step:
        def __init__(self, last: bool) -> None:
            self.reward, self.last = 0.5, lambda: last

    class Env:
        def action_spec(self):
            return type("Spec", (), {"minimum": -1.0, "maximum": 1.0, "shape": (2,)})

        def reset(self):
            return Step(False)

        def step(self, action):
            steps.append(action)
            return Step(len(steps) == 5)

    monkeypatch.setattr(random_policy.suite, "load", lambda *a, **k: Env())
    episode = random_policy.on_suite("d", "t", seed=0, still=False)
    assert random_policy.episode_return(*episode, action_repeat=2) == 2.5
    assert [float(a[0]) for a in steps[:2]] == [float(steps[0][0])] * 2
    assert float(steps[2][0]) != float(steps[0][0])


def test_a_random_policy_plays_gymnasiums_envs_and_can_stand_still():
    pytest.importorskip("gymnasium", reason="needs the extra gym: make extras")
    random_policy = importlib.import_module("random_policy")

    def play(seed: int, *, still: bool) -> float:
        episode = random_policy.on_gymnasium("Pendulum-v1", seed, still=still)
        return random_policy.episode_return(*episode, action_repeat=2)

    assert play(1, still=False) == play(1, still=False) != play(2, still=False)
    assert play(1, still=True) != play(1, still=False)

"""What a newcomer sees: the first lines of a run, its progress, its end; nothing else."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from absl import logging as absl_logging
from helpers.checkout import ROOT
from helpers.runs import tiny_run

import w2f_torchrl.envs._dm_control  # drops absl's known messages
import w2f_torchrl.logging.pictures.plotting  # noqa: F401  # and Matplotlib's
from w2f_torchrl._known_noise import KNOWN, drop_known_messages
from w2f_torchrl.data import UpdateSchedule
from w2f_torchrl.envs import DistractionConfig
from w2f_torchrl.logging.announcement import announce, count_evaluations, make_plan
from w2f_torchrl.logging.background_worker import BackgroundWorker
from w2f_torchrl.logging.progress import Pace, ProgressBar
from w2f_torchrl.trainers.run_logging import count_jobs

NOISE = re.compile(
    r"OpenGL|MUJOCO_GL|MuJoCo|settotalmass|absl|deprecat|font|WARNING|warn", re.IGNORECASE
)
FIRST_LINES = 10
"""How many lines a run may print before it trains."""


# ------------------------------------------------------------------ other packages' messages


@pytest.mark.parametrize("name", KNOWN)
def test_known_messages_are_dropped_and_all_others_kept(name, caplog):
    logger = absl_logging.get_absl_logger() if name == "absl" else logging.getLogger(name)
    logger.addHandler(caplog.handler)
    before, propagate = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        for beginning in KNOWN[name]:
            logger.warning("%s%s", beginning[:5], beginning[5:] + " and more")
        logger.warning("mj_step: Nan, Inf or huge value in QACC; after %s", KNOWN[name][0])
    finally:
        logger.removeHandler(caplog.handler)
        logger.setLevel(before)
        logger.propagate = propagate
    assert [record.message[:10] for record in caplog.records] == ["mj_step: N"]


def test_messages_are_dropped_once_however_often_the_package_is_imported():
    logger = logging.getLogger("matplotlib.font_manager")
    before = list(logger.filters)
    drop_known_messages(logger)
    assert logger.filters == before
    assert len(before) == 1


# ------------------------------------------------------------------ the first lines


def plan_of(config, **counts):
    schedule = UpdateSchedule(4, 2, 8, start=32)
    counts = {"steps": 0, "frames": 0, "updates": 0, "last": 0} | counts
    schedule(counts["steps"])
    return make_plan(config, schedule, **counts)


def lines_of(config, **counts) -> dict[str, str]:
    import torch

    found = announce(
        config,
        plan_of(config, **counts),
        device=torch.device("cpu"),
        execution="eager",
        parameters=1_234_567,
        workers=2,
        masks="simulator",
    )
    return dict(line.split(maxsplit=1) for line in found)


def test_a_run_says_what_where_how_long_and_how_to_stop(tmp_path):
    config = tiny_run(tmp_path, environment={"distraction": "easy", "action_repeat": 2})
    lines = lines_of(config)
    assert lines["trains"] == "world2filter, latent split, on cartpole balance, distraction easy"
    assert lines["model"] == "tiny, 1.2 million parameters"
    assert re.fullmatch(r"cpu, \d+ threads?, eager; 2 envs in 2 worker processes", lines["device"])
    assert lines["masks"] == "simulator"
    # 128 agent steps, of which 32 fill the replay: 96 x 4 / 16 updates.
    assert lines["length"].startswith("256 frames, 24 updates of 2 x 8 records, 2 evaluations;")
    assert lines["results"].startswith(str(tmp_path))
    assert "Ctrl+C" in lines["stop"]
    assert "resume=auto" in lines["stop"]
    assert len(lines) < FIRST_LINES


def test_a_resumed_run_says_where_it_is_and_what_is_left(tmp_path):
    config = tiny_run(tmp_path, environment={"action_repeat": 2})
    plan = plan_of(config, steps=64, frames=128, updates=8, last=128)
    assert (plan.total_updates, plan.evaluations) == (24, 1)
    lines = lines_of(config, steps=64, frames=128, updates=8, last=128)
    assert lines["length"].endswith("1 evaluation; resumes at 128 frames, 8 updates")


@pytest.mark.parametrize(
    ("distraction", "shown"),
    [
        ("none", ""),
        ("hard", ", distraction hard"),
        ({"background": {"num_videos": 4}, "camera": None}, ", distraction background"),
        (DistractionConfig.of_difficulty("easy"), ", distraction background, camera, color"),
    ],
)
def test_a_run_names_its_distractions(distraction, shown, tmp_path):
    config = tiny_run(tmp_path)
    config.environment.distraction = distraction
    assert lines_of(config)["trains"].endswith(f"on cartpole balance{shown}")


def test_a_run_without_masks_names_none(tmp_path):
    config = tiny_run(tmp_path, algo={"name": "dreamer_v3", "latent": None})
    assert "masks" not in lines_of(config)


@pytest.mark.parametrize("every", [1, 3, 7, 10, 11, 0])
@pytest.mark.parametrize("total", [1, 9, 10, 21])
def test_evaluations_are_counted_as_the_loop_makes_them(every, total):
    """As ``RunEvaluations.are_due`` and ``final_is_due`` decide, a frame per batch."""
    for first in range(total):
        last = made = 0
        for frames in range(1, total + 1):
            due = every > 0 and (
                frames // every > last // every if frames < total else last != frames
            )
            if due:
                last = frames
                made += frames > first
            if frames == first:
                seen = last
        left = count_evaluations(seen if first else 0, total, every)
        assert left == made


# ------------------------------------------------------------------ progress


class Clock:
    """Seconds that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_progress_is_a_line_a_minute_where_there_is_no_terminal(caplog):
    clock, stream = Clock(), io.StringIO()
    with (
        caplog.at_level(logging.INFO),
        ProgressBar(
            10_000, initial_frames=1000, initial_updates=50, stream=stream, clock=clock
        ) as progress,
    ):
        for second in range(1, 126):
            clock.now = float(second)
            progress.update(frames=1000 + 20 * second, updates=50, last_return=123.4)
    assert stream.getvalue() == ""
    assert len(caplog.messages) == 3  # after a minute, after two, and at the end
    assert caplog.messages[0] == (
        "2,200 of 10,000 frames, 50 updates: "
        "return 123.4, 20.0 frames/s, 0.0 updates/s, 0:06:30 left"
    )


def test_rates_are_those_of_the_window_and_a_resumed_run_starts_from_its_own_counts():
    clock = Clock()
    progress = ProgressBar(
        10**6, initial_frames=5 * 10**5, window=10.0, stream=io.StringIO(), clock=clock
    )
    assert all(map(math.isnan, progress.rates()))
    for second, frames in enumerate([0] * 50 + list(range(100, 5000, 100))):
        clock.now = float(second)
        progress.update(frames=5 * 10**5 + frames, updates=0)
    assert progress.rates() == (100.0, 0.0)


def test_the_time_left_counts_updates_that_are_slower_than_the_frames_before_them(caplog):
    clock = Clock()
    progress = ProgressBar(
        1000, total_updates=90, evaluations=2, stream=io.StringIO(), clock=clock, log_every=1e9
    )

    def after(seconds: float, frames: int, updates: int, **results: float) -> None:
        clock.now += seconds
        progress.update(frames=frames, updates=updates, **results)

    with caplog.at_level(logging.INFO):
        for frames in range(10, 101, 10):  # the replay fills: 0.1 s a frame, no update
            after(1.0, frames, 0)
            assert "? left" in progress.text()
        after(60.0, 100, 1)  # compiles: not counted
        assert "? left" in progress.text()
        for update in range(2, 11):
            after(2.0, 100, update, mask_iou=0.5)
        # 900 frames of 0.1 s, 80 updates of 2 s; evaluations are not timed yet.
        assert progress.text().endswith("0:04:10 left")
        progress.begin("evaluating")
        after(30.0, 110, 10, last_return=7.0)
        # One evaluation of 30 s is left.
        assert progress.text().endswith(", 0:04:39 left")
    assert "return 7.0, mask IoU 0.50, " in progress.text()
    [estimate] = [text for text in caplog.messages if text.startswith("about")]
    assert estimate == "about 0:04:18 from here plus 2 evaluations, as measured over 5 updates"
    assert caplog.messages.count("evaluating ...") == 1


def test_a_pace_without_updates_counts_frames_alone():
    pace = Pace(100, None, 0, now=0.0)
    pace.add(4.0, 20, 0)
    assert pace.seconds_left(20, 0) == pytest.approx(16.0)
    assert pace.seconds_left(120, 0) == 0.0


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_is_one_line_on_a_terminal(caplog):
    clock, stream = Clock(), Terminal()
    with caplog.at_level(logging.INFO), ProgressBar(100, stream=stream, clock=clock) as progress:
        clock.now = 100.0
        progress.update(frames=50, updates=5, last_return=7.0, mask_iou=0.25)
        progress.begin("evaluating")
        progress.update(frames=150, updates=5)  # a batch beyond the last frame
    assert "evaluating, return 7.0, mask IoU 0.25, 0.5 frames/s" in stream.getvalue()
    assert " 50%|" in stream.getvalue()
    assert "100%|" in stream.getvalue()
    assert "\n" not in stream.getvalue().rstrip()
    assert caplog.messages == []


IN_A_TERMINAL = """
import logging, sys, time
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
from w2f_torchrl.logging.progress import ProgressBar
with ProgressBar(1_000_000, total_updates=99_999, evaluations=9) as bar:
    bar.update(frames=60_000, updates=0)
    for step in range(1, 9):
        time.sleep(0.11)
        frames = 60_000 * step
        bar.update(frames=frames, updates=step, last_return=-1234.5, mask_iou=0.42)
        bar.update(frames=frames + 60_000, updates=step)
        if step == 4:
            bar.begin("evaluating")
            logging.info("a message")
"""


def run_in_a_pty(command: list[str], columns: int) -> str:
    """What a command prints on a terminal of so many columns; 0: one that does not tell."""
    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (24, columns))
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=child, stderr=child, env=variables) as process:
        os.close(child)
        text = b""
        with contextlib.suppress(OSError):  # Linux's answer when the other end is closed
            while part := os.read(parent, 65536):
                text += part
    os.close(parent)
    assert process.returncode == 0, text.decode()
    return text.decode()


@pytest.mark.parametrize("columns", [80, 120, 0])
def test_the_line_fits_a_real_terminal_and_messages_stand_above_it(columns):
    text = run_in_a_pty([sys.executable, "-c", IN_A_TERMINAL], columns)
    shown = [part for part in re.split(r"[\r\n]+", text) if part.strip()]
    bars = [part for part in shown if "%|" in part]
    assert max(len(part) for part in shown) == (columns or 80)
    assert all(re.search(r"return -1234, mask IoU 0\.42, .* left$", part) for part in bars[1:])
    assert any("evaluating" in part for part in bars)
    assert "a message" in shown
    # Lines are only ended by messages and at the end; everything else overwrites the bar.
    messages = [part for part in shown if "%|" not in part]
    assert text.count("\n") == len(messages) + 1


# ------------------------------------------------------------------ the end


def test_the_end_says_in_a_few_words_what_it_makes():
    videos = [f"video train/{name} at frame 4096" for name in "abc"]
    labels = [*videos, "picture train/original at frame 4096", "curves.png", "report.html"]
    assert count_jobs(labels) == "3 videos, 1 picture, curves.png, report.html"
    assert count_jobs([]) == ""


def test_unfinished_work_is_known_until_it_is_done():
    import threading

    go = threading.Event()
    worker = BackgroundWorker()
    worker.submit("first", go.wait)
    worker.submit("second", lambda: 1 / 0)
    assert worker.unfinished() == ["first", "second"]
    go.set()
    worker.close()
    assert worker.unfinished() == []
    assert worker.failed == ["second"]


# ------------------------------------------------------------------ a whole run


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run of the cheetah, whose model MuJoCo warns about, with a worker, on a fresh machine."""
    folder = tmp_path_factory.mktemp("first")
    overrides = (
        "experiment=demo run_dir=run environment.domain=cheetah environment.task=run "
        "environment.image_size=16 environment.num_envs=2 "
        "environment.action_repeat=20 training.total_frames=1600 training.batch_size=2 "
        "training.batch_length=8 training.prefill_steps=16 training.train_ratio=4 "
        "collection.num_workers=1 collection.steps_per_batch=8 evaluation.every_frames=800 "
        "evaluation.episodes=1 logging.imagination_windows=0 logging.every_updates=2"
    )
    done = subprocess.run(
        [sys.executable, ROOT / "sota_configs" / "world2filter.py", *overrides.split()],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MPLCONFIGDIR": str(folder / "matplotlib")},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return folder, done.stderr.splitlines()


@pytest.mark.render
def test_a_run_prints_ten_lines_before_it_trains_and_none_of_other_packages(printed):
    _, lines = printed
    assert [line for line in lines if NOISE.search(line)] == []
    first = next(i for i, line in enumerate(lines) if "evaluating" in line or "frames/s" in line)
    assert first <= FIRST_LINES, lines[:first]
    words = [line.split()[0] for line in lines[:first]]
    assert words[:7] == ["loading", "trains", "model", "device", "masks", "length", "results"]
    assert words[7] == "stop"


@pytest.mark.render
def test_a_run_ends_with_the_page_that_shows_everything(printed):
    folder, lines = printed
    assert any(re.fullmatch(r"evaluation at [\d,]+ frames: .*mask IoU .*", line) for line in lines)
    assert any(line.startswith("making ") and "report.html" in line for line in lines)
    assert any(re.fullmatch(r"made in \d+ s", line) for line in lines)
    assert lines[-1] == f"everything on one page: {(folder / 'run' / 'report.html').as_uri()}"
    assert (folder / "run" / "report.html").stat().st_size < 2e6

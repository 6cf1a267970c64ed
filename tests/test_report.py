"""The report: one page with everything, nothing fetched, and what a browser makes of it."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers.checkout import ROOT

from w2f_torchrl.logging.environment import note_environment
from w2f_torchrl.logging.metric_names import METRICS, meaning_of
from w2f_torchrl.logging.metrics import MetricsLogger
from w2f_torchrl.report import page, write_report
from w2f_torchrl.report.__main__ import main
from w2f_torchrl.report.charts import chart_data, thin
from w2f_torchrl.report.runs import flatten, load_runs

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def make_run(path: Path, seed: int = 0, domain: str = "walker") -> Path:
    with MetricsLogger(path) as metrics:
        for update in range(1, 41):
            row = {"wm/kl_loss": 3.0 / update + seed, "weights/encoder/q50": 0.1}
            if update == 7:
                row["wm/kl_loss"] = float("nan")
            metrics.log(row, frames=100 * update, updates=update)
            if update % 10 == 0:
                evaluation = {"eval/return_mean": 10.0 * update, "eval/return_std": 2.0}
                metrics.log(evaluation, frames=100 * update, updates=update)
                metrics.log({"episode/return": float(update)}, frames=100 * update, updates=update)
        for frames in (1000, 4000):
            video = torch.full((5, 3, 32, 32), frames // 50, dtype=torch.uint8)
            metrics.log_video("train/imagination/comparison", video, frames=frames)
            metrics.log_image("train/original", video[0], frames=frames)
    environment = f"  domain: {domain}\n  task: walk\n  note: <b>&\n"
    settings = f"seed: {seed}\nenvironment:\n{environment}device: null\n"
    path.joinpath("config.yaml").write_text(settings)
    note_environment(path / "environment.json", 0, "cpu")
    note_environment(path / "environment.json", 2000, "cpu")
    return path


def embedded(html: str) -> dict:
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    return json.loads(text.group(1))


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    return [make_run(tmp_path / "a" / "run", 0), make_run(tmp_path / "b" / "run", 1)]


def test_a_page_holds_every_number_and_the_newest_media_of_each_run(runs, tmp_path):
    html = write_report(runs, tmp_path / "deep" / "page.html").read_text()
    data = embedded(html)
    assert data["runs"] == ["a/run", "b/run"]  # told apart by their folders
    charts = {chart["name"]: chart for part in data["sections"] for chart in part["charts"]}
    assert set(charts) == {
        "wm/kl_loss",
        "weights/encoder/q50",
        "eval/return_mean",
        "episode/return",
    }
    points = charts["wm/kl_loss"]["series"][1]["points"]
    assert points[3] == [400, 4, 1.75]
    assert points[6] == [700, 7, None]
    assert charts["eval/return_mean"]["series"][0]["band"] == [2.0] * 4
    for run in runs:
        for kind, folder in (("video/mp4", "videos"), ("image/png", "images")):
            old, new = sorted((run / folder).iterdir())
            for file, present in ((old, False), (new, True)):
                uri = f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"
                assert (uri in html) == present
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["page.html"]


def test_nothing_is_fetched_from_anywhere(runs, tmp_path):
    html = write_report(runs, tmp_path / "page.html").read_text()
    html = re.sub(r"data:[a-z]+/[a-z0-9]+;base64,[A-Za-z0-9+/=]+", "data:", html)
    assert set(re.findall(r"https?://[^\s\"'<]+", html)) == {"http://www.w3.org/2000/svg"}
    assert set(re.findall(r'(?:src|href)="([^#"][^"]*)"', html)) == {"data:", "data:,"}
    assert "@import" not in html
    assert "url(" not in html


def test_settings_that_differ_come_first_and_are_marked(runs, tmp_path):
    html = write_report(runs, tmp_path / "page.html").read_text()
    settings = html[
        html.index('<section id="settings">') : html.index('<section id="environment">')
    ]
    assert "1 of 5 settings differ" in settings
    rows = re.findall(r'<tr class="(differs)?"><th>(.*?)</th>', settings)
    assert rows[0] == ("differs", "seed")
    assert rows[1:] == [
        ("differs", "seed"),
        ("", "environment.domain"),
        ("", "environment.task"),
        ("", "environment.note"),
        ("", "device"),
    ]
    assert "&lt;b&gt;&amp;" in settings  # settings are text, never markup
    assert "<td>null</td>" in settings
    assert "started 2 times" in html


def test_tables_keep_what_only_one_run_has():
    rows = page.compare([{"a": "1", "b": "2"}, {"b": "2", "c": "3"}])
    assert [(row["name"], row["values"], row["differs"]) for row in rows] == [
        ("a", ["1", None], True),
        ("c", [None, "3"], True),
        ("b", ["2", "2"], False),
    ]
    assert flatten({"a": {"b": True, "c": None}, "d": [1, "x"]}) == {
        "a.b": "true",
        "a.c": "null",
        "d": "[1, 'x']",
    }


def test_a_hostile_name_stays_text(tmp_path):
    run = make_run(tmp_path / "<script>alert(1)<!--</script>".replace("/", "_"), domain="</title>")
    html = write_report([run], tmp_path / "page.html").read_text()
    assert "<script>alert" not in html
    assert "</title>" not in html.split("</title>", 1)[1].split("<body>")[0]
    assert embedded(html)["runs"] == [run.name]


def test_the_overview_is_that_of_the_metrics(runs):
    facts = page.overview(load_runs(runs)[0])
    assert facts["last evaluation"] == "400.0 ± 2.0 at 4,000"
    assert facts["best evaluation"] == "400.0 at 4,000"
    assert facts["training episodes"] == "25.0, mean of the last 4"
    assert (facts["frames"], facts["updates"]) == ("4,000", "40")


def test_thinned_curves_keep_their_mean_and_their_end():
    points = [(10 * i, i, float(i)) for i in range(1, 1204)]
    thinned = thin(points, 400)
    assert len(thinned) <= 400
    assert thinned[0] == (40, 4, 2.5)
    assert thinned[-1][:2] == (12030, 1203)
    assert thin(points[:300], 400) == points[:300]
    assert thin([(1, 1, float("nan"))]) == [(1, 1, None)]


def test_a_run_that_has_only_begun_and_a_codec_that_browsers_lack(tmp_path, monkeypatch):
    MetricsLogger(tmp_path / "new").close()
    assert chart_data(load_runs([tmp_path / "new"])) == []
    html = write_report([tmp_path / "new"], tmp_path / "page.html").read_text()
    assert "No config.yaml" in html
    run = make_run(tmp_path / "run")
    monkeypatch.setattr(page, "BROWSER_CODECS", ("none",))
    html = write_report([run], tmp_path / "page.html").read_text()
    assert "Encoded as h264, which browsers cannot play" in html
    assert "<video" not in html


def test_the_command_names_what_is_wrong(runs, tmp_path, capsys, monkeypatch):
    assert main([str(tmp_path / "none")]) == 2
    assert "is not a run directory" in capsys.readouterr().err
    assert main([str(runs[0]), str(runs[0])]) == 2
    assert "given twice" in capsys.readouterr().err
    assert main([str(runs[0])]) == 0
    assert str(runs[0] / "report.html") in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    assert main([*map(str, runs)]) == 0
    assert (tmp_path / "report.html").exists()


def test_every_metric_of_a_run_has_a_meaning_and_stands_in_the_docs():
    text = (ROOT / "docs" / "logging.md").read_text()
    for name, (_, meaning) in METRICS.items():
        assert f"`{name}`" in text, name
        assert meaning in text, name
    assert meaning_of("eval/clean/return_mean").text.endswith("set clean")
    assert meaning_of("weights/actor/q05").text == "5 % quantile, weights of a module"
    assert meaning_of("wm/unheard_of").text == ""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_a_browser_draws_the_curves_and_plays_the_videos(runs, tmp_path):
    path = write_report(runs, tmp_path / "page.html")
    probe = """<script>addEventListener("load", () => setTimeout(() => {
      const videos = [...document.querySelectorAll("video")];
      document.body.dataset.videos = videos.map((v) => `${v.readyState}x${v.videoHeight}`).join();
      document.body.dataset.curves = document.querySelectorAll("path.curve").length;
      document.body.dataset.overflow = document.documentElement.scrollWidth - innerWidth;
    }, 2000));</script>"""
    path.write_text(path.read_text().replace("</body>", probe + "</body>"))
    options = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --dump-dom "
        "--disable-background-networking --disable-component-update --disable-sync "
        f"--window-size=420,3000 --virtual-time-budget=8000 --user-data-dir={tmp_path / 'profile'}"
    )
    done = subprocess.run(
        [CHROMIUM, *options.split(), f"file://{path}"],
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    found = dict(re.findall(r'data-(videos|curves|overflow)="(.*?)"', done.stdout))
    # Two runs' newest video, decoded (readyState 2 or more); weights are folded, hence not drawn.
    assert [int(item[0]) >= 2 for item in found["videos"].split(",")] == [True, True]
    assert found["videos"].count("x256") == 2
    assert int(found["curves"]) >= 6
    assert int(found["overflow"]) <= 0  # nothing sticks out on a phone

"""The program that compares methods: its list of runs, its aggregates, table and picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from tiny_run import MODEL

pytest.importorskip("rliable", reason="the aggregates need it: make extras")

import methods
from methods_table import COLUMNS, Measured, draw, markdown, summarise

from w2f_torchrl.config import METHODS
from w2f_torchrl.registry import algorithms


def measured(method: str, world: str, task: str, seed: int, score: float) -> Measured:
    scenery = world != "none"
    return Measured(
        method,
        world,
        task,
        seed,
        960,
        [score - 10, score + 10],
        [score / 2] if scenery else [],
        [score / 4] if scenery else [],
        {COLUMNS["pose R2"]: score / 1000, **({COLUMNS["apart, last"]: 0.5} if scenery else {})},
        [0.1, 0.2 + seed] if scenery else [],
    )


RUNS = [
    measured(method, world, task, seed, base + 100 * seed + 40 * number)
    for method, base in (("split", 500), ("tia", 200))
    for world in ("none", "easy")
    for number, task in enumerate(("cartpole_swingup", "ball_in_cup_catch"))
    for seed in (0, 1)
]


def test_every_builtin_method_is_compared_with_its_latents():
    compared = {each.removeprefix("algo=") for o in methods.METHODS.values() for each in o[:1]}
    assert compared == {"world2filter", *METHODS} == set(algorithms.builtin)


def test_the_list_of_runs_is_every_combination_and_its_settings_are_checked(tmp_path):
    args = methods._arguments(
        [
            *("--runs", str(tmp_path), "--worlds", "none", "easy", "--methods", "split", "tia"),
            *("--override", "training.total_frames=96000"),
        ]
    )
    jobs = methods.jobs_of(args)
    assert len(jobs) == len({job.name for job in jobs}) == 2 * 2 * 2 * 2
    first = next(iter(jobs))
    assert first.name == "split_none_finger_spin_seed0"
    assert first.settings["environment.action_repeat"] == "4"
    assert {job.settings["training.total_frames"] for job in jobs} == {"96000"}
    assert first.settings["model.preset"] == "size1m"
    catch = next(job for job in jobs if "tia_easy_ball" in job.name)
    assert catch.settings["environment.domain"] == "ball_in_cup"
    assert catch.settings["environment.action_repeat"] == "8"
    assert (catch.settings["algo.name"], catch.settings["algo.latent"]) == ("tia", "null")
    assert catch.settings["environment.distraction"] == "easy"
    args.override = []
    frames = {job.settings["training.total_frames"] for job in methods.jobs_of(args)}
    assert frames == {"64000", "320000"}
    args.override = ["training.total_frames=nothing"]
    with pytest.raises(ValueError, match=r"split_none_finger_spin: .*total_frames"):
        methods.jobs_of(args)


def test_aggregates_are_interquartile_means_over_tasks_and_seeds():
    summary = summarise(RUNS)
    row = next(r for r in summary["returns"] if (r["method"], r["world"]) == ("split", "easy"))
    scores = [0.5, 0.6, 0.54, 0.64]
    assert row["estimate"]["value"] == pytest.approx(stats.trim_mean(scores, 0.25))
    assert min(scores) <= row["estimate"]["low"] < row["estimate"]["value"]
    assert row["estimate"]["value"] < row["estimate"]["high"] <= max(scores)
    assert row["scores"]["cartpole_swingup"] == {0: pytest.approx(0.5), 1: pytest.approx(0.6)}
    measures = next(r for r in summary["measures"] if (r["method"], r["world"]) == ("tia", "easy"))
    assert measures["divergence"] == pytest.approx([0.1, 0.7])
    assert measures["measures"][COLUMNS["pose R2"]] == pytest.approx(
        np.mean([200, 300, 240, 340]) / 1000
    )
    assert summarise(RUNS) == summary  # the intervals' draws too
    json.dumps(summary)


def test_the_table_says_what_is_missing():
    runs = [r for r in RUNS if (r.method, r.world) != ("tia", "easy")]
    text = markdown(summarise(runs[1:]), ["tia_easy_cartpole_swingup_seed0"])
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()]
    tables = {
        row[0]: row for row in lines[: lines.index(["world: none", "runs", "pose R2"])] if row
    }
    header = tables["IQM of returns / 1000"]
    assert header[1:] == ["none, seen", "easy, seen", "easy, unseen", "easy, real"]
    assert tables["tia"][2:] == ["not run", "not run", "not run"]
    assert tables["split"][1] == "seeds differ"  # a run of one task is missing
    assert tables["split, cartpole_swingup"][1] == "600"
    assert tables["split, ball_in_cup_catch"][1:] == [
        "540, 640",
        "540, 640",
        "270, 320",
        "135, 160",
    ]
    assert "Not finished: tia_easy_cartpole_swingup_seed0." in text
    assert "apart, last" in text
    assert "camera R2" not in text


def test_the_picture_has_a_column_for_each_world(tmp_path):
    figure = draw(summarise(RUNS))
    panels = figure.axes
    assert [axes.get_title() for axes in panels[:2]] == ["scenery: none", "scenery: easy"]
    assert len(panels[0].containers) == 2
    assert len(panels[1].containers) == 6  # seen, unseen and real
    assert [len(axes.lines) for axes in panels[2:]] == [0, 2]
    figure.savefig(tmp_path / "methods.png")


def test_an_interrupted_comparison_says_how_it_continues(tmp_path, capsys, monkeypatch):
    def interrupt(self, jobs):
        raise KeyboardInterrupt

    monkeypatch.setattr(methods.Runs, "train", interrupt)
    command = ["--runs", str(tmp_path), "--worlds", "easy", "--json", str(tmp_path / "m.json")]
    with pytest.raises(SystemExit) as stopped:
        methods.main(command)
    assert stopped.value.code == 130
    assert "the same command continues" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no run is finished"):
        methods.main([*command, "--no-training"])


def test_runs_of_another_call_count_if_made_and_measured_alike(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(methods.Runs, "train", lambda self, jobs: trained.extend(jobs))
    monkeypatch.setattr(methods, "measure", lambda run, what, **_: what._replace(seen=[300.0]))
    monkeypatch.setattr(methods, "read_environment", lambda path: [{"commit": "abc"}])

    def call(name, *more):
        trained.clear()
        methods.main(
            [
                *("--runs", str(tmp_path / "runs"), "--json", str(tmp_path / name), "--methods"),
                *("split", "tia", "--worlds", "clips", "--tasks", "finger_spin", *more),
            ]
        )
        return json.loads((tmp_path / name).read_text())

    clips, elsewhere = tmp_path / "clips", tmp_path / "moved"
    for folder in (clips, elsewhere):
        for number in range(8):
            (folder / f"clip{number}").mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(folder / f"clip{number}" / "0.png")
    monkeypatch.setattr(methods, "is_finished", lambda run: "tia" in run.name)
    first = call("first.json", "--clips", str(clips), "--seeds", "0")
    assert [(r["method"], r["commit"]) for r in first["runs"]] == [("tia", "abc")]
    assert str(tmp_path) not in json.dumps(first["runs"])
    monkeypatch.setattr(methods, "is_finished", lambda run: "split" in run.name)
    more = ["--clips", str(elsewhere), "--seeds", "0", "1", "--add", str(tmp_path / "first.json")]
    second = call("second.json", *more)
    assert [job.name for job in trained] == [
        "split_clips_finger_spin_seed0",
        "split_clips_finger_spin_seed1",
        "tia_clips_finger_spin_seed1",
    ]
    assert second["not_finished"] == ["tia_clips_finger_spin_seed1"]
    assert first["runs"][0] in second["runs"]
    assert len(second["runs"]) == 3
    for other in (["--episodes", "3"], ["--override", "optimizer.lr=1e-4"]):
        assert len(call("third.json", *more, *other)["runs"]) == 2
        assert len(trained) == 4
    (tmp_path / "old.json").write_text('{"returns": [], "runs": [{"method": "tia"}]}')
    with pytest.raises(SystemExit, match=r"old.json is not a results file"):
        call("fourth.json", "--clips", str(clips), "--add", str(tmp_path / "old.json"))


@pytest.mark.slow
@pytest.mark.render
@pytest.mark.timeout(1800)
def test_methods_are_trained_measured_once_and_tabulated(tmp_path, capsys):
    command = [
        *("--runs", str(tmp_path / "runs"), "--json", str(tmp_path / "methods.json")),
        *("--markdown", str(tmp_path / "methods.md"), "--plot", str(tmp_path / "methods.png")),
        *("--methods", "masked_input", "repo", "--worlds", "easy"),
        *("--tasks", "cartpole_balance", "--seeds", "0", "--episodes", "1", "--probed", "16"),
        *("--override", "training.total_frames=2048", "environment.image_size=16"),
        *("training.prefill_steps=64", "training.train_ratio=16", "evaluation.every_frames=0"),
        *(
            "environment.num_envs=1",
            "training.batch_size=2",
            *(f"model.{name}={value}" for name, value in MODEL.items()),
        ),
    ]
    methods.main(command)
    found = json.loads((tmp_path / "methods.json").read_text())
    assert len(found["runs"]) == 2
    assert found["not_finished"] == []
    for run in found["runs"]:
        assert len(run["seen"]) == len(run["unseen"]) == 1
        assert {COLUMNS["clip"], COLUMNS["action, replaced"]} <= set(run["measures"])
    assert Path(tmp_path / "methods.png").stat().st_size > 1000
    capsys.readouterr()
    methods.main(command)
    assert "done before" in capsys.readouterr().err
    assert json.loads((tmp_path / "methods.json").read_text())["runs"] == found["runs"]

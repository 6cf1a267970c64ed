"""The generalisation table's statistics and form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rliable")

import generalisation
from generalisation_table import Played, aggregate, cell, draw, markdown, summarise
from PIL import Image

from w2f_torchrl.logging.pictures.plotting import save_figure
from w2f_torchrl.trainers.run import make_evaluator

EXAMPLES = Path(__file__).parents[1] / "examples"


def played(
    method: str, task: str, seed: int, name: str, mean: float, iou: float | None = 0.8
) -> Played:
    returns = np.random.default_rng(seed).normal(mean, 20, 10)
    return Played(method, task, seed, name, list(map(float, returns)), iou)


def test_intervals_are_over_seeds_where_there_are_enough():
    few = [played("split", "walker walk", s, "clean", 500) for s in range(2)]
    estimate = cell(few)
    assert estimate.over == "episodes"
    assert estimate.value == pytest.approx(np.mean([r for p in few for r in p.returns]))
    many = [played("split", "walker walk", s, "clean", 300 + 100 * s) for s in range(5)]
    estimate = cell(many)
    assert estimate.over == "seeds"
    assert estimate.low < estimate.value < estimate.high
    # The spread of the seeds' means, about 141, over the root of 5, twice to both sides.
    assert 180 < estimate.high - estimate.low < 300
    assert estimate == cell(many)  # reproducible


def test_the_aggregate_is_the_interquartile_mean_over_tasks_and_seeds():
    scores = {"a b": [100.0, 200.0], "c d": [300.0, 1000.0]}
    runs = [
        Played("m", task, seed, "clean", [value], None)
        for task, values in scores.items()
        for seed, value in enumerate(values)
    ]
    estimate = aggregate(runs)
    assert estimate.value == pytest.approx(0.25)  # the mean of the middle half: 200 and 300
    assert estimate.low <= estimate.value <= estimate.high
    with pytest.raises(ValueError, match="as many seeds of every task, got a b: 2, c d: 1"):
        aggregate(runs[:3])


def all_runs() -> list[Played]:
    runs = []
    for task in ("cartpole balance", "walker walk"):
        for seed in range(3):
            for name, lost in (("train_videos_easy", 0), ("unseen_videos_easy", 200)):
                runs.append(played("dreamer_v3", task, seed, name, 600 - lost, None))
                runs.append(played("world2filter split", task, seed, name, 700 - lost / 10))
    return runs


def test_the_summary_and_its_table(tmp_path):
    summary = summarise(all_runs(), "easy")
    assert len(summary["cells"]) == 8
    gaps = {(g["method"], g["task"]): g["gap"] for g in summary["gaps"]}
    # The same noise in both sets: the gap is exact.
    assert gaps["dreamer_v3", "walker walk"] == pytest.approx(200)
    assert gaps["world2filter split", "cartpole balance"] == pytest.approx(20)
    assert len(summary["aggregates"]) == 4
    text = markdown(summary)
    lines = text.splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 2 + 4 + 2
    row = next(line for line in lines if "| walker walk | world2filter split |" in line)
    assert "| 20 |" in row
    assert "0.80" in row
    assert save_figure(draw(summary), tmp_path / "table.png").stat().st_size > 5000


def test_what_cannot_be_aggregated_is_said_and_nothing_is_lost():
    runs = all_runs()[:-1]
    summary = summarise(runs, "easy")
    assert len(summary["cells"]) == 8
    assert len(summary["aggregates"]) == 3
    assert "as many seeds of every task" in summary["not_aggregated"][0]
    markdown(summary)


def test_sets_that_were_not_played_leave_no_gap():
    runs = [r for r in all_runs() if r.set == "train_videos_easy"]
    assert summarise(runs, "easy")["gaps"] == []


def test_a_method_has_one_color_in_every_panel_and_no_aggregate_over_other_tasks():
    rows = [
        played(method, task, seed, "clean", 500)
        for method, tasks in (("a", "xy"), ("b", "x"), ("c", "xy"))
        for task in tasks
        for seed in range(2)
    ]
    summary = summarise(rows, "easy")
    panels = draw(summary).axes
    colors = [
        {bars.get_label(): bars.patches[0].get_facecolor() for bars in axes.containers
         if bars.get_label() in "abc"}
        for axes in panels
    ]  # fmt: skip
    assert set(colors[0]) == set("abc")
    assert colors[1] == {method: colors[0][method] for method in "ac"}
    assert {entry["method"] for entry in summary["aggregates"]} == {"a", "c"}
    assert "b, clean: not played on y" in summary["not_aggregated"]


def test_a_policy_plays_before_the_clips_of_a_folder(tmp_path, monkeypatch):
    for split in ("train", "val"):
        for clip in range(4):
            folder = tmp_path / "real" / split / f"{split}{clip}"
            folder.mkdir(parents=True)
            for frame in range(2):
                Image.new("RGB", (64, 64), (clip * 60, frame * 90, 128)).save(
                    folder / f"{frame}.png"
                )
    seen = []

    def make(config, *args, **kwargs):
        seen.append(config.environment.background_source)
        return make_evaluator(config, *args, **kwargs)

    monkeypatch.setattr(generalisation, "make_evaluator", make)
    policy = EXAMPLES / "pretrained" / "finger_spin_easy.pt"
    sets = ["clean", "unseen_videos_easy", "unseen_procedural_easy", "dmcgb_video_easy_stand_in"]
    rows = generalisation.play(policy, sets, 1, 0, str(tmp_path / "real"))
    assert [row.set for row in rows] == ["unseen_videos_easy, real"]
    assert seen == [str(tmp_path / "real")]
    assert len(rows[0].returns) == 1
    assert rows[0].mask_iou is not None
    with pytest.raises(ValueError, match="no evaluation set of --sets shows its videos"):
        generalisation.play(policy, ["clean", "color_easy"], 1, 0, str(tmp_path / "real"))

"""Presets of published protocols, and published scores drawn only where the protocol matches."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_module
from matplotlib.axes import Axes

import sota_configs.world2filter  # its settings and presets
from w2f_torchrl.config import config_to_dict, to_run_config
from w2f_torchrl.config.run import RunConfig
from w2f_torchrl.envs.scenery.distractions import parse_distraction
from w2f_torchrl.logging.pictures.plotting import plot_curves
from w2f_torchrl.logging.pictures.published import (
    FOLDER,
    NATURAL,
    published_scores,
    read_table,
)

EXPERIMENTS = Path(sota_configs.world2filter.__file__).parent / "experiment"
PRESETS = {
    "dmc_vision_1m": (1_000_000, 2, 16, 16, 64, 512, []),
    "natural_video": (1_000_000, 2, 1, 50, 50, 500, ["unseen"]),
    "dmcgb": (
        500_000,
        4,
        16,
        16,
        64,
        512,
        ["dmcgb_color_easy", "dmcgb_color_hard", "dmcgb_video_easy", "dmcgb_video_hard"],
    ),
    "distracting_easy": (1_000_000, 2, 16, 16, 64, 512, ["all_easy"]),
    "distracting_medium": (1_000_000, 2, 16, 16, 64, 512, ["all_medium"]),
    "distracting_hard": (1_000_000, 2, 16, 16, 64, 512, ["all_hard"]),
}


def preset(name: str, *overrides: str) -> RunConfig:
    with initialize_config_module("sota_configs", version_base="1.3"):
        return to_run_config(compose("config", [f"experiment={name}", *overrides]))


# ------------------------------------------------------------------ presets


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_its_protocols_numbers(name):
    config, training = preset(name), preset(name).training
    found = (
        training.total_frames,
        config.environment.action_repeat,
        config.environment.num_envs,
        training.batch_size,
        training.batch_length,
        training.train_ratio,
        config.evaluation.sets,
    )
    assert found == PRESETS[name]
    assert config.environment.image_size == 64
    assert config.model.preset == "size12m"
    text = (EXPERIMENTS / f"{name}.yaml").read_text()
    assert "# Source: " in text
    assert "arXiv" in text
    updates_per_step = training.train_ratio / (training.batch_size * training.batch_length)
    assert updates_per_step == (0.2 if name == "natural_video" else 0.5)


def test_distractions_of_the_presets(tmp_path):
    assert preset("dmc_vision_1m").environment.distraction == "none"
    assert preset("dmcgb").environment.distraction == "none"
    for level in ("easy", "medium", "hard"):
        environment = preset(f"distracting_{level}").environment
        assert (environment.distraction, environment.background_source) == (level, "davis")
    natural = preset("natural_video").environment
    assert parse_distraction(natural.distraction) == NATURAL
    assert NATURAL.background.alpha("walker") == 0.0  # everywhere but on the agent


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_can_be_run_with_its_data(name, tmp_path):
    overrides = [f"run_dir={tmp_path / 'run'}"]
    if name == "natural_video":
        for split in ("train", "test"):
            clip = tmp_path / "kinetics400" / "videos" / split / "clip.mp4"
            clip.parent.mkdir(parents=True)
            clip.touch()
        overrides.append(f"environment.background_source={clip.parents[1]}")
    elif name == "dmcgb":
        for mode in ("easy", "hard"):
            (tmp_path / f"color_{mode}.pt").touch()
            (tmp_path / f"video_{mode}" / "video0").mkdir(parents=True)
        overrides.append(f"environment.dmcgb_data={tmp_path}")
    elif name.startswith("distracting"):
        overrides.append("environment.background_source=procedural")
    preset(name, *overrides).validate()


# ------------------------------------------------------------------ published scores


def settings(name: str, domain: str, task: str, *overrides: str) -> dict:
    task_of = [f"environment.domain={domain}", f"environment.task={task}", *overrides]
    return config_to_dict(preset(name, *task_of))


def test_the_tables_hold_the_published_scores():
    natural = {row["task"]: float(row["mean"]) for row in read_table(FOLDER / "natural_video.csv")}
    assert natural == {
        "dmc_cartpole_swingup": 620,
        "dmc_ball_in_cup_catch": 505,
        "dmc_finger_spin": 801,
        "dmc_reacher_easy": 639,
        "dmc_walker_run": 393,
        "dmc_cheetah_run": 444,
    }
    rows = read_table(FOLDER / "dmcgb.csv")
    tasks = ("walker_walk", "cartpole_swingup", "ball_in_cup_catch", "finger_spin")
    for name, scores in (
        ("video_easy", (819, 782, 875, 808)),
        ("color_hard", (760, 837, 961, 977)),
    ):
        found = {r["task"]: float(r["mean"]) for r in rows if r["set"] == f"dmcgb_{name}"}
        assert [found[f"dmc_{task}"] for task in tasks] == list(scores)


def test_scores_of_the_protocol_that_a_run_follows():
    [curve] = published_scores(settings("dmc_vision_1m", "walker", "walk"))
    assert curve.metric == "episode/return"
    assert curve.frames[-1] == 1e6
    assert curve.means[curve.frames.index(1e5)] == pytest.approx(586, abs=1)
    [natural] = published_scores(settings("natural_video", "cheetah", "run"))
    assert (natural.metric, natural.frames, natural.means) == (
        "eval/unseen/return_mean",
        (1e6,),
        (444.0,),
    )
    assert natural.label == "TPC, published, at 1M frames"
    found = published_scores(settings("dmcgb", "walker", "walk"))
    assert {score.metric: score.means for score in found} == {
        "eval/dmcgb_video_easy/return_mean": (819.0,),
        "eval/dmcgb_color_hard/return_mean": (760.0,),
    }
    eight = published_scores(
        settings("dmcgb", "cartpole", "swingup", "environment.action_repeat=8")
    )
    assert {score.means for score in eight} == {(782.0,), (837.0,)}


@pytest.mark.parametrize(
    ("name", "task", "override"),
    [
        ("dmc_vision_1m", "walker walk", "environment.image_size=96"),
        ("dmc_vision_1m", "walker walk", "environment.action_repeat=1"),
        ("dmc_vision_1m", "walker walk", "environment.distraction=easy"),
        ("dmc_vision_1m", "fish swim", "seed=1"),  # not in the table
        ("natural_video", "cheetah run", "environment.background_source=my/videos"),
        ("natural_video", "cheetah run", "environment.background_split=val"),
        ("natural_video", "cheetah run", "environment.distraction.step_unit=control"),
        ("natural_video", "cheetah run", "environment.distraction.background.ground_alpha=1.0"),
        ("natural_video", "cheetah run", "environment.action_repeat=4"),
        ("dmcgb", "cartpole swingup", "seed=1"),  # its action repeat is 8
        ("dmcgb", "walker walk", "environment.distraction=corruption"),
        ("distracting_easy", "walker walk", "seed=1"),
    ],
)
def test_and_of_no_other(name, task, override):
    domain, task = task.split()
    assert published_scores(settings(name, domain, task, override)) == []


def test_what_is_damaged_or_missing_has_none(tmp_path):
    config = settings("dmc_vision_1m", "walker", "walk")
    assert published_scores(config, tmp_path / "missing") == []
    assert published_scores({}) == []
    broken = copy.deepcopy(settings("natural_video", "cheetah", "run"))
    broken["environment"]["distraction"] = {"background": {"speed": 3}}
    assert published_scores(broken) == []


@pytest.mark.parametrize("name", ["dmc_vision_1m", "dmcgb", "distracting_easy", None])
def test_curves_of_a_run_show_them(name, tmp_path, monkeypatch):
    """The run's own curves.png: what is drawn, by the legends' labels and the lines' heights."""
    rows = [
        {
            "frames": frames,
            "updates": frames,
            "episode/return": 100.0 + frames / 1000,
            "eval/dmcgb_video_easy/return_mean": 200.0,
            "eval/dmcgb_video_easy_stand_in/return_mean": 300.0,
        }
        for frames in (2000, 4000)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if name is not None:
        config = settings(name, "walker", "walk")
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    drawn: dict[str, list[float]] = {}
    for kind in ("plot", "axhline"):
        method = getattr(Axes, kind)

        def spy(axes, *values, method=method, kind=kind, **style):
            heights = values[1] if kind == "plot" else [values[0]]
            if style.get("label"):
                drawn[style["label"]] = [float(height) for height in heights]
            return method(axes, *values, **style)

        monkeypatch.setattr(Axes, kind, spy)
    assert plot_curves(tmp_path).exists()
    published = {label: heights for label, heights in drawn.items() if "published" in label}
    if name == "dmc_vision_1m":
        [(label, heights)] = published.items()
        assert label.startswith("DreamerV3, published")
        assert len(heights) == 9
    elif name == "dmcgb":
        label = "dmcgb_video_easy: SVEA or SODA, published, at 0.5M frames"
        assert published == {label: [819.0]}
    else:
        assert published == {}
    assert drawn["dmcgb_video_easy"] == [200.0, 200.0]
    assert drawn["dmcgb_video_easy_stand_in"] == [300.0, 300.0]

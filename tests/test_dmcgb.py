"""DMControl-GB's test sets: what they show, where their data comes from, and what stands in."""

from __future__ import annotations

import logging
import pickle
from functools import partial
from pathlib import Path

from helpers.runs import tiny_run
from tensordict import TensorDict

from w2f_torchrl.config import ConfigError, EnvironmentConfig
from w2f_torchrl.data.environments import build_env, probe_env
from w2f_torchrl.envs import (
    BackgroundConfig,
    DistractionConfig,
    PixelDMControlEnv,
    evaluation_sets,
    validate_distraction,
)
from w2f_torchrl.envs.protocols.dmcgb import MODES
from w2f_torchrl.envs.protocols.palette import (
    SPREAD,
    USUAL,
    Palette,
    PaletteConfig,
    PaletteWalk,
    load_table,
)
from w2f_torchrl.envs.scenery.backgrounds import list_clips
from w2f_torchrl.envs.scenery.distractions import parse_distraction
from w2f_torchrl.envs.scenery.walks import ClipsInOrder, VideoWalk
from w2f_torchrl.trainers import Trainer

# isort: split
# MuJoCo after torch's compiler: the other order crashes with Mesa (see test_imports.py).
import mujoco
import numpy as np
import pytest
import torch
from dm_control import suite
from dm_control.mujoco import Physics
from PIL import Image

SIZE = 64
FRAMES = 3
COLOR_KEYS = ("grid_rgb1", "grid_rgb2", "self_rgb", "skybox_rgb")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as DMControl-GB's, with few colours and short clips of one colour per frame."""
    folder, generator = tmp_path_factory.mktemp("dmcgb"), np.random.default_rng(0)
    for level in ("easy", "hard"):
        table = [{key: generator.uniform(0, 1, 3) for key in COLOR_KEYS} for _ in range(5)]
        torch.save(table, folder / f"color_{level}.pt")
        for clip in (0, 1, 10):
            images = folder / f"video_{level}" / f"video{clip}"
            images.mkdir(parents=True)
            for frame in range(FRAMES):
                color = (20 * clip + 10, 80 * frame + 5, 200 if level == "hard" else 100)
                Image.new("RGB", (SIZE, SIZE), color).save(images / f"{frame}.png")
    return folder


def make(name: str, data: Path | None, task: str = "walker walk", **settings) -> PixelDMControlEnv:
    domain, task = task.split()
    values = {"image_size": SIZE, "action_repeat": 2} | settings
    environment = EnvironmentConfig(
        domain=domain, task=task, dmcgb_data=data and str(data), **values
    )
    return build_env(environment, 3, evaluation_set=evaluation_sets()[name]).base_env


def play(env: PixelDMControlEnv, steps: int) -> list[TensorDict]:
    generator = torch.Generator().manual_seed(0)
    data = [env.reset()]
    for _ in range(steps):
        action = torch.rand(env.action_spec.shape, generator=generator) * 2 - 1
        data.append(env.step(TensorDict({"action": action}, []))["next"])
    return data


# ------------------------------------------------------------------ colours


def recoloured(domain: str, colors: dict[str, np.ndarray]) -> Physics:
    """The suite's model with the colours written into its XML files, as the benchmark does."""
    module = getattr(suite, domain)
    xml, assets = module.get_model_and_assets()
    assets = dict(assets)  # shared by all models
    text = {key: " ".join(map(str, value)) for key, value in colors.items()}
    sky, materials = "./common/skybox.xml", "./common/materials.xml"
    for name, old, new in (
        (sky, 'rgb1=".4 .6 .8"', f'rgb1="{text["skybox_rgb"]}"'),
        (materials, 'rgb1=".1 .2 .3"', f'rgb1="{text["grid_rgb1"]}"'),
        (materials, ' rgb2=".2 .3 .4"', f' rgb2="{text["grid_rgb2"]}"'),
        (
            materials,
            'name="self" rgba=".7 .5 .3 1"',
            f'name="self" rgba="{text["self_rgb"]} 1"',
        ),
    ):
        content = assets[name].decode() if isinstance(assets[name], bytes) else assets[name]
        assert content.count(old) == 1, old
        assets[name] = content.replace(old, new).encode()
    physics = Physics.from_xml_string(xml, assets)
    physics.model.vis.quality.offsamples = 0
    return physics


@pytest.mark.render
@pytest.mark.parametrize("domain", ["walker", "finger"])
def test_colours_are_those_of_a_model_that_was_compiled_with_them(domain, data):
    task = {"walker": "walk", "finger": "spin"}[domain]
    env = make("dmcgb_color_hard", data, f"{domain} {task}")
    table = torch.load(data / "color_hard.pt", weights_only=False)
    flags, seen = {"shadow": False, "reflection": False}, set()
    for _ in range(4):
        pixels = env.reset()["pixels"].permute(1, 2, 0).numpy()
        index = env.distractor.palette.index
        plain = recoloured(domain, table[index])
        plain.set_state(env.physics.get_state())
        plain.forward()
        if domain == "finger":  # the task hides the target at its reset
            for name in ("site_rgba", "site_pos"):
                getattr(plain.model, name)[:] = getattr(env.physics.model, name)
            plain.forward()
        expected = plain.render(SIZE, SIZE, 0, render_flag_overrides=flags)
        np.testing.assert_array_equal(pixels, expected)
        seen.add(index)
    assert len(seen) > 1
    env.close()


@pytest.mark.render
def test_the_model_is_as_it_was_and_rewards_are_the_tasks(data):
    env = make("dmcgb_color_easy", data)
    plain = PixelDMControlEnv("walker", "walk", image_size=SIZE, seed=None)
    arrays = env.physics.model.tex_data, env.physics.model.mat_rgba
    before = [array.copy() for array in arrays]
    played = play(env, 4)
    for array, saved in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, saved)
    expected = make("clean", None)
    for mine, theirs in zip(played[1:], play(expected, 4)[1:], strict=True):
        assert torch.equal(mine["reward"], theirs["reward"])
        assert torch.equal(mine["foreground_mask"], theirs["foreground_mask"])
        assert (mine["pixels"] != theirs["pixels"]).float().mean() > 0.5
    for each in (env, plain, expected):
        each.close()


@pytest.mark.parametrize("level", ["easy", "hard"])
def test_stand_ins_are_around_the_suites_colours(level):
    table = load_table(PaletteConfig(level))
    assert table == load_table(PaletteConfig(level))
    assert len(table) == len(set(table)) == 100
    for name, mean in USUAL.items():
        colors = np.array([getattr(entry, name) for entry in table])
        assert ((colors >= 0) & (colors <= 1)).all()
        assert colors.mean(0) == pytest.approx(mean, abs=3 * SPREAD[level] / 10 + 0.06)
        assert colors.std(0).mean() == pytest.approx(SPREAD[level], rel=0.25)
    lighter = np.array([np.subtract(entry.light_grid, entry.grid) for entry in table])
    assert lighter == pytest.approx(0.1)


def test_an_entry_is_drawn_uniformly():
    table = [Palette((index / 10,) * 3, (0, 0, 0), (0, 0, 0), (0, 0, 0)) for index in range(5)]
    walk, generator = PaletteWalk(table), np.random.default_rng(0)
    drawn = []
    for _ in range(2000):
        walk.start(generator)
        drawn.append(walk.index)
    assert np.bincount(drawn, minlength=5) == pytest.approx(400, abs=80)
    assert walk.palette is table[drawn[-1]]


class Evil:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"grid_rgb1": np.zeros(3)}], "is not a table of DMControl-GB: 'grid_rgb2'"),
        ([dict.fromkeys(COLOR_KEYS, np.full(3, 2.0))], r"\[2.0, 2.0, 2.0\] is no colour"),
        ([], "is empty"),
        (Evil(), "is not a table of DMControl-GB: Weights only load failed"),
    ],
)
def test_other_files_are_no_tables(tmp_path, content, message, capsys):
    torch.save(content, tmp_path / "table.pt")
    with pytest.raises(ValueError, match=message):
        load_table(PaletteConfig(file=str(tmp_path / "table.pt")))
    assert "run" not in capsys.readouterr().out


# ------------------------------------------------------------------ videos


def clear_picture(env: PixelDMControlEnv, domain: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dm_control's own picture without sky: colours, where anything shows, where the floor does."""
    plain = suite.load(domain, env.task_name, task_kwargs={"random": 3}).physics
    model = plain.model
    model.vis.quality.offsamples = 0
    plain.set_state(env.physics.get_state())
    for name in ("geom_pos", "site_pos", "site_rgba", "mat_rgba"):
        getattr(model, name)[:] = getattr(env.physics.model, name)
    plain.forward()
    flags = dict.fromkeys(("shadow", "reflection", "skybox", "haze"), False)
    rgb = plain.render(SIZE, SIZE, 0, render_flag_overrides=flags)
    labels = plain.render(SIZE, SIZE, 0, segmentation=True)
    ids, kinds = labels[..., 0], labels[..., 1]
    floors = [i for i in range(model.ngeom) if model.id2name(i, "geom") in ("floor", "ground")]
    floor = (kinds == int(mujoco.mjtObj.mjOBJ_GEOM)) & np.isin(ids, floors)
    return rgb, kinds >= 0, floor


@pytest.mark.render
@pytest.mark.parametrize("task", ["walker walk", "cartpole swingup", "reacher easy"])
@pytest.mark.parametrize("level", ["easy", "hard"])
def test_videos_replace_the_sky_and_in_hard_the_floor(level, task, data):
    """Everything else is dm_control's own picture: the agent, and walls too."""
    env = make(f"dmcgb_video_{level}", data, task)
    played = play(env, 2)
    picture = played[-1]["pixels"].permute(1, 2, 0).numpy()
    rgb, shows, floor = clear_picture(env, task.split()[0])
    frame = np.array(Image.open(data / f"video_{level}" / "video0" / "2.png"))
    assert floor.any()
    if level == "easy":
        np.testing.assert_array_equal(picture, np.where(shows[..., None], rgb, frame))
        mask = make("clean", None, task)
        assert torch.equal(played[-1]["foreground_mask"], play(mask, 2)[-1]["foreground_mask"])
        mask.close()
    else:
        np.testing.assert_array_equal(picture[floor | ~shows], frame[floor | ~shows])
        np.testing.assert_array_equal(picture[shows & ~floor], rgb[shows & ~floor])
    if task == "reacher easy":  # the walls are scenery, and visible
        walls = shows & ~floor & ~played[-1]["foreground_mask"][0].numpy()
        assert walls.sum() > 50
    env.close()


@pytest.mark.render
def test_both_render_modes_fix_the_video_to_the_screen(data):
    fast, reference = (
        make("dmcgb_video_hard", data, render=render) for render in ("fast", "reference")
    )
    one, other = (play(env, 3)[-1] for env in (fast, reference))
    outside = ~(one["foreground_mask"] | other["foreground_mask"])[0]
    assert torch.equal(one["pixels"][:, outside], other["pixels"][:, outside])
    assert (one["foreground_mask"] == other["foreground_mask"]).float().mean() > 0.98
    for env in (fast, reference):
        env.close()


@pytest.mark.render
def test_clips_play_one_after_another_from_their_first_frames(data):
    """One frame per agent step; clips in the order of their numbers, again from a new seed."""
    env = make("dmcgb_video_hard", data, action_repeat=4)

    def shown(steps: int) -> list[tuple[int, int]]:
        corners = [each["pixels"][:, 0, 0].tolist() for each in play(env, steps)]
        return [((red - 10) // 20, (green - 5) // 80) for red, green, _ in corners]

    for _ in range(2):
        assert shown(4) == [(0, 0), (0, 1), (0, 2), (0, 0), (0, 1)]
        assert [shown(1) for _ in range(3)] == [
            [(1, 0), (1, 1)],
            [(10, 0), (10, 1)],
            [(0, 0), (0, 1)],
        ]
        env.set_seed(5)
    env.close()


@pytest.mark.render
@pytest.mark.parametrize("mode", MODES)
def test_frames_after_a_restore_are_the_same(mode, data):
    first, second = (make(f"dmcgb_{mode}", data) for _ in range(2))
    play(first, 3)
    play(first, 4)
    play(second, 1)
    second.load_resume_state(pickle.loads(pickle.dumps(first.resume_state())))
    for _ in range(2):
        action = torch.full(first.action_spec.shape, 0.3)
        one, other = (
            env.step(TensorDict({"action": action}, []))["next"] for env in (first, second)
        )
        assert torch.equal(one["pixels"], other["pixels"])
    assert torch.equal(first.reset()["pixels"], second.reset()["pixels"])
    for env in (first, second):
        env.close()


def test_a_loop_plays_forwards_from_a_random_frame():
    walk, generator, starts = VideoWalk([5, 3], playback="loop"), np.random.default_rng(0), set()
    for _ in range(200):
        walk.start(generator)
        starts.add((walk.clip, walk.frame))
        first, length = walk.frame, [5, 3][walk.clip]
        for step in range(1, 12):
            walk.step()
            assert walk.frame == (first + step) % length
    assert len(starts) == 8


def test_what_does_not_play_shows_each_clips_first_frame():
    walk, generator = ClipsInOrder(2, dynamic=False), np.random.default_rng(0)
    clips = []
    for _ in range(3):
        walk.start(generator)
        walk.step()
        clips.append((walk.clip, walk.frame))
    assert clips == [(0, 0), (1, 0), (0, 0)]


# ------------------------------------------------------------------ sets and settings


def test_sets_are_found_by_name(data):
    sets = evaluation_sets()
    for mode in MODES:
        chosen = sets[f"dmcgb_{mode}"].resolved("none", str(data))
        stand_in = sets[f"dmcgb_{mode}_stand_in"]
        assert stand_in.is_stand_in
        assert not chosen.is_stand_in
        assert stand_in.resolved("none", None) is stand_in
        source = str(data / mode) if mode.startswith("video") else None
        assert chosen.background_source("my/clips") == source
        assert (stand_in.background_source("my/clips") or "").startswith(
            "procedural" if source else ""
        )
        if source is None:
            assert chosen.distraction.palette.file == str(data / f"{mode}.pt")
            assert stand_in.distraction.palette == PaletteConfig(mode.split("_")[1])
        else:
            replaces = "floor" if mode == "video_hard" else "sky"
            expected = BackgroundConfig(None, playback="in_order", replaces=replaces)
            assert chosen.distraction == stand_in.distraction
            assert chosen.distraction == DistractionConfig(expected, step_unit="agent")
            assert len(list_clips(source, chosen.split)) == 3


def test_the_data_is_looked_for_before_any_work(tmp_path, data, monkeypatch):
    monkeypatch.setenv("W2F_CACHE", str(tmp_path))
    run = partial(tiny_run, tmp_path / "run", evaluation={"sets": ["dmcgb_video_hard"]})
    with pytest.raises(ConfigError, match=r"sets=dmcgb_video_hard: .*\.dmcgb_data is null. Clone"):
        run().validate()
    (tmp_path / "empty").mkdir()
    folder = {"environment": {"dmcgb_data": str(tmp_path / "empty")}}
    with pytest.raises(ConfigError, match=r"empty has no video_hard. Clone .*_stand_in, whose"):
        run(**folder).validate()
    run(environment={"dmcgb_data": str(data)}).validate()
    (tmp_path / "dmcgb").symlink_to(data)
    run().validate()


@pytest.mark.render
def test_a_run_says_that_its_sets_are_stand_ins(tmp_path, caplog, no_curves):
    names = ["dmcgb_color_easy_stand_in", "dmcgb_video_easy_stand_in", "unseen"]
    config = tiny_run(
        tmp_path / "run",
        environment={"distraction": "reactive_time"},
        evaluation={"sets": names, "every_frames": 256, "max_control_steps": 40},
    )
    with caplog.at_level(logging.WARNING):
        trainer = Trainer(config)
    for name in names[:2]:
        assert f"evaluation.sets={name} is a built-in stand-in" in caplog.text
    assert "unseen is a built-in" not in caplog.text
    trainer.train()
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert all(f"eval/{name}/return_mean" in text for name in names)


def test_probing_builds_the_sets_env(tmp_path, data):
    """What is wrong with a file shows before the run starts."""
    broken = tmp_path / "data"
    broken.mkdir()
    (broken / "color_easy.pt").write_bytes(b"nothing")
    config = tiny_run(
        tmp_path / "run",
        environment={"dmcgb_data": str(broken)},
        evaluation={"sets": ["dmcgb_color_easy"]},
    )
    with pytest.raises(ConfigError, match=r"sets=dmcgb_color_easy: palette.file=.* is not a table"):
        probe_env(config.validated())


def test_unseen_is_the_runs_own_distraction_with_other_scenery():
    unseen = evaluation_sets()["unseen"]
    chosen = unseen.resolved({"reactive": {"seed": 4}, "camera": {}}, None)
    assert chosen.distraction == parse_distraction({"reactive": {"seed": 4}, "camera": {}})
    assert chosen.split == "val"
    assert unseen.resolved("easy", None).background_source("my/clips") == "my/clips"
    with pytest.raises(ValueError, match=r"environment\.distraction=none"):
        unseen.resolved("none", None)


def test_all_clips_of_a_source(tmp_path, data):
    names = [Path(clip.name).name for clip in list_clips(str(data / "video_hard"), "all")]
    assert names == ["video0", "video1", "video10"]
    for kind in (None, "procedural:3"):
        both = [clip for split in ("train", "val") for clip in list_clips(kind, split)]
        assert list(list_clips(kind, "all")) == both
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / f"{split}.mp4").touch()
    assert [clip.path.name for clip in list_clips(str(tmp_path), "val")] == ["test.mp4"]
    assert [clip.path.name for clip in list_clips(str(tmp_path), "all")] == [
        "train.mp4",
        "test.mp4",
    ]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"palette": {"level": "medium"}},
            "palette.level='medium' is unknown; allowed: easy, hard",
        ),
        ({"palette": {}, "color": {}}, "distraction.color and distraction.palette change the same"),
        ({"palette": {}, "background": {}}, "background and distraction.palette change the same"),
        ({"background": {"playback": "back"}}, "playback='back' is unknown; allowed: pingpong"),
        ({"background": {"replaces": "agent"}}, "replaces='agent' is unknown; allowed: scenery"),
        (
            {"background": {"replaces": "sky", "ground_alpha": 0.5}},
            "ground_alpha=0.5 must be null with background.replaces=sky",
        ),
    ],
)
def test_bad_settings_are_named(value, message):
    with pytest.raises(ValueError, match=message):
        parse_distraction(value)


def test_a_grid_has_no_colours_of_both_splits():
    with pytest.raises(ValueError, match="'all': must be one of train, val for scenery that react"):
        validate_distraction("reactive_time", None, "all")

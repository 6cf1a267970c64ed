"""Replaced scenery: what a mask marks stays to the bit, everything else shows a clip."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.counting_env import CountingEnv
from helpers.runs import tiny_run
from helpers.short_runs import crash, differences, run
from hydra import compose, initialize_config_module
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import TransformedEnv

from w2f_torchrl.config import ConfigError
from w2f_torchrl.learner.non_finite_guard import FINITE
from w2f_torchrl.segmenters import recoloring
from w2f_torchrl.trainers import Trainer
from w2f_torchrl.transforms import ReplacedSceneryTransform

B, T, SIZE = 6, 7, 8
LEVELS_PER_CLIP = 10
"""Colour levels between clips: frame l of clip c has the colour 10 c + l + 1 everywhere."""


def clips(count: int = 3, length: int = 4) -> list[np.ndarray]:
    levels = np.arange(length, dtype=np.uint8)[:, None, None, None]
    ones = np.ones((1, SIZE, SIZE, 3), np.uint8)
    return [ones * (LEVELS_PER_CLIP * clip + levels + 1) for clip in range(count)]


def sample(*shape: int) -> TensorDict:
    """Frames of the colour 200, each with another mask."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(*shape, 1, SIZE, SIZE, generator=generator) < 0.3
    pixels = torch.full((*shape, 3, SIZE, SIZE), 200, dtype=torch.uint8)
    return TensorDict({"next": {"pixels": pixels, "foreground_mask": mask}}, shape)


def levels_behind(data: TensorDict) -> torch.Tensor:
    """Return the one colour behind the foreground of each frame."""
    pixels, mask = data["next", "pixels"], data["next", "foreground_mask"].expand(-1, -1, 3, -1, -1)
    levels = torch.where(mask, 0, pixels).flatten(2).amax(-1)
    assert torch.equal(pixels, torch.where(mask, 200, levels[..., None, None, None]))
    return levels


def test_the_foreground_stays_and_the_rest_plays_one_clip():
    data = sample(B, T)
    before = data.clone()
    levels = levels_behind(ReplacedSceneryTransform(clips(), 1.0, colors=False)(data)).int() - 1
    clip, frame = levels // LEVELS_PER_CLIP, levels % LEVELS_PER_CLIP
    assert (clip == clip[:, :1]).all()  # one clip in a sequence
    assert len(clip[:, 0].unique()) > 1
    # A clip of 4 frames plays 0 1 2 3 2 1 0 1 ...: neighbours in each step, turning at the ends.
    assert ((frame[:, 1:] - frame[:, :-1]).abs() == 1).all()
    turns = torch.tensor([0, 1, 2, 3, 2, 1])
    for row in frame:
        starts = [torch.equal(row, turns[(s + torch.arange(T)) % 6].int()) for s in range(6)]
        assert any(starts)
    same = before["next", "foreground_mask"]
    assert torch.equal(data["next", "foreground_mask"], same)


def test_every_start_and_direction_occurs():
    transform = ReplacedSceneryTransform(clips(1), 1.0, colors=False)
    levels = levels_behind(transform(sample(300, 2)))
    pairs, counts = levels.unique(dim=0, return_counts=True)
    assert len(pairs) == 6
    assert counts.min() > 25  # 50 on average, with a standard deviation of 6.5


def test_the_share_is_that_of_whole_sequences():
    transform = ReplacedSceneryTransform(clips(), 0.3, colors=False)
    replaced = levels_behind(transform(sample(2000, 2))) != 200
    assert (replaced[:, 0] == replaced[:, 1]).all()
    assert abs(replaced[:, 0].float().mean() - 0.3) < 0.04  # four standard deviations
    assert (levels_behind(ReplacedSceneryTransform(clips(), 0.0)(sample(50, 2))) == 200).all()


def test_colours_change_as_the_formula_says():
    frames = torch.randint(256, (2, 3, 3, 4, 4), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(3)
    matrices = torch.stack([recoloring.draw_recoloring(generator) for _ in range(2)])
    changed = recoloring.recolored(frames, matrices)
    for n in range(2):
        for pixel, new in zip(
            frames[n].movedim(1, -1).reshape(-1, 3).double(),
            changed[n].movedim(1, -1).reshape(-1, 3),
            strict=True,
        ):
            expected = matrices[n, :, :3].double() @ pixel + matrices[n, :, 3].double()
            assert (expected.clamp(0, 255) - new).abs().max() <= 0.501


def test_drawn_colours_stay_in_their_ranges():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        matrix = recoloring.draw_recoloring(generator).double()
        gain = matrix[:, :3].sum() / 3  # grey stays grey, times the gain
        assert torch.allclose(matrix[:, :3].sum(1), gain.expand(3), atol=1e-5)
        assert recoloring.GAIN[0] <= gain <= recoloring.GAIN[1]
        offset = matrix[:, 3] - 128 * (1 - gain)
        assert offset.abs().max() <= recoloring.OFFSET + 1e-4


def test_with_colours_too_only_the_scenery_changes():
    data = sample(B, T)
    before = data.clone()
    pixels = ReplacedSceneryTransform(clips(), 1.0)(data)["next", "pixels"]
    mask = data["next", "foreground_mask"].expand_as(pixels)
    assert torch.equal(pixels[mask], before["next", "pixels"][mask])
    assert (pixels[~mask] != 200).float().mean() > 0.9


def test_draws_follow_the_seed_and_the_state_dict():
    transform = ReplacedSceneryTransform(clips(), 0.5, seed=5)
    first = transform(sample(B, T))["next", "pixels"]
    state = transform.state_dict()
    second = transform(sample(B, T))["next", "pixels"]
    assert not torch.equal(first, second)
    other = ReplacedSceneryTransform(clips(), 0.5)
    other.load_state_dict(state)
    assert torch.equal(other(sample(B, T))["next", "pixels"], second)
    other.seed(5)
    assert torch.equal(other(sample(B, T))["next", "pixels"], first)


def test_further_pictures_get_the_same_clip_by_their_own_masks():
    data = sample(B, T)
    wrist = sample(B, T)["next"]
    data["next", "pixels_wrist"] = wrist["pixels"] // 2
    data["next", "pixels_wrist_mask"] = ~wrist["foreground_mask"]
    keys = [("next", "pixels"), ("next", "pixels_wrist")]
    transform = ReplacedSceneryTransform(clips(), 1.0, keys, colors=False)
    transform(data)
    mask = data["next", "foreground_mask"].expand(-1, -1, 3, -1, -1)
    levels = levels_behind(data)[..., None, None, None]
    expected = torch.where(mask, levels, 100)
    assert torch.equal(data["next", "pixels_wrist"], expected)


def test_a_replay_buffer_samples_it_and_keeps_what_was_stored():
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(20), batch_size=50)
    buffer.append_transform(ReplacedSceneryTransform(clips(), 0.5, ["pixels"], colors=False))
    buffer.extend(sample(20)["next"])
    seen = buffer.sample()["pixels"]  # every frame is a sequence of one
    assert 0.3 < (seen.flatten(1).amin(-1) < 200).float().mean() < 0.7
    assert (buffer.storage[:]["pixels"] == 200).all()


def test_a_replay_buffer_of_whole_sequences_plays_a_clip_in_each():
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(20), batch_size=8)
    buffer.append_transform(ReplacedSceneryTransform(clips(), 1.0, colors=False))
    data = sample(20, T)["next"]
    buffer.extend(TensorDict({"next": TensorDict(dict(data.items()), [20])}, [20]))
    levels = levels_behind(buffer.sample()).int() - 1
    assert ((levels[:, 1:] - levels[:, :-1]).abs() == 1).all()


def test_what_it_cannot_do_is_an_error():
    with pytest.raises(ValueError, match=r"share=1\.5 must be in \[0, 1\]"):
        ReplacedSceneryTransform(clips(), 1.5)
    with pytest.raises(ValueError, match="at least one clip"):
        ReplacedSceneryTransform([])
    with pytest.raises(ValueError, match="of one size, with L at least 2"):
        ReplacedSceneryTransform([*clips(), clips()[0][:1]])
    with pytest.raises(ValueError, match="one mask for each image"):
        ReplacedSceneryTransform(clips(), mask_keys=[])
    data = sample(B, T)
    del data["next", "foreground_mask"]
    with pytest.raises(KeyError, match="reads the mask"):
        ReplacedSceneryTransform(clips(), 1.0)(data)
    env = TransformedEnv(CountingEnv(0), ReplacedSceneryTransform(clips(), 1.0, ["pixels"]))
    with pytest.raises(RuntimeError, match="append it to a replay buffer"):
        env.reset()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"augmentation": {"scenery": -0.1}}, r"augmentation\.scenery=-0\.1 must be in \[0, 1\]"),
        ({"augmentation": {"source": "davis"}}, r"augmentation\.source=davis has no effect"),
        ({"augmentation": {"colors": False}}, r"augmentation\.colors=False has no effect"),
        ({"augmentation": {"scenery": 0.5, "source": "/x"}}, r"augmentation\.source=/x: .*folder"),
        (
            {"augmentation": {"scenery": 0.5}, "algo": {"name": "dreamer_v3", "latent": None}},
            r"must be 0 with algo=dreamer_v3, which has no masks in training",
        ),
        (
            {"augmentation": {"scenery": 0.5}, "algo": {"name": "masked_input", "latent": None}},
            r"must be 0 with algo=masked_input, .*sees only what they mark",
        ),
    ],
)
def test_settings_without_a_meaning_are_refused(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        tiny_run(tmp_path, **settings).validated()


@pytest.mark.render
@pytest.mark.usefixtures("no_curves")
def test_a_run_learns_from_it_and_resumes_exactly(tmp_path):
    settings = {"augmentation": {"scenery": 0.5}, "evaluation": {"every_frames": 0}}
    run(tmp_path / "whole", **settings)
    crash(tmp_path / "crashed", 23, **settings)
    run(tmp_path / "crashed", **settings)
    assert differences(tmp_path / "whole", tmp_path / "crashed") == []
    plain = settings | {"augmentation": {}}
    run(tmp_path / "plain", **plain)
    assert differences(tmp_path / "whole", tmp_path / "plain")


@pytest.mark.render
def test_an_update_sees_the_sample_with_replaced_scenery(tmp_path):
    trainer = Trainer(tiny_run(tmp_path, augmentation={"scenery": 1.0}))
    updates = trainer._updates
    updates.replaced_scenery = black = _Black(updates.replaced_scenery)
    seen = []
    trainer.learner.update = lambda sample: seen.append(sample) or {}
    trainer.start()
    try:
        while len(trainer.replay) < 200:
            trainer._collect()
        updates._learn()
    finally:
        trainer._close(report=False)
    assert black.calls == 1
    pixels, mask = seen[0]["next", "pixels"], seen[0]["next", "foreground_mask"]
    assert (pixels[~mask.expand_as(pixels)] == 0).all()
    assert pixels[mask.expand_as(pixels)].any()


@pytest.mark.render
def test_a_clip_that_cannot_be_read_leaves_no_run_behind(tmp_path):
    for number in range(8):
        folder = tmp_path / "clips" / f"clip{number}"
        folder.mkdir(parents=True)
        (folder / "0.png").write_bytes(b"no picture")
    settings = {"scenery": 0.5, "source": str(tmp_path / "clips")}
    with pytest.raises(ConfigError, match=r"augmentation\.source=.*clips"):
        Trainer(tiny_run(tmp_path / "run", augmentation=settings))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.render
def test_the_program_replaces_scenery_as_the_trainer_does(tmp_path, monkeypatch):
    import sota_configs.world2filter as program

    built = []

    def train(trainer: Trainer) -> None:
        built.append(trainer._updates.replaced_scenery)
        trainer._close(report=False)

    monkeypatch.setattr(Trainer, "train", train)
    asked = ["experiment=smoke", "augmentation.scenery=0.25", f"run_dir={tmp_path}"]
    with initialize_config_module("sota_configs", version_base="1.3"):
        program.train(compose("config", asked))
    assert built[0].share == 0.25


@pytest.mark.render
@pytest.mark.parametrize(
    ("latent", "forgotten"),
    [
        ("split", {"background_belief", "background_state"}),
        ("shared", {"belief", "state"}),
        ("foreground", set()),
    ],
)
def test_latents_of_other_scenery_are_neither_read_nor_stored(tmp_path, latent, forgotten):
    algo = {"name": "world2filter", "latent": latent}
    trainer = Trainer(tiny_run(tmp_path, algo=algo, augmentation={"scenery": 0.5}))
    updates, seen, stored, rows = trainer._updates, [], [], []
    draw = updates.replaced_scenery.draw

    def draw_and_tell(*shape: int) -> TensorDict:
        drawn = draw(*shape)
        rows.append(drawn["row"].tolist())
        return drawn

    def learn(sample: TensorDict) -> TensorDict:
        seen.append(sample["initial"].clone())
        trainer.learner.latents = sample["initial"].apply(torch.ones_like)
        return TensorDict({FINITE: torch.ones(())})

    updates.replaced_scenery.draw = draw_and_tell
    trainer.learner.update = learn
    trainer.start()
    trainer.replay.write_back = lambda slots, latents, applied: stored.append(latents.clone())
    try:
        while len(trainer.replay) < 200:
            trainer._collect()
        slots = torch.arange(trainer.replay.latents.num_rows)
        ones = {
            name: torch.ones(len(slots), *field.shape, dtype=field.torch_dtype)
            for name, field in trainer.replay.latents.fields.items()
        }
        trainer.replay.latents.write(slots, ones)
        for _ in range(4):
            updates._learn()
    finally:
        trainer._close(report=False)
    assert any(rows)
    assert any(len(each) < len(seen[0]) for each in rows)
    for replaced, *latents in zip(rows, seen, stored, strict=True):
        for found in latents:
            assert forgotten <= set(found.keys())
            for name, value in found.items():
                for row, values in enumerate(value):
                    assert values.all() == (name not in forgotten or row not in replaced), name
                    assert not (name in forgotten and row in replaced and values.any())


class _Black(ReplacedSceneryTransform):
    """Shows black clips, and counts its calls."""

    def __init__(self, real: ReplacedSceneryTransform) -> None:
        size = real.clips[0].shape[1]
        super().__init__(
            [np.zeros((2, size, size, 3), np.uint8)], real.share, real.in_keys, colors=False
        )
        self.calls = 0

    def compose(self, tensordict, drawn):
        self.calls += 1
        return super().compose(tensordict, drawn)

"""Masks made ahead, and the examples: the mask store, preprocess_masks.py and examples/."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import relabel_replay
import torch
from helpers.extras import needs_sam3
from helpers.segmenters import BrightSegmenter, bright, random_pixels
from matplotlib.image import imread
from tensordict import TensorDict
from torchrl.data import LazyMemmapStorage, TensorDictReplayBuffer

from sota_configs import preprocess_masks
from w2f_torchrl.data import MaskStore, load_masks
from w2f_torchrl.logging.pictures.contact_sheet import draw_contact_sheet, overlay
from w2f_torchrl.segmenters import StudentSegmenter


@pytest.fixture
def frames(tmp_path) -> tuple[Path, torch.Tensor]:
    pixels = random_pixels(10, size=16)
    path = tmp_path / "frames.npz"
    np.savez(path, pixels=pixels.numpy())
    return path, pixels


# ------------------------------------------------------------------ the store


def test_the_store_gives_back_what_was_written_and_resumes(tmp_path):
    masks = bright(random_pixels(7, size=16))
    store = MaskStore(tmp_path / "masks", (7, 16, 16), {"segmenter": "a", "prompts": ["x"]})
    store.append(masks[:3])
    again = MaskStore(tmp_path / "masks", (7, 16, 16), {"segmenter": "a", "prompts": ["x"]})
    assert again.done == 3
    again.append(masks[3:])
    read, record = load_masks(tmp_path / "masks")
    assert torch.equal(read, masks)
    assert record["made_by"]["prompts"] == ["x"]
    assert (tmp_path / "masks" / "masks.npy").stat().st_size < 7 * 16 * 2 + 200  # a bit a pixel


def test_the_store_refuses_other_masks(tmp_path):
    MaskStore(tmp_path, (7, 16, 16), {"prompts": ["x"]})
    with pytest.raises(ValueError, match=r"made_by=.*'y'"):
        MaskStore(tmp_path, (7, 16, 16), {"prompts": ["y"]})
    with pytest.raises(ValueError, match="frames=7, not 8"):
        MaskStore(tmp_path, (8, 16, 16), {"prompts": ["x"]})
    with pytest.raises(ValueError, match="width 12"):
        MaskStore(tmp_path / "b", (7, 16, 12), {})


def test_the_contact_sheet_shows_each_frame_above_its_overlay(tmp_path):
    pixels = random_pixels(5, size=16)
    masks = bright(pixels)
    sheet = imread(draw_contact_sheet(pixels, masks, tmp_path / "s.png", columns=3))
    assert sheet.shape[:2] == (2 * 32, 3 * 16)
    shown = torch.from_numpy((sheet[..., :3] * 255).round().astype(np.uint8)).permute(2, 0, 1)
    assert torch.equal(shown[:, 32:48, 16:32], pixels[4])
    assert torch.equal(shown[:, 48:64, 16:32], overlay(pixels[4], masks[4]))
    assert torch.equal(
        overlay(pixels, masks)[masks.expand_as(pixels)], pixels[masks.expand_as(pixels)]
    )


# ------------------------------------------------------------------ the script


def test_preprocessing_is_resumed_where_it_stopped(tmp_path, frames, monkeypatch):
    path, pixels = frames
    student = StudentSegmenter().save(tmp_path / "student.pt")
    command = ["--frames", str(path), "--out", str(tmp_path / "out"), "--segmenter", "student"]
    command += ["--checkpoint", str(student), "--batch-size", "4"]

    class Failing(BrightSegmenter):
        def __call__(self, frames):
            if sum(self.calls) >= 4:
                raise KeyboardInterrupt
            return super().__call__(frames)

    monkeypatch.setattr(preprocess_masks, "make_segmenter", lambda *_: Failing())
    with pytest.raises(KeyboardInterrupt):
        preprocess_masks.main(command)
    assert json.loads((tmp_path / "out" / "masks.json").read_text())["done"] == 4
    counting = BrightSegmenter()
    monkeypatch.setattr(preprocess_masks, "make_segmenter", lambda *_: counting)
    preprocess_masks.main(command)
    assert counting.calls == [4, 2]  # the first four were done
    masks, record = load_masks(tmp_path / "out")
    assert torch.equal(masks, bright(pixels))
    assert record["made_by"]["segmenter"] == "student"
    assert len(record["made_by"]["checkpoint_sha256"]) == 64
    assert "torch" in record["made_by"]["versions"]
    assert imread(tmp_path / "out" / "contact_sheet.png").shape[:2] == (2 * 32, 8 * 16)


def test_preprocessing_a_stored_tensordict_with_the_median(tmp_path):
    background = random_pixels(1, size=16, seed=3)
    pixels = background.repeat(9, 1, 1, 1)
    for index in range(9):
        pixels[index, :, index : index + 3, 4:9] = 255 - background[0, :, index : index + 3, 4:9]
    TensorDict({"next": {"pixels": pixels.view(3, 3, 3, 16, 16)}}, [3, 3]).memmap(tmp_path / "td")
    command = ["--frames", str(tmp_path / "td"), "--key", "next.pixels", "--segmenter", "median"]
    preprocess_masks.main([*command, "--out", str(tmp_path / "out")])
    masks, _ = load_masks(tmp_path / "out")
    outside = masks.clone()
    for index in range(9):
        outside[index, :, index : index + 3, 4:9] = False
    assert masks.any((1, 2, 3)).all()
    assert not outside.any()
    with pytest.raises(SystemExit, match=r"--key image .*allowed: next.pixels"):
        preprocess_masks.main([*command[:2], "--key", "image", "--out", str(tmp_path / "other")])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--checkpoint", "nowhere.pt"], "--checkpoint nowhere.pt is no file"),
        (["--segmenter", "student"], "--segmenter student needs --checkpoint"),
        (["--frames", "nowhere"], "neither an .npz file nor a stored tensordict"),
    ],
)
def test_preprocessing_errors_name_the_option(tmp_path, frames, arguments, match):
    command = ["--frames", str(frames[0]), "--out", str(tmp_path / "out"), *arguments]
    with pytest.raises(SystemExit, match=match):
        preprocess_masks.main(command)
    assert not (tmp_path / "out").exists()


@needs_sam3
def test_preprocessing_with_sam3_records_prompts_and_versions(tmp_path, frames):
    from w2f_torchrl.segmenters.sam3 import save_tiny_sam3

    tiny = save_tiny_sam3(tmp_path / "tiny.pt")
    command = [
        "--frames",
        str(frames[0]),
        "--out",
        str(tmp_path / "out"),
        "--checkpoint",
        str(tiny),
    ]
    preprocess_masks.main([*command, "--prompts", "robot", "leg", "--device", "cpu"])
    masks, record = load_masks(tmp_path / "out")
    assert masks.shape == (10, 1, 16, 16)
    assert record["made_by"]["prompts"] == ["robot", "leg"]
    assert record["made_by"]["versions"]["sam3"]
    with pytest.raises(SystemExit, match="made_by"):
        preprocess_masks.main([*command, "--prompts", "cat", "--device", "cpu"])


# ------------------------------------------------------------------ the examples


def test_a_stored_replay_is_relabelled(tmp_path):
    pixels = random_pixels(21, size=16)
    transitions = TensorDict({"pixels": pixels[:-1], "next": {"pixels": pixels[1:]}}, [20])
    replay = TensorDictReplayBuffer(storage=LazyMemmapStorage(20), batch_size=4)
    replay.extend(transitions)
    replay.dumps(tmp_path / "saved")
    segmenter = BrightSegmenter()
    out = relabel_replay.relabel(
        relabel_replay.stored_transitions(tmp_path / "saved"), segmenter, batch_size=10
    )
    assert segmenter.calls == [11, 11]  # ten transitions share nine frames
    student = StudentSegmenter().save(tmp_path / "student.pt")
    relabel_replay.main(
        f"--replay {tmp_path}/saved --out {tmp_path}/new --student {student}".split()
    )
    again = TensorDictReplayBuffer(storage=LazyMemmapStorage(20), batch_size=4)
    again.loads(tmp_path / "new")
    expected = StudentSegmenter.load(student)(pixels)
    for buffer, masks in ((out, bright(pixels)), (again, expected)):
        stored = buffer.storage[:]
        assert torch.equal(stored["foreground_mask"], masks[:-1])
        assert torch.equal(stored["next", "foreground_mask"], masks[1:])


@pytest.mark.render
@needs_sam3
@pytest.mark.parametrize("blank", [False, True])
def test_the_ppo_example_runs_and_reads_the_mask(tmp_path, blank):
    import ppo_with_sam3

    arguments = [
        "--checkpoint",
        "tiny",
        "--envs",
        "1",
        "--frames",
        "64",
        "--batch",
        "32",
        "--epochs",
        "1",
    ]
    rewards = ppo_with_sam3.main(arguments + ["--blank"] * blank)
    assert len(rewards) == 2
    encoder = ppo_with_sam3.Encoder(3, blank=blank)
    pixels = random_pixels(2, size=64)
    masks = torch.zeros(2, 1, 64, 64, dtype=torch.bool)
    assert not torch.equal(encoder(pixels, masks), encoder(pixels, ~masks))

"""Where a run's masks come from: the choice, the student in a run, and whole runs."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.counting_env import CountingEnv
from helpers.extras import needs_sam3
from helpers.runs import tiny_run
from helpers.segmenters import BrightSegmenter, bright, random_pixels
from omegaconf import OmegaConf
from tensordict import TensorDict
from torchrl.data import Bounded, Composite, Unbounded

from w2f_torchrl.checkpoint import list_checkpoints, load_checkpoint
from w2f_torchrl.config import SegmentationConfig, to_run_config
from w2f_torchrl.config.environment import SEGMENTATIONS
from w2f_torchrl.envs import make_env, register_env
from w2f_torchrl.envs import tasks as tasks_module
from w2f_torchrl.keys import NEXT_MASK
from w2f_torchrl.logging.metrics import read_metrics
from w2f_torchrl.masks import choose as segmentation_module
from w2f_torchrl.masks.choose import build_mask_source, choose_source
from w2f_torchrl.masks.labels import load_labels
from w2f_torchrl.masks.prepare import collect_frames
from w2f_torchrl.masks.sources import MaskSource, SegmentedSource, TaughtSource
from w2f_torchrl.segmenters import StudentSegmenter, mask_iou
from w2f_torchrl.trainers import ConfigError, Trainer

QUIET = {"every_frames": 0}
SMALL_STUDENT = {"teacher_frames": 12, "train_steps": 3, "teacher_every": 10}


def make_records(count: int, seed: int = 0, *, masks: bool = True) -> TensorDict:
    pixels = random_pixels(count, size=16, seed=seed)
    following = {"pixels": pixels} | ({"foreground_mask": bright(pixels)} if masks else {})
    return TensorDict({"stream": torch.zeros(count, dtype=torch.int64), "next": following}, [count])


# ------------------------------------------------------------------ sources


def test_a_source_segments_each_record_once_and_compares():
    segmenter = BrightSegmenter()
    source = SegmentedSource("sam3", segmenter)
    records = make_records(6)
    records[NEXT_MASK][:3].logical_not_()  # the simulator says otherwise on half of them
    labelled = source.label(records)
    assert torch.equal(labelled[NEXT_MASK], bright(records["next", "pixels"]))
    assert segmenter.calls == [6]
    metrics = source.metrics()
    assert metrics["segmentation/iou"] == pytest.approx(0.5)
    assert metrics["segmentation/frames"] == 6
    assert metrics["segmentation/source_sam3"] == 1
    assert metrics["segmentation/milliseconds"] > 0
    source.label(make_records(4, masks=False))
    assert "segmentation/iou" not in source.metrics()  # nothing to compare with
    assert source.metrics()["segmentation/frames"] == 10


def test_lost_masks_are_the_share_asked_for_and_depend_on_the_frames_number_only():
    def labelled(parts: list[int], seed: int = 7) -> tuple[MaskSource, TensorDict]:
        source, records = MaskSource("simulator", mask_dropout=0.4, seed=seed), make_records(400)
        return source, torch.cat([source.label(part) for part in records.split(parts)])

    records = make_records(400)
    source, whole = labelled([400])
    before = records[NEXT_MASK].clone()
    lost = ~whole[NEXT_MASK].flatten(1).any(1)
    assert records[NEXT_MASK].flatten(1).any(1).all()
    assert 0.3 < lost.float().mean() < 0.5
    assert torch.equal(whole[NEXT_MASK][~lost], records[NEXT_MASK][~lost])
    assert source.metrics()["segmentation/iou"] == pytest.approx(1 - float(lost.float().mean()))
    _, in_parts = labelled([7, 130, 1, 262])  # as a run that stops between them has it
    assert torch.equal(in_parts[NEXT_MASK], whole[NEXT_MASK])
    assert not torch.equal(labelled([400], seed=8)[1][NEXT_MASK], whole[NEXT_MASK])
    MaskSource("simulator", mask_dropout=0.9).label(records)
    assert torch.equal(records[NEXT_MASK], before)  # the caller's stay as they are
    assert source.segment(records) is records  # an evaluation's too


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (
            {"segmentation": {"mask_dropout": 1.0}},
            r"segmentation.mask_dropout=1.0 must be in \[0, 1\)",
        ),
        ({"segmentation": {"mask_dropout": 0.1, "source": "median"}}, "with segmentation=median"),
        (
            {"segmentation": {"mask_dropout": 0.1}, "algo": {"name": "dreamer_v3", "latent": None}},
            "algo=dreamer_v3",
        ),
    ],
)
def test_masks_are_lost_of_the_simulators_only(tmp_path, settings, match):
    config = tiny_run(tmp_path / "run", **settings)
    with pytest.raises(ConfigError, match=match):
        Trainer(config)


def test_the_former_name_of_mask_dropout_is_accepted_with_a_warning():
    with pytest.warns(FutureWarning, match=r"use segmentation\.mask_dropout=0\.4"):
        config = to_run_config({"segmentation": {"lost": 0.4}})
    assert (config.segmentation.mask_dropout, config.segmentation.lost) == (0.4, None)
    with warnings.catch_warnings(action="error"):  # every older config.yaml has lost: 0.0
        config = to_run_config({"segmentation": {"lost": 0.0}})
    assert (config.segmentation.mask_dropout, config.segmentation.lost) == (0.0, None)
    with pytest.warns(FutureWarning):
        config = to_run_config({"segmentation": {"lost": 0.4, "mask_dropout": 0.2}})
    with pytest.raises(ConfigError, match="set only the latter"):
        config.validate()


def test_older_checkpoints_count_the_teachers_frames_by_another_name():
    source = TaughtSource(StudentSegmenter(), teacher=None, every=4, refit_steps=1)
    source.label(make_records(8))
    state = source.state_dict()
    state["taught"] = state.pop("labelled_by_teacher")
    other = TaughtSource(StudentSegmenter(), teacher=None, every=4, refit_steps=1)
    other.load_state_dict(state)
    assert other.labelled_by_teacher == source.labelled_by_teacher == 2


def test_the_teacher_labels_every_kth_frame_of_the_run():
    teacher, student = BrightSegmenter(), StudentSegmenter()
    source = TaughtSource(student, teacher=teacher, every=4, refit_steps=1)
    for seed, count in enumerate((3, 6, 1, 10)):  # frames 0..19: 0, 4, 8, 12, 16 are asked
        records = make_records(count, seed, masks=False)
        labelled = source.label(records)
        assert torch.equal(labelled[NEXT_MASK], student(records["next", "pixels"]))
    assert sum(teacher.calls) == source.labelled_by_teacher == 5
    metrics = source.metrics()
    assert metrics["segmentation/teacher_share"] == pytest.approx(5 / 20)
    assert 0 <= metrics["segmentation/agreement"] <= 1
    assert {"segmentation/milliseconds", "segmentation/teacher_milliseconds"} <= metrics.keys()
    pixels, masks = source.pool
    assert torch.equal(masks, bright(pixels))
    first = make_records(3, 0)["next", "pixels"][0]
    assert torch.equal(pixels[0], first)


def test_a_student_learns_from_its_teacher_during_the_run():
    """The simulator teaches; after enough frames the student agrees with it more."""
    torch.manual_seed(0)  # the student's first weights
    student = StudentSegmenter()
    source = TaughtSource(student, teacher=None, every=1, refit_steps=60, capacity=150)
    before = source.label(make_records(100))
    agreement = source.metrics()["segmentation/agreement"]
    assert source.label(make_records(100, 1)) is not before  # 200 frames: it learns now
    source.metrics()
    source.label(make_records(100, 2))
    assert source.metrics()["segmentation/agreement"] > agreement + 0.1
    assert len(source.pool[0]) == 150
    assert torch.equal(source.pool[1], bright(source.pool[0]))


# ------------------------------------------------------------------ the choice


@pytest.mark.parametrize(
    ("sam3_there", "env_has_mask", "settings", "choice"),
    [
        (True, True, {}, "sam3"),
        (False, True, {}, "simulator"),
        (False, False, {"labels": "frames.npz"}, "student"),
        (False, False, {"student_checkpoint": "student.pt"}, "student"),
        (False, False, {}, "median"),
    ],
)
def test_auto_takes_the_best_there_is_and_says_so(
    monkeypatch, caplog, tmp_path, sam3_there, env_has_mask, settings, choice
):
    monkeypatch.setattr(
        segmentation_module, "missing_requirement", lambda *_: None if sam3_there else "no weights"
    )
    config = tiny_run(tmp_path, segmentation={"source": "auto"} | settings).segmentation
    with caplog.at_level(logging.INFO):
        assert choose_source(config, env_has_mask) == choice
    assert f"segmentation=auto uses {choice}" in caplog.text
    assert ("no weights" in caplog.text) == (not sam3_there)
    # A resumed run keeps its choice.
    assert choose_source(config, env_has_mask, before="median") == "median"


@pytest.mark.parametrize("settings", [{}, {"source": "student"}])
def test_an_env_without_masks_is_refused_as_their_source(tmp_path, settings):
    config = tiny_run(tmp_path, segmentation=settings).segmentation
    with pytest.raises(ConfigError, match="cartpole has no foreground_mask"):
        choose_source(config, env_has_mask=False, needed_by="cartpole")
    assert choose_source(config, env_has_mask=False) == config.source  # DreamerV3
    median = SegmentationConfig(source="median")
    assert choose_source(median, env_has_mask=False, needed_by="cartpole") == "median"


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"source": "guess"}, "segmentation='guess'.*simulator, sam3, student, median, auto"),
        ({"source": "student", "teacher": "me"}, "segmentation.teacher='me'.*simulator, sam3"),
        ({"teacher_frames": 0}, "segmentation.teacher_frames=0 must be at least 1"),
        ({"teacher_every": -1}, "segmentation.teacher_every=-1 must be at least 0"),
        ({"train_steps": 0}, "segmentation.train_steps=0"),
        ({"batch_size": 0}, "segmentation.batch_size=0"),
        ({"score_threshold": 2.0}, r"segmentation.score_threshold=2.0 must be in \[0, 1\]"),
        ({"threshold": 255}, r"segmentation.threshold=255 must be in \[0, 254\]"),
        ({"prompts": []}, r"segmentation.prompts=\[\]"),
        ({"labels": "nowhere.npz"}, "segmentation.labels=nowhere.npz is not a file"),
        ({"source": "student", "backgrounds": "nowhere.npz"}, "nowhere.npz must be an .npz file"),
        ({"source": "student", "backgrounds": "nowhere"}, "backgrounds=nowhere: .*no such folder"),
        ({"student_checkpoint": "nowhere.pt"}, "student_checkpoint=nowhere.pt is not a file"),
        ({"source": "sam3", "checkpoint": "nowhere.pt"}, r"segmentation=sam3: (SAM3|There)"),
        (
            {"source": "student", "teacher": "sam3", "checkpoint": "nowhere.pt"},
            "segmentation=student: SAM3",
        ),
    ],
)
def test_bad_settings_are_named_before_anything_is_built(tmp_path, settings, match):
    config = tiny_run(tmp_path / "run", segmentation=settings)
    with pytest.raises(ConfigError, match=match):
        Trainer(config)
    assert not (tmp_path / "run").exists()


def test_masks_for_dreamer_are_refused(tmp_path):
    algo = {"name": "dreamer_v3", "latent": None}
    config = tiny_run(tmp_path / "run", algo=algo, segmentation={"source": "median"})
    with pytest.raises(ConfigError, match="segmentation='median' has no effect"):
        Trainer(config)


def test_labels_are_checked(tmp_path):
    pixels = random_pixels(3, size=16)
    good = {"pixels": pixels.numpy(), "masks": bright(pixels).numpy()}
    np.savez(tmp_path / "good.npz", **good)
    assert torch.equal(load_labels(tmp_path / "good.npz")[1], bright(pixels))
    for name, change, match in (
        ("missing", {"masks": None}, "masks"),
        ("dtype", {"masks": good["masks"].astype(np.float32)}, "bool"),
        ("shape", {"masks": good["masks"][:2]}, r"\(3, 1, 16, 16\)"),
        ("float", {"pixels": good["pixels"] / 255}, "uint8"),
        ("none", {"pixels": good["pixels"][:0], "masks": good["masks"][:0]}, "no images"),
    ):
        arrays = {k: v for k, v in (good | change).items() if v is not None}
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(ConfigError, match=match):
            load_labels(tmp_path / f"{name}.npz")
    (tmp_path / "text.npz").write_text("nothing")
    with pytest.raises(ConfigError, match=r"text.npz must be an .npz file"):
        load_labels(tmp_path / "text.npz")


def test_a_student_that_is_none_is_refused(tmp_path):
    torch.save({"a": 1}, tmp_path / "other.pt")
    settings = SegmentationConfig(source="student", student_checkpoint=str(tmp_path / "other.pt"))
    with pytest.raises(ConfigError, match="does not hold a student"):
        build_mask_source(
            settings, "student", True, seed=0, device=torch.device("cpu"), image_size=16
        )


@pytest.mark.parametrize("source", SEGMENTATIONS)
def test_hydra_offers_every_source(source):
    group = Path(__file__).parents[1] / "sota_configs" / "segmentation" / f"{source}.yaml"
    config = to_run_config({"segmentation": OmegaConf.load(group)})
    assert config.segmentation.source == source


# ------------------------------------------------------------------ whole runs


SHORT = {"total_frames": 96}


def run_segmented(run, **segmentation) -> Trainer:
    config = tiny_run(run, evaluation=QUIET, segmentation=segmentation, training=SHORT)
    trainer = Trainer(config)
    trainer.train()
    return trainer


def stored_masks(trainer: Trainer) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures and masks of a replay's samples."""
    samples = torch.cat([trainer.replay.sample() for _ in range(8)])
    following = samples.flatten(0, 1)["next"]
    return following["pixels"], following["foreground_mask"]


@pytest.mark.render
def test_each_frame_is_segmented_once_and_the_replay_holds_the_segmenters_masks(
    tmp_path, monkeypatch
):
    segmenter = BrightSegmenter()
    monkeypatch.setattr(segmentation_module, "_sam3", lambda settings, device: segmenter)
    monkeypatch.setattr("w2f_torchrl.config.validation.missing_requirement", lambda *_, **__: None)
    trainer = run_segmented(tmp_path / "run", source="sam3")
    written = int(trainer.replay.heads.written.sum())
    assert written == trainer.steps + 2  # and the first observation of each of two envs
    assert sum(segmenter.calls) == trainer.masks.frames == written
    assert min(segmenter.calls) >= 16  # a batch of the collector at a time
    pixels, masks = stored_masks(trainer)
    for frame, mask in zip(pixels[:64], masks[:64], strict=True):
        assert torch.equal(bright(frame), mask)
    last = [row for row in read_metrics(tmp_path / "run") if "segmentation/iou" in row][-1]
    assert last["segmentation/source_sam3"] == 1
    assert last["segmentation/frames"] == written


@pytest.mark.render
def test_a_student_in_a_run_is_saved_and_goes_on_with_it(tmp_path):
    run = tmp_path / "run"
    trainer = run_segmented(run, source="student", **SMALL_STUDENT)
    names = {name for row in read_metrics(run) for name in row}
    wanted = {"iou", "agreement", "teacher_share", "milliseconds", "source_student", "frames"}
    assert {f"segmentation/{name}" for name in wanted} <= names
    pixels, masks = stored_masks(trainer)
    student = StudentSegmenter.load(run / "student.pt")
    assert torch.equal(student(pixels), masks)
    settings = {"source": "student"} | SMALL_STUDENT
    again = Trainer(
        tiny_run(
            run,
            evaluation=QUIET,
            resume="auto",
            segmentation=settings,
            training={"total_frames": 128},
        )
    )
    assert again.masks.frames == trainer.masks.frames
    assert torch.equal(again.masks.segmenter(pixels), masks)
    again.train()
    assert again.masks.frames > trainer.masks.frames
    with pytest.raises(ConfigError, match="has masks from student"):
        Trainer(tiny_run(run, resume="auto", segmentation={"source": "median"}))
    # And it serves another run, which needs no teacher then.
    frozen = {
        "source": "student",
        "teacher_every": 0,
        "student_checkpoint": str(run / "student.pt"),
    }
    other = run_segmented(tmp_path / "other", **frozen)
    assert other.masks.labelled_by_teacher == 0
    assert torch.equal(other.masks.segmenter(pixels), student(pixels))


@pytest.mark.render
def test_auto_is_written_down(tmp_path, monkeypatch):
    monkeypatch.setattr(segmentation_module, "missing_requirement", lambda *_: "no SAM3 here")
    run = tmp_path / "run"
    run_segmented(run, source="auto")
    assert "chosen: simulator" in (run / "config.yaml").read_text()
    assert any("segmentation/source_simulator" in row for row in read_metrics(run))
    saved = load_checkpoint(list_checkpoints(run / "checkpoints")[-1]).payload
    assert saved["masks"]["name"] == "simulator"
    # SAM3 appears later: the run keeps its source.
    monkeypatch.setattr(segmentation_module, "missing_requirement", lambda *_: None)
    settings = {"source": "auto"}
    config = tiny_run(run, evaluation=QUIET, resume="auto", segmentation=settings)
    again = Trainer(config)
    assert again.masks.name == "simulator"


class MasklessEnv(CountingEnv):
    """A domain whose simulator has no masks; pictures of 16 x 16."""

    def __init__(self, task, *, seed=0, **settings):
        super().__init__(0, seed)
        self.observation_spec = Composite(
            pixels=Bounded(0, 255, (3, 16, 16), dtype=torch.uint8),
            seed=Unbounded((1,), dtype=torch.int64),
        )

    def _observe(self, action):
        pixels = torch.zeros(3, 16, 16, dtype=torch.uint8)
        pixels[:, self.step_number : self.step_number + 4, 2:9] = 200
        return {"pixels": pixels, "seed": torch.tensor([self.seed_received])}


def test_a_domain_without_masks_trains_on_the_medians(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks_module, "_REGISTRY", {})
    register_env("maskless", MasklessEnv)
    environment = {"domain": "maskless", "task": "any"}
    settings = {"environment": environment, "segmentation": {"source": "median"}}
    trainer = Trainer(tiny_run(tmp_path / "run", **settings))
    trainer.train()
    pixels, masks = stored_masks(trainer)
    assert torch.equal(masks, trainer.masks.segmenter(pixels))
    assert 0 < masks.float().mean() < 0.5
    names = {name for row in read_metrics(tmp_path / "run") for name in row}
    assert "segmentation/iou" not in names  # nothing to compare with
    assert "wm/mask_iou" in names  # the evaluation's masks come from the median too
    with pytest.raises(ConfigError, match="maskless has no foreground_mask"):
        Trainer(tiny_run(tmp_path / "other", environment=environment))


@pytest.mark.render
@needs_sam3
@pytest.mark.parametrize("latent", ["split", "shared"])
def test_a_tiny_sam3_end_to_end(tmp_path, latent):
    from w2f_torchrl.segmenters.sam3 import save_tiny_sam3

    tiny = save_tiny_sam3(tmp_path / "tiny.pt")
    settings = {"source": "sam3", "checkpoint": str(tiny), "score_threshold": 0.15}
    run = tmp_path / "run"
    config = tiny_run(
        run,
        algo={"latent": latent},
        evaluation=QUIET,
        segmentation=settings,
        training=SHORT,
    )
    trainer = Trainer(config)
    trainer.train()
    assert trainer.updates == (48 - 32) * 4 // 16
    pixels, masks = stored_masks(trainer)
    single = torch.cat([trainer.masks.segmenter(frame.unsqueeze(0)) for frame in pixels[:16]])
    assert (single == masks[:16]).float().mean() > 0.999  # but for rounding at the threshold
    assert any("segmentation/source_sam3" in row for row in read_metrics(run))


# ------------------------------------------------------------------ frames before the run


@pytest.mark.render
def test_frames_of_a_random_policy_are_reproducible_and_move():
    def frames(seed):
        return collect_frames(make_env("cartpole", "balance", image_size=16, seed=seed), 10, seed)

    first, again, other = frames(1), frames(1), frames(2)
    assert first["pixels"].shape == (10, 3, 16, 16)
    assert torch.equal(first["pixels"], again["pixels"])
    assert not torch.equal(first["pixels"], other["pixels"])
    assert len(first["pixels"].flatten(1).unique(dim=0)) > 5
    assert mask_iou(first["foreground_mask"], again["foreground_mask"]).min() == 1


def test_the_base_source_leaves_records_as_they_are():
    records = make_records(4)
    source = MaskSource("simulator")
    assert source.label(records) is records
    assert source.metrics() == {"segmentation/frames": 4, "segmentation/source_simulator": 1}

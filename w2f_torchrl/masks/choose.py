"""Choose and build the source of a run's masks."""

from __future__ import annotations

import logging

import torch

from w2f_torchrl.config import ConfigError, SegmentationConfig
from w2f_torchrl.masks.labels import load_backgrounds, load_labels
from w2f_torchrl.masks.sources import MaskSource, SegmentedSource, TaughtSource
from w2f_torchrl.registry import segmenters
from w2f_torchrl.segmenters import (
    MedianSegmenter,
    Sam3Segmenter,
    SegmenterUnavailableError,
    StudentNetwork,
    StudentSegmenter,
)
from w2f_torchrl.segmenters.sam3_requirements import missing_requirement
from w2f_torchrl.utils.seeding import derive_seed

logger = logging.getLogger(__name__)


def choose_source(
    settings: SegmentationConfig,
    env_has_mask: bool,
    *,
    needed_by: str | None = None,
    before: str | None = None,
) -> str:
    """Choose the source of the masks.

    Args:
        settings: Validated settings.
        env_has_mask: Whether the env renders ``foreground_mask`` itself.
        needed_by: Name of the env whose masks training needs; None if it needs none.
        before: The source of a run that is resumed, which ``auto`` keeps.

    Returns:
        ``simulator``, ``sam3``, ``student``, ``median`` or a registered name.

    Raises:
        ConfigError: If the simulator's masks are needed but do not exist.
    """
    source = settings.source
    if source == "auto":
        source = before or _best_source(settings, env_has_mask)
        logger.info("segmentation=auto uses %s", source)
    asks = source == "simulator" or (
        source == "student"
        and settings.teacher == "simulator"
        and settings.student_checkpoint is None
        and settings.labels is None
    )
    if needed_by is not None and asks and not env_has_mask:
        raise ConfigError(
            f"segmentation={settings.source} needs the simulator's masks, but the env "
            f"{needed_by} has no foreground_mask. Allowed: sam3; median; a "
            "registered segmenter; or "
            "student with segmentation.labels, segmentation.student_checkpoint or "
            "segmentation.teacher=sam3."
        )
    return source


def _best_source(settings: SegmentationConfig, env_has_mask: bool) -> str:
    missing = missing_requirement(settings.checkpoint, settings.vocabulary)
    if missing is None:
        return "sam3"
    logger.info("segmentation=auto: no SAM3. %s", missing)
    if env_has_mask:
        return "simulator"
    return "student" if settings.student_checkpoint or settings.labels else "median"


def build_mask_source(
    settings: SegmentationConfig,
    source: str,
    env_has_mask: bool,
    *,
    seed: int,
    device: torch.device,
    image_size: int,
) -> MaskSource:
    """Build the source of a run's masks; :func:`prepare` trains it if necessary.

    Args:
        settings: Validated settings.
        source: The choice of :func:`choose_source`.
        env_has_mask: Whether the env renders ``foreground_mask`` itself.
        seed: The run's seed.
        device: Where a segmenter computes.
        image_size: Height and width of the frames.

    Raises:
        ConfigError: If weights or labels are missing or do not match.
    """
    if source == "simulator":
        lost = derive_seed(seed, "lost masks", 0)
        return MaskSource(source, mask_dropout=settings.mask_dropout, seed=lost)
    if (make := segmenters.get(source)) is not None:
        return SegmentedSource(source, make(settings, device))
    if source == "median":
        return SegmentedSource(source, MedianSegmenter(settings.threshold))
    try:
        if source == "sam3":
            return SegmentedSource(source, _sam3(settings, device))
        if settings.student_checkpoint is not None:
            path = settings.student_checkpoint
            student = StudentSegmenter.load(path, device=device)
        else:
            student = _new_student(seed, device)
        load_backgrounds(settings.backgrounds, image_size)  # raises if invalid
        every = settings.teacher_every
        if settings.teacher == "simulator" and not env_has_mask:
            every = 0  # there are labels or a trained student, but no teacher
        return TaughtSource(
            student,
            teacher=_sam3(settings, device) if settings.teacher == "sam3" else None,
            every=every,
            refit_steps=max(settings.train_steps // 10, 1),
            pool=None if settings.labels is None else load_labels(settings.labels),
            seed=derive_seed(seed, "segmentation", 0),
        )
    except (SegmenterUnavailableError, ValueError) as error:
        raise ConfigError(f"segmentation={source}: {error}") from error


def _new_student(seed: int, device: torch.device) -> StudentSegmenter:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "segmentation", 0))
        return StudentSegmenter(StudentNetwork(), device=device)


def _sam3(settings: SegmentationConfig, device: torch.device) -> Sam3Segmenter:
    return Sam3Segmenter(
        settings.prompts,
        checkpoint=settings.checkpoint,
        resolution=settings.resolution,
        score_threshold=settings.score_threshold,
        batch_size=settings.batch_size,
        device=device,
        compile=settings.compile,
        vocabulary=settings.vocabulary,
    )

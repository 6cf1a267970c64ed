"""Choose and build the source of a run's masks, and train it if it has to learn."""

from __future__ import annotations

import logging
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase

from w2f_torchrl.envs import BackgroundError
from w2f_torchrl.envs.backgrounds import load_clips
from w2f_torchrl.keys import MASK, PIXELS
from w2f_torchrl.segmenters import (
    MedianSegmenter,
    Sam3Segmenter,
    Segmenter,
    SegmenterUnavailableError,
    StudentNetwork,
    StudentSegmenter,
    choose_diverse,
    train_student,
)
from w2f_torchrl.segmenters.sam3_requirements import missing_requirement
from w2f_torchrl.trainers.config import ConfigError, RunConfig, SegmentationConfig
from w2f_torchrl.trainers.mask_source import MaskSource, SegmentedSource, TaughtSource
from w2f_torchrl.utils.seeding import derive_seed

logger = logging.getLogger(__name__)

MEDIAN_FRAMES = 300
REPEAT = 4
"""Agent steps for which a random action is held, so that the agent moves."""
EPISODE = 120
"""Agent steps after which the random policy starts an episode."""
MOST_BYTES = 2**30
"""Maximum size of an array of images in a file, bytes."""

MakeEnv = Callable[[int], EnvBase]
"""Makes one of the run's envs from a seed."""


def choose_source(config: RunConfig, env_has_mask: bool) -> str:
    """Choose the source of the masks.

    Args:
        config: The run's validated settings; ``segmentation.chosen`` holds an earlier choice of
            ``auto``, which is kept.
        env_has_mask: Whether the env renders ``foreground_mask`` itself.

    Returns:
        ``simulator``, ``sam3``, ``student`` or ``median``.

    Raises:
        ConfigError: If the simulator's masks are needed but do not exist.
    """
    settings = config.segmentation
    source = settings.source
    if source == "auto":
        source = settings.chosen or _best_source(settings, env_has_mask)
        logger.info("segmentation=auto uses %s", source)
    asks = source == "simulator" or (
        source == "student"
        and settings.teacher == "simulator"
        and settings.student_checkpoint is None
        and settings.labels is None
    )
    if config.needs_masks and asks and not env_has_mask:
        raise ConfigError(
            f"segmentation={settings.source} needs the simulator's masks, but the env "
            f"{config.environment.domain} has no foreground_mask. Allowed: sam3; median; or "
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


def build_mask_source(config: RunConfig, source: str, env_has_mask: bool) -> MaskSource:
    """Build the source of a run's masks; :func:`prepare` trains it if necessary.

    Args:
        config: The run's validated settings.
        source: The choice of :func:`choose_source`.
        env_has_mask: Whether the env renders ``foreground_mask`` itself.

    Raises:
        ConfigError: If weights or labels are missing or do not match.
    """
    settings = config.segmentation
    if source == "simulator":
        seed = derive_seed(config.seed, "lost masks", 0)
        return MaskSource(source, mask_dropout=settings.mask_dropout, seed=seed)
    if source == "median":
        return SegmentedSource(source, MedianSegmenter(settings.threshold))
    try:
        if source == "sam3":
            return SegmentedSource(source, _sam3(config))
        if settings.student_checkpoint is not None:
            path = settings.student_checkpoint
            student = StudentSegmenter.load(path, device=config.torch_device())
        else:
            student = _new_student(config)
        load_backgrounds(settings.backgrounds, config.environment.image_size)  # raises if invalid
        every = settings.teacher_every
        if settings.teacher == "simulator" and not env_has_mask:
            every = 0  # there are labels or a trained student, but no teacher
        return TaughtSource(
            student,
            teacher=_sam3(config) if settings.teacher == "sam3" else None,
            every=every,
            refit_steps=max(settings.train_steps // 10, 1),
            pool=None if settings.labels is None else load_labels(settings.labels),
            seed=derive_seed(config.seed, "segmentation", 0),
        )
    except (SegmenterUnavailableError, ValueError) as error:
        raise ConfigError(f"segmentation={source}: {error}") from error


def prepare(source: MaskSource, config: RunConfig, make_env: MakeEnv) -> None:
    """Train a source on frames of a random policy, in a separate env, if it has to learn.

    Not for a resumed run, whose source has already been trained.

    Args:
        source: From :func:`build_mask_source`.
        config: The run's settings.
        make_env: Makes the env.
    """
    settings = config.segmentation
    seed = derive_seed(config.seed, "segmentation", 0)
    if source.name == "median":
        assert isinstance(source, SegmentedSource)
        segmenter = source.segmenter
        assert isinstance(segmenter, MedianSegmenter)
        segmenter.fit(collect_frames(make_env(seed), MEDIAN_FRAMES, seed)["pixels"])
        logger.info("segmentation=median: background from %d frames", MEDIAN_FRAMES)
    elif isinstance(source, TaughtSource) and settings.student_checkpoint is None:
        if source.pool is None:
            source.pool = _ask_teacher(source.teacher, make_env(seed), settings, seed)
        pixels, masks = source.pool
        logger.info(
            "segmentation=student: learning from %d frames, %d steps",
            len(pixels),
            settings.train_steps,
        )
        backgrounds = load_backgrounds(settings.backgrounds, pixels.shape[-1])
        train_student(
            pixels,
            masks,
            backgrounds=backgrounds,
            steps=settings.train_steps,
            # Few labels show few positions, so the foregrounds are moved as well.
            moves=0.2 if settings.labels is not None and backgrounds is not None else 0.0,
            seed=seed,
            device=source.student.device,
            student=source.student,
        )


def collect_frames(env: EnvBase, count: int, seed: int, every: int = 2) -> TensorDictBase:
    """Collect frames of a random policy that holds its actions, then close the env.

    Args:
        env: An unbatched env with ``pixels``.
        count: Number of frames.
        seed: Seed of the actions.
        every: Agent steps between frames.

    Returns:
        ``pixels`` uint8 ``[N, 3, H, W]``, and ``foreground_mask`` bool ``[N, 1, H, W]`` if the env
        renders it.
    """
    generator = torch.Generator().manual_seed(seed)
    spec = env.action_spec
    low, high = spec.space.low.cpu(), spec.space.high.cpu()
    data, frames = env.reset(), []
    for step in range(count * every):
        if step % REPEAT == 0:
            action = low + (high - low) * torch.rand(spec.shape, generator=generator)
        data["action"] = action.to(spec.dtype)
        transition, data = env.step_and_maybe_reset(data)
        if step % every == every - 1:
            keys = {PIXELS, MASK} & set(transition["next"].keys())
            frames.append(transition["next"].select(*keys).clone())
        if step % EPISODE == EPISODE - 1:
            data = env.reset()
    env.close()
    stacked: TensorDictBase = torch.stack(frames)
    return stacked


def load_labels(path: str | Path) -> tuple[Tensor, Tensor]:
    """Read labelled frames from an ``.npz`` file.

    Returns:
        ``pixels`` uint8 ``[N, 3, H, W]`` and ``masks`` bool ``[N, 1, H, W]``.

    Raises:
        ConfigError: If an array is missing, or has the wrong dtype or shape.
    """
    arrays = _load_arrays(path, ("pixels", "masks"))
    pixels, masks = arrays["pixels"], arrays["masks"]
    _check_pictures(path, pixels)
    if masks.dtype is not torch.bool or masks.shape != (len(pixels), 1, *pixels.shape[2:]):
        raise ConfigError(
            f"{path}: masks must be bool {(len(pixels), 1, *pixels.shape[2:])}, got {masks.dtype} "
            f"{tuple(masks.shape)}."
        )
    return pixels, masks


def load_pictures(path: str | Path) -> Tensor:
    """Read background images, ``pixels`` uint8 ``[K, 3, H, W]``, from an ``.npz`` file.

    Raises:
        ConfigError: If the array is missing, or has the wrong dtype or shape.
    """
    pixels = _load_arrays(path, ("pixels",))["pixels"]
    _check_pictures(path, pixels)
    return pixels


def load_backgrounds(source: str | None, size: int) -> Tensor | None:
    """Load images to paste foregrounds onto.

    Args:
        source: An ``.npz`` file with ``pixels``, or clips in the form of
            ``environment.background_source``, of which every fourth frame of the training split is
            used; None for none.
        size: Side of the frames, pixels.

    Returns:
        uint8 ``[K, 3, H, W]``, or None.

    Raises:
        ConfigError: If the source does not exist, or cannot be read.
    """
    if source is None:
        return None
    if source.endswith(".npz"):
        return load_pictures(source)
    try:
        clips = load_clips(source, "train", None, size)
    except BackgroundError as error:
        raise ConfigError(f"segmentation.backgrounds={source}: {error}") from error
    frames = torch.cat([torch.from_numpy(clip[::4].copy()) for clip in clips])  # [K, H, W, 3]
    return frames.permute(0, 3, 1, 2)


def _check_pictures(path: str | Path, pixels: Tensor) -> None:
    if pixels.dtype is not torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ConfigError(
            f"{path}: pixels must be uint8 [N, 3, H, W], got {pixels.dtype} {tuple(pixels.shape)}."
        )
    if not len(pixels):
        raise ConfigError(f"{path}: pixels holds no images.")


def _load_arrays(path: str | Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    try:
        _check_size(path, names)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in names}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, BadZipFile) as error:
        raise ConfigError(
            f"{path} must be an .npz file with {' and '.join(names)}: {error}"
        ) from error


def _check_size(path: str | Path, names: tuple[str, ...]) -> None:
    """Check the arrays' headers in an .npz file before they are unpacked.

    Raises:
        ValueError: If an array has no image dtype, or is too large.
        KeyError: If an array is missing.
    """
    form: Any = np.lib.format  # untyped
    with zipfile.ZipFile(path) as archive:
        for name in names:
            with archive.open(f"{name}.npy") as stream:
                if form.read_magic(stream) == (1, 0):
                    shape, _, dtype = form.read_array_header_1_0(stream)
                else:
                    shape, _, dtype = form.read_array_header_2_0(stream)
            size = math.prod(shape) * dtype.itemsize
            if dtype not in (np.uint8, np.bool_) or len(shape) != 4 or size > MOST_BYTES:
                raise ValueError(
                    f"{name} is {dtype} {shape}, {size / 2**20:,.0f} MiB; allowed are uint8 or "
                    f"bool [N, C, H, W] of at most {MOST_BYTES / 2**20:,.0f} MiB"
                )


def _ask_teacher(
    teacher: Segmenter | None, env: EnvBase, settings: SegmentationConfig, seed: int
) -> tuple[Tensor, Tensor]:
    """Label frames of a random policy, chosen for diversity from twice as many."""
    frames = collect_frames(env, 2 * settings.teacher_frames, seed)
    frames = frames[choose_diverse(frames["pixels"], settings.teacher_frames)]
    pixels = frames["pixels"]
    return pixels, frames[MASK] if teacher is None else teacher(pixels)


def _new_student(config: RunConfig) -> StudentSegmenter:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "segmentation", 0))
        return StudentSegmenter(StudentNetwork(), device=config.torch_device())


def _sam3(config: RunConfig) -> Sam3Segmenter:
    settings = config.segmentation
    return Sam3Segmenter(
        settings.prompts,
        checkpoint=settings.checkpoint,
        resolution=settings.resolution,
        score_threshold=settings.score_threshold,
        batch_size=settings.batch_size,
        device=config.torch_device(),
        compile=settings.compile,
        vocabulary=settings.vocabulary,
    )


def check_same_source(saved: dict[str, Any], source: MaskSource) -> None:
    """Refuse to continue with masks from another source than before.

    Raises:
        ConfigError: If the sources differ.
    """
    if saved["name"] != source.name:
        raise ConfigError(
            f"segmentation={source.name}: the resumed run has its masks from {saved['name']}; "
            f"resume it with segmentation={saved['name']}, or start another run."
        )

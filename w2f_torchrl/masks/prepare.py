"""Train sources of masks that have to learn before a run's first step."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase

from w2f_torchrl.config import SegmentationConfig
from w2f_torchrl.envs.actions import random_action
from w2f_torchrl.keys import MASK, PIXELS
from w2f_torchrl.masks.labels import load_backgrounds
from w2f_torchrl.masks.sources import MaskSource, SegmentedSource, TaughtSource
from w2f_torchrl.segmenters import (
    MedianSegmenter,
    Segmenter,
    choose_diverse,
    train_student,
)
from w2f_torchrl.utils.seeding import derive_seed

logger = logging.getLogger(__name__)

MEDIAN_FRAMES = 300
REPEAT = 4
"""Agent steps for which a random action is held, so that the agent moves."""
EPISODE = 120
"""Agent steps after which the random policy starts an episode."""
MakeEnv = Callable[[int], EnvBase]
"""Makes one of the run's envs from a seed."""
Frames = Callable[[int, int], TensorDictBase]
"""Returns so many frames, chosen by a seed, as :func:`collect_frames` does."""


def random_frames(make_env: MakeEnv) -> Frames:
    """Return what collects frames of a random policy in a separate env."""
    return lambda count, seed: collect_frames(make_env(seed), count, seed)


def prepare(source: MaskSource, settings: SegmentationConfig, frames: Frames, *, seed: int) -> None:
    """Train a source on frames, if it has to learn.

    Not for a resumed run, whose source has already been trained.

    Args:
        source: From :func:`build_mask_source`.
        settings: How it learns.
        frames: Returns frames of the run: :func:`random_frames`, or those of recorded data.
        seed: The run's seed.
    """
    seed = derive_seed(seed, "segmentation", 0)
    if source.name == "median":
        assert isinstance(source, SegmentedSource)
        segmenter = source.segmenter
        assert isinstance(segmenter, MedianSegmenter)
        segmenter.fit(frames(MEDIAN_FRAMES, seed)["pixels"])
        logger.info("segmentation=median: background from %d frames", MEDIAN_FRAMES)
    elif isinstance(source, TaughtSource) and settings.student_checkpoint is None:
        if source.pool is None:
            source.pool = _ask_teacher(source.teacher, frames, settings, seed)
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
    data, frames = env.reset(), []
    for step in range(count * every):
        if step % REPEAT == 0:
            action = random_action(env.action_spec, generator)
        data["action"] = action
        transition, data = env.step_and_maybe_reset(data)
        if step % every == every - 1:
            keys = {PIXELS, MASK} & set(transition["next"].keys())
            frames.append(transition["next"].select(*keys).clone())
        if step % EPISODE == EPISODE - 1:
            data = env.reset()
    env.close()
    stacked: TensorDictBase = torch.stack(frames)
    return stacked


def _ask_teacher(
    teacher: Segmenter | None, frames: Frames, settings: SegmentationConfig, seed: int
) -> tuple[Tensor, Tensor]:
    """Label frames, chosen for diversity from twice as many."""
    found = frames(2 * settings.teacher_frames, seed)
    found = found[choose_diverse(found["pixels"], settings.teacher_frames)]
    pixels = found["pixels"]
    return pixels, found[MASK] if teacher is None else teacher(pixels)

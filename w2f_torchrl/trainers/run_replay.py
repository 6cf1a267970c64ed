"""The replay of one rank of a run, and what changes its samples."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from w2f_torchrl.checkpoint.file import CheckpointError
from w2f_torchrl.checkpoint.resume import SavedRecords
from w2f_torchrl.config import (
    ConfigError,
    EnvironmentConfig,
    ReplayConfig,
    RunConfig,
    TrainingConfig,
)
from w2f_torchrl.data import StreamReplayBuffer, make_replay
from w2f_torchrl.data.replay.record_files import Fields
from w2f_torchrl.data.replay.replay_files import Manifest, ReplayFiles, new_generation, ring_rows
from w2f_torchrl.envs import BackgroundError
from w2f_torchrl.envs.scenery.backgrounds import load_clips
from w2f_torchrl.keys import PIXELS
from w2f_torchrl.transforms import ReplacedSceneryTransform

logger = logging.getLogger(__name__)


class RunReplay:
    """A replay buffer and its files, made by :meth:`open`.

    Its state is that of the sampler; the records are in separate files.

    Args:
        settings: Its capacity and storage.
        training: The length and number of sampled slices.
        environment: The number of envs, and the size of their images.
        folder: Folder of its records.
        records: Records of a checkpoint to start from; None for an empty replay.
        slack: Records that a stream on disk can take while a checkpoint is kept
            (:func:`checkpoint_slack`).
        latents: Sizes of the latents that records keep, if any.
        pin_memory: Whether samples are in pinned memory, for a GPU.

    Raises:
        CheckpointError: If the records do not fit the settings; names the setting.
    """

    def __init__(
        self,
        settings: ReplayConfig,
        training: TrainingConfig,
        environment: EnvironmentConfig,
        folder: Path,
        records: SavedRecords | None = None,
        *,
        slack: int,
        latents: Fields | None = None,
        pin_memory: bool = False,
    ) -> None:
        if records is not None:
            check_layout(environment, records.manifest)
        self.settings, self.training, self.num_envs = settings, training, environment.num_envs
        self.folder, self.records = folder, records
        self.slack, self.latents, self.pin_memory = slack, latents, pin_memory
        self._sampling: dict[str, Any] | None = None
        self._buffer: StreamReplayBuffer | None = None
        self._files: ReplayFiles | None = None

    @property
    def buffer(self) -> StreamReplayBuffer:
        """The replay buffer."""
        assert self._buffer is not None, "the replay is open"
        return self._buffer

    @property
    def files(self) -> ReplayFiles:
        """The files of the records, which checkpoints refer to."""
        assert self._files is not None, "the replay is open"
        return self._files

    def kept(self, observations: Sequence[str]) -> list[str]:
        """Return those of an env's observations that the records can hold: all, in a new replay.

        Args:
            observations: Entries in addition to images and masks.
        """
        fields = None if self.records is None else self.records.manifest["fields"]
        kept = [name for name in observations if fields is None or f"next/{name}" in fields]
        if len(kept) < len(observations):
            logger.warning(
                "the checkpoint's records have no %s: the replay is continued without.",
                ", ".join(name for name in observations if name not in kept),
            )
        return kept

    def open(self, *, seed: int, resume_episodes: bool) -> None:
        """Make the buffer, and fill it with the checkpoint's records.

        Args:
            seed: Seed of the samples.
            resume_episodes: Whether the envs continue the episodes of the last records.

        Raises:
            CheckpointError: If the length of the slices has changed.
        """
        settings = self.settings
        ring, generation = self._ring_and_generation()
        on_disk = settings.storage == "disk"
        self._buffer = make_replay(
            capacity=settings.capacity,
            num_streams=self.num_envs,
            batch_size=self.training.batch_size,
            batch_length=self.training.batch_length,
            path=self.folder / generation if on_disk else None,
            ring=ring if on_disk else None,
            exist_ok=True,
            newest_first=settings.newest_first,
            pin_memory=self.pin_memory,
            seed=seed,
            latents=self.latents,
        )
        self._files = ReplayFiles(self._buffer, self.folder, generation, ring)
        if self.records is None:
            return
        self._files.load(self.records.manifest, self.records.folder, self.records.damage)
        assert self._sampling is not None, "a checkpoint with records has the state of sampling"
        try:
            self._buffer.load_sampling_state(self._sampling)
        except ValueError as error:
            raise CheckpointError(f"training.batch_length: {error}") from error
        if not resume_episodes:
            self._buffer.end_episodes()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the sampler."""
        return self.buffer.sampling_state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep a state from :meth:`state_dict` for :meth:`open`."""
        self._sampling = state

    def _ring_and_generation(self) -> tuple[int, str]:
        """Return the number of rows of a stream's files, and the name of their folder.

        Both are those of the checkpoint if its files can be continued.
        """
        capacity = self.settings.capacity // self.num_envs
        if self.records is not None:
            manifest = self.records.manifest
            same_folder = self.records.folder.resolve() == self.folder.resolve()
            if same_folder and manifest["capacity"] == capacity:
                return manifest["ring"], manifest["generation"]
        return ring_rows(capacity, self.slack), new_generation(self.folder)


def checkpoint_slack(config: RunConfig) -> int:
    """Return an upper bound of the records that a stream writes while a checkpoint is kept."""
    envs, keep = config.environment.num_envs, config.checkpoint.keep
    capacity = config.replay.capacity // envs
    training, ranks = config.training, config.distributed.ranks
    if not training.train_ratio:
        return keep * capacity
    records = config.effective_batch_size * training.batch_length
    updates_per_step = training.train_ratio / records
    steps = config.checkpoint.every_updates / updates_per_step / envs / ranks
    # An episode of L steps makes L + 1 records.
    between = math.ceil(1.1 * steps) + 2 * config.collection.steps_per_batch
    return keep * min(between, capacity)


def check_layout(environment: EnvironmentConfig, manifest: Manifest) -> None:
    """Refuse records that do not fit the run's settings.

    Raises:
        CheckpointError: If they do not fit; names the setting.
    """
    streams, envs = len(manifest["written"]), environment.num_envs
    if streams != envs:
        raise CheckpointError(
            f"environment.num_envs={envs} must stay {streams}, as the checkpoint's replay has it."
        )
    size = manifest["fields"]["next/pixels"][1][-1]
    if size != environment.image_size:
        raise CheckpointError(
            f"environment.image_size={environment.image_size} must stay {size}, as the "
            "checkpoint's replay has it."
        )


def build_replaced_scenery(config: RunConfig) -> ReplacedSceneryTransform | None:
    """Build what replaces the scenery of sampled sequences; None without.

    Raises:
        ConfigError: If a clip cannot be read.
    """
    settings = config.augmentation
    if not settings.scenery:
        return None
    try:
        clips = load_clips(settings.source, "train", None, config.environment.image_size)
    except BackgroundError as error:
        raise ConfigError(f"augmentation.source={settings.source}: {error}") from error
    pictures = (PIXELS, *config.model.pictures)
    return ReplacedSceneryTransform(
        clips,
        settings.scenery,
        [("next", name) for name in pictures],
        colors=settings.colors,
    )

"""The replay of a run and its files, as new or as a checkpoint has them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from w2f_torchrl.data import StreamReplayBuffer, make_replay
from w2f_torchrl.data.latents import latent_fields
from w2f_torchrl.data.replay_files import Manifest, ReplayFiles, new_generation, ring_rows
from w2f_torchrl.trainers.checkpointing import CheckpointError
from w2f_torchrl.trainers.config import RunConfig

if TYPE_CHECKING:
    from w2f_torchrl.trainers.resuming import Resumption


def open_replay(
    config: RunConfig,
    folder: Path,
    *,
    seed: int,
    resumption: Resumption | None = None,
    envs_go_on: bool = False,
) -> tuple[StreamReplayBuffer, ReplayFiles]:
    """Make the replay of a run, and fill it.

    Args:
        config: The run's settings.
        folder: Where its records are kept.
        seed: Seed of the samples.
        resumption: What this rank goes on from; None for an empty replay.
        envs_go_on: Whether the envs continue the episodes that the last records are of.

    Raises:
        CheckpointError: If the slices' length has changed.
    """
    replay = config.replay
    ring, generation = _ring_and_generation(config, folder, resumption)
    on_disk = replay.storage == "disk"
    buffer = make_replay(
        capacity=replay.capacity,
        num_streams=config.environment.num_envs,
        batch_size=config.training.batch_size,
        batch_length=config.training.batch_length,
        path=folder / generation if on_disk else None,
        ring=ring if on_disk else None,
        exist_ok=True,
        newest_first=replay.newest_first,
        pin_memory=config.torch_device().type == "cuda",
        seed=seed,
        latents=latent_fields(config.model, config.latent) if replay.latents else None,
    )
    files = ReplayFiles(buffer, folder, generation, ring)
    if resumption is not None and resumption.manifest is not None:
        files.load(resumption.manifest, resumption.records, resumption.damage)
        _resume_sampling(buffer, resumption, envs_go_on)
    return buffer, files


def _ring_and_generation(
    config: RunConfig, folder: Path, resumption: Resumption | None
) -> tuple[int, str]:
    """Rows that a stream's files have, and the name of the folder that they are in.

    Both are the checkpoint's where its files can be written on.
    """
    capacity = config.replay.capacity // config.environment.num_envs
    manifest = None if resumption is None else resumption.manifest
    if resumption is not None and manifest is not None:
        same_folder = resumption.records.resolve() == folder.resolve()
        if same_folder and manifest["capacity"] == capacity:
            return manifest["ring"], manifest["generation"]
    return ring_rows(capacity, checkpoint_slack(config)), new_generation(folder)


def _resume_sampling(buffer: StreamReplayBuffer, resumption: Resumption, envs_go_on: bool) -> None:
    try:
        buffer.load_sampling_state(resumption.state["sampling"])
    except ValueError as error:
        raise CheckpointError(f"training.batch_length: {error}") from error
    if not envs_go_on:
        buffer.end_episodes()


def checkpoint_slack(config: RunConfig) -> int:
    """Records that a stream writes while the run's checkpoints are kept, and some more."""
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


def check_layout(config: RunConfig, manifest: Manifest) -> None:
    """Refuse records that the run's settings don't fit.

    Raises:
        CheckpointError: Naming the setting.
    """
    streams, envs = len(manifest["written"]), config.environment.num_envs
    if streams != envs:
        raise CheckpointError(
            f"environment.num_envs={envs} must stay {streams}, as the checkpoint's replay has it."
        )
    size = manifest["fields"]["next/pixels"][1][-1]
    if size != config.environment.image_size:
        raise CheckpointError(
            f"environment.image_size={config.environment.image_size} must stay {size}, as the "
            "checkpoint's replay has it."
        )

"""Where a run's data come from and where they go: its workers, and the replay that they fill."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tensordict import TensorDictBase
from torchrl.collectors import Collector, MultiSyncCollector

from w2f_torchrl.data import (
    OverlappedCollector,
    StreamReplayBuffer,
    WorkerError,
    collector_state,
    make_collector,
)
from w2f_torchrl.data.replay_files import ReplayFiles
from w2f_torchrl.modules import latent_sizes
from w2f_torchrl.trainers.checkpointing import records_folder
from w2f_torchrl.trainers.config import RunConfig, config_to_dict
from w2f_torchrl.trainers.environments import create_env
from w2f_torchrl.trainers.open_replay import open_replay
from w2f_torchrl.trainers.resuming import Resumption
from w2f_torchrl.trainers.run_state import RunState
from w2f_torchrl.utils.seeding import derive_seed

logger = logging.getLogger(__name__)

LATENT_KEYS = (("next", "state"), ("next", "belief"))
"""What batches keep of the acting policy's latents for the replay."""


@dataclass
class Collection:
    """A rank's collector, and its replay."""

    collector: Collector | MultiSyncCollector | OverlappedCollector
    replay: StreamReplayBuffer
    files: ReplayFiles
    """The replay's, for checkpoints."""
    environment: dict[str, Any]
    """All that must stay as it is if envs are to go on in the middle of an episode."""
    envs_go_on: bool
    """Whether the collector is to begin where the checkpoint has it."""
    complete: bool = True
    """Whether the replay holds all that the collector gave: else its state is of no use."""

    @contextmanager
    def taking_a_batch(self) -> Iterator[None]:
        """From the moment that a batch is asked for until the replay holds it."""
        self.complete = False
        yield  # what is raised here leaves it so
        self.complete = True

    def envs_state(self) -> dict[str, Any] | None:
        """The collector's state; None if it is of no use, or, with a warning, if a worker died."""
        if not self.complete:
            return None
        try:
            return collector_state(self.collector)
        except WorkerError as error:
            logger.warning("the environments' state is lost: %s", error)
            return None


class EndedEpisode(NamedTuple):
    """A training episode that a batch holds the end of."""

    column: int
    """Where in the batch, in steps of its envs."""
    episode_return: float
    length: float
    """Agent steps."""


def start_collecting(state: RunState, run_dir: Path, resumption: Resumption | None) -> Collection:
    """Start the workers of a rank, and open its replay.

    Args:
        state: The run's.
        run_dir: Its directory.
        resumption: What this rank goes on from, None at a run's beginning.

    Raises:
        CheckpointError: If settings that must stay have changed.
    """
    config, ranks, steps = state.config, state.ranks, state.counters.steps
    envs = config.environment.num_envs
    workers = count_workers(config, ranks.local_size)
    environment = config_to_dict(config)["environment"] | {
        "workers": workers,
        "ranks": ranks.size,
        "overlap": config.collection.overlap,
    }
    go_on = resumption is not None and _envs_go_on(resumption, environment, steps)
    # Otherwise the workers' noise must not be that of the run's beginning.
    fresh = go_on or resumption is None
    seed = config.seed if fresh else derive_seed(config.seed, "resume", steps)
    replay, files = open_replay(
        config,
        records_folder(run_dir, ranks.rank),
        seed=derive_seed(seed, "replay", ranks.rank),
        resumption=resumption,
        envs_go_on=go_on,
    )
    collector = make_collector(
        partial(create_env, config),
        state.learner.policy,
        primers=latent_sizes(config.model, state.action_size),
        num_envs=envs,
        num_workers=workers,
        frames_per_batch=envs * config.collection.steps_per_batch,
        seed=seed,
        rank=ranks.rank,
        device=config.torch_device() if config.collection.device == "learner" else "cpu",
        overlap=config.collection.overlap,
        extra_keys=LATENT_KEYS if config.replay.latents else (),
    )
    return Collection(collector, replay, files, environment, go_on)


def count_workers(config: RunConfig, local_ranks: int) -> int:
    """How many worker processes a rank has.

    By default one for each of its cores, at most one per env, and a divisor of their number.

    Args:
        config: The run's settings.
        local_ranks: Ranks that share the machine.
    """
    if config.collection.num_workers is not None:
        return config.collection.num_workers
    cores, envs = len(os.sched_getaffinity(0)) // local_ranks, config.environment.num_envs
    return max(n for n in range(1, min(max(cores, 1), envs) + 1) if envs % n == 0)


def check_finite(batch: TensorDictBase) -> None:
    """Refuse transitions that would poison the replay: every update that draws one is lost.

    Args:
        batch: Transitions ``[N, T]``.

    Raises:
        FloatingPointError: Naming the first env and step whose reward or action is not finite.
    """
    entries = {"action": batch["action"], "reward": batch["next", "reward"]}
    for name, values in entries.items():
        bad = ~values.flatten(2).isfinite().all(-1)  # [N, T]
        if bad.any():
            row, column = bad.nonzero()[0].tolist()
            blame = "environment gave it" if name == "reward" else "policy's weights are spoiled"
            raise FloatingPointError(
                f"{name} is {values[row, column].tolist()} in env {row}, step {column} of the "
                f"batch: the {blame}. The batch is not stored; a resume begins new episodes."
            )


def ended_episodes(batch: TensorDictBase) -> list[EndedEpisode]:
    """The episodes that ended in a batch of transitions ``[N, T]``, env by env."""
    following = batch["next"]
    return [
        EndedEpisode(
            column,
            float(following["episode_reward"][row, column]),
            float(following["step_count"][row, column]),
        )
        for row, column in following["done"].squeeze(-1).nonzero().tolist()
    ]


def _envs_go_on(resumption: Resumption, environment: dict[str, Any], steps: int) -> bool:
    """Whether the environments go on from where the checkpoint has them."""
    lost = resumption.manifest is None and steps > 0
    reason = resumption.why_new_episodes(environment, replay_empty=lost)
    if reason is not None:
        logger.warning("the environments begin new episodes: %s", reason)
    return reason is None

"""Where a run's data come from and where they go: its workers, and the replay that they fill."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import Collector, MultiSyncCollector

from w2f_torchrl.data import (
    OverlappedCollector,
    StreamReplayBuffer,
    WorkerError,
    collector_state,
    make_collector,
    sync_policy_weights,
)
from w2f_torchrl.data.replay_files import ReplayFiles
from w2f_torchrl.modules import latent_sizes
from w2f_torchrl.trainers.checkpointing import records_folder
from w2f_torchrl.trainers.config import RunConfig, config_to_dict
from w2f_torchrl.trainers.environments import create_env
from w2f_torchrl.trainers.open_replay import open_replay
from w2f_torchrl.trainers.resuming import Resumption
from w2f_torchrl.trainers.run_state import RunState
from w2f_torchrl.utils.leftovers import Leftovers
from w2f_torchrl.utils.seeding import derive_seed
from w2f_torchrl.utils.stopping import may_be_cut, stop_is_wanted

logger = logging.getLogger(__name__)

T = TypeVar("T")


AnyCollector: TypeAlias = Collector | MultiSyncCollector | OverlappedCollector

LATENT_KEYS = (("next", "state"), ("next", "belief"))
"""What batches keep of the acting policy's latents for the replay."""


@dataclass
class Collection:
    """A rank's collector, and its replay."""

    make: Callable[[int], AnyCollector]
    """Makes the collector from a seed."""
    seed: int
    replay: StreamReplayBuffer
    files: ReplayFiles
    """The replay's, for checkpoints."""
    environment: dict[str, Any]
    """All that must stay as it is if envs are to go on in the middle of an episode."""
    envs_go_on: bool
    """Whether the collector is to begin where the checkpoint has it."""
    max_restarts: int
    """How often in a row lost workers are replaced."""
    free: Callable[[], None] | None = None
    """Frees what lost workers leave."""
    alone: bool = True
    """Whether a stop signal may end the replacing: no other rank waits for this one."""
    restarts: int = 0
    """How often workers were replaced, in the whole run."""
    complete: bool = True
    """Whether the replay holds all that the collector gave: else its state is of no use."""
    held: TensorDictBase | None = None
    """A batch ``[N, T]`` that was collected, and comes before any that is asked for."""
    lost: WorkerError | None = None
    """What was noticed of the workers; they have to be replaced."""

    def __post_init__(self) -> None:
        """Start the workers."""
        self._in_a_row = 0
        self._batches: Iterator[TensorDictBase] | None = None
        self.collector = self.make(self.seed)

    def next_batch(self) -> TensorDictBase:
        """Take the next batch ``[N, T]``; workers that are lost meanwhile are replaced.

        Raises:
            WorkerError: If they were replaced too often in a row, or a stop signal came.
        """
        if self.held is not None:
            batch, self.held = self.held, None
            return batch
        batch = self._with_workers(self._ask)
        self._in_a_row = 0
        return batch

    def send_weights(self, policy: TensorDictModuleBase) -> None:
        """Copy the policy's weights to the workers; lost ones are replaced.

        Raises:
            WorkerError: As :meth:`next_batch` does.
        """
        self._with_workers(lambda: sync_policy_weights(self.collector, policy))

    @contextmanager
    def taking_a_batch(self) -> Iterator[None]:
        """From the moment that a batch is asked for until the replay holds it."""
        self.complete = False
        yield  # what is raised here leaves it so
        self.complete = True

    def put_back(self, batch: TensorDictBase) -> None:
        """Keep a batch that could not be stored yet; a checkpoint holds it."""
        self.held, self.complete = batch, True

    def envs_state(self) -> dict[str, Any] | None:
        """The collector's state; None if it is of no use, or, with a warning, if a worker died."""
        if not self.complete or self.lost is not None:
            return None
        try:
            return collector_state(self.collector)
        except WorkerError as error:
            logger.warning("the environments' state is lost: %s", error)
            self.lost = error
            return None

    def close(self) -> None:
        """End the workers; at once if they are lost, or if a signal says that time is short."""
        self._batches = None  # a generator that is left to the interpreter's end complains
        short = self.lost is not None or stop_is_wanted()
        if short and not isinstance(self.collector, Collector):
            self.collector.kill()
        self.collector.shutdown()

    def _ask(self) -> TensorDictBase:
        if self._batches is None:
            self._batches = iter(self.collector)
        return next(self._batches)

    def _with_workers(self, work: Callable[[], T]) -> T:
        while True:
            try:
                if self.lost is not None:
                    self._replace(self.lost)
                return work()
            except WorkerError as error:
                self.lost = error
                if stop_is_wanted() or self._in_a_row >= self.max_restarts:
                    raise

    def _replace(self, error: WorkerError) -> None:
        """Make the collector anew; its envs begin new episodes."""
        self._in_a_row += 1
        self.restarts += 1
        logger.warning(
            "%s\nAll workers of this rank are replaced (%d of at most %d times in a row); their "
            "episodes begin anew.",
            error,
            self._in_a_row,
            self.max_restarts,
        )
        assert not isinstance(self.collector, Collector), "it has no workers that could be lost"
        threads = torch.get_num_threads()  # TorchRL's shutdown sets them
        self.collector.kill()
        self.collector.shutdown(raise_on_error=False)
        torch.set_num_threads(threads)
        self._batches = None
        self.replay.end_episodes()
        if self.free is not None:
            self.free()
        with may_be_cut(at_once=True) if self.alone else nullcontext():
            self.collector = self.make(derive_seed(self.seed, "replaced", self.restarts))
        self.lost = None


class EndedEpisode(NamedTuple):
    """A training episode that a batch holds the end of."""

    column: int
    """Where in the batch, in steps of its envs."""
    episode_return: float
    length: float
    """Agent steps."""


def start_collecting(
    state: RunState,
    run_dir: Path,
    resumption: Resumption | None,
    leftovers: Leftovers | None = None,
) -> Collection:
    """Start the workers of a rank, and open its replay.

    Args:
        state: The run's.
        run_dir: Its directory.
        resumption: What this rank goes on from, None at a run's beginning.
        leftovers: What the rank's processes put outside of that directory.

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
    make = partial(
        make_collector,
        partial(create_env, config),
        state.learner.policy,
        primers=latent_sizes(config.model, state.action_size),
        num_envs=envs,
        num_workers=workers,
        frames_per_batch=envs * config.collection.steps_per_batch,
        rank=ranks.rank,
        device=config.torch_device() if config.collection.device == "learner" else "cpu",
        overlap=config.collection.overlap,
        timeout_seconds=config.collection.timeout_seconds,
        scratch=None if leftovers is None else leftovers.scratch(),
        extra_keys=LATENT_KEYS if config.replay.latents else (),
    )
    saved = {} if resumption is None else resumption.state
    collection = Collection(
        lambda seed: make(seed=seed),
        seed,
        replay,
        files,
        environment,
        go_on,
        max_restarts=config.collection.max_restarts,
        free=None if leftovers is None else leftovers.free,
        alone=ranks.size == 1,
        restarts=saved.get("worker_restarts", 0),
    )
    if go_on and saved.get("held") is not None:
        collection.held = TensorDict(saved["held"], saved["held"]["action"].shape[:2])
    return collection


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

"""A rank's workers, and the replay that they fill."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import Collector, MultiSyncCollector

from w2f_torchrl.config import CollectionConfig, EnvironmentConfig, RunConfig
from w2f_torchrl.data import (
    OverlappedCollector,
    StreamReplayBuffer,
    WorkerError,
    collector_state,
    load_collector_state,
    records_from_rollout,
    sync_policy_weights,
)
from w2f_torchrl.data.collector.leftovers import Leftovers
from w2f_torchrl.data.records import keys_of_observations
from w2f_torchrl.trainers.run_replay import RunReplay
from w2f_torchrl.utils.main_guard import require_main_guard
from w2f_torchrl.utils.ranks import Ranks
from w2f_torchrl.utils.seeding import derive_seed
from w2f_torchrl.utils.stopping import StopRequested, may_be_cut, stop_is_wanted

logger = logging.getLogger(__name__)

T = TypeVar("T")


AnyCollector: TypeAlias = Collector | MultiSyncCollector | OverlappedCollector

LATENT_KEYS = (("next", "state"), ("next", "belief"))
"""Latents of the acting policy that batches keep for the replay."""


class Collection:
    """The workers of a rank, started by :meth:`start`, and the replay that they fill.

    Its state is the state of the envs between two batches.

    Args:
        settings: How often lost workers are replaced.
        ranks: The run's processes.
        replay: The replay, not yet open.
        make: Makes the collector from a seed and a folder for temporary files.
        seed: The run's seed.
        environment: Settings that must be unchanged for envs to continue in the middle of an
            episode.
        latent_classes: Classes of each categorical of the state, if the replay keeps latents.
        leftovers: Files that the rank's processes create outside of the run's directory.
        observations: Entries of the envs' observations, in addition to images and masks, that
            records keep.
    """

    def __init__(
        self,
        settings: CollectionConfig,
        ranks: Ranks,
        replay: RunReplay,
        make: Callable[..., AnyCollector],
        *,
        seed: int,
        environment: dict[str, Any],
        latent_classes: int | None = None,
        leftovers: Leftovers | None = None,
        observations: Sequence[str] = (),
    ) -> None:
        self.settings, self.ranks, self.run_replay, self.make = settings, ranks, replay, make
        self.seed, self.environment, self.latent_classes = seed, environment, latent_classes
        self.leftovers, self.observations = leftovers, observations
        self.restarts = 0
        """How often workers have been replaced in the whole run."""
        self.complete = True
        """Whether the replay holds every batch of the collector; otherwise its state is useless."""
        self.held: TensorDictBase | None = None
        """A collected batch ``[N, T]`` that is returned before a new one is requested."""
        self.lost: WorkerError | None = None
        """The failure of the workers, while they wait to be replaced."""
        self._saved: dict[str, Any] | None = None
        self._collector: AnyCollector | None = None
        self._in_a_row = 0
        self._batches: Iterator[TensorDictBase] | None = None

    @property
    def collector(self) -> AnyCollector:
        """The collector, which steps the environments; replaced when its workers are lost."""
        assert self._collector is not None, "the workers have started"
        return self._collector

    @property
    def replay(self) -> StreamReplayBuffer:
        """The replay that stores the batches."""
        return self.run_replay.buffer

    def start(self, steps: int, *, resumed: bool) -> None:
        """Open the replay and start the workers; envs continue from a loaded state.

        Args:
            steps: Agent steps of the run so far.
            resumed: Whether the run resumes from a checkpoint.

        Raises:
            CheckpointError: If settings that must stay the same have changed.
        """
        resume_envs = resumed and self._envs_can_resume(steps)
        if resumed and not resume_envs:  # the workers' noise must not repeat the run's beginning
            self.seed = derive_seed(self.seed, "resume", steps)
        self.run_replay.open(
            seed=derive_seed(self.seed, "replay", self.ranks.rank), resume_episodes=resume_envs
        )
        self._collector = self._make(self.seed)
        if resume_envs and self._saved is not None:
            load_collector_state(self.collector, self._saved["collector"])
            if (held := self._saved.get("held")) is not None:
                self.held = TensorDict(held, held["action"].shape[:2])
        self._saved = None

    def state_dict(self) -> dict[str, Any]:
        """Return the envs' state, and the batch that is not yet stored, if any."""
        return {
            "collector": self._envs_state(),
            "held": None if self.held is None else self.held.to_dict(),
            "worker_restarts": self.restarts,
            "environment": self.environment,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep a state from :meth:`state_dict` for :meth:`start`."""
        self._saved = state
        self.restarts = state.get("worker_restarts") or 0

    def next_batch(self) -> TensorDictBase:
        """Return the next batch ``[N, T]``; replace workers that are lost meanwhile.

        Raises:
            WorkerError: If they were replaced too often in a row, or a stop signal arrived.
        """
        if self.held is not None:
            batch, self.held = self.held, None
            return batch
        batch = self._with_workers(self._ask)
        self._in_a_row = 0
        return batch

    def send_weights(self, policy: TensorDictModuleBase) -> None:
        """Copy the policy's weights to the workers; replace lost ones.

        Raises:
            WorkerError: As in :meth:`next_batch`.
        """
        self._with_workers(lambda: sync_policy_weights(self.collector, policy))

    @contextmanager
    def taking_a_batch(self) -> Iterator[None]:
        """Mark the time from the request of a batch until the replay holds it."""
        self.complete = False
        yield  # after an exception it stays False
        self.complete = True

    def put_back(self, batch: TensorDictBase) -> None:
        """Keep a batch that could not be stored yet; checkpoints include it."""
        self.held, self.complete = batch, True

    def store(
        self, batch: TensorDictBase, label: Callable[[TensorDictBase], TensorDictBase]
    ) -> list[EndedEpisode]:
        """Put a batch of transitions ``[N, T]`` into the replay.

        Args:
            batch: From :meth:`next_batch`.
            label: Adds masks to records ``[M]``.

        Returns:
            The episodes that ended in it.

        Raises:
            TransitionError: If a number in it is not finite; nothing is stored then.
            StopRequested: If a stop signal arrived; the batch is kept for later.
        """
        check_finite(batch, self.observations)
        classes = self.latent_classes if LATENT_KEYS[0] in batch.keys(True) else None
        keys = keys_of_observations(batch, self.observations)
        records = records_from_rollout(batch, keys, latent_classes=classes)
        try:  # the other ranks wait for this one's episodes
            with may_be_cut() if self.ranks.size == 1 else nullcontext():
                records = label(records)
        except StopRequested:
            self.put_back(batch)
            raise
        self.replay.extend(records)
        return ended_episodes(batch)

    def close(self) -> None:
        """Stop the workers; kill them if some are lost, or if a stop signal leaves little time."""
        if self._collector is None:
            return
        self._batches = None  # a generator that lives until the interpreter exits prints an error
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
                if stop_is_wanted() or self._in_a_row >= self.settings.max_restarts:
                    raise

    def _replace(self, error: WorkerError) -> None:
        """Make a new collector; its envs begin new episodes."""
        self._in_a_row += 1
        self.restarts += 1
        logger.warning(
            "%s\nAll workers of this rank are replaced (%d of at most %d times in a row); they "
            "begin new episodes.",
            error,
            self._in_a_row,
            self.settings.max_restarts,
        )
        assert not isinstance(self.collector, Collector), "only workers can be lost"
        threads = torch.get_num_threads()  # TorchRL's shutdown sets them
        self.collector.kill()
        self.collector.shutdown(raise_on_error=False)
        torch.set_num_threads(threads)
        self._batches = None
        self.replay.end_episodes()
        if self.leftovers is not None:
            self.leftovers.free()
        # A signal may interrupt this only if no other rank waits for this one.
        with may_be_cut(at_once=True) if self.ranks.size == 1 else nullcontext():
            self._collector = self._make(derive_seed(self.seed, "replaced", self.restarts))
        self.lost = None

    def _make(self, seed: int) -> AnyCollector:
        scratch = None if self.leftovers is None else self.leftovers.scratch()
        return self.make(seed=seed, scratch=scratch)

    def _envs_state(self) -> dict[str, Any] | None:
        """Return the collector's state; None if it is useless or, with a warning, lost."""
        if not self.complete or self.lost is not None:
            return None
        try:
            return collector_state(self.collector)
        except WorkerError as error:
            logger.warning("the environments' state is lost: %s", error)
            self.lost = error
            return None

    def _envs_can_resume(self, steps: int) -> bool:
        reason = reason_to_reset_envs(
            self._saved,
            self.environment,
            replay_empty=self.run_replay.records is None and steps > 0,
        )
        if reason is not None:
            logger.warning("the environments begin new episodes: %s", reason)
        return reason is None


class EndedEpisode(NamedTuple):
    """A training episode that ended in a batch."""

    column: int
    """Index in the batch of the step that ended it."""
    episode_return: float
    length: float
    """Agent steps."""


def reason_to_reset_envs(
    saved: dict[str, Any] | None, environment: dict[str, Any], *, replay_empty: bool
) -> str | None:
    """Return why the envs cannot continue from a saved state; None if they can.

    Args:
        saved: A state of :meth:`Collection.state_dict`; None if this rank saved none.
        environment: The settings that must equal those of the saved state.
        replay_empty: Whether the replay lost its records.
    """
    if replay_empty:
        return "the replay is empty"
    if saved is None:
        return "no checkpoint of this rank contains their state"
    if saved["collector"] is None:
        return "their state was not saved (an exception, or envs without resume_state)"
    # Settings that an older checkpoint does not contain had their default.
    then = vars(EnvironmentConfig()) | saved["environment"]
    for name in sorted(then.keys() | environment.keys()):
        if then.get(name) != environment.get(name):
            return f"{name} was {then.get(name)!r} and is {environment.get(name)!r}"
    return None


def count_workers(config: RunConfig, local_ranks: int) -> int:
    """Return the number of worker processes of a rank.

    By default one per core of the rank, at most one per env, and a divisor of the number of envs;
    none for recorded data.

    Args:
        config: The run's settings.
        local_ranks: Ranks that share the machine.
    """
    if config.data.path is not None:
        return 0
    if config.collection.num_workers is not None:
        return config.collection.num_workers
    cores, envs = len(os.sched_getaffinity(0)) // local_ranks, config.environment.num_envs
    return max(n for n in range(1, min(max(cores, 1), envs) + 1) if envs % n == 0)


def check_guard(config: RunConfig, local_ranks: int) -> None:
    """Refuse a script whose worker processes would build the trainer again.

    Args:
        config: The run's settings.
        local_ranks: Ranks that share the machine.

    Raises:
        RuntimeError: If it starts worker processes outside ``if __name__ == "__main__":``.
    """
    if count_workers(config, local_ranks):
        require_main_guard("Trainer")


class TransitionError(FloatingPointError):
    """Transitions of this rank are not finite; other ranks know nothing of it."""


def check_finite(batch: TensorDictBase, observations: Sequence[str] = ()) -> None:
    """Refuse transitions that are not finite: every update that samples one would fail.

    Args:
        batch: Transitions ``[N, T]``.
        observations: Entries of the env's observations; those of integers are finite.

    Raises:
        TransitionError: Naming the first env and step where a number of an observation, a reward
            or an action is not finite.
    """
    # The policy's action follows from the observation, which is to blame then.
    entries = [(name, part[name]) for name in observations for part in (batch, batch["next"])]
    entries += [("reward", batch["next", "reward"]), ("action", batch["action"])]
    for name, values in entries:
        if not values.is_floating_point():
            continue
        bad = ~values.flatten(2).isfinite().all(-1)  # [N, T]
        if bad.any():
            row, column = bad.nonzero()[0].tolist()
            blame = "policy's weights are bad" if name == "action" else "environment returned it"
            raise TransitionError(
                f"{name} is {values[row, column].tolist()} in env {row}, step {column} of the "
                f"batch: the {blame}. The batch is not stored; a resume begins new episodes."
            )


def ended_episodes(batch: TensorDictBase) -> list[EndedEpisode]:
    """Return the episodes that ended in a batch of transitions ``[N, T]``, env by env."""
    following = batch["next"]
    return [
        EndedEpisode(
            column,
            float(following["episode_reward"][row, column]),
            float(following["step_count"][row, column]),
        )
        for row, column in following["done"].squeeze(-1).nonzero().tolist()
    ]

"""A whole run: collect, replay, learn, evaluate, write down."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from pathlib import Path

import torch
from tensordict import TensorDictBase

from w2f_torchrl.data import (
    UpdateSchedule,
    load_collector_state,
    records_from_rollout,
    sync_policy_weights,
)
from w2f_torchrl.trainers.checkpointing import (
    Checkpoint,
    discard_checkpoints_after,
    load_checkpoint,
)
from w2f_torchrl.trainers.collecting import (
    LATENT_KEYS,
    check_finite,
    count_workers,
    ended_episodes,
    start_collecting,
)
from w2f_torchrl.trainers.config import RunConfig, save_config
from w2f_torchrl.trainers.device_copy import DeviceCopy
from w2f_torchrl.trainers.diagnostics import Diagnostics
from w2f_torchrl.trainers.distributed import Ranks, describe_lost_rank, is_lost_rank
from w2f_torchrl.trainers.environments import build_env
from w2f_torchrl.trainers.evaluator import Evaluator
from w2f_torchrl.trainers.finite import FINITE
from w2f_torchrl.trainers.interruptions import (
    end_all,
    keep_exception,
    save_batch,
    stop_on_signal,
)
from w2f_torchrl.trainers.preemption import hand_over, is_restart
from w2f_torchrl.trainers.resuming import (
    Resumption,
    checkpoint_folder,
    find_checkpoint,
    restore_run_dir,
)
from w2f_torchrl.trainers.run_checkpoints import RunCheckpoints
from w2f_torchrl.trainers.run_lock import RunLock
from w2f_torchrl.trainers.run_logging import RunClock, build_loggers, finish_run
from w2f_torchrl.trainers.run_state import RunState
from w2f_torchrl.trainers.segmentation import prepare
from w2f_torchrl.trainers.update_metrics import Sums, shown_row
from w2f_torchrl.utils.environment import note_environment
from w2f_torchrl.utils.logging import MetricsLogger, ProgressBar
from w2f_torchrl.utils.main_guard import require_main_guard
from w2f_torchrl.utils.memory import keep_freed_memory
from w2f_torchrl.utils.random_state import restore_random_state
from w2f_torchrl.utils.seeding import derive_seed

logger = logging.getLogger(__name__)


class Trainer:
    """Trains one agent, with worker processes that step the environments.

    One process, or several that torchrun or submitit started: then every rank builds a Trainer and
    calls :meth:`train`, rank 0 logs, evaluates and writes checkpoints, and ``steps``, ``frames``
    and ``updates`` count what all ranks did together.

    Args:
        config: The run's settings.

    Raises:
        ConfigError: If a setting is out of range.
        CheckpointError: If the run directory holds a run already and ``resume`` is null, or is in
            use by another process, or the checkpoint to resume from is missing, damaged or of
            another model.
        RuntimeError: If a script builds it outside ``if __name__ == "__main__":``, and it would
            start worker processes.
    """

    def __init__(self, config: RunConfig):
        self.ranks = Ranks.from_environment()
        config.distributed.ranks = self.ranks.size
        config.validate()
        if count_workers(config, self.ranks.local_size):
            require_main_guard("Trainer")
        self.config = config
        self.run_dir = Path(config.run_dir)
        self._lock = RunLock(self.run_dir)
        try:
            self._prepare()
        except BaseException:
            self._lock.release()
            raise

    @property
    def steps(self) -> int:
        """Agent steps so far, over all envs and ranks."""
        return self.state.counters.steps

    @property
    def frames(self) -> int:
        """Environment frames (control steps) so far."""
        return self.state.counters.frames

    @property
    def updates(self) -> int:
        """Learner updates so far."""
        return self.state.counters.updates

    @property
    def schedule(self) -> UpdateSchedule:
        """How many updates are due after how many agent steps."""
        return self.state.counters.schedule

    # ---------------------------------------------------------------- before the first step

    def _prepare(self) -> None:
        config, ranks = self.config, self.ranks
        self.device = config.torch_device()
        ranks.connect(self.device, config.distributed.timeout_seconds)
        self._to_device = DeviceCopy(self.device)
        # torchrun counts on the machine where a rank failed only.
        again = any(ranks.gather([is_restart(self.run_dir)]))
        checkpoint = ranks.on_first(partial(self._find_checkpoint, again))
        saved = None if checkpoint is None else load_checkpoint(checkpoint)
        torch.manual_seed(derive_seed(config.seed, "learner", ranks.rank))
        keep_freed_memory()
        self.state = RunState.build(config, ranks, saved)
        self.learner, self.masks = self.state.learner, self.state.masks
        self.action_size = self.state.action_size
        self.resumption: Resumption | None = None
        self._built = False
        self._open_run_dir(saved, checkpoint)

    def _find_checkpoint(self, again: bool) -> Path | None:
        self._lock.acquire()
        return find_checkpoint(self.config, again=again)

    def _open_run_dir(self, saved: Checkpoint | None, checkpoint: Path | None) -> None:
        """Take the run directory, and bring everything to where the checkpoint has it."""
        config, ranks = self.config, self.ranks
        self.run_dir.mkdir(parents=True, exist_ok=True)
        ranks.on_first(self._lock.acquire)
        if saved is not None and checkpoint is not None and ranks.is_first:
            restore_run_dir(self.run_dir, saved, checkpoint)
        self.logger = ranks.shown_by_first(
            lambda: MetricsLogger(self.run_dir, build_loggers(config))
        )
        if saved is not None and checkpoint is not None:
            self._restore(saved, checkpoint)
        else:
            # resume=auto of a run that ended before its first checkpoint begins again.
            self.logger.truncate_after(-1)
        if ranks.is_first:
            save_config(config, self.run_dir / "config.yaml")
            note_environment(self.run_dir / "environment.json", self.frames, self.device)
        self.diagnostics = ranks.shown_by_first(
            lambda: Diagnostics(config, self.learner, self.logger)
        )
        self.clock = RunClock(self.run_dir, self.frames, self.updates)

    def _build_workers(self) -> None:
        """Start what takes processes, threads and memory."""
        config, state, resumption = self.config, self.state, self.resumption
        if self.ranks.is_first:
            self.evaluator = Evaluator(
                config,
                derive_seed(config.seed, "eval", 0),
                self.learner.policy,
                self.action_size,
                self.masks.segment,
            )
        if resumption is None:
            prepare(self.masks, config, partial(build_env, config.environment))
            state.share_masks()
        self.collection = start_collecting(state, self.run_dir, resumption)
        self.collector, self.replay = self.collection.collector, self.collection.replay
        total = config.training.total_frames
        self.progress = self.ranks.shown_by_first(
            lambda: ProgressBar(total, initial_frames=self.frames, initial_updates=self.updates)
        )
        self.checkpoints = RunCheckpoints(state, self.collection, self.logger, self.diagnostics)
        self.writer = self.checkpoints.writer
        if resumption is not None and resumption.state:
            if self.collection.envs_go_on:
                load_collector_state(self.collector, resumption.state["collector"])
            self.diagnostics.videos_at = resumption.state["videos_at"]
            restore_random_state(resumption.state["random"])
        self._built = True

    # ---------------------------------------------------------------- the loop

    def train(self) -> None:
        """Run to the last frame, or until a stop signal; ends with a checkpoint either way.

        The signals are SIGINT (Ctrl+C), SIGTERM, SIGUSR1 and SIGUSR2.

        Raises:
            SystemExit: If the scheduler has asked for the machine, in a job that submitit started.
        """
        try:
            self._build_workers()
            with stop_on_signal() as stopped:
                stop = self._run(stopped)
                logger.info("checkpoint: %s", self.save())
        except BaseException as error:
            self._fail(error)
            self._close()
            raise
        if errors := self._close():
            raise errors[0]
        if stop:
            hand_over(stopped, self.run_dir, is_first=self.ranks.is_first)

    def _run(self, stopped: list[int]) -> bool:
        """Go on from wherever the counters are: learn what is due, then collect.

        Returns:
            Whether a signal ended the run.
        """
        batches = iter(self.collector)
        while True:
            self._learn(stopped)
            stop = self.ranks.agree(bool(stopped))
            if stop or self.frames >= self.config.training.total_frames:
                break
            sync_policy_weights(self.collector, self.learner.policy)
            self._evaluate_if_due()
            self._checkpoint_if_due()
            with self.collection.taking_a_batch():
                self._take(next(batches))
        if not stop:
            if self.state.evaluations.lack_the_end(self.frames):
                self.evaluate()
            self._flush()
        return stop

    def _take(self, batch: TensorDictBase) -> None:
        """Store a batch of transitions ``[N, T]`` and log the episodes that ended in it."""
        check_finite(batch)
        keeps_latents = self.config.replay.latents and LATENT_KEYS[0] in batch.keys(True)
        classes = self.config.model.num_classes if keeps_latents else None
        records = records_from_rollout(batch, latent_classes=classes)
        self.replay.extend(self.masks.label(records))
        before, ranks = self.steps, self.ranks.size
        # In the order of time, with the frames of the step that ended the episode.
        for episode in sorted(self.ranks.gather(ended_episodes(batch)), key=attrgetter("column")):
            self.state.last_return = episode.episode_return
            self.state.counters.steps = before + (episode.column + 1) * len(batch) * ranks
            metrics = {"episode/return": episode.episode_return, "episode/length": episode.length}
            self.logger.log(metrics, frames=self.frames, updates=self.updates)
        self.state.counters.steps = before + batch.numel() * ranks
        self.progress.update(
            frames=self.frames, updates=self.updates, last_return=self.state.last_return
        )

    def _learn(self, stopped: list[int]) -> None:
        """Do the updates that are due."""
        for _ in range(self.state.counters.updates_due()):
            if self.ranks.agree(bool(stopped)):
                return
            sample = self.replay.sample()
            slots = sample["index"]
            sample = self._to_device(sample)
            metrics = self.learner.update(sample)
            self.state.metrics.add(metrics, slots)
            if self.learner.latents is not None:
                self.replay.write_back(slots, self.learner.latents, metrics[FINITE])
            self.state.counters.add_update()
            if self.updates % self.config.logging.every_updates == 0:
                self._flush()
            self.diagnostics.after_update(sample, frames=self.frames, updates=self.updates)
            self.progress.update(frames=self.frames, updates=self.updates)

    def _flush(self) -> None:
        """Write the mean of the metrics since the last call; the only read of the device."""
        if not self.state.metrics.count:
            return
        sums = self.state.metrics.read()
        if sums.missed and (self.config.training.on_nan == "stop" or not sums.applied):
            raise self._not_finite(sums)
        means = sums.means()
        row = means | (self.masks.metrics() if self.config.needs_masks else {})
        row = self.ranks.mean(row)
        bad = sorted(name for name in means if not math.isfinite(row[name]))
        row = shown_row(row, self.ranks.size) | self.clock.metrics(self.frames, self.updates)
        self.logger.log(row, frames=self.frames, updates=self.updates)
        self.state.metrics.clear()
        if bad:
            raise FloatingPointError(f"not finite at update {self.updates}: {', '.join(bad)}.")

    def _not_finite(self, sums: Sums) -> FloatingPointError:
        """Save the batch of the first bad update, and go back to the counters before it."""
        if self.config.training.on_nan == "stop":
            self.state.counters.take_back(sums.missed)
        name = f"not_finite_after_{self.updates:012d}_rank_{self.ranks.rank}.pt"
        path = save_batch(self.run_dir / name, self.replay, self.state.metrics.slots[sums.applied])
        self.state.metrics.clear()
        weights = "were not changed" if self.learner.is_finite() else "are not finite either"
        return FloatingPointError(
            f"gradients are not finite after update {self.updates} "
            f"({', '.join(sums.not_finite())}). The weights {weights}. The batch is in "
            f"{path}. training.on_nan=skip goes on without such updates, as long as not all of a "
            "row of metrics are."
        )

    def _evaluate_if_due(self) -> None:
        if self.state.evaluations.are_due(self.frames):
            self.evaluate()
            self.diagnostics.draw_curves()

    def evaluate(self) -> dict[str, float]:
        """Play evaluation episodes; log returns and videos. Only rank 0 does."""
        if not self.ranks.is_first:  # it doesn't wait: it collects meanwhile
            self.state.evaluations.last = self.frames
            return {}
        evaluation = self.state.evaluations.play(self.evaluator, self.frames)
        if self.state.evaluations.is_best(evaluation):
            self.checkpoints.save_best()
        self.logger.log(evaluation.metrics, frames=self.frames, updates=self.updates)
        self.diagnostics.after_evaluation(evaluation, frames=self.frames, updates=self.updates)
        return evaluation.metrics

    # ---------------------------------------------------------------- the end

    def _fail(self, error: BaseException) -> None:
        """Keep an exception, and save what can be saved; nothing is raised."""
        if is_lost_rank(self.ranks, error):  # said at once: torchrun ends this rank soon
            logger.error("%s", describe_lost_rank(self.ranks, error))
        counters = {"frames": self.frames, "updates": self.updates}
        text = keep_exception(self.run_dir, error, **counters)
        logger.error("%s at frame %d, update %d", repr(error)[:500], self.frames, self.updates)
        # The other ranks may be elsewhere, or gone; gradients are the same on all of them.
        together = self.ranks.size == 1 or isinstance(error, FloatingPointError)
        if not (together and self._built and self.learner.intact and self.learner.is_finite()):
            logger.error("no emergency checkpoint: the last one stays the newest")
            return
        try:
            logger.info("emergency checkpoint: %s", self.save(exception=text))
        except Exception:  # whatever it is, the first exception is what the caller must see
            logger.exception("the emergency checkpoint failed; the last one stays the newest")

    def _close(self) -> list[Exception]:
        """End processes, threads and files, whatever there is of them; errors are logged."""
        ends: list[Callable[[], None]] = [
            getattr(getattr(self, name), method)
            for name, method in (
                ("progress", "close"),
                ("collector", "shutdown"),
                ("evaluator", "close"),
                ("writer", "close"),
            )
            if hasattr(self, name)
        ]
        if self.ranks.is_first:
            counts = {"frames": self.frames, "updates": self.updates}
            ends.append(partial(finish_run, self.config, self.logger, self.clock, **counts))
        errors = end_all(ends)
        self._lock.release()
        return errors

    # ---------------------------------------------------------------- checkpoints

    def _checkpoint_if_due(self) -> None:
        if self.checkpoints.are_due():
            self.checkpoints.save(wait=False)

    def save(self, exception: str | None = None) -> Path:
        """Write a checkpoint of all that the run needs to go on, and wait until it is on disk.

        All ranks call it. Rank 0 writes what is equal on all of them; each its own replay and envs.

        Args:
            exception: The traceback of what ended the run.

        Returns:
            The checkpoint's path.
        """
        return self.checkpoints.save(wait=True, exception=exception)

    def _restore(self, saved: Checkpoint, path: Path) -> None:
        """Go on from a checkpoint; what :meth:`_build_workers` needs of it is kept for then."""
        self.state.restore(saved)
        self.resumption = Resumption.read(saved, path, self.ranks, self.config)
        if self.resumption.manifest is None and (saved.format_version == 1 or self.steps):
            self.state.counters.fill_again()
        if self.resumption.state:
            self.state.restore_own(self.resumption.state)
        self.logger.truncate_after(saved.frames, saved.updates)
        folder = checkpoint_folder(self.run_dir / "checkpoints", self.ranks.rank)
        discard_checkpoints_after(folder, saved.updates)
        logger.info("resumed %s at %d frames, %d updates", path, saved.frames, saved.updates)

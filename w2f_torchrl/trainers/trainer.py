"""A whole run: collect, replay, learn, evaluate, write down."""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TypeVar

import torch
from tensordict import TensorDictBase

from w2f_torchrl.data import (
    UpdateSchedule,
    WorkerError,
    load_collector_state,
    records_from_rollout,
)
from w2f_torchrl.trainers.checkpointing import (
    Checkpoint,
    discard_checkpoints_after,
    malformed_is_an_error,
)
from w2f_torchrl.trainers.collecting import (
    LATENT_KEYS,
    AnyCollector,
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
from w2f_torchrl.trainers.evaluator import Evaluation, Evaluator
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
    load_run,
    restore_run_dir,
)
from w2f_torchrl.trainers.run_checkpoints import RunCheckpoints
from w2f_torchrl.trainers.run_lock import RunLock
from w2f_torchrl.trainers.run_logging import RunClock, build_loggers, finish_run
from w2f_torchrl.trainers.run_state import RunState
from w2f_torchrl.trainers.segmentation import prepare
from w2f_torchrl.trainers.tolerance import Tolerance
from w2f_torchrl.trainers.update_metrics import Sums, shown_row
from w2f_torchrl.utils.environment import note_environment
from w2f_torchrl.utils.leftovers import Leftovers
from w2f_torchrl.utils.logging import MetricsLogger, ProgressBar
from w2f_torchrl.utils.main_guard import require_main_guard
from w2f_torchrl.utils.memory import keep_freed_memory
from w2f_torchrl.utils.random_state import random_state, restore_random_state
from w2f_torchrl.utils.seeding import derive_seed
from w2f_torchrl.utils.stopping import StopRequested, may_be_cut

logger = logging.getLogger(__name__)

T = TypeVar("T")


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
        self._leftovers = Leftovers(self.run_dir, self.ranks.rank)
        try:
            # What is loaded and compiled here is made again by a resume: it ends at any moment.
            with stop_on_signal(), may_be_cut(at_once=True):
                self._prepare()
        except BaseException as error:
            self._abandon()
            if isinstance(error, StopRequested) and error.number == signal.SIGINT:
                raise KeyboardInterrupt from None
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
    def collector(self) -> AnyCollector:
        """What steps the environments; another one after its workers were lost."""
        return self.collection.collector

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
        saved = None if checkpoint is None else load_run(checkpoint, config)
        torch.manual_seed(derive_seed(config.seed, "learner", ranks.rank))
        keep_freed_memory()
        self.state = RunState.build(config, ranks, saved)
        self.learner, self.masks = self.state.learner, self.state.masks
        self.action_size = self.state.action_size
        self.resumption: Resumption | None = None
        self._built = self._compiled = False
        self._open_run_dir(saved, checkpoint)

    def _find_checkpoint(self, again: bool) -> Path | None:
        self._lock.acquire()
        self._leftovers.clear()
        return find_checkpoint(self.config, again=again)

    def _open_run_dir(self, saved: Checkpoint | None, checkpoint: Path | None) -> None:
        """Take the run directory, and bring everything to where the checkpoint has it."""
        config, ranks = self.config, self.ranks
        if not ranks.is_first:
            self._leftovers.clear()
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
        self.tolerance = Tolerance(self.run_dir, config.evaluation.max_failures)

    def _build_workers(self) -> None:
        """Start what takes processes, threads and memory."""
        config, state, resumption = self.config, self.state, self.resumption
        self._leftovers.take()
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
        self.collection = start_collecting(state, self.run_dir, resumption, self._leftovers)
        self.replay, self._restarts_logged = self.collection.replay, self.collection.restarts
        total = config.training.total_frames
        self.progress = self.ranks.shown_by_first(
            lambda: ProgressBar(total, initial_frames=self.frames, initial_updates=self.updates)
        )
        if resumption is not None:
            self.tolerance.in_a_row = dict(resumption.state.get("failures", {}))
        self.checkpoints = RunCheckpoints(
            state, self.collection, self.logger, self.diagnostics, self.tolerance
        )
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

        The signals are SIGINT (Ctrl+C), SIGTERM, SIGUSR1, SIGUSR2, and SIGHUP unless it is ignored.

        Raises:
            SystemExit: If the scheduler has asked for the machine, in a job that submitit started;
                or if a signal comes before the first step, when there is nothing to save.
        """
        with stop_on_signal() as stopped:
            stop = self._train(stopped)
        if stop:
            hand_over(stopped, self.run_dir, is_first=self.ranks.is_first)
        if stop and not self._built:
            if stopped[0] == signal.SIGINT:
                raise KeyboardInterrupt
            raise StopRequested(stopped[0])

    def _train(self, stopped: list[int]) -> bool:
        """All of :meth:`train` that a signal may come in; returns whether one ended it."""
        try:
            with may_be_cut(at_once=True):
                self._build_workers()
            stop = self._run(stopped)
            logger.info("checkpoint: %s", self.save())
        except StopRequested:  # before the first step
            logger.info("stopped while the run was started: there is nothing new to save")
            self._close(report=False)
            return True
        except BaseException as error:
            self._fail(error)
            self._close()
            raise
        # Who sends another signal than Ctrl+C takes the machine away, in seconds maybe.
        drawn = not stop or stopped[:1] == [signal.SIGINT]
        if errors := self._close(report=drawn):
            raise errors[0]
        return stop

    def _run(self, stopped: list[int]) -> bool:
        """Go on from wherever the counters are: learn what is due, then collect.

        Returns:
            Whether a signal ended the run.
        """
        try:
            while True:
                self._learn(stopped)
                stop = self.ranks.agree(bool(stopped))
                if stop or self.frames >= self.config.training.total_frames:
                    break
                self.collection.send_weights(self.learner.policy)
                self._evaluate_if_due()
                self._checkpoint_if_due()
                self._collect()
            return stop or self._finish()
        except StopRequested:
            return True
        except WorkerError as error:
            if not stopped or self.ranks.size > 1:
                raise
            logger.warning("%s The run ends without it.", error)
            return True

    def _finish(self) -> bool:
        """Evaluate after the last frame, and write the last row of metrics.

        Returns:
            Whether a signal cut that short; a resume does it again.
        """
        cut = False
        if self.state.evaluations.lack_the_end(self.frames):
            try:
                self.evaluate()
            except StopRequested:
                cut = True
        if any(self.ranks.gather([cut])):
            return True
        self._flush()
        return False

    def _collect(self) -> None:
        """Take a batch of transitions from the workers."""
        with self.collection.taking_a_batch():
            batch = self.collection.next_batch()
            if self.collection.restarts > self._restarts_logged:
                self._restarts_logged = self.collection.restarts
                row = {"train/worker_restarts": float(self.collection.restarts)}
                self.logger.log(row, frames=self.frames, updates=self.updates)
            self._take(batch)

    def _take(self, batch: TensorDictBase) -> None:
        """Store a batch of transitions ``[N, T]`` and log the episodes that ended in it."""
        check_finite(batch)
        keeps_latents = self.config.replay.latents and LATENT_KEYS[0] in batch.keys(True)
        classes = self.config.model.num_classes if keeps_latents else None
        records = records_from_rollout(batch, latent_classes=classes)
        try:  # the other ranks wait for this one's episodes
            with may_be_cut() if self.ranks.size == 1 else nullcontext():
                records = self.masks.label(records)
        except StopRequested:
            self.collection.put_back(batch)
            raise
        self.replay.extend(records)
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
            sample = self._update() if self._compiled else self._first_update()
            self.state.counters.add_update()
            if self.updates % self.config.logging.every_updates == 0:
                self._flush()
            counts = {"frames": self.frames, "updates": self.updates}
            show = partial(self.diagnostics.after_update, sample, **counts)
            self._attempt("a picture or histogram of training", show)
            self.progress.update(frames=self.frames, updates=self.updates)

    def _update(self) -> TensorDictBase:
        """Draw a sample ``[B, T]`` and learn from it."""
        sample = self.replay.sample()
        slots = sample["index"]
        sample = self._to_device(sample)
        metrics = self.learner.update(sample)
        self.state.metrics.add(metrics, slots)
        if self.learner.latents is not None:
            self.replay.write_back(slots, self.learner.latents, metrics[FINITE])
        return sample

    def _first_update(self) -> TensorDictBase:
        """The first update of this process compiles, for minutes: a signal ends it at any moment.

        Raises:
            StopRequested: After putting everything back, so that the update is due as before.
        """
        if self.learner.execution == "eager" or self.ranks.size > 1:
            self._compiled = True
            return self._update()
        sampling, random = self.replay.sampling_state(), random_state()
        buffers = {name: value.clone() for name, value in self.learner.loss.named_buffers()}
        try:
            with may_be_cut(at_once=lambda: self.learner.intact):
                sample = self._update()
        except StopRequested:
            self.replay.load_sampling_state(sampling)
            restore_random_state(random)
            for name, value in self.learner.loss.named_buffers():
                value.copy_(buffers[name])
            raise
        self._compiled = True
        return sample

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

    def _attempt(self, work: str, action: Callable[[], T]) -> T | None:
        """Do what may fail without ending the run; None if it does."""
        return self.tolerance.attempt(work, action, frames=self.frames, updates=self.updates)

    def _evaluate_if_due(self) -> None:
        if not self.state.evaluations.are_due(self.frames):
            return
        try:
            self.evaluate()
        except StopRequested:
            if self.ranks.size == 1:
                raise
            return  # the others collect meanwhile: all stop together, at the next update
        self.diagnostics.draw_curves()

    def evaluate(self) -> dict[str, float]:
        """Play evaluation episodes; log returns and videos. Only rank 0 does.

        What fails is written to ``exceptions.txt``; in a row it may do so
        ``evaluation.max_failures`` times.

        Returns:
            The metrics; none where the evaluation failed.

        Raises:
            StopRequested: If a stop signal cut it short. It is due as before then.
        """
        evaluations = self.state.evaluations
        if not self.ranks.is_first:  # it doesn't wait: it collects meanwhile
            evaluations.last = self.frames
            return {}
        random = random_state()
        try:
            with may_be_cut():
                evaluation = self._attempt("the evaluation", self._play)
                measured = {}
                if evaluation is not None and self.config.evaluation.filtering:
                    probe = evaluations.measure_filtering
                    measured = self._attempt("the measures of filtering", probe) or {}
        except StopRequested:
            restore_random_state(random)
            raise
        evaluations.last = self.frames
        if evaluation is None:
            self._attempt("making the evaluation's environments anew", self.evaluator.renew)
            return {}
        evaluation.metrics |= measured
        if evaluations.is_best(evaluation):
            self.checkpoints.save_best()
        self.logger.log(evaluation.metrics, frames=self.frames, updates=self.updates)
        counts = {"frames": self.frames, "updates": self.updates}
        show = partial(self.diagnostics.after_evaluation, evaluation, **counts)
        self._attempt("a video of the evaluation", show)
        return evaluation.metrics

    def _play(self) -> Evaluation:
        return self.state.evaluations.play(self.evaluator, self.frames)

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

    def _close(self, *, report: bool = True) -> list[Exception]:
        """End processes, threads and files, whatever there is of them; errors are logged.

        Args:
            report: Whether to draw curves and write the report.
        """
        ends: list[Callable[[], None]] = [
            getattr(self, name).close
            for name in ("progress", "collection", "evaluator", "writer")
            if hasattr(self, name)
        ]
        if self.ranks.is_first and self._built:
            counts = {"frames": self.frames, "updates": self.updates}
            finish = partial(finish_run, self.config, self.logger, self.clock, draw=report)
            ends.append(partial(finish, **counts))
        errors = end_all([*ends, self._leftovers.remove])
        self._abandon()
        return errors

    def _abandon(self) -> None:
        """Close the loggers if they aren't, and give the run directory back."""
        if self.ranks.is_first and hasattr(self, "logger"):
            end_all([self.logger.close])
        self._lock.abandon()

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
        with malformed_is_an_error(path):
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

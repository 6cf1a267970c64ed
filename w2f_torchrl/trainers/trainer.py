"""The loop of a run: collect, replay, learn, evaluate, write down."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TypeVar

from tensordict import TensorDictBase

from w2f_torchrl.checkpoint.writer import CheckpointWriter
from w2f_torchrl.config import RunConfig
from w2f_torchrl.data import StreamReplayBuffer, UpdateSchedule, WorkerError
from w2f_torchrl.trainers.collecting import AnyCollector
from w2f_torchrl.trainers.interruptions import keep_exception, stop_on_signal
from w2f_torchrl.trainers.preemption import hand_over
from w2f_torchrl.trainers.run import (
    Bar,
    Parts,
    Run,
    build_parts,
    finish,
    open_run,
    start_bar,
    train_masks,
)
from w2f_torchrl.trainers.updates import Updates
from w2f_torchrl.utils.closing import end_all
from w2f_torchrl.utils.random_state import random_state, restore_random_state
from w2f_torchrl.utils.ranks import Silent, describe_lost_rank, is_lost_rank
from w2f_torchrl.utils.stopping import StopRequested, may_be_cut

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Trainer:
    """Trains one agent, with worker processes that step the environments.

    One process, or several that torchrun or submitit started: then every rank builds a Trainer and
    calls :meth:`train`, rank 0 logs, evaluates and writes checkpoints, and ``steps``, ``frames``
    and ``updates`` count the work of all ranks together.

    Args:
        run: An open run; or its settings, with which the run is opened and every part built.
        parts: All that the run consists of; None builds the usual ones.

    Raises:
        ConfigError: If a setting is out of range.
        CheckpointError: If the run directory holds a run already and ``resume`` is null, or is in
            use by another process, or the checkpoint to resume from is missing, damaged or of
            another model.
        RuntimeError: If a script builds it outside ``if __name__ == "__main__":``, and it would
            start worker processes.
    """

    def __init__(self, run: Run | RunConfig, parts: Parts | None = None):
        if isinstance(run, RunConfig):
            run = open_run(run)
        if parts is None:
            try:
                parts = build_parts(run)
            except BaseException as error:
                run.abandon(error)
                raise
        self.run = run
        self.config, self.ranks, self.run_dir = run.config, run.ranks, run.directory
        self.logger = run.logger
        self.learner, self.masks, self.collection = parts.learner, parts.masks, parts.collection
        self.evaluator, self.checkpoints = parts.evaluator, parts.checkpoints
        self.counters, self.metrics = parts.progress.counters, parts.progress.metrics
        self.evaluations, self.tolerance = parts.progress.evaluations, parts.progress.tolerance
        self.diagnostics, self.clock = parts.progress.diagnostics, parts.progress.clock
        self.random = parts.progress.random
        self.bar: Bar = Silent()
        self.started = False
        """Whether workers, writer and progress bar run."""
        self._updates = Updates(run, parts)
        self._restarts_logged = self.collection.restarts
        run.built()

    @property
    def steps(self) -> int:
        """Agent steps so far, over all envs and ranks."""
        return self.counters.steps

    @property
    def frames(self) -> int:
        """Environment frames (control steps) so far."""
        return self.counters.frames

    @property
    def updates(self) -> int:
        """Learner updates so far."""
        return self.counters.updates

    @property
    def collector(self) -> AnyCollector:
        """What steps the environments; a new one after its workers were lost."""
        return self.collection.collector

    @property
    def replay(self) -> StreamReplayBuffer:
        """The replay of this rank."""
        return self.collection.replay

    @property
    def schedule(self) -> UpdateSchedule:
        """How many updates are due after how many agent steps."""
        return self.counters.schedule

    @property
    def writer(self) -> CheckpointWriter:
        """What writes checkpoints in the background."""
        assert self.checkpoints.writer is not None, "the run has started"
        return self.checkpoints.writer

    def start(self) -> None:
        """Start what takes processes, threads and memory; :meth:`train` calls it."""
        resumed = self.run.resumption is not None
        self.run.leftovers.take()
        if self.evaluator is not None:
            self.evaluator.start()
        if not resumed:
            train_masks(self.run, self.masks)
        self.collection.start(self.steps, resumed=resumed)
        self._restarts_logged = self.collection.restarts
        self.bar = start_bar(self.run, self.counters)
        self.checkpoints.start(self.collection.run_replay.files)
        self.random.resume()
        self.started = True

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
            hand_over(stopped, self.run.directory, is_first=self.ranks.is_first)
        if stop and not self.started:
            if stopped[0] == signal.SIGINT:
                raise KeyboardInterrupt
            raise StopRequested(stopped[0])

    def _train(self, stopped: list[int]) -> bool:
        """All of :meth:`train` that a signal may come in; returns whether one ended it."""
        try:
            with may_be_cut(at_once=True):
                self.start()
            stop = self._run(stopped)
            logger.info("checkpoint: %s", self.save())
        except StopRequested:  # before the first step
            logger.info("stopped while the run was starting: nothing new to save")
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
        """Continue from wherever the counters are: learn what is due, then collect.

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
        if self.evaluations.final_is_due(self.frames):
            try:
                self.evaluate()
            except StopRequested:
                cut = True
        if any(self.ranks.gather([cut])):
            return True
        self._updates.flush()
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
        episodes = self.collection.store(batch, self.masks.label)
        before, ranks = self.steps, self.ranks.size
        # In the order of time, with the frames of the step that ended the episode.
        for episode in sorted(self.ranks.gather(episodes), key=attrgetter("column")):
            self.counters.last_return = episode.episode_return
            self.counters.steps = before + (episode.column + 1) * len(batch) * ranks
            metrics = {"episode/return": episode.episode_return, "episode/length": episode.length}
            self.logger.log(metrics, frames=self.frames, updates=self.updates)
        self.counters.steps = before + batch.numel() * ranks
        self.bar.update(
            frames=self.frames, updates=self.updates, last_return=self.counters.last_return
        )

    def _learn(self, stopped: list[int]) -> None:
        """Do the updates that are due."""
        for _ in range(self.counters.updates_due()):
            if self.ranks.agree(bool(stopped)):
                return
            sample = self._updates.update()
            counts = {"frames": self.frames, "updates": self.updates}
            show = partial(self.diagnostics.after_update, sample, **counts)
            self._attempt("a picture or histogram of training", show)
            self.bar.update(frames=self.frames, updates=self.updates)

    def _attempt(self, work: str, action: Callable[[], T]) -> T | None:
        """Do what may fail without ending the run; None if it does."""
        return self.tolerance.attempt(work, action, frames=self.frames, updates=self.updates)

    def _evaluate_if_due(self) -> None:
        if not self.evaluations.are_due(self.frames):
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
        evaluations = self.evaluations
        if (evaluator := self.evaluator) is None:  # this rank collects meanwhile
            evaluations.last = self.frames
            return {}
        random = random_state()
        try:
            with may_be_cut():
                play = partial(evaluations.play, evaluator, self.frames)
                evaluation = self._attempt("the evaluation", play)
                measured = {}
                if evaluation is not None and self.config.evaluation.filtering:
                    probe = evaluations.measure_filtering
                    measured = self._attempt("the measures of filtering", probe) or {}
        except StopRequested:
            restore_random_state(random)
            raise
        evaluations.last = self.frames
        if evaluation is None:
            self._attempt("rebuilding the evaluation's environments", evaluator.start)
            return {}
        evaluation.metrics |= measured
        if evaluations.is_best(evaluation):
            self._save_best()
        self.logger.log(evaluation.metrics, frames=self.frames, updates=self.updates)
        counts = {"frames": self.frames, "updates": self.updates}
        show = partial(self.diagnostics.after_evaluation, evaluation, **counts)
        self._attempt("a video of the evaluation", show)
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
        if not (together and self.started and self.learner.intact and self.learner.is_finite()):
            logger.error("no emergency checkpoint: the last one stays the newest")
            return
        try:
            logger.info("emergency checkpoint: %s", self.save(exception=text))
        except Exception:  # whatever it is, the first exception is what the caller must see
            logger.exception("the emergency checkpoint failed; the last one stays the newest")

    def _close(self, *, report: bool = True) -> list[Exception]:
        """End processes, threads and files; errors are logged.

        Args:
            report: Whether to draw curves and write the report.
        """
        ends: list[Callable[[], None]] = [self.bar.close, self.collection.close]
        if self.evaluator is not None:
            ends.append(self.evaluator.close)
        ends.append(self.checkpoints.close)
        if self.ranks.is_first and self.started:
            ends.append(partial(finish, self.run, self.clock, self.counters, draw=report))
        errors = end_all([*ends, self.run.leftovers.remove])
        self.run.close()
        return errors

    # ---------------------------------------------------------------- checkpoints

    def _checkpoint_if_due(self) -> None:
        due = self.checkpoints.are_due(self.updates)
        if self.config.replay.storage == "disk":
            # A batch brings a stream at most two records a step.
            full = self.writer.make_room(2 * self.config.collection.steps_per_batch)
            due |= any(self.ranks.gather([full]))
        if due:
            self._save(wait=False)

    def save(self, exception: str | None = None) -> Path:
        """Write a checkpoint of all that the run needs to continue, and wait until it is on disk.

        All ranks call it. Rank 0 writes what is equal on all of them; each its own replay and envs.

        Args:
            exception: The traceback of what ended the run.

        Returns:
            The checkpoint's path.

        Raises:
            FloatingPointError: If the networks or the optimizer hold a number that is not finite:
                they must not take the place of a good checkpoint.
        """
        return self._save(wait=True, exception=exception)

    def _save(self, *, wait: bool, exception: str | None = None) -> Path:
        if not self.learner.is_finite():
            raise FloatingPointError(
                f"the weights are not finite at update {self.updates}: no checkpoint is "
                "written, the last one stays the newest. optimizer.lr and the loss scales are the "
                "first places to look."
            )
        self.ranks.copy_from_first(self.masks.learned())
        if self.ranks.is_first:
            self.masks.save_student(self.run_dir / "student.pt")
        counts = {"updates": self.updates, "frames": self.frames}
        return self.checkpoints.save(**counts, wait=wait, exception=exception)

    def _save_best(self) -> None:
        """Keep the networks as those that evaluated best, unless they are not finite.

        The run's next checkpoint says so then.
        """
        if self.learner.is_finite():
            self.checkpoints.save_best(updates=self.updates, frames=self.frames)

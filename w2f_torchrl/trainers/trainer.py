"""The loop of a run: collect, replay, learn, evaluate, log."""

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
    announce_run,
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
    """Train one agent, with worker processes that step the environments.

    With several processes, started by torchrun or submitit, every rank builds a Trainer and calls
    :meth:`train`; rank 0 logs, evaluates and writes checkpoints, and ``steps``, ``frames`` and
    ``updates`` count the work of all ranks together.

    Args:
        run: An open run, or the settings with which to open one.
        parts: The parts of the run; None builds the usual ones.

    Raises:
        ConfigError: If a setting is out of range.
        CheckpointError: If the run directory already holds a run and ``resume`` is null, if another
            process uses it, or if the checkpoint to resume from is missing, damaged or of
            another model.
        RuntimeError: If it would start worker processes and a script builds it outside
            ``if __name__ == "__main__":``.
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
        self.logger = parts.progress.logger
        self.learner, self.masks, self.collection = parts.learner, parts.masks, parts.collection
        self.evaluator, self.checkpoints = parts.evaluator, parts.checkpoints
        self.counters, self.metrics = parts.progress.counters, parts.progress.metrics
        self.evaluations, self.tolerance = parts.progress.evaluations, parts.progress.tolerance
        self.diagnostics, self.clock = parts.progress.diagnostics, parts.progress.clock
        self.random = parts.progress.random
        self.bar: Bar = Silent()
        self.started = False
        """Whether workers, writer and progress bar are running."""
        self._progress, self._updates = parts.progress, Updates(run, parts)
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
        """The collector, which steps the environments; replaced when its workers are lost."""
        return self.collection.collector

    @property
    def replay(self) -> StreamReplayBuffer:
        """The replay of this rank."""
        return self.collection.replay

    @property
    def schedule(self) -> UpdateSchedule:
        """The schedule of updates per agent step."""
        return self.counters.schedule

    @property
    def writer(self) -> CheckpointWriter:
        """The writer of checkpoints in the background."""
        assert self.checkpoints.writer is not None, "the run has started"
        return self.checkpoints.writer

    def start(self) -> None:
        """Start processes and threads and allocate memory; :meth:`train` calls it."""
        resumed = self.run.resumption is not None
        masks, last = self.masks.name, self.evaluations.last
        plan = announce_run(self.config, self.ranks, self.learner, masks, self.counters, last)
        self.run.leftovers.take()
        if self.evaluator is not None:
            self.evaluator.start()
        if not resumed:
            train_masks(self.run, self.masks, self.collection)
        self.collection.start(self.steps, resumed=resumed)
        self._restarts_logged = self.collection.restarts
        self.bar = start_bar(self.config, self.ranks, plan)
        self.checkpoints.start(self.collection.run_replay.files)
        self.random.resume()
        self.started = True

    # ---------------------------------------------------------------- the loop

    def train(self) -> None:
        """Run to the last frame or until a stop signal; write a checkpoint in both cases.

        The signals are SIGINT (Ctrl+C), SIGTERM, SIGUSR1, SIGUSR2, and SIGHUP unless it is ignored.

        Raises:
            SystemExit: If the scheduler preempts a job that submitit started, or if a signal
                arrives before the first step, when nothing needs to be saved.
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
        """Train, and return whether a signal ended the run."""
        try:
            with may_be_cut(at_once=True):
                self.start()
            stop = self._run(stopped)
            self.bar.begin("writing a checkpoint")
            logger.info("checkpoint: %s", self.save())
        except StopRequested:  # before the first step
            logger.info("stopped while the run was starting: nothing new to save")
            self._close(report=False)
            return True
        except BaseException as error:
            self._fail(error)
            self._close()
            raise
        # Signals other than Ctrl+C announce that the machine is lost, perhaps within seconds.
        drawn = not stop or stopped[:1] == [signal.SIGINT]
        if errors := self._close(report=drawn):
            raise errors[0]
        return stop

    def _run(self, stopped: list[int]) -> bool:
        """Alternate between the updates that are due and collecting, from the current counters.

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
        """Evaluate after the last frame, and log the last row of metrics.

        Returns:
            Whether a signal interrupted that; a resume repeats it.
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
        """Collect a batch of transitions and store it."""
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
        # In chronological order, each with the frames of the step that ended the episode.
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
            self._attempt("an image or histogram of training", show)
            self.bar.update(**counts, mask_iou=self._updates.mask_iou)

    def _attempt(self, work: str, action: Callable[[], T]) -> T | None:
        """Call a function that may fail without ending the run; return None if it fails."""
        return self.tolerance.attempt(work, action, frames=self.frames, updates=self.updates)

    def _evaluate_if_due(self) -> None:
        if not self.evaluations.are_due(self.frames):
            return
        try:
            self.evaluate()
        except StopRequested:
            if self.ranks.size == 1:
                raise
            return  # the other ranks are collecting: all stop together, at the next update
        self.diagnostics.draw_curves()

    def evaluate(self) -> dict[str, float]:
        """Play evaluation episodes on rank 0; log returns and videos.

        Failures are written to ``exceptions.txt``; ``evaluation.max_failures`` of them in a row end
        the run.

        Returns:
            The metrics; empty if the evaluation failed, and on other ranks.

        Raises:
            StopRequested: If a stop signal interrupted it. It then stays due.
        """
        evaluations = self.evaluations
        if (evaluator := self.evaluator) is None:  # only rank 0 evaluates
            evaluations.last = self.frames
            return {}
        self.bar.begin("evaluating")
        random = random_state()
        try:
            with may_be_cut():
                play = partial(evaluations.play, evaluator, self.frames)
                evaluation = self._attempt("the evaluation", play)
                measured = {}
                if evaluation is not None and self.config.evaluation.filtering:
                    probe = partial(evaluations.measure_filtering, evaluator)
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
        """Record an exception, and write an emergency checkpoint if possible; raise nothing."""
        if is_lost_rank(self.ranks, error):  # logged first: torchrun ends this rank soon
            logger.error("%s", describe_lost_rank(self.ranks, error))
        counters = {"frames": self.frames, "updates": self.updates}
        text = keep_exception(self.run_dir, error, **counters)
        logger.error("%s at frame %d, update %d", repr(error)[:500], self.frames, self.updates)
        # Other ranks may be elsewhere or dead. All see the same gradients, one its transitions.
        together = self.ranks.size == 1 or type(error) is FloatingPointError
        if not (together and self.started and self.learner.intact and self.learner.is_finite()):
            logger.error("no emergency checkpoint is written: the previous one stays the newest")
            return
        try:
            logger.info("emergency checkpoint: %s", self.save(exception=text))
        except Exception:  # the caller must see the first exception, not this one
            logger.exception("the emergency checkpoint failed; the previous one stays the newest")

    def _close(self, *, report: bool = True) -> list[Exception]:
        """End processes and threads and close files; log the errors and return them.

        Args:
            report: Whether to draw curves and write the report.
        """
        ends: list[Callable[[], None]] = [self.bar.close, self.collection.close]
        if self.evaluator is not None:
            ends.append(self.evaluator.close)
        ends.append(self.checkpoints.close)
        if self.ranks.is_first and self.started:
            ends.append(partial(finish, self.run, self._progress, draw=report))
        errors = end_all([*ends, self.run.leftovers.remove])
        self.run.close()
        return errors

    # ---------------------------------------------------------------- checkpoints

    def _checkpoint_if_due(self) -> None:
        due = self.checkpoints.are_due(self.updates)
        if self.config.replay.storage == "disk":
            # A batch adds at most two records per step to a stream.
            full = self.writer.make_room(2 * self.config.collection.steps_per_batch)
            due |= any(self.ranks.gather([full]))
        if due:
            self._save(wait=False)

    def save(self, exception: str | None = None) -> Path:
        """Write a checkpoint from which the run can continue, and wait until it is on disk.

        All ranks call it. Rank 0 writes the shared state; each rank writes its replay and envs.

        Args:
            exception: Traceback of the exception that ended the run.

        Returns:
            The path of the checkpoint.

        Raises:
            FloatingPointError: If a number in the networks or the optimizer is not finite: they
                must not replace a good checkpoint.
        """
        return self._save(wait=True, exception=exception)

    def _save(self, *, wait: bool, exception: str | None = None) -> Path:
        if not self.learner.is_finite():
            raise FloatingPointError(
                f"the weights are not finite at update {self.updates}: no checkpoint is "
                "written, the previous one stays the newest. Check optimizer.lr and the loss "
                "scales first."
            )
        self.ranks.copy_from_first(self.masks.learned())
        if self.ranks.is_first:
            self.masks.save_student(self.run_dir / "student.pt")
        counts = {"updates": self.updates, "frames": self.frames}
        return self.checkpoints.save(**counts, wait=wait, exception=exception)

    def _save_best(self) -> None:
        """Save the networks with the best evaluation so far, unless they are not finite.

        In that case the next checkpoint raises an error.
        """
        if self.learner.is_finite():
            self.checkpoints.save_best(updates=self.updates, frames=self.frames)

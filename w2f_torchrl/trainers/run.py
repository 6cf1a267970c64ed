"""A run: the place and the processes that it has, and every part of it, in order.

:func:`open_run` takes the run directory; :func:`build_parts` builds what trains in it. The parts
are cheap to build: processes, threads and the replay's memory come with
:meth:`~w2f_torchrl.trainers.Trainer.train`.
"""

from __future__ import annotations

import logging
import signal
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeAlias, cast

import torch

from w2f_torchrl.checkpoint.folder import checkpoints_of, records_folder
from w2f_torchrl.checkpoint.lock import RunLock
from w2f_torchrl.checkpoint.parts import Checkpoints
from w2f_torchrl.checkpoint.resume import Resumption, find_resumption
from w2f_torchrl.config import ConfigError, RunConfig, config_to_dict, save_config
from w2f_torchrl.data.collector.leftovers import Leftovers
from w2f_torchrl.data.environments import EnvFacts, build_env, probe_env
from w2f_torchrl.evaluation.evaluator import Evaluator
from w2f_torchrl.evaluation.run_evaluations import RunEvaluations
from w2f_torchrl.learner.learner import Learner
from w2f_torchrl.logging.diagnostics import Diagnostics
from w2f_torchrl.logging.environment import note_environment
from w2f_torchrl.logging.metrics import MetricsLogger
from w2f_torchrl.logging.progress import ProgressBar
from w2f_torchrl.logging.wandb import restore_wandb_run
from w2f_torchrl.masks.choose import build_mask_source, choose_source
from w2f_torchrl.masks.prepare import prepare
from w2f_torchrl.masks.sources import MaskSource
from w2f_torchrl.modules.components import encoder_keys
from w2f_torchrl.trainers.collecting import Collection, count_workers
from w2f_torchrl.trainers.counters import RunCounters
from w2f_torchrl.trainers.interruptions import stop_on_signal
from w2f_torchrl.trainers.preemption import is_restart
from w2f_torchrl.trainers.run_logging import RunClock, build_loggers, finish_run
from w2f_torchrl.trainers.run_replay import RunReplay
from w2f_torchrl.trainers.tolerance import Tolerance
from w2f_torchrl.trainers.update_metrics import UpdateMetrics
from w2f_torchrl.utils.closing import end_all
from w2f_torchrl.utils.main_guard import require_main_guard
from w2f_torchrl.utils.memory import keep_freed_memory
from w2f_torchrl.utils.random_state import RandomStreams
from w2f_torchrl.utils.ranks import Ranks, Silent
from w2f_torchrl.utils.seeding import derive_seed
from w2f_torchrl.utils.stopping import StopRequested, may_be_cut

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """What a run has before any of its parts is built.

    As a context it closes what is left open, and until :meth:`built` a stop signal ends it at once.
    """

    config: RunConfig
    """Validated and frozen; ``distributed.ranks`` and ``segmentation.chosen`` are filled in."""
    ranks: Ranks
    device: torch.device
    directory: Path
    lock: RunLock
    leftovers: Leftovers
    resumption: Resumption | None
    """The checkpoint that it resumes from."""
    building: ExitStack
    """Holds the handlers of stop signals while the parts are built."""
    logger: MetricsLogger = field(default_factory=lambda: cast(MetricsLogger, Silent()))
    """Silent on the ranks other than rank 0, and before :meth:`open_log`."""

    def __enter__(self) -> Run:
        """Return the run."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Close the run.

        Raises:
            KeyboardInterrupt: In place of the error of a Ctrl+C before the first step.
        """
        self.abandon(error)

    def abandon(self, error: BaseException | None = None) -> None:
        """Close the run, whatever of it is open.

        Args:
            error: What ended it before its time.

        Raises:
            KeyboardInterrupt: In place of the error of a Ctrl+C before the first step.
        """
        self.building.close()
        self.close()
        _raise_interrupt(error)

    def open_log(self) -> MetricsLogger:
        """Open the metrics. What is wrong with a part shows before: then nothing is written."""
        if self.resumption is not None and self.ranks.is_first:
            restore_wandb_run(self.directory, self.resumption.own["log"]["wandb"])
        self.logger = self.ranks.on_first_or_silent(
            lambda: MetricsLogger(self.directory, build_loggers(self.config))
        )
        return self.logger

    def built(self) -> None:
        """Leave stop signals to the trainer: all parts are built."""
        self.building.close()

    def close(self) -> None:
        """Close the loggers, and give the run directory back. Closing twice is allowed."""
        end_all([self.logger.close])
        self.lock.abandon()


def open_run(config: RunConfig) -> Run:
    """Validate the settings, join the other ranks, take the run directory, find what to resume.

    Raises:
        ConfigError: If a setting is out of range.
        CheckpointError: If the directory is in use or holds another run, or the checkpoint to
            resume from is missing, damaged or of another model.
        RuntimeError: If a script starts worker processes outside ``if __name__ == "__main__":``.
    """
    ranks = Ranks.from_environment()
    config = config.validated(ranks=ranks.size)
    if count_workers(config, ranks.local_size):
        require_main_guard("Trainer")
    directory = Path(config.run_dir)
    lock, leftovers = RunLock(directory), Leftovers(directory, ranks.rank)
    building = ExitStack()
    try:
        # What is loaded and compiled here is made again by a resume, so it may end at any moment.
        building.enter_context(stop_on_signal())
        building.enter_context(may_be_cut(at_once=True))
        device = config.torch_device()
        ranks.connect(device, config.distributed.timeout_seconds)
        # torchrun counts restarts only on the machine where a rank failed.
        restart = any(ranks.gather([is_restart(directory)]))
        ranks.on_first(lock.acquire)
        leftovers.clear()
        resumption = find_resumption(config, ranks, is_restart=restart)
    except BaseException as error:
        building.close()
        lock.abandon()
        _raise_interrupt(error)
        raise
    torch.manual_seed(derive_seed(config.seed, "learner", ranks.rank))
    keep_freed_memory()
    return Run(config, ranks, device, directory, lock, leftovers, resumption, building)


def _raise_interrupt(error: BaseException | None) -> None:
    if isinstance(error, StopRequested) and error.number == signal.SIGINT:
        raise KeyboardInterrupt from None


def choose_masks(run: Run, env: EnvFacts) -> MaskSource:
    """Build what makes the masks. ``segmentation=auto`` chooses once per run, on rank 0.

    Raises:
        ConfigError: If masks cannot be made.
    """
    before = None
    if run.resumption is not None:
        before = str(run.resumption.checkpoint.payload["masks"]["name"])
    choose = partial(choose_source, run.config, env.has_mask, before=before)
    source = run.ranks.on_first(choose)
    run.config = run.config.with_masks_from(source)
    return build_mask_source(run.config, source, env.has_mask)


def build_learner(run: Run, env: EnvFacts) -> Learner:
    """Build the networks, their losses and the optimizer.

    Raises:
        ConfigError: If a loss has no weight, or the encoder reads what the env does not observe.
    """
    training = run.config.training
    if run.ranks.size > 1:
        logger.info(
            "%d ranks of %d sequences: an update's batch is %d sequences of %d records",
            run.ranks.size,
            training.batch_size,
            run.config.effective_batch_size,
            training.batch_length,
        )
    gradients = run.config.gradients
    try:
        learner = Learner.from_config(run.config, env.action_size, gradients=gradients)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    offered = ("pixels", *env.observations)
    missing = [key for key in encoder_keys(learner.world_model.encoder) if key not in offered]
    if missing:
        raise ConfigError(
            f"model.encoder={run.config.model.encoder} reads {', '.join(missing)}, but "
            f"environment.domain={run.config.environment.domain} observes {', '.join(offered)}."
        )
    return learner


def build_collection(run: Run, learner: Learner, env: EnvFacts) -> Collection:
    """Build the workers and the replay of this rank; they start with training."""
    records = None if run.resumption is None else run.resumption.records
    replay = RunReplay(run.config, records_folder(run.directory, run.ranks.rank), records)
    return Collection(
        run.config,
        run.ranks,
        learner.policy,
        env.action_size,
        replay,
        run.leftovers,
        replay.kept(env.observations),
    )


def build_evaluator(
    run: Run, learner: Learner, masks: MaskSource, env: EnvFacts
) -> Evaluator | None:
    """Build what plays evaluation episodes; only rank 0 has one."""
    if not run.ranks.is_first:
        return None
    seed = derive_seed(run.config.seed, "eval", 0)
    return Evaluator(
        run.config, seed, learner.policy, env.action_size, masks.segment, env.observations
    )


@dataclass
class Progress:
    """What a run has counted and still has to write down."""

    counters: RunCounters
    metrics: UpdateMetrics
    """Of the row that is not written yet."""
    evaluations: RunEvaluations
    tolerance: Tolerance
    diagnostics: Diagnostics
    random: RandomStreams
    clock: RunClock


def build_progress(run: Run, learner: Learner) -> Progress:
    """Build what counts and shows how a run gets on."""
    config, log = run.config, run.open_log()
    return Progress(
        counters=RunCounters(config),
        metrics=UpdateMetrics(run.device),
        evaluations=RunEvaluations(config, learner),
        tolerance=Tolerance(run.directory, config.evaluation.max_failures),
        diagnostics=run.ranks.on_first_or_silent(lambda: Diagnostics(config, learner, log)),
        random=RandomStreams(),
        clock=RunClock(run.directory),
    )


def build_checkpoints(
    run: Run,
    *,
    env: EnvFacts,
    learner: Learner,
    masks: MaskSource,
    collection: Collection,
    progress: Progress,
) -> Checkpoints:
    """List what the run's checkpoints hold, and put back what it resumes from."""
    header = {
        "config": config_to_dict(run.config),
        "action_size": env.action_size,
        "ranks": run.ranks.size,
    }
    checkpoints = Checkpoints(
        checkpoints_of(run.directory, run.ranks.rank),
        header=header if run.ranks.is_first else None,
        shared={
            "learner": learner,
            "counters": progress.counters,
            "masks": masks,
            "evaluations": progress.evaluations,
        },
        own={
            "metrics": progress.metrics,
            "failures": progress.tolerance,
            "diagnostics": progress.diagnostics,
            "log": run.logger,
            "collection": collection,
            "sampling": collection.run_replay,
            "random": progress.random,
        },
        keep=run.config.checkpoint.keep,
        every_updates=run.config.checkpoint.every_updates,
    )
    if run.resumption is not None:
        _resume(run, run.resumption, checkpoints, progress.counters)
    else:
        # resume=auto of a run that ended before its first checkpoint begins again.
        run.logger.truncate_after(-1)
    progress.clock.start(progress.counters.frames, progress.counters.updates)
    if run.ranks.is_first:
        save_config(run.config, run.directory / "config.yaml")
        note_environment(run.directory / "environment.json", progress.counters.frames, run.device)
    return checkpoints


def _resume(
    run: Run, resumption: Resumption, checkpoints: Checkpoints, counters: RunCounters
) -> None:
    checkpoints.restore(resumption)
    if resumption.must_fill_again:
        counters.fill_again()
    logger.info(
        "resumed %s at %d frames, %d updates", resumption.path, counters.frames, counters.updates
    )


def train_masks(run: Run, masks: MaskSource) -> None:
    """Train a source of masks that learns, on rank 0's frames, before the first step."""
    prepare(masks, run.config, partial(build_env, run.config.environment))
    run.ranks.copy_from_first(masks.learned())


Bar: TypeAlias = ProgressBar | Silent


def start_bar(run: Run, counters: RunCounters) -> Bar:
    """Show a run's progress, on rank 0."""
    total, frames, updates = run.config.training.total_frames, counters.frames, counters.updates
    return run.ranks.on_first_or_silent(
        lambda: ProgressBar(total, initial_frames=frames, initial_updates=updates)
    )


def finish(run: Run, clock: RunClock, counters: RunCounters, *, draw: bool) -> None:
    """Finish what rank 0 shows of a run, and say what it came to.

    Args:
        run: The run.
        clock: Its clock.
        counters: Its counters.
        draw: Whether to draw curves and write the report, which takes seconds.
    """
    counts = {"frames": counters.frames, "updates": counters.updates}
    finish_run(run.config, run.logger, clock, draw=draw, **counts)


@dataclass
class Parts:
    """All that a run consists of."""

    learner: Learner
    masks: MaskSource
    collection: Collection
    evaluator: Evaluator | None
    progress: Progress
    checkpoints: Checkpoints


def build_parts(run: Run) -> Parts:
    """Build every part of a run, in order, and put back what it resumes from."""
    env = probe_env(run.config)
    masks = choose_masks(run, env)
    learner = build_learner(run, env)
    collection = build_collection(run, learner, env)
    evaluator = build_evaluator(run, learner, masks, env)
    progress = build_progress(run, learner)
    checkpoints = build_checkpoints(
        run, env=env, learner=learner, masks=masks, collection=collection, progress=progress
    )
    return Parts(learner, masks, collection, evaluator, progress, checkpoints)

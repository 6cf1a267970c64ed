"""Every part of a run, built in order, each from its own group of settings.

:func:`open_run` takes the run directory; :func:`build_parts` builds what trains in it. The parts
are cheap to build: processes, threads and the replay's memory come with
:meth:`~w2f_torchrl.trainers.Trainer.train`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial

from w2f_torchrl.algorithms.masked_input import act_on_student
from w2f_torchrl.checkpoint.folder import checkpoints_of, records_folder
from w2f_torchrl.checkpoint.parts import Checkpoints
from w2f_torchrl.checkpoint.resume import Resumption
from w2f_torchrl.config import ConfigError, RunConfig, config_to_dict, save_config
from w2f_torchrl.data import UpdateSchedule, make_collector
from w2f_torchrl.data.environments import EnvFacts, build_env, create_env, probe_env
from w2f_torchrl.data.recorded.collection import RecordedCollection, make_recorded_collection
from w2f_torchrl.data.replay.latents import latent_fields
from w2f_torchrl.evaluation.run_evaluations import (
    AnyEvaluator,
    RunEvaluations,
    make_evaluator,
    make_recorded_evaluator,
)
from w2f_torchrl.keys import MASK
from w2f_torchrl.learner.learner import Learner
from w2f_torchrl.learner.update_metrics import UpdateMetrics
from w2f_torchrl.logging.diagnostics import Diagnostics
from w2f_torchrl.logging.environment import note_environment
from w2f_torchrl.logging.metrics import MetricsLogger
from w2f_torchrl.logging.wandb import restore_wandb_run
from w2f_torchrl.masks.choose import build_mask_source, choose_source
from w2f_torchrl.masks.prepare import prepare, random_frames
from w2f_torchrl.masks.sources import MaskSource, TaughtSource
from w2f_torchrl.modules import latent_sizes
from w2f_torchrl.modules.components import encoder_keys
from w2f_torchrl.trainers.collecting import LATENT_KEYS, Collection, count_workers
from w2f_torchrl.trainers.counters import RunCounters
from w2f_torchrl.trainers.opening import Run, open_run
from w2f_torchrl.trainers.run_logging import (
    Bar,
    RunClock,
    announce_run,
    build_loggers,
    finish_run,
    start_bar,
)
from w2f_torchrl.trainers.run_replay import RunReplay, build_replaced_scenery, checkpoint_slack
from w2f_torchrl.trainers.tolerance import Tolerance
from w2f_torchrl.transforms.replaced_scenery import ReplacedSceneryTransform
from w2f_torchrl.utils.random_state import RandomStreams
from w2f_torchrl.utils.seeding import derive_seed

__all__ = [
    "Bar",
    "Parts",
    "Progress",
    "Run",
    "announce_run",
    "build_checkpoints",
    "build_collection",
    "build_counters",
    "build_evaluator",
    "build_learner",
    "build_parts",
    "build_progress",
    "build_replaced_scenery",
    "choose_masks",
    "finish",
    "make_evaluator",
    "open_run",
    "probe_env",
    "start_bar",
    "train_masks",
]

logger = logging.getLogger(__name__)


def choose_masks(run: Run, env: EnvFacts) -> MaskSource:
    """Build what makes the masks. ``segmentation=auto`` chooses once per run, on rank 0.

    Raises:
        ConfigError: If masks cannot be made.
    """
    before = None
    if run.resumption is not None:
        before = str(run.resumption.checkpoint.payload["masks"]["name"])
    settings = run.config.segmentation
    needed_by = run.config.environment.domain if run.config.needs_masks else None
    choose = partial(choose_source, settings, env.has_mask, needed_by=needed_by, before=before)
    source = run.ranks.on_first(choose)
    run.config = run.config.with_masks_from(source)
    return build_mask_source(
        settings,
        source,
        env.has_mask,
        seed=run.config.seed,
        device=run.device,
        image_size=run.config.environment.image_size,
    )


def build_learner(run: Run, env: EnvFacts, masks: MaskSource) -> Learner:
    """Build the networks, their losses and the optimizer.

    A policy that acts on masks shares the student of their source, if it has one.

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
        learner = Learner.from_config(
            run.config,
            env.action_size,
            gradients=gradients,
            discrete_actions=env.discrete_actions,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if run.config.acts_on_masks and isinstance(masks, TaughtSource):
        learner.policy = act_on_student(learner.policy, masks.student)
    offered = ("pixels", *([MASK] if run.config.acts_on_masks else []), *env.observations)
    missing = [key for key in encoder_keys(learner.world_model.encoder) if key not in offered]
    if missing:
        raise ConfigError(
            f"model.encoder={run.config.model.encoder} reads {', '.join(missing)}, but "
            f"environment.domain={run.config.environment.domain} observes {', '.join(offered)}."
        )
    return learner


def build_collection(
    run: Run, learner: Learner, env: EnvFacts, masks: MaskSource
) -> Collection | RecordedCollection:
    """Build the replay of this rank, and the workers or recorded episodes that fill it."""
    config, replay = run.config, build_replay(run, recorded=env.data is not None)
    if env.data is not None:
        place = {"rank": run.ranks.rank, "ranks": run.ranks.size}
        return make_recorded_collection(config, replay, env.data, masks.label, **place)
    observations = replay.kept(env.observations)
    envs, workers = config.environment.num_envs, count_workers(config, run.ranks.local_size)
    make = partial(
        make_collector,
        partial(create_env, config),
        learner.policy,
        primers=latent_sizes(config.model, env.action_size),
        num_envs=envs,
        num_workers=workers,
        frames_per_batch=envs * config.collection.steps_per_batch,
        rank=run.ranks.rank,
        device=run.device if config.collection.device == "learner" else "cpu",
        overlap=config.collection.overlap,
        timeout_seconds=config.collection.timeout_seconds,
        observations=observations,
        extra_keys=LATENT_KEYS if config.replay.latents else (),
    )
    must_stay = {
        "workers": workers,
        "ranks": run.ranks.size,
        "overlap": config.collection.overlap,
    }
    return Collection(
        config.collection,
        run.ranks,
        replay,
        make,
        seed=config.seed,
        environment=config_to_dict(config)["environment"] | must_stay,
        latent_classes=config.model.num_classes if config.replay.latents else None,
        leftovers=run.leftovers,
        observations=observations,
    )


def build_replay(run: Run, *, recorded: bool) -> RunReplay:
    """Build the replay of this rank; records of recorded episodes are all equally new."""
    config = run.config
    return RunReplay(
        config.replay.thawed(newest_first=False) if recorded else config.replay,
        config.training,
        config.environment,
        records_folder(run.directory, run.ranks.rank),
        None if run.resumption is None else run.resumption.records,
        slack=checkpoint_slack(config),
        latents=latent_fields(config.model, config.latent) if config.replay.latents else None,
        pin_memory=run.device.type == "cuda",
    )


def build_evaluator(
    run: Run, learner: Learner, masks: MaskSource, env: EnvFacts
) -> AnyEvaluator | None:
    """Build what evaluates, in envs or on recorded episodes; only rank 0 has one."""
    if not run.ranks.is_first:
        return None
    seed = derive_seed(run.config.seed, "eval", 0)
    options = {"seed": seed, "segment": masks.segment, "observations": env.observations}
    if env.data is not None:
        return make_recorded_evaluator(run.config, learner.policy, env.data, **options)
    return make_evaluator(run.config, learner.policy, env.action_size, **options)


@dataclass
class Progress:
    """What a run has counted and still has to write down."""

    logger: MetricsLogger
    """Silent on the ranks other than rank 0."""
    counters: RunCounters
    metrics: UpdateMetrics
    """Of the row that is not written yet."""
    evaluations: RunEvaluations
    tolerance: Tolerance
    diagnostics: Diagnostics
    random: RandomStreams
    clock: RunClock


def open_log(run: Run) -> MetricsLogger:
    """Open the metrics. What is wrong with a part shows before: then nothing is written."""
    if run.resumption is not None and run.ranks.is_first:
        restore_wandb_run(run.directory, run.resumption.own["log"]["wandb"])
    log: MetricsLogger = run.ranks.on_first_or_silent(
        lambda: MetricsLogger(run.directory, build_loggers(run.config))
    )
    run.ends.append(log.close)
    return log


def build_counters(config: RunConfig) -> RunCounters:
    """Build the counters of a run, and its schedule of updates."""
    schedule = UpdateSchedule(
        config.training.train_ratio,
        config.effective_batch_size,
        config.training.batch_length,
        start=config.prefill_steps,
    )
    repeat, ranks = config.environment.action_repeat, config.distributed.ranks
    return RunCounters(schedule, action_repeat=repeat, ranks=ranks)


def build_progress(run: Run, learner: Learner) -> Progress:
    """Build what counts and shows how a run gets on."""
    config, log = run.config, open_log(run)
    shown = partial(
        Diagnostics, config.logging, learner, log, seed=config.seed, videos=config.evaluation.video
    )
    return Progress(
        logger=log,
        counters=build_counters(config),
        metrics=UpdateMetrics(run.device),
        evaluations=RunEvaluations(
            config.evaluation, config.environment, learner, seed=config.seed
        ),
        tolerance=Tolerance(run.directory, config.evaluation.max_failures),
        diagnostics=run.ranks.on_first_or_silent(shown),
        random=RandomStreams(),
        clock=RunClock(run.directory),
    )


def build_checkpoints(
    run: Run,
    *,
    env: EnvFacts,
    learner: Learner,
    masks: MaskSource,
    collection: Collection | RecordedCollection,
    progress: Progress,
) -> Checkpoints:
    """List what the run's checkpoints hold, and put back what it resumes from."""
    header = {
        "config": config_to_dict(run.config),
        "action_size": env.action_size,
        "discrete_actions": env.discrete_actions,
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
            "log": progress.logger,
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
        progress.logger.truncate_after(-1)
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


def train_masks(run: Run, masks: MaskSource, collection: Collection | RecordedCollection) -> None:
    """Train a source of masks that learns, on rank 0's frames, before the first step."""
    frames = random_frames(partial(build_env, run.config.environment))
    if isinstance(collection, RecordedCollection):
        frames = collection.frames
    prepare(masks, run.config.segmentation, frames, seed=run.config.seed)
    run.ranks.copy_from_first(masks.learned())


def finish(run: Run, progress: Progress, *, draw: bool) -> None:
    """Finish what rank 0 shows of a run, and say what it came to.

    Args:
        run: The run.
        progress: What it has counted and logged.
        draw: Whether to draw curves and write the report, which takes seconds.
    """
    counts = {"frames": progress.counters.frames, "updates": progress.counters.updates}
    finish_run(run.config, progress.logger, progress.clock, draw=draw, **counts)


@dataclass
class Parts:
    """All that a run consists of."""

    learner: Learner
    masks: MaskSource
    collection: Collection | RecordedCollection
    evaluator: AnyEvaluator | None
    progress: Progress
    checkpoints: Checkpoints
    scenery: ReplacedSceneryTransform | None
    """Replaces the scenery of sampled sequences; None for nothing."""


def build_parts(run: Run) -> Parts:
    """Build every part of a run, in order, and put back what it resumes from."""
    # First: a clip that can't be read must not leave a log behind, which would be taken for a run.
    scenery = build_replaced_scenery(run.config)
    env = probe_env(run.config)
    masks = choose_masks(run, env)
    learner = build_learner(run, env, masks)
    collection = build_collection(run, learner, env, masks)
    evaluator = build_evaluator(run, learner, masks, env)
    progress = build_progress(run, learner)
    checkpoints = build_checkpoints(
        run, env=env, learner=learner, masks=masks, collection=collection, progress=progress
    )
    return Parts(learner, masks, collection, evaluator, progress, checkpoints, scenery)

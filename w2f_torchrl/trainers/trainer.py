"""A whole run: collect, replay, learn, evaluate, write down."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from w2f_torchrl.data import (
    UpdateSchedule,
    WorkerError,
    collector_state,
    load_collector_state,
    make_collector,
    records_from_rollout,
    sync_policy_weights,
)
from w2f_torchrl.data.replay_files import Manifest
from w2f_torchrl.envs import evaluation_sets
from w2f_torchrl.modules import latent_sizes
from w2f_torchrl.trainers.checkpoint_writer import CheckpointWriter
from w2f_torchrl.trainers.checkpointing import (
    Checkpoint,
    CheckpointError,
    discard_checkpoints_after,
    load_checkpoint,
    records_folder,
    resolve_resume,
)
from w2f_torchrl.trainers.config import ConfigError, RunConfig, config_to_dict, save_config
from w2f_torchrl.trainers.device_copy import DeviceCopy
from w2f_torchrl.trainers.diagnostics import Diagnostics
from w2f_torchrl.trainers.distributed import (
    Ranks,
    Silent,
    describe_lost_rank,
    is_lost_rank,
)
from w2f_torchrl.trainers.environments import build_env, create_env
from w2f_torchrl.trainers.evaluator import Evaluator
from w2f_torchrl.trainers.finite import FINITE
from w2f_torchrl.trainers.interruptions import keep_exception, save_batch, stop_on_signal
from w2f_torchrl.trainers.learner import Learner
from w2f_torchrl.trainers.mask_source import TaughtSource
from w2f_torchrl.trainers.open_replay import check_layout, open_replay
from w2f_torchrl.trainers.preemption import hand_over, is_restart
from w2f_torchrl.trainers.resuming import (
    cut_metrics,
    describe_difference,
    keep_wandb_run,
    rank_checkpoint,
    read_wandb_run,
    replay_of,
)
from w2f_torchrl.trainers.run_lock import RunLock
from w2f_torchrl.trainers.run_logging import RunClock, build_loggers, finish_run
from w2f_torchrl.trainers.segmentation import (
    build_mask_source,
    check_same_source,
    choose_source,
    prepare,
)
from w2f_torchrl.utils.environment import note_environment
from w2f_torchrl.utils.logging import MetricsLogger, ProgressBar
from w2f_torchrl.utils.memory import keep_freed_memory
from w2f_torchrl.utils.random_state import random_state, restore_random_state
from w2f_torchrl.utils.seeding import derive_seed

if TYPE_CHECKING:
    from w2f_torchrl.trainers.filtering import FilteringMeter

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
    """

    def __init__(self, config: RunConfig):
        self.ranks = Ranks.from_environment()
        config.distributed.ranks = self.ranks.size
        config.validate()
        self.config = config
        self.run_dir = Path(config.run_dir)
        self._lock = RunLock(self.run_dir)
        try:
            self._prepare(config)
        except BaseException:
            self._lock.release()
            raise

    def _prepare(self, config: RunConfig) -> None:
        self.device = config.torch_device()
        self.ranks.connect(self.device, config.distributed.timeout_seconds)
        self._to_device = DeviceCopy(self.device)
        # torchrun counts on the machine where a rank failed only.
        again = any(self.ranks.gather([is_restart(self.run_dir)]))
        checkpoint = self.ranks.on_first(partial(self._resolve_resume, again))
        torch.manual_seed(derive_seed(config.seed, "learner", self.ranks.rank))
        keep_freed_memory()
        self.action_size, env_has_mask = self._probe_env()
        config.segmentation.chosen = self._chosen_before(checkpoint)
        source = self.ranks.on_first(partial(choose_source, config, env_has_mask))
        self.masks = build_mask_source(config, source, env_has_mask)
        if config.segmentation.source == "auto":
            config.segmentation.chosen = source
        self.learner = Learner.from_config(config, self.action_size, gradients=config.gradients)
        self.steps = 0
        """Agent steps so far, over all envs and ranks."""
        self.updates = 0
        self.schedule = UpdateSchedule(
            config.training.train_ratio,
            config.effective_batch_size,
            config.training.batch_length,
            start=config.prefill_steps,
        )
        self._first_steps = config.prefill_steps
        """Agent steps before which there are no updates."""
        self._last_return: float | None = None
        self._filtering: FilteringMeter | None = None
        self._sums: TensorDictBase | None = None
        self._summed = 0
        self._window: list[Tensor] = []
        """Slots ``[B, T]`` of each sample that the sums are of."""
        self._rate_mark: tuple[float, int, int] | None = None
        self._evaluated = self._saved = 0
        self._best: float | None = None
        self._built = False
        self._between_batches = True
        """Whether the replay holds all that the collector gave: else its state is of no use."""
        self._resume: dict[str, Any] = {}
        self._manifest: Manifest | None = None
        self._resumed_from = checkpoint
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.ranks.on_first(self._lock.acquire)
        saved = None if checkpoint is None else load_checkpoint(checkpoint)
        if checkpoint is not None and saved is not None and self.ranks.is_first:
            cut_metrics(self.run_dir, saved, checkpoint)
            keep_wandb_run(self.run_dir, saved.payload.get("resume", {}).get("wandb"), checkpoint)
        self.logger = (
            MetricsLogger(self.run_dir, build_loggers(config))
            if self.ranks.is_first
            else cast(MetricsLogger, Silent())
        )
        if checkpoint is not None and saved is not None:
            self._restore(saved, checkpoint)
        else:
            # resume=auto of a run that ended before its first checkpoint begins again.
            self.logger.truncate_after(-1)
        if self.ranks.is_first:
            save_config(config, self.run_dir / "config.yaml")
            note_environment(self.run_dir / "environment.json", self.frames, self.device)
        self.diagnostics = (
            Diagnostics(config, self.learner, self.logger)
            if self.ranks.is_first
            else cast(Diagnostics, Silent())
        )
        self.clock = RunClock(self.run_dir, self.frames, self.updates)
        if self.ranks.size > 1:
            logger.info(
                "%d ranks of %d sequences: an update's batch is %d sequences of %d records",
                self.ranks.size,
                config.training.batch_size,
                config.effective_batch_size,
                config.training.batch_length,
            )

    def _resolve_resume(self, again: bool) -> Path | None:
        self._lock.acquire()
        # A launcher that starts a run again means to go on with it.
        resume = self.config.resume or ("auto" if again else None)
        checkpoint = resolve_resume(resume, self.run_dir)
        if resume is None and (self.run_dir / "metrics.jsonl").exists():
            raise CheckpointError(
                f"run_dir={self.run_dir} already holds a run and resume=null starts a new one. "
                "Pass resume=auto to go on with it, or another run_dir."
            )
        return checkpoint

    @property
    def frames(self) -> int:
        """Environment frames (control steps) so far."""
        return self.steps * self.config.environment.action_repeat

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
            self._between_batches = False
            self._take(next(batches))
            self._between_batches = True
        if not stop:
            if self.config.evaluation.every_frames and self._evaluated != self.frames:
                self.evaluate()
            self._flush()
        return stop

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

    # ---------------------------------------------------------------- parts of the loop

    def _take(self, batch: TensorDictBase) -> None:
        """Store a batch of transitions ``[N, T]`` and log the episodes that ended in it."""
        self.replay.extend(self.masks.label(records_from_rollout(batch)))
        following, before = batch["next"], self.steps
        episodes = [
            (
                column,
                float(following["episode_reward"][row, column]),
                float(following["step_count"][row, column]),
            )
            for row, column in following["done"].squeeze(-1).nonzero().tolist()
        ]
        # In the order of time, with the frames of the step that ended the episode.
        for column, episode_return, length in sorted(
            self.ranks.gather(episodes), key=itemgetter(0)
        ):
            self._last_return = episode_return
            self.steps = before + (column + 1) * len(batch) * self.ranks.size
            metrics = {"episode/return": episode_return, "episode/length": length}
            self.logger.log(metrics, frames=self.frames, updates=self.updates)
        self.steps = before + batch.numel() * self.ranks.size
        self.progress.update(
            frames=self.frames, updates=self.updates, last_return=self._last_return
        )

    def _learn(self, stopped: list[int]) -> None:
        """Do the updates that are due."""
        if self.steps < self._first_steps:
            return
        due = self.schedule(self.steps)
        # Counted one by one: what isn't done is due again after a resume.
        self.schedule.updates -= due
        for _ in range(due):
            if self.ranks.agree(bool(stopped)):
                return
            sample = self.replay.sample()
            self._window.append(sample["index"])
            sample = self._to_device(sample)
            self._accumulate(self.learner.update(sample))
            self.updates += 1
            self.schedule.updates += 1
            if self.updates % self.config.logging.every_updates == 0:
                self._flush()
            self.diagnostics.after_update(sample, frames=self.frames, updates=self.updates)
            self.progress.update(frames=self.frames, updates=self.updates)

    def _accumulate(self, metrics: TensorDictBase) -> None:
        self._sums = metrics if self._sums is None else self._sums + metrics
        self._summed += 1

    def _flush(self) -> None:
        """Write the mean of the metrics since the last call; the only read of the device."""
        if self._sums is None:
            return
        means = self._means()
        row = {k: float(v) for k, v in means.items()}
        if self.config.needs_masks:
            row |= self.masks.metrics()
        row = self.ranks.mean(row)
        bad = sorted(name for name in means.keys() if not math.isfinite(row[name]))
        row = {name: value for name, value in row.items() if not name.startswith("loss_")}
        # The evaluation's IoU has the plain name; this one is of the training batches.
        if "wm/mask_iou" in row:
            row["train/mask_iou"] = row.pop("wm/mask_iou")
        if "segmentation/frames" in row:
            row["segmentation/frames"] *= self.ranks.size
        now = time.monotonic()
        if self._rate_mark is not None:
            then, frames, updates = self._rate_mark
            row["speed/frames_per_second"] = (self.frames - frames) / (now - then)
            row["speed/updates_per_second"] = (self.updates - updates) / (now - then)
        self._rate_mark = (now, self.frames, self.updates)
        row["speed/seconds"] = self.clock.seconds()
        self.logger.log(row, frames=self.frames, updates=self.updates)
        self._sums, self._summed, self._window = None, 0, []
        if bad:
            raise FloatingPointError(f"not finite at update {self.updates}: {', '.join(bad)}.")

    def _means(self) -> TensorDictBase:
        """Means over the updates that were applied, on the host.

        Raises:
            FloatingPointError: If one was not, with ``training.on_nan=stop``, or none was.
        """
        assert self._sums is not None, "there are sums to take means of"
        sums = self._sums.to("cpu")
        good = round(float(sums.pop(FINITE)))
        if good < self._summed and (self.config.training.on_nan == "stop" or not good):
            raise self._not_finite(sums, good)
        means: TensorDictBase = sums / good
        if good < self._summed:
            means["train/skipped_updates"] = torch.tensor(float(self._summed - good))
            logger.warning("%d of %d updates were skipped", self._summed - good, self._summed)
        return means

    def _not_finite(self, sums: TensorDictBase, good: int) -> FloatingPointError:
        """Save the batch of the first bad update, and go back to the counters before it."""
        if self.config.training.on_nan == "stop":
            self.updates -= self._summed - good
            self.schedule.updates -= self._summed - good
        names = sorted(k for k, v in sums.items() if not torch.isfinite(v))
        name = f"not_finite_after_{self.updates:012d}_rank_{self.ranks.rank}.pt"
        path = save_batch(self.run_dir / name, self.replay, self._window[good])
        self._sums, self._summed, self._window = None, 0, []
        return FloatingPointError(
            f"gradients are not finite after update {self.updates} ({', '.join(names)}). The "
            f"networks are those of before. The batch is in {path}. training.on_nan=skip goes on "
            "without such updates, as long as not all of a row of metrics are."
        )

    def _evaluate_if_due(self) -> None:
        every = self.config.evaluation.every_frames
        if every and self.frames // every > self._evaluated // every:
            self.evaluate()
            self.diagnostics.draw_curves()

    def evaluate(self) -> dict[str, float]:
        """Play evaluation episodes; log returns and videos. Only rank 0 does."""
        if not self.ranks.is_first:  # it doesn't wait: it collects meanwhile
            self._evaluated = self.frames
            return {}
        self.evaluator.seed(self.frames)
        evaluation = self.evaluator.evaluate(
            self.learner.world_model, self.config.evaluation.episodes
        )
        if self.config.evaluation.filtering:
            # The episodes are recorded in every process anew: not at the training's cost.
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                evaluation.metrics |= self._measure_filtering()
        self._evaluated = self.frames
        score = evaluation.metrics["eval/return_mean"]
        if self._best is None or score > self._best:
            self._best = score
            self.writer.save_best(self._networks(), updates=self.updates, frames=self.frames)
        self.logger.log(evaluation.metrics, frames=self.frames, updates=self.updates)
        self.diagnostics.after_evaluation(evaluation, frames=self.frames, updates=self.updates)
        return evaluation.metrics

    def _measure_filtering(self) -> dict[str, float]:
        """Probe the latents; the episodes are recorded at the first call."""
        from w2f_torchrl.trainers.filtering import FilteringMeter, flat_metrics  # scikit-learn

        if self._filtering is None:
            self._filtering = FilteringMeter(self.config, derive_seed(self.config.seed, "probe", 0))
        found = self._filtering.measure(self.learner.loss, seeds=(0,), probes=("linear",))
        return flat_metrics(found)

    # ---------------------------------------------------------------- building and ending

    def _probe_env(self) -> tuple[int, bool]:
        """Build every kind of env once, so that what is wrong with one shows before any work.

        Returns:
            The size of an action, and whether the env draws masks.
        """
        config = self.config
        try:
            env = build_env(config.environment, 0, foreground_mask=config.needs_masks)
        except ValueError as error:  # a camera that the model lacks, a video that can't be read
            raise ConfigError(f"environment: {error}") from error
        for name in self.config.evaluation.sets:
            try:
                chosen = evaluation_sets()[name]
                build_env(self.config.environment, 0, evaluation_set=chosen).close()
            except ValueError as error:
                raise ConfigError(f"evaluation.sets={name}: {error}") from error
        size = int(env.action_spec.shape[-1])
        has_mask = "foreground_mask" in env.observation_spec.keys()
        env.close()
        return size, has_mask

    def _chosen_before(self, checkpoint: Path | None) -> str | None:
        """What ``segmentation=auto`` chose before a resume: the choice is made once."""
        if checkpoint is None or self.config.segmentation.source != "auto":
            return None
        return str(load_checkpoint(checkpoint).payload["segmentation"]["name"])

    def _build_workers(self) -> None:
        config = self.config
        envs, training = config.environment.num_envs, config.training
        workers = config.collection.num_workers
        if workers is None:
            workers = _default_workers(envs, self.ranks.local_size)
        self._workers = workers
        exact = self._collector_goes_on()
        # Otherwise the workers' noise must not be that of the run's beginning.
        fresh = exact or self._resumed_from is None
        seed = config.seed if fresh else derive_seed(config.seed, "resume", self.steps)
        if self.ranks.is_first:
            self.evaluator = Evaluator(
                config,
                derive_seed(config.seed, "eval", 0),
                self.learner.policy,
                self.action_size,
                self.masks.segment,
            )
        if self._resumed_from is None:
            prepare(self.masks, config, partial(build_env, config.environment))
            self._share_student()
        self._open_replay(derive_seed(seed, "replay", self.ranks.rank), exact)
        self.collector = make_collector(
            partial(create_env, config),
            self.learner.policy,
            primers=latent_sizes(config.model, self.action_size),
            num_envs=envs,
            num_workers=workers,
            frames_per_batch=envs * config.collection.steps_per_batch,
            seed=seed,
            rank=self.ranks.rank,
            device=self.device,
            overlap=config.collection.overlap,
        )
        self.progress = (
            ProgressBar(
                training.total_frames, initial_frames=self.frames, initial_updates=self.updates
            )
            if self.ranks.is_first
            else cast(ProgressBar, Silent())
        )
        self.writer = CheckpointWriter(
            self._checkpoint_folder(), config.checkpoint.keep, self._files
        )
        if exact:
            load_collector_state(self.collector, self._resume["collector"])
        if self._resume:
            self.diagnostics.videos_at = self._resume["videos_at"]
            restore_random_state(self._resume["random"])
        self._built = True

    def _collector_goes_on(self) -> bool:
        """Whether the environments go on from where the checkpoint has them."""
        if self._resumed_from is None:
            return False
        environment = self._environment_settings()
        reason: str | None = "their state is in no checkpoint of this rank"
        if self._resume:
            reason = describe_difference(self._resume["environment"], environment)
            if self._resume["collector"] is None:
                reason = "their state was not saved (an exception, or envs without resume_state)"
        if self._manifest is None and self.steps:
            reason = "the replay is empty"
        if reason is not None:
            logger.warning("the environments begin new episodes: %s", reason)
        return reason is None

    def _environment_settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = config_to_dict(self.config)["environment"]
        workers = {"workers": self._workers, "ranks": self.ranks.size}
        return settings | workers | {"overlap": self.config.collection.overlap}

    def _open_replay(self, seed: int, exact: bool) -> None:
        source = None
        if self._resumed_from is not None:
            source = records_folder(self._resumed_from, self.ranks.rank)
        folder = records_folder(self.run_dir / "checkpoints" / "any", self.ranks.rank)
        self.replay, self._files = open_replay(
            self.config, folder, seed=seed, manifest=self._manifest, source=source
        )
        if self._manifest is not None:
            try:
                self.replay.load_sampling_state(self._resume["sampling"])
            except ValueError as error:
                raise CheckpointError(f"training.batch_length: {error}") from error
            if not exact:
                self.replay.end_episodes()

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
        errors = []
        for end in ends:
            try:
                end()
            except Exception as error:  # the other parts must end too
                logger.exception("closing the run")
                errors.append(error)
        self._lock.release()
        return errors

    # ---------------------------------------------------------------- checkpoints

    def _checkpoint_if_due(self) -> None:
        every = self.config.checkpoint.every_updates
        due = self.updates // every > self._saved // every
        if self.config.replay.storage == "disk":
            # A batch brings a stream at most two records a step.
            full = self.writer.make_room(2 * self.config.collection.steps_per_batch)
            due |= any(self.ranks.gather([full]))
        if due:
            self._save(wait=False)

    def _checkpoint_folder(self) -> Path:
        folder = self.run_dir / "checkpoints"
        return folder if self.ranks.is_first else rank_checkpoint(folder, self.ranks.rank)

    def _share_student(self) -> None:
        """Let all ranks go on with the student that rank 0 saves."""
        if isinstance(self.masks, TaughtSource):
            self.ranks.copy_from_first(self.masks.student.state_dict().values())

    def save(self, exception: str | None = None) -> Path:
        """Write a checkpoint of all that the run needs to go on, and wait until it is on disk.

        All ranks call it. Rank 0 writes what is equal on all of them; each its own replay and envs.

        Args:
            exception: The traceback of what ended the run.

        Returns:
            The checkpoint's path.
        """
        return self._save(wait=True, exception=exception)

    def _save(self, *, wait: bool, exception: str | None = None) -> Path:
        self._saved = self.updates
        self._share_student()
        payload: dict[str, Any] = {"resume": self._resume_state()}
        if self.ranks.is_first:
            self.logger.sync()
            if isinstance(self.masks, TaughtSource):
                self.masks.student.save(self.run_dir / "student.pt")
            payload |= self._networks() | {"exception": exception}
        return self.writer.save(payload, updates=self.updates, frames=self.frames, wait=wait)

    def _networks(self) -> dict[str, Any]:
        """What is the same on all ranks: networks, optimizer, counters."""
        return {
            "config": config_to_dict(self.config),
            "action_size": self.action_size,
            "learner": self.learner.checkpoint(),
            "steps": self.steps,
            "first_steps": self._first_steps,
            "schedule": self.schedule.state_dict(),
            "ranks": self.ranks.size,
            "segmentation": self.masks.state_dict(),
        }

    def _resume_state(self) -> dict[str, Any]:
        """What a resumed run needs beside its networks to do the same as one that wasn't ended."""
        return {
            "collector": self._collector_state(),
            "environment": self._environment_settings(),
            "sampling": self.replay.sampling_state(),
            "random": random_state(),
            "metrics_bytes": self.logger.path.stat().st_size if self.ranks.is_first else None,
            "sums": None if self._sums is None else self._sums.to_dict(),
            "summed": self._summed,
            "window": self._window,
            "last_return": self._last_return,
            "evaluated": self._evaluated,
            "best": self._best,
            "videos_at": self.diagnostics.videos_at if self.ranks.is_first else None,
            "wandb": read_wandb_run(self.run_dir),
        }

    def _collector_state(self) -> dict[str, Any] | None:
        if not self._between_batches:
            return None
        try:
            return collector_state(self.collector)
        except WorkerError as error:
            logger.warning("the environments' state is lost: %s", error)
            return None

    def _restore(self, saved: Checkpoint, path: Path) -> None:
        payload = saved.payload
        self.learner.restore(payload["learner"])
        check_same_source(payload["segmentation"], self.masks)
        self.masks.load_state_dict(payload["segmentation"])
        self.steps, self.updates = payload["steps"], saved.updates
        self._first_steps = payload["first_steps"]
        self._evaluated, self._saved = self.frames, self.updates
        self._restore_schedule(payload)
        own = saved if self.ranks.is_first else self._own_part(path)
        manifest = None if own is None else replay_of(own, path, self.ranks.rank)
        # All ranks' replays, or none: their updates are the same.
        if all(self.ranks.gather([manifest is not None])) and manifest is not None:
            check_layout(self.config, manifest)
            self._manifest = manifest
        elif saved.format_version == 1 or self.steps:
            self._fill_again()
        self._take_over({} if own is None else own.payload.get("resume", {}))
        self.logger.truncate_after(saved.frames, saved.updates)
        discard_checkpoints_after(self._checkpoint_folder(), saved.updates)
        logger.info("resumed %s at %d frames, %d updates", path, saved.frames, saved.updates)

    def _restore_schedule(self, payload: dict[str, Any]) -> None:
        if payload.get("ranks", 1) != self.ranks.size:
            self.schedule.change_ratio(payload["schedule"], self.steps)
            return
        try:
            self.schedule.load_state_dict(payload["schedule"])
        except ValueError as error:
            raise CheckpointError(f"training.train_ratio: {error}") from error

    def _own_part(self, path: Path) -> Checkpoint | None:
        """What this rank, not the first, saved of its own at the time of a checkpoint."""
        own = rank_checkpoint(path.parent, self.ranks.rank) / path.name
        if not own.exists():
            logger.warning("%s has no part of rank %d", path, self.ranks.rank)
            return None
        return load_checkpoint(own)

    def _take_over(self, resume: dict[str, Any]) -> None:
        self._resume = resume
        if resume:
            sums = resume["sums"]
            self._sums = None if sums is None else TensorDict(sums).to(self.device)
            self._summed, self._window = resume["summed"], resume["window"]
            self._last_return = resume["last_return"]
            self._evaluated, self._best = resume["evaluated"], resume["best"]

    def _fill_again(self) -> None:
        """Without a replay: it fills before the next update, and those steps owe no updates.

        A run that ended while it filled has been spared a whole filling already, of which only a
        part was used.
        """
        prefill = self.config.prefill_steps
        unused = max(self._first_steps - self.steps, 0)
        self.schedule.start += prefill - min(unused, prefill)
        self._first_steps = self.steps + prefill


def _default_workers(num_envs: int, local_ranks: int) -> int:
    """One worker per core of this rank, at most one per env, and a divisor of their number."""
    cores = max(len(os.sched_getaffinity(0)) // local_ranks, 1)
    return max(n for n in range(1, min(cores, num_envs) + 1) if num_envs % n == 0)

"""A whole run: collect, replay, learn, evaluate, write down."""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, cast

import torch
from tensordict import TensorDictBase

from w2f_torchrl.data import (
    UpdateSchedule,
    make_collector,
    make_replay,
    records_from_rollout,
    sync_policy_weights,
)
from w2f_torchrl.envs import evaluation_sets
from w2f_torchrl.modules import latent_sizes
from w2f_torchrl.trainers.checkpointing import (
    CheckpointError,
    discard_checkpoints_after,
    load_checkpoint,
    resolve_resume,
    save_checkpoint,
)
from w2f_torchrl.trainers.config import ConfigError, RunConfig, config_to_dict, save_config
from w2f_torchrl.trainers.diagnostics import Diagnostics
from w2f_torchrl.trainers.distributed import (
    Ranks,
    Silent,
    describe_lost_rank,
    is_lost_rank,
)
from w2f_torchrl.trainers.environments import build_env, create_env
from w2f_torchrl.trainers.evaluator import Evaluator
from w2f_torchrl.trainers.learner import Learner
from w2f_torchrl.trainers.mask_source import TaughtSource
from w2f_torchrl.trainers.preemption import hand_over, is_restart, stop_signals
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
        CheckpointError: If the run directory holds a run already and ``resume`` is null, or the
            checkpoint to resume from is missing, damaged or of another model.
    """

    def __init__(self, config: RunConfig):
        self.ranks = Ranks.from_environment()
        config.distributed.ranks = self.ranks.size
        config.validate()
        self.config = config
        self.run_dir = Path(config.run_dir)
        self.device = config.torch_device()
        self.ranks.connect(self.device, config.distributed.timeout_seconds)
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
        self._rate_mark: tuple[float, int, int] | None = None
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.logger = (
            MetricsLogger(self.run_dir, build_loggers(config))
            if self.ranks.is_first
            else cast(MetricsLogger, Silent())
        )
        if checkpoint is not None:
            self._restore(checkpoint)
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
        """Run to the last frame, or until Ctrl+C or SIGTERM; ends with a checkpoint either way.

        Raises:
            SystemExit: If the scheduler has asked for the machine, in a job that submitit started.
        """
        config = self.config
        self._build_workers()
        try:
            with _stop_on_signal() as stopped:
                for batch in self.collector:
                    self._take(batch)
                    self._learn(stopped)
                    stop = self.ranks.agree(bool(stopped))
                    if stop or self.frames >= config.training.total_frames:
                        break
                    sync_policy_weights(self.collector, self.learner.policy)
                    self._evaluate_if_due()
                    self._checkpoint_if_due()
                if not stop and config.evaluation.every_frames:
                    self.evaluate()
            self._flush()
        except FloatingPointError:
            # The weights may be spoiled already: the last checkpoint stays the newest.
            self._close()
            raise
        except BaseException as error:
            if is_lost_rank(self.ranks, error):  # said at once: torchrun ends this rank soon
                logger.error("%s", describe_lost_rank(self.ranks, error))
            if self.ranks.size == 1:  # the other ranks may be elsewhere, or gone
                self.save()
            self._close()
            raise
        logger.info("checkpoint: %s", self.save())
        self._close()
        if stop:
            hand_over(stopped, self.run_dir, is_first=self.ranks.is_first)

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
        for done in range(due := self.schedule(self.steps)):
            if self.ranks.agree(bool(stopped)):
                # What was granted and not done is due again after a resume.
                self.schedule.updates -= due - done
                return
            sample = self.replay.sample().to(self.device, non_blocking=True)
            self._accumulate(self.learner.update(sample))
            self.updates += 1
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
        means = (self._sums / self._summed).to("cpu")
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
        self._sums, self._summed = None, 0
        if bad:
            raise FloatingPointError(f"not finite at update {self.updates}: {', '.join(bad)}.")

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
        evaluation = self.evaluator.evaluate(
            self.learner.world_model, self.config.evaluation.episodes
        )
        if self.config.evaluation.filtering:
            evaluation.metrics |= self._measure_filtering()
        self._evaluated = self.frames
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
        # After a resume the workers' noise must not be that of the run's beginning.
        seed = config.seed if self.steps == 0 else derive_seed(config.seed, "resume", self.steps)
        if self.ranks.is_first:
            self.evaluator = Evaluator(
                config,
                derive_seed(config.seed, "eval", 0),
                self.learner.policy,
                self.action_size,
                self.masks.segment,
            )
        if self.steps == 0:
            prepare(self.masks, config, partial(build_env, config.environment))
            self._share_student()
        self.replay = make_replay(
            capacity=config.replay.capacity,
            num_streams=envs,
            batch_size=training.batch_size,
            batch_length=training.batch_length,
            path=self._replay_folder() if config.replay.storage == "disk" else None,
            exist_ok=True,
            newest_first=config.replay.newest_first,
            pin_memory=self.device.type == "cuda",
            seed=derive_seed(seed, "replay", self.ranks.rank),
        )
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
        self._evaluated = self.frames
        self._saved = self.updates

    def _close(self) -> None:
        self.progress.close()
        self.collector.shutdown()
        if not self.ranks.is_first:
            return
        self.evaluator.close()
        counts = {"frames": self.frames, "updates": self.updates}
        finish_run(self.config, self.logger, self.clock, **counts)

    # ---------------------------------------------------------------- checkpoints

    def _checkpoint_if_due(self) -> None:
        every = self.config.checkpoint.every_updates
        if self.updates // every > self._saved // every:
            self.save()

    def _replay_folder(self) -> Path:
        return self.run_dir / ("replay" if self.ranks.is_first else f"replay_{self.ranks.rank}")

    def _share_student(self) -> None:
        """Let all ranks go on with the student that rank 0 saves."""
        if isinstance(self.masks, TaughtSource):
            self.ranks.copy_from_first(self.masks.student.state_dict().values())

    def save(self) -> Path:
        """Write a checkpoint of the models, the optimizer and the counters.

        All ranks call it, and rank 0 writes: what it holds is equal on all of them.
        """
        self._flush()
        self._saved = self.updates
        self._share_student()
        if not self.ranks.is_first:
            return self.run_dir / "checkpoints"
        self.logger.sync()
        if isinstance(self.masks, TaughtSource):
            self.masks.student.save(self.run_dir / "student.pt")
        return save_checkpoint(
            self.run_dir / "checkpoints",
            {
                "config": config_to_dict(self.config),
                "action_size": self.action_size,
                "learner": self.learner.checkpoint(),
                "steps": self.steps,
                "first_steps": self._first_steps,
                "schedule": self.schedule.state_dict(),
                "ranks": self.ranks.size,
                "segmentation": self.masks.state_dict(),
            },
            updates=self.updates,
            frames=self.frames,
            keep=self.config.checkpoint.keep,
        )

    def _restore(self, path: Path) -> None:
        saved = load_checkpoint(path, self.device)
        self.learner.restore(saved.payload["learner"])
        check_same_source(saved.payload["segmentation"], self.masks)
        self.masks.load_state_dict(saved.payload["segmentation"])
        self.steps, self.updates = saved.payload["steps"], saved.updates
        if saved.payload.get("ranks", 1) == self.ranks.size:
            self.schedule.load_state_dict(saved.payload["schedule"])
        else:
            self.schedule.change_ratio(saved.payload["schedule"], self.steps)
        # The replay is not in the checkpoint: it fills again before the first update, and the
        # steps that this takes owe no updates. A run that ended while it filled has been spared a
        # whole filling already, of which only a part was used.
        prefill = self.config.prefill_steps
        unused = max(saved.payload["first_steps"] - self.steps, 0)
        self.schedule.start += prefill - min(unused, prefill)
        self._first_steps = self.steps + prefill
        self.logger.truncate_after(saved.frames, saved.updates)
        if self.ranks.is_first:
            discard_checkpoints_after(self.run_dir / "checkpoints", saved.updates)
        logger.info("resumed %s at %d frames, %d updates", path, saved.frames, saved.updates)


def _default_workers(num_envs: int, local_ranks: int) -> int:
    """One worker per core of this rank, at most one per env, and a divisor of their number."""
    cores = max(len(os.sched_getaffinity(0)) // local_ranks, 1)
    return max(n for n in range(1, min(cores, num_envs) + 1) if num_envs % n == 0)


@contextmanager
def _stop_on_signal() -> Iterator[list[int]]:
    """Collect signals in a list, so that the loop can end between two updates."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        logger.warning("stopping after this update; a second Ctrl+C stops at once")

    previous = {number: signal.signal(number, note) for number in stop_signals()}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

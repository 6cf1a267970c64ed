"""When a run saves itself, and all that a checkpoint of it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from w2f_torchrl.trainers.checkpoint_writer import CheckpointWriter
from w2f_torchrl.trainers.collecting import Collection
from w2f_torchrl.trainers.diagnostics import Diagnostics
from w2f_torchrl.trainers.resuming import checkpoint_folder, read_wandb_run
from w2f_torchrl.trainers.run_state import RunState
from w2f_torchrl.trainers.tolerance import Tolerance
from w2f_torchrl.utils.logging import MetricsLogger
from w2f_torchrl.utils.random_state import random_state


class RunCheckpoints:
    """The checkpoints of a run, as one rank writes them.

    Rank 0 writes what is equal on all ranks; each its own replay, environments and random streams.

    Args:
        state: What the run has learned and counted.
        collection: The rank's collector and replay.
        metrics_logger: The run's.
        diagnostics: The run's.
        tolerance: The run's.
    """

    def __init__(
        self,
        state: RunState,
        collection: Collection,
        metrics_logger: MetricsLogger,
        diagnostics: Diagnostics,
        tolerance: Tolerance,
    ) -> None:
        self.state, self.collection = state, collection
        self.logger, self.diagnostics = metrics_logger, diagnostics
        self.tolerance = tolerance
        self.run_dir = Path(state.config.run_dir)
        folder = checkpoint_folder(self.run_dir / "checkpoints", state.ranks.rank)
        self.writer = CheckpointWriter(folder, state.config.checkpoint.keep, collection.files)
        self.last = state.counters.updates
        """Updates at the last checkpoint."""

    def are_due(self) -> bool:
        """Whether ``checkpoint.every_updates`` have passed, or records would be overwritten."""
        config, updates = self.state.config, self.state.counters.updates
        every = config.checkpoint.every_updates
        due = updates // every > self.last // every
        if config.replay.storage == "disk":
            # A batch brings a stream at most two records a step.
            full = self.writer.make_room(2 * config.collection.steps_per_batch)
            due |= any(self.state.ranks.gather([full]))
        return due

    def save(self, *, wait: bool, exception: str | None = None) -> Path:
        """Take the state as it is; all ranks call it.

        Args:
            wait: Whether to come back when it is on disk.
            exception: The traceback of what ended the run.

        Returns:
            The path that the checkpoint has or will have.

        Raises:
            FloatingPointError: If the networks or the optimizer hold a number that is not finite:
                they must not take the place of a good checkpoint.
        """
        state, counters = self.state, self.state.counters
        if not state.learner.is_finite():
            raise FloatingPointError(
                f"the weights are not finite at update {counters.updates}: no checkpoint is "
                "written, the last one stays the newest. optimizer.lr and the loss scales are the "
                "first places to look."
            )
        self.last = counters.updates
        state.share_masks()
        payload: dict[str, Any] = {"resume": self._own()}
        if state.ranks.is_first:
            self.logger.sync()
            state.masks.save_student(self.run_dir / "student.pt")
            payload |= state.common() | {"exception": exception}
        return self.writer.save(
            payload, updates=counters.updates, frames=counters.frames, wait=wait
        )

    def save_best(self) -> None:
        """Write the networks as those that evaluated best; only rank 0 calls it.

        Networks that are not finite are left out; the run's next checkpoint says so.
        """
        if not self.state.learner.is_finite():
            return
        counters = self.state.counters
        self.writer.save_best(self.state.common(), updates=counters.updates, frames=counters.frames)

    def _own(self) -> dict[str, Any]:
        """What this rank needs beside the networks to do the same as if it hadn't been ended."""
        is_first, held = self.state.ranks.is_first, self.collection.held
        return {
            "collector": self.collection.envs_state(),
            "held": None if held is None else held.to_dict(),
            "worker_restarts": self.collection.restarts,
            "environment": self.collection.environment,
            "sampling": self.collection.replay.sampling_state(),
            "random": random_state(),
            "metrics_bytes": self.logger.path.stat().st_size if is_first else None,
            **self.state.own(),
            "failures": dict(self.tolerance.in_a_row),
            "videos_at": self.diagnostics.videos_at if is_first else None,
            "wandb": read_wandb_run(self.run_dir),
        }

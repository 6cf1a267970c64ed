"""What a run has learned and counted: all that its checkpoints hold but replay and environments."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

from w2f_torchrl.trainers.checkpointing import Checkpoint
from w2f_torchrl.trainers.config import RunConfig, config_to_dict
from w2f_torchrl.trainers.counters import RunCounters
from w2f_torchrl.trainers.distributed import Ranks
from w2f_torchrl.trainers.environments import probe_env
from w2f_torchrl.trainers.learner import Learner
from w2f_torchrl.trainers.mask_source import MaskSource
from w2f_torchrl.trainers.older_checkpoints import check_same_networks
from w2f_torchrl.trainers.run_evaluations import RunEvaluations
from w2f_torchrl.trainers.segmentation import build_mask_source, check_same_source, choose_source
from w2f_torchrl.trainers.update_metrics import UpdateMetrics

logger = logging.getLogger(__name__)


@dataclass
class RunState:
    """The parts of a run that change as it goes on, and their form in a checkpoint."""

    config: RunConfig
    ranks: Ranks
    action_size: int
    masks: MaskSource
    learner: Learner
    counters: RunCounters
    metrics: UpdateMetrics
    """Of the row that is not written yet."""
    evaluations: RunEvaluations
    last_return: float | None = None
    """Of the last training episode."""

    @classmethod
    def build(cls, config: RunConfig, ranks: Ranks, saved: Checkpoint | None) -> RunState:
        """Build a run's networks, and what makes their masks, at the run's beginning.

        Args:
            config: The run's settings; ``segmentation.chosen`` is set.
            ranks: This process's place among the run's.
            saved: Of the checkpoint that :meth:`restore` will be called with: what
                ``segmentation=auto`` chose then, it chooses again.

        Raises:
            ConfigError: If an env can't be built, or masks can't be made.
        """
        action_size, env_has_mask = probe_env(config)
        settings = config.segmentation
        automatic, settings.chosen = settings.source == "auto", None
        if automatic and saved is not None:
            settings.chosen = str(saved.payload["segmentation"]["name"])
        source = ranks.on_first(partial(choose_source, config, env_has_mask))
        masks = build_mask_source(config, source, env_has_mask)
        if automatic:
            settings.chosen = source
        learner = Learner.from_config(config, action_size, gradients=config.gradients)
        if ranks.size > 1:
            logger.info(
                "%d ranks of %d sequences: an update's batch is %d sequences of %d records",
                ranks.size,
                config.training.batch_size,
                config.effective_batch_size,
                config.training.batch_length,
            )
        return cls(
            config,
            ranks,
            action_size,
            masks,
            learner,
            RunCounters(config),
            UpdateMetrics(config.torch_device()),
            RunEvaluations(config, learner),
        )

    def common(self) -> dict[str, Any]:
        """What is the same on all ranks, and enough to act with: networks, optimizer, counters."""
        return {
            "config": config_to_dict(self.config),
            "action_size": self.action_size,
            "learner": self.learner.checkpoint(),
            **self.counters.state_dict(),
            "ranks": self.ranks.size,
            "segmentation": self.masks.state_dict(),
        }

    def own(self) -> dict[str, Any]:
        """What each rank has of its own, beside its replay, environments and random streams."""
        return {
            **self.metrics.state_dict(),
            "last_return": self.last_return,
            **self.evaluations.state_dict(),
        }

    def restore(self, saved: Checkpoint) -> None:
        """Take over what :meth:`common` gave.

        Raises:
            CheckpointError: If it is of another model, or settings that must stay have changed.
            ConfigError: If its masks come from another source.
        """
        payload = saved.payload
        check_same_networks(payload["config"]["model"], self.config.model)
        self.learner.restore(payload["learner"])
        check_same_source(payload["segmentation"], self.masks)
        self.masks.load_state_dict(payload["segmentation"])
        same_ranks = payload.get("ranks", 1) == self.ranks.size
        self.counters.load_state_dict(payload, updates=saved.updates, same_ranks=same_ranks)
        self.evaluations.last = self.counters.frames

    def restore_own(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`own` gave, and more entries that are not read."""
        self.metrics.load_state_dict(state)
        self.evaluations.load_state_dict(state)
        self.last_return = state["last_return"]

    def share_masks(self) -> None:
        """Let all ranks segment with what rank 0 has learned."""
        self.ranks.copy_from_first(self.masks.learned())

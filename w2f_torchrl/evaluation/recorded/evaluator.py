"""Evaluate a run on recorded episodes, and in an environment if it has one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from tensordict import TensorDictBase

from w2f_torchrl.data.recorded.episodes import RecordedData
from w2f_torchrl.data.recorded.form import load_episode
from w2f_torchrl.evaluation.evaluator import KEPT_STEPS, Evaluation, Evaluator, reconstruct
from w2f_torchrl.evaluation.recorded.open_loop import predict_open_loop
from w2f_torchrl.keys import MASK
from w2f_torchrl.modules import WorldModel
from w2f_torchrl.utils.seeding import derive_seed
from w2f_torchrl.utils.stopping import check_stop

if TYPE_CHECKING:
    from w2f_torchrl.evaluation.recorded.filtering import RecordedMeter

PREFIX = "recorded"
"""Group of the metrics."""


class RecordedEvaluator:
    """Predict held-out episodes, and play in an env if the run has one.

    Args:
        data: The data set; the episodes are those of :meth:`~.RecordedData.split`.
        player: Plays episodes in the run's env; None without one.
        seed: The run's seed.
        device: Where the world model computes.
        masks: Whether the model has masks.
        segment: Adds masks to records of data without.
    """

    def __init__(
        self,
        data: RecordedData,
        player: Evaluator | None,
        *,
        seed: int,
        device: torch.device | str,
        masks: bool,
        segment: Callable[[TensorDictBase], TensorDictBase],
    ) -> None:
        self.data, self.player, self.segment = data, player, segment
        self.episode_seed, self.device, self.masks = seed, torch.device(device), masks
        self._meter: RecordedMeter | None = None

    def start(self) -> None:
        """Make the env, if the run has one."""
        if self.player is not None:
            self.player.start()

    def seed(self, frames: int) -> None:
        """Seed the env by the run's frames; the recorded episodes are always the same."""
        if self.player is not None:
            self.player.seed(frames)

    def evaluate(self, world_model: WorldModel, episodes: int) -> Evaluation:
        """Predict held-out episodes, then play.

        Args:
            world_model: The world model.
            episodes: Maximum number of recorded episodes, and number of those played in the env.

        Returns:
            Metrics ``recorded/...`` of :func:`predict_open_loop`, means over the episodes, and
            ``wm/mask_iou`` on recorded episodes; with an env its returns too. Pictures and records
            are those of the env's first episode, or else of the first recorded one.
        """
        _, held_out = self.data.split()
        found: dict[str, list[float]] = {}
        first: Evaluation | None = None
        for place, index in enumerate(held_out[:episodes]):
            check_stop()
            records = self._records(index)
            seed = derive_seed(self.episode_seed, "open loop", place)
            measured = predict_open_loop(world_model, records, seed=seed) or {}
            columns, iou = self._reconstruct(world_model, records, seed)
            for name, value in measured.items():
                found.setdefault(f"{PREFIX}/{name}", []).append(value)
            if iou is not None:
                found.setdefault("wm/mask_iou", []).append(iou)
            pixels = records["next", "pixels"][0].cpu()
            first = first or Evaluation({}, pixels, columns, records)
        assert first is not None, "at least one episode is evaluated"
        metrics = {name: math.fsum(values) / len(values) for name, values in found.items()}
        if self.player is None:
            first.metrics = metrics
            return first
        played = self.player.evaluate(world_model, episodes)
        played.metrics = metrics | played.metrics
        return played

    def meter(self, count: int) -> RecordedMeter:
        """Return the measures of filtering on recorded episodes, loaded once.

        Args:
            count: Maximum number of episodes.

        Raises:
            DataError: If the data have neither masks nor true states.
        """
        from w2f_torchrl.evaluation.recorded.filtering import RecordedMeter  # scikit-learn

        if self._meter is None:
            self._meter = RecordedMeter(self.data, count)
        return self._meter

    def close(self) -> None:
        """Close the env."""
        if self.player is not None:
            self.player.close()

    def _records(self, index: int) -> TensorDictBase:
        """Return an episode's records ``[1, T]``, cut if it is long, with masks if needed."""
        records: TensorDictBase = load_episode(self.data, index).records()[:KEPT_STEPS]
        if not self.masks:
            records = records.exclude(("next", MASK))
        elif MASK not in records["next"].keys():
            records = self.segment(records)
        return records.unsqueeze(0).to(self.device)

    def _reconstruct(
        self, world_model: WorldModel, records: TensorDictBase, seed: int
    ) -> tuple[dict[str, torch.Tensor], float | None]:
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            return reconstruct(world_model, records)

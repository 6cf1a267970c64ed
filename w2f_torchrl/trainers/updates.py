"""The updates of a run: sample, learn, and log rows of mean metrics."""

from __future__ import annotations

import math

from tensordict import TensorDictBase
from torch import Tensor

from w2f_torchrl.data.device_copy import DeviceCopy
from w2f_torchrl.learner.non_finite_guard import FINITE
from w2f_torchrl.learner.update_metrics import Sums, shown_row
from w2f_torchrl.modules.packed_latents import INITIAL
from w2f_torchrl.trainers.interruptions import save_batch
from w2f_torchrl.trainers.run import Parts, Run
from w2f_torchrl.transforms.replaced_scenery import without_scenery
from w2f_torchrl.utils.random_state import random_state, restore_random_state
from w2f_torchrl.utils.seeding import derive_seed
from w2f_torchrl.utils.stopping import StopRequested, may_be_cut


class Updates:
    """Do the updates of a run, one at a time.

    Args:
        run: The run.
        parts: The parts of the run.
    """

    def __init__(self, run: Run, parts: Parts) -> None:
        self.config, self.ranks, self.directory = run.config, run.ranks, run.directory
        self.logger = parts.progress.logger
        self.learner, self.masks, self.collection = parts.learner, parts.masks, parts.collection
        self.counters, self.metrics = parts.progress.counters, parts.progress.metrics
        self.clock = parts.progress.clock
        self.to_device = DeviceCopy(run.device)
        self.replaced_scenery = parts.scenery
        self.pinned = run.device.type == "cuda"
        self.mask_iou: float | None = None
        """IoU of the predicted masks in the last row of metrics; None without such a row."""
        self._compiled = False

    def update(self) -> TensorDictBase:
        """Do an update, count it, and log a row of metrics when one is due.

        Returns:
            The sample ``[B, T]`` on the learner's device.
        """
        sample = self._learn() if self._compiled else self._learn_first()
        self.counters.add_update()
        if self.counters.updates % self.config.logging.every_updates == 0:
            self.flush()
        return sample

    def _learn(self) -> TensorDictBase:
        """Draw a sample ``[B, T]`` and learn from it."""
        sample = self.collection.replay.sample()
        slots = sample["index"]
        sample, replaced = self._augmented(self.to_device(sample), self.counters.updates)
        metrics = self.learner.update(sample)
        self.metrics.add(metrics, slots)
        latents = self.learner.latents
        if latents is not None:
            if replaced is not None:
                latents = without_scenery(latents, replaced, self.config.latent)
            self.collection.replay.write_back(slots, latents, metrics[FINITE])
        return sample

    def _augmented(
        self, sample: TensorDictBase, update: int
    ) -> tuple[TensorDictBase, Tensor | None]:
        """Change a sample on the device as for an update; that many updates came before it.

        Returns:
            The sample, and which of its sequences have other scenery, int64 ``[N]``; None if none
            ever has.
        """
        if self.replaced_scenery is None:
            return sample, None
        # Every update has a seed, so that a resumed run draws what an uninterrupted one does.
        self.replaced_scenery.seed(
            derive_seed(self.config.seed, "scenery", self.ranks.rank, update)
        )
        drawn = self.replaced_scenery.draw(*sample.shape)
        if self.pinned:  # copied during the previous update, as samples are
            drawn = drawn.pin_memory()
        drawn = self.to_device(drawn)
        sample = self.replaced_scenery.compose(sample, drawn)
        if INITIAL in sample.keys():
            initial = without_scenery(sample[INITIAL], drawn["row"], self.config.latent)
            sample = sample.replace({INITIAL: initial})
        return sample, drawn["row"]

    def _learn_first(self) -> TensorDictBase:
        """Do the first update of a process; a signal interrupts it, as it may compile for minutes.

        Raises:
            StopRequested: If a signal arrived. The state before the update is restored, so that it
                stays due.
        """
        if self.learner.execution == "eager" or self.ranks.size > 1:
            self._compiled = True
            return self._learn()
        sampling, random = self.collection.replay.sampling_state(), random_state()
        buffers = {name: value.clone() for name, value in self.learner.loss.named_buffers()}
        try:
            with may_be_cut(at_once=lambda: self.learner.intact):
                sample = self._learn()
        except StopRequested:
            self.collection.replay.load_sampling_state(sampling)
            restore_random_state(random)
            for name, value in self.learner.loss.named_buffers():
                value.copy_(buffers[name])
            raise
        self._compiled = True
        return sample

    def flush(self) -> None:
        """Log the mean of the metrics since the last call; the only read from the device."""
        if not self.metrics.count:
            return
        frames, updates = self.counters.frames, self.counters.updates
        sums = self.metrics.read()
        if sums.missed and (self.config.training.on_nan == "stop" or not sums.applied):
            raise self._not_finite(sums)
        means = sums.means()
        row = means | (self.masks.metrics() if self.config.needs_masks else {})
        row = self.ranks.mean(row)
        bad = sorted(name for name in means if not math.isfinite(row[name]))
        row = shown_row(row, self.ranks.size) | self.clock.metrics(frames, updates)
        self.logger.log(row, frames=frames, updates=updates)
        self.mask_iou = row.get("train/mask_iou")
        self.metrics.clear()
        if bad:
            raise FloatingPointError(f"not finite at update {updates}: {', '.join(bad)}.")

    def _not_finite(self, sums: Sums) -> FloatingPointError:
        """Save the batch of the first bad update, and restore the counters before it."""
        before = self.counters.updates - sums.missed
        if self.config.training.on_nan == "stop":
            self.counters.take_back(sums.missed)
        updates = self.counters.updates
        name = f"not_finite_after_{updates:012d}_rank_{self.ranks.rank}.pt"
        batch = self.collection.replay.gather(self.metrics.slots[sums.applied])
        batch = self._augmented(self.to_device(batch), before)[0].cpu()
        path = save_batch(self.directory / name, batch)
        self.metrics.clear()
        weights = "were not changed" if self.learner.is_finite() else "are not finite either"
        return FloatingPointError(
            f"gradients are not finite after update {updates} "
            f"({', '.join(sums.not_finite())}). The weights {weights}. The batch is in "
            f"{path}. training.on_nan=skip continues without such updates, unless all updates of "
            "a row of metrics are."
        )

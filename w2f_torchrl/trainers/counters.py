"""What a run has done so far, and the updates that are due for it."""

from __future__ import annotations

from typing import Any

from w2f_torchrl.checkpoint.file import CheckpointError
from w2f_torchrl.config import RunConfig
from w2f_torchrl.data import UpdateSchedule


class RunCounters:
    """Steps and updates of all ranks together.

    Args:
        config: The run's settings.
    """

    def __init__(self, config: RunConfig) -> None:
        self.steps = 0
        """Agent steps so far, over all envs and ranks."""
        self.updates = 0
        self.last_return: float | None = None
        """Return of the last training episode."""
        self._ranks = config.distributed.ranks
        self._counted = (0, 0)
        """Steps and frames of the checkpoint that this run goes on from."""
        self.schedule = UpdateSchedule(
            config.training.train_ratio,
            config.effective_batch_size,
            config.training.batch_length,
            start=config.prefill_steps,
        )
        self.first_steps = config.prefill_steps
        """Agent steps before which there are no updates."""
        self._prefill = config.prefill_steps
        self._action_repeat = config.environment.action_repeat

    @property
    def frames(self) -> int:
        """Environment frames (control steps) so far.

        Those of a checkpoint are as it counted them, whatever an action lasts now.
        """
        steps, frames = self._counted
        return frames + (self.steps - steps) * self._action_repeat

    def updates_due(self) -> int:
        """How many updates are due; they stay so until :meth:`add_update`."""
        if self.steps < self.first_steps:
            return 0
        due = self.schedule(self.steps)
        # Counted one by one: what isn't done is due again after a resume.
        self.schedule.updates -= due
        return due

    def add_update(self) -> None:
        """Count an update that was done."""
        self.updates += 1
        self.schedule.updates += 1

    def take_back(self, updates: int) -> None:
        """Count updates as not done: they changed nothing."""
        self.updates -= updates
        self.schedule.updates -= updates

    def fill_again(self) -> None:
        """Without a replay: it fills before the next update, and those steps owe no updates.

        A run that ended while it filled has been spared a whole filling already, of which only a
        part was used.
        """
        unused = max(self.first_steps - self.steps, 0)
        self.schedule.start += self._prefill - min(unused, self._prefill)
        self.first_steps = self.steps + self._prefill

    def state_dict(self) -> dict[str, Any]:
        """Return the counters, and the number of ranks that they are of."""
        return {
            "steps": self.steps,
            "frames": self.frames,
            "updates": self.updates,
            "first_steps": self.first_steps,
            "schedule": self.schedule.state_dict(),
            "last_return": self.last_return,
            "ranks": self._ranks,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; with another number of ranks steps count with another ratio.

        Raises:
            CheckpointError: If settings that must stay have changed.
        """
        self.steps, self.updates = state["steps"], state["updates"]
        self.last_return = state["last_return"]
        # Checkpoints before this entry are of runs that count with one action repeat.
        self._counted = (self.steps, state.get("frames", self.steps * self._action_repeat))
        self.first_steps = state["first_steps"]
        if state["ranks"] != self._ranks:
            self.schedule.change_ratio(state["schedule"], self.steps)
            return
        try:
            self.schedule.load_state_dict(state["schedule"])
        except ValueError as error:
            raise CheckpointError(f"training.train_ratio: {error}") from error

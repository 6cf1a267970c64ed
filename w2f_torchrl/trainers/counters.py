"""Steps, frames and updates of a run so far, and the updates that are due."""

from __future__ import annotations

from typing import Any

from w2f_torchrl.checkpoint.file import CheckpointError
from w2f_torchrl.data import UpdateSchedule


class RunCounters:
    """Steps and updates of all ranks together.

    Args:
        schedule: Updates per agent step; its start is the number of agent steps before the first.
        action_repeat: Control steps of an agent step.
        ranks: Processes that train together.
    """

    def __init__(self, schedule: UpdateSchedule, *, action_repeat: int = 1, ranks: int = 1) -> None:
        self.steps = 0
        """Agent steps so far, over all envs and ranks."""
        self.updates = 0
        self.last_return: float | None = None
        """Return of the last training episode."""
        self._ranks = ranks
        self._counted = (0, 0)
        """Steps and frames of the checkpoint that this run resumed from."""
        self.schedule = schedule
        self.first_steps = schedule.start
        """Agent steps before the first update."""
        self._prefill = schedule.start
        self._action_repeat = action_repeat

    @property
    def frames(self) -> int:
        """Environment frames (control steps) so far.

        Frames of a checkpoint keep their count, even if the action repeat has changed since.
        """
        steps, frames = self._counted
        return frames + (self.steps - steps) * self._action_repeat

    def updates_due(self) -> int:
        """Return how many updates are due; each stays due until :meth:`add_update`."""
        if self.steps < self.first_steps:
            return 0
        due = self.schedule(self.steps)
        # Counted one by one: an update that was not done is due again after a resume.
        self.schedule.updates -= due
        return due

    def add_update(self) -> None:
        """Count a completed update."""
        self.updates += 1
        self.schedule.updates += 1

    def take_back(self, updates: int) -> None:
        """Subtract updates that changed nothing."""
        self.updates -= updates
        self.schedule.updates -= updates

    def fill_again(self) -> None:
        """Fill an empty replay before the next update; those steps require no updates.

        If the run ended during an earlier filling, its unused steps are not exempted twice.
        """
        unused = max(self.first_steps - self.steps, 0)
        self.schedule.start += self._prefill - min(unused, self._prefill)
        self.first_steps = self.steps + self._prefill

    def state_dict(self) -> dict[str, Any]:
        """Return the counters, and the number of ranks that they belong to."""
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
        """Continue from a state; with another number of ranks, steps count at another ratio.

        Raises:
            CheckpointError: If settings that must stay the same have changed.
        """
        self.steps, self.updates = state["steps"], state["updates"]
        self.last_return = state["last_return"]
        # Older checkpoints lack this entry; their runs had a single action repeat.
        self._counted = (self.steps, state.get("frames", self.steps * self._action_repeat))
        self.first_steps = state["first_steps"]
        if state["ranks"] != self._ranks:
            self.schedule.change_ratio(state["schedule"], self.steps)
            return
        try:
            self.schedule.load_state_dict(state["schedule"])
        except ValueError as error:
            raise CheckpointError(f"training.train_ratio: {error}") from error

"""r2dreamer's training loop on a CPU, on this project's environments.

Its own trainer pins memory, which needs CUDA. This loop does what that does, in the same order:

1. Every env takes the action chosen last. One whose episode has ended is reset in place of a step,
   which does not count as an agent step.
2. The policy acts on all observations, first ones included, with the newest weights. It zeroes its
   latent and its previous action where ``is_first``.
3. Stored are the observation, the reward that came with it, the policy's latent after it, and the
   action taken *at* it, zero at an episode's last. (Its replay shifts the actions when it samples:
   a slice is T + 1 long, and of the first record it uses latent and action.)
4. Updates that are due. Each writes its new latents back into the replay.

It differs where the comparison asks for it: updates are counted by our ``UpdateSchedule``, one per
agent step after the same prefill as ours, and nothing is evaluated.

Shape letters: N envs, A action.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from peer_envs import EnvBatch
from tensordict import TensorDict
from torch import Tensor
from torchrl.objectives import categorical_kl_terms

from w2f_torchrl.data import UpdateSchedule
from w2f_torchrl.logging.metrics_file import repair
from w2f_torchrl.utils.random_state import random_state, restore_random_state

STATE_NAME = "state.pt"
METRICS = {
    "wm/image_loss": "loss/image",
    "wm/reward_loss": "loss/rew",
    "wm/kl_clipped": "loss/dyn",
    "ac/entropy": "action_entropy",
}
"""Our names of r2dreamer's metrics whose units are the same.

Image loss: squared errors of colours in [0, 1], summed over a picture's pixels and channels, mean
over B x T. Reward: cross-entropy of the two-hot over 255 bins, nats. Its KL has free nats and is
that of the logits without the share of the uniform distribution: :func:`record_kl` takes ours.
"""


class Peer(Protocol):
    """The part of r2dreamer's ``Dreamer`` that the loop uses."""

    rssm: Any
    _slow_value_updates: int
    _optimizer: Any
    _scaler: Any
    _scheduler: Any

    def act(self, obs: TensorDict, state: TensorDict) -> tuple[Tensor, TensorDict]: ...  # noqa: D102
    def update(self, replay_buffer: Any) -> dict[str, Any]: ...  # noqa: D102
    def get_initial_state(self, B: int) -> TensorDict: ...  # noqa: D102
    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102
    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...  # noqa: D102


def record_kl(agent: Peer, unimix: float) -> Callable[[], Tensor]:
    """Let an agent note the KL of each update in our units.

    Args:
        agent: Its ``rssm.kl_loss(posterior, prior, free_nats)`` is watched; the result stays.
        unimix: Share of the uniform distribution in every categorical, as both projects sample.

    Returns:
        Gives the last update's KL: nats, summed over the categoricals, mean over B x T, without
        free nats.
    """
    inner, noted = agent.rssm.kl_loss, {}

    def kl_loss(posterior: Tensor, prior: Tensor, free: float) -> Any:
        with torch.no_grad():
            noted["kl"], _ = categorical_kl_terms(posterior.float(), prior.float(), 0.0, unimix)
        return inner(posterior, prior, free)

    agent.rssm.kl_loss = kl_loss
    return lambda: noted["kl"]


class Rows:
    """A ``metrics.jsonl`` that can be cut where a saved state has it.

    Args:
        run_dir: Where it is.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "metrics.jsonl"
        self.path.touch()
        repair(self.path)

    def write(self, row: dict[str, float]) -> None:
        """Append a row."""
        with self.path.open("a") as stream:
            stream.write(json.dumps(row) + "\n")

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self.path.stat().st_size

    def cut(self, size: int) -> None:
        """Truncate the file to this size."""
        os.truncate(self.path, size)


class PeerLoop:
    """Trains r2dreamer's agent; see the module for the order of things.

    Args:
        agent: Its ``Dreamer``.
        replay: Its ``Buffer``, empty, with room for the whole run.
        envs: The environments.
        schedule: How many updates are due after how many agent steps.
        run_dir: Metrics and state go here.
        action_repeat: Control steps of an agent step.
        row: Updates that a row of metrics is the mean of.
        unimix: See :func:`record_kl`.
    """

    def __init__(
        self,
        agent: Peer,
        replay: Any,
        envs: EnvBatch,
        schedule: UpdateSchedule,
        run_dir: Path,
        *,
        action_repeat: int,
        row: int,
        unimix: float = 0.01,
    ) -> None:
        self.agent, self.replay, self.envs, self.schedule = agent, replay, envs, schedule
        self.run_dir, self.rows = run_dir, Rows(run_dir)
        self.action_repeat, self.row = action_repeat, row
        self._kl = record_kl(agent, unimix)
        self.steps = self.updates = 0
        """Agent steps over all envs, and updates."""
        self._done = torch.ones(len(envs), dtype=torch.bool)
        self._returns, self._lengths = torch.zeros(len(envs)), torch.zeros(len(envs))
        self._state = agent.get_initial_state(len(envs))
        self._action = self._state["prev_action"].clone()
        self._sums: dict[str, float] = {}
        self._summed = 0
        self._seconds, self._since = 0.0, time.monotonic()
        self._row_began: tuple[float, int] | None = None

    # ---------------------------------------------------------------- the loop

    def run(self, updates: int, stopped: Sequence[Any] = (), save_seconds: float = 180.0) -> bool:
        """Train to a number of updates, or until ``stopped`` isn't empty; saves at the end.

        Args:
            updates: In all.
            stopped: Checked between agent steps.
            save_seconds: Seconds between two saves.

        Returns:
            Whether the run is complete.
        """
        saved = time.monotonic()
        while self.updates < updates and not stopped:
            self.step()
            self.learn(updates)
            if time.monotonic() - saved > save_seconds:
                self.save()
                saved = time.monotonic()
        complete = self.updates >= updates
        if complete and self._summed:
            self._flush()
        self.save()
        return complete

    def step(self) -> None:
        """Step all envs, act, store."""
        ended = self._done
        self.steps += int((~ended).sum())
        self._lengths += ~ended
        observation, self._done = self.envs.step(self._action, ended)
        self._action, self._state = self.agent.act(observation.clone(), self._state)
        observation["action"] = self._action * ~self._done.unsqueeze(-1)
        observation["stoch"], observation["deter"] = self._state["stoch"], self._state["deter"]
        # Constant: a slice may run from one episode into the next, is_first resets there.
        observation["episode"] = torch.arange(len(self.envs), dtype=torch.int32)
        self.replay.add_transition(observation.detach())
        self._returns += observation["reward"].squeeze(-1)
        for env in self._done.nonzero().flatten().tolist():
            length = float(self._lengths[env])
            self._write(
                {"episode/return": float(self._returns[env]), "episode/length": length},
            )
            self._returns[env] = self._lengths[env] = 0

    def learn(self, maximum: int) -> None:
        """Do the updates that are due, up to ``maximum`` in total."""
        due = self.schedule(self.steps)
        self.schedule.updates -= due  # counted one by one: what is not done stays due
        for _ in range(min(due, maximum - self.updates)):
            metrics = self.agent.update(self.replay)
            values = {ours: metrics[theirs] for ours, theirs in METRICS.items()}
            for name, value in (values | {"wm/kl_value": self._kl()}).items():
                self._sums[name] = self._sums.get(name, 0.0) + float(value.detach())
            self._summed += 1
            self.updates += 1
            self.schedule.updates += 1
            if self.updates % self.row == 0:
                self._flush()

    def _flush(self) -> None:
        row = {name: value / self._summed for name, value in self._sums.items()}
        now = time.monotonic()
        if self._row_began is not None:
            then, updates = self._row_began
            row["speed/updates_per_second"] = (self.updates - updates) / (now - then)
        self._row_began = now, self.updates
        self._write(row | {"speed/seconds": self._seconds + now - self._since})
        self._sums, self._summed = {}, 0

    def _write(self, row: dict[str, float]) -> None:
        frames = self.steps * self.action_repeat
        self.rows.write({"frames": frames, "updates": self.updates, **row})

    # ---------------------------------------------------------------- stop and continue

    def save(self) -> None:
        """Atomically write all that the next steps depend on."""
        agent, storage = self.agent, self.replay._buffer.storage
        filled = storage.shape[0] if len(storage) else 0
        state = {
            "agent": agent.state_dict(),
            "optimizer": agent._optimizer.state_dict(),
            "scaler": agent._scaler.state_dict(),
            "scheduler": agent._scheduler.state_dict(),
            "slow_value_updates": agent._slow_value_updates,
            "replay": storage._storage[:filled].to_dict() if filled else None,
            "envs": self.envs.state_dict(),
            "done": self._done,
            "returns": self._returns,
            "lengths": self._lengths,
            "latent": self._state.to_dict(),
            "action": self._action,
            "steps": self.steps,
            "updates": self.updates,
            "schedule": self.schedule.state_dict(),
            "sums": (self._sums, self._summed),
            "seconds": self._seconds + time.monotonic() - self._since,
            "rows": self.rows.size,
            "random": random_state(),
        }
        path = self.run_dir / STATE_NAME
        temporary = path.with_name(f".{path.name}.tmp")
        torch.save(state, temporary)
        os.replace(temporary, path)

    def resume(self) -> bool:
        """Continue from the saved state, exactly if the envs can; else with new episodes.

        Returns:
            Whether there was one; without, rows of a run that saved nothing are dropped.
        """
        path = self.run_dir / STATE_NAME
        if not path.exists():
            self.rows.cut(0)
            return False
        state = torch.load(path, weights_only=True)
        agent, envs = self.agent, len(self.envs)
        agent.load_state_dict(state["agent"])
        agent._optimizer.load_state_dict(state["optimizer"])
        agent._scaler.load_state_dict(state["scaler"])
        agent._scheduler.load_state_dict(state["scheduler"])
        agent._slow_value_updates = state["slow_value_updates"]
        if state["replay"] is not None:
            filled = len(state["replay"]["episode"])
            records = TensorDict(state["replay"], batch_size=(filled, envs))
            self.replay._buffer.extend(records.transpose(0, 1))  # it stores time first
        self.steps, self.updates = state["steps"], state["updates"]
        self.schedule.load_state_dict(state["schedule"])
        self._sums, self._summed = state["sums"]
        self._seconds, self._since = state["seconds"], time.monotonic()
        self._state = TensorDict(state["latent"], batch_size=(envs,))
        self._action = state["action"]
        if state["envs"] is not None:
            self.envs.load_state_dict(state["envs"])
            self._done = state["done"]
            self._returns, self._lengths = state["returns"], state["lengths"]
        self.rows.cut(state["rows"])
        restore_random_state(state["random"])
        return True

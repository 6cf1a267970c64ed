"""Record episodes of an env and of policies, as files that runs can be trained on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import step_mdp

from w2f_torchrl.config import EnvironmentConfig
from w2f_torchrl.data.environments import build_env, control_steps
from w2f_torchrl.data.recorded.episodes import Array, RecordedEpisode
from w2f_torchrl.data.recorded.write import note_facts, write_episode
from w2f_torchrl.envs import PixelDMControlEnv
from w2f_torchrl.envs.actions import random_action
from w2f_torchrl.evaluation.episodes import true_states
from w2f_torchrl.evaluation.policy import LoadedPolicy
from w2f_torchrl.keys import MASK, PIXELS
from w2f_torchrl.utils.seeding import derive_seed

logger = logging.getLogger(__name__)

RANDOM = "random"
CONTROL_STEPS = 1000
"""Length of an episode if its env has no limit."""


@dataclass(frozen=True)
class Player:
    """A policy that is recorded.

    Attributes:
        name: Part of its files' names.
        policy: A trained policy; None for random actions.
    """

    name: str
    policy: LoadedPolicy | None = None


class Recorder:
    """Record episodes into a folder; those that are there are kept.

    Episode i depends only on the seed and i, so an interrupted recording continues as if it had
    not been interrupted.

    Args:
        folder: The folder; created if missing.
        environment: The env.
        players: Policies, which take turns: episode i is played by number i modulo their number.
        seed: Seed of the recording.
        hold: Agent steps for which a random action is held.
        max_steps: Agent steps after which an episode is cut; None for the env's limit.

    Raises:
        ConfigError: If the folder holds another recording.
    """

    def __init__(
        self,
        folder: Path,
        environment: EnvironmentConfig,
        players: Sequence[Player],
        *,
        seed: int = 0,
        hold: int = 4,
        max_steps: int | None = None,
    ) -> None:
        self.folder, self.environment, self.players = folder, environment, list(players)
        self.seed, self.hold, self.max_steps = seed, hold, max_steps
        facts = {
            "environment": {k: v for k, v in vars(environment).items() if k != "num_envs"},
            "players": [player.name for player in players],
            "seed": seed,
            "hold": hold,
            "max_steps": max_steps,
        }
        note_facts(folder, facts)

    def record(self, episodes: int, tell: Callable[[Path], None] = lambda path: None) -> list[Path]:
        """Record the episodes that are missing.

        Args:
            episodes: Number of episodes that the folder holds afterwards, if it held fewer.
            tell: Called with the path of each new file.

        Returns:
            The paths of the new files.
        """
        envs: dict[int, EnvBase] = {}
        written = []
        try:
            for index in range(episodes):
                if any(self.folder.glob(f"{index:06d}-*.npz")):
                    continue
                place = index % len(self.players)
                if place not in envs:
                    envs[place] = self._make_env(self.players[place])
                episode = self._play(envs[place], self.players[place], index)
                name = f"{index:06d}-{self.players[place].name}-{len(episode)}.npz"
                written.append(write_episode(self.folder / name, episode))
                tell(written[-1])
        finally:
            for env in envs.values():
                env.close()
        return written

    def _make_env(self, player: Player) -> EnvBase:
        env = build_env(self.environment, derive_seed(self.seed, "recording", 0))
        if player.policy is not None:
            env.append_transform(player.policy.make_tensordict_primer())
        return env

    def _play(self, env: EnvBase, player: Player, index: int) -> RecordedEpisode:
        seed = derive_seed(self.seed, "recording", index)
        env.set_seed(seed, static_seed=True)
        torch.manual_seed(seed)
        repeat = self.environment.action_repeat
        limit = -(-(control_steps(env, repeat) or CONTROL_STEPS) // repeat)
        steps = limit if self.max_steps is None else min(limit, self.max_steps)
        act = self._random(env, seed) if player.policy is None else player.policy
        data, rows = env.reset(), []
        zero = torch.zeros(env.action_spec.shape)
        rows.append(_row(env, data, zero, 0.0))
        for _ in range(steps):
            # Not step_and_maybe_reset: the true state of the last observation must be read first.
            transition = env.step(act(data))
            following, data = transition["next"], step_mdp(transition)
            action = transition["action"].float().clamp(-1, 1)
            rows.append(_row(env, following, action, float(following["reward"])))
            if following["done"].any():
                break
        terminated = bool(following["terminated"].any())
        return _joined(f"episode {index}", rows, terminated=terminated)

    def _random(self, env: EnvBase, seed: int) -> Callable[[TensorDictBase], TensorDictBase]:
        generator = torch.Generator().manual_seed(seed)
        step, action = 0, torch.empty(0)

        def act(data: TensorDictBase) -> TensorDictBase:
            nonlocal step, action
            if step % self.hold == 0:
                action = random_action(env.action_spec, generator)
            step += 1
            return data.set("action", action)

        return act


_Row = dict[str, Any]


def _row(env: EnvBase, data: TensorDictBase, action: Tensor, reward: float) -> _Row:
    """Return one observation, and what led to it."""
    row = {"pixels": data[PIXELS], "mask": data.get(MASK, None), "action": action, "states": {}}
    row["reward"] = reward
    base = getattr(env, "base_env", env)
    if isinstance(base, PixelDMControlEnv):
        agent, scenery = true_states(base)
        row["states"] = {f"agent/{name}": value for name, value in agent.items()}
        row["states"] |= {f"scenery/{name}": value for name, value in scenery.items()}
    return row


def _joined(name: str, rows: Sequence[_Row], *, terminated: bool) -> RecordedEpisode:
    states: dict[str, Array] = {
        key: np.stack([row["states"][key] for row in rows]) for key in rows[0]["states"]
    }
    masks = [row["mask"] for row in rows]
    return RecordedEpisode(
        name,
        torch.stack([row["pixels"] for row in rows]).cpu(),
        torch.stack([row["action"] for row in rows]).float().cpu(),
        torch.tensor([row["reward"] for row in rows]),
        terminated,
        None if masks[0] is None else torch.stack(masks).cpu(),
        states,
    )

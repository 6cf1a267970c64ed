"""This project's environments as r2dreamer's trainer sees them.

Shape letters: N envs, A action, C, H, W picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase, TransformedEnv


class EnvBatch:
    """Envs, one after the other, as r2dreamer's trainer sees them.

    Args:
        envs: Unbatched, with ``pixels`` uint8 [C, H, W], ``reward``, ``terminated``, ``done`` [1].
    """

    def __init__(self, envs: Sequence[EnvBase]) -> None:
        self.envs = [_innermost(env) for env in envs]

    def __len__(self) -> int:
        """N."""
        return len(self.envs)

    def step(self, action: Tensor, done: Tensor) -> tuple[TensorDict, Tensor]:
        """Step the envs, and reset those whose episodes have ended.

        Args:
            action: ``[N, A]``.
            done: bool ``[N]``, whether the last observation was an episode's last.

        Returns:
            ``image`` uint8 [N, H, W, C], ``reward`` float32 [N, 1], ``is_first``, ``is_last``,
            ``is_terminal`` bool [N, 1]; and the new ``done`` [N].
        """
        rows = [
            self._reset(env) if ended else self._step(env, one)
            for env, one, ended in zip(self.envs, action, done.tolist(), strict=True)
        ]
        batch = TensorDict.stack(rows)
        return batch, batch["is_last"].squeeze(-1).clone()

    def _reset(self, env: EnvBase) -> TensorDict:
        no, zero = torch.zeros(1, dtype=torch.bool), torch.zeros(1)
        return _row(env.reset(), zero, is_first=~no, is_last=no, is_terminal=no)

    def _step(self, env: EnvBase, action: Tensor) -> TensorDict:
        after = env.step(TensorDict({"action": action}))["next"]
        return _row(
            after,
            after["reward"],
            is_first=torch.zeros(1, dtype=torch.bool),
            is_last=after["done"],
            is_terminal=after["terminated"],
        )

    def state_dict(self) -> list[Any] | None:
        """Return all that the next steps depend on; None if an env can't."""
        if not all(hasattr(env, "resume_state") for env in self.envs):
            return None
        return [env.resume_state() for env in self.envs]

    def load_state_dict(self, states: list[Any]) -> None:
        """Continue from :meth:`state_dict`, in envs made with the same arguments."""
        for env, state in zip(self.envs, states, strict=True):
            env.load_resume_state(state)


def _innermost(env: EnvBase) -> Any:
    while isinstance(env, TransformedEnv):
        env = env.base_env
    return env


def _row(observation: TensorDictBase, reward: Tensor, **flags: Tensor) -> TensorDict:
    image = observation["pixels"].movedim(0, -1)
    return TensorDict({"image": image, "reward": reward.float(), **flags})

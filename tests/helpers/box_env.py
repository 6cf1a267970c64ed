"""A small env without a simulator, of any action box, and with any fault that a spec can have."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Binary, Bounded, Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase

STEPS = 10
"""Agent steps of an episode."""


class BoxEnv(EnvBase):
    """A square that the actions move; keeps the actions that it got.

    Args:
        action: Its spec.
        entries: Observation specs by name, in the place of its own; a spec of None leaves one out.
        flags: The flags that it has.
        reward: What a step gives, None for the distance from the middle.
        reward_spec: Its spec.
        given: Observation values in the place of those of the specs.
    """

    def __init__(
        self,
        task: str = "any",
        *,
        image_size: int = 16,
        seed: int = 0,
        action: TensorSpec | None = None,
        entries: dict[str, TensorSpec | None] | None = None,
        flags: tuple[str, ...] = ("done", "terminated", "truncated"),
        reward: float | None = None,
        bad_after: int = 0,
        reward_spec: TensorSpec | None = None,
        given: dict[str, torch.Tensor] | None = None,
        device: str = "cpu",
        **settings: Any,
    ) -> None:
        super().__init__(batch_size=[], device=device)
        del task, settings
        self.generator = torch.Generator().manual_seed(seed)
        size, self.reward, self.bad_after = image_size, reward, bad_after
        self.size, self.given, self.flags = size, given or {}, flags
        specs: dict[str, TensorSpec | None] = {
            "pixels": Bounded(0, 255, (3, size, size), dtype=torch.uint8),
            "foreground_mask": Binary(shape=(1, size, size), dtype=torch.bool),
        }
        specs |= entries or {}
        self.observation_spec = Composite({k: v for k, v in specs.items() if v is not None})
        self.action_spec = Bounded(-1, 1, (2,)) if action is None else action
        self.reward_spec = Unbounded((1,)) if reward_spec is None else reward_spec
        self.done_spec = Composite({k: Binary(shape=(1,), dtype=torch.bool) for k in flags})
        self.received: list[torch.Tensor] = []
        self.total_steps = 0

    def _observe(self) -> dict[str, torch.Tensor]:
        out = {name: spec.zero() for name, spec in self.observation_spec.items()}
        if out["pixels"].shape == (3, self.size, self.size):
            row = 1 + self.steps % (self.size - 4)
            out["pixels"][:, row : row + 3, 3:9] = 200
            if "foreground_mask" in out:
                out["foreground_mask"][:, row : row + 3, 3:9] = 1
        return out | self.given

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: object) -> TensorDict:
        del tensordict, kwargs
        self.steps = 0
        return TensorDict(self._observe(), [])

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        self.received.append(tensordict["action"].clone())
        self.steps += 1
        self.total_steps += 1
        over = torch.tensor([self.steps == STEPS])
        flags = {"done": over, "terminated": torch.zeros_like(over), "truncated": over}
        if "truncated" not in self.flags:
            flags["terminated"] = over
        reward = self.reward_spec.zero() + 0.5
        if self.reward is not None and self.total_steps > self.bad_after:
            reward = torch.full_like(reward, self.reward)
        flags = {name: value for name, value in flags.items() if name in self.flags}
        return TensorDict({**self._observe(), "reward": reward, **flags}, [])

    def _set_seed(self, seed: int | None) -> None:
        self.generator.manual_seed(seed or 0)

"""A small env of discrete actions, whose pictures say which one led to them."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Categorical, OneHot, TensorSpec

from helpers.box_env import BoxEnv


class ChoiceEnv(BoxEnv):
    """A :class:`BoxEnv` of a choice; action 1 is rewarded.

    The first pixel holds 1 + the action that led here, 0 at a reset; the second the episode's step.

    Args:
        action: Its spec, ``Categorical`` or ``OneHot``.
    """

    def __init__(
        self, task: str = "any", *, action: TensorSpec | None = None, **settings: Any
    ) -> None:
        self.last = 0
        super().__init__(task, action=Categorical(4) if action is None else action, **settings)

    def _observe(self) -> dict[str, torch.Tensor]:
        out = super()._observe()
        out["pixels"][0, 0, :2] = torch.tensor([self.last, self.steps], dtype=torch.uint8)
        return out

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: object) -> TensorDict:
        self.last = 0
        return super()._reset(tensordict, **kwargs)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        action = tensordict["action"]
        assert self.action_spec.is_in(action), action
        index = int(action.long().argmax()) if isinstance(self.action_spec, OneHot) else int(action)
        self.last, self.reward = 1 + index, float(index == 1)
        return super()._step(tensordict)

    def resume_state(self) -> dict[str, int]:
        return {"steps": self.steps, "last": self.last, "total_steps": self.total_steps}

    def load_resume_state(self, state: dict[str, int]) -> None:
        self.steps, self.last = state["steps"], state["last"]
        self.total_steps = state["total_steps"]


def led_to(pixels: torch.Tensor) -> torch.Tensor:
    """The action that led to pictures ``[..., 3, H, W]``, -1 where an episode begins."""
    return pixels[..., 0, 0, 0].long() - 1


def step_of(pixels: torch.Tensor) -> torch.Tensor:
    """The episode's step of pictures ``[..., 3, H, W]``."""
    return pixels[..., 0, 0, 1].long()

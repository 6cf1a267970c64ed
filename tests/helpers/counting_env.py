"""An environment whose every observation says where it comes from, to prove causal order."""

from __future__ import annotations

from typing import ClassVar

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.data import Binary, Bounded, Composite, Unbounded
from torchrl.envs import Compose, EnvBase, InitTracker, RewardSum, TransformedEnv

SIZE = 8
RECURRENT = {"state": 4, "belief": 3, "previous_action": 1}


def episode_length(env: int, episode: int) -> int:
    """Steps of an episode: uneven over envs and over an env's episodes."""
    return 1 + (7 * env + 5 * episode) % 11


def reward_of(env: int, episode: int, step: int, action: float) -> float:
    """A reward that names its transition (exact in float32)."""
    return env * 1e6 + episode * 1e4 + step * 256 + action


class CountingEnv(EnvBase):
    """Counts episodes and steps; the pixels hold env, episode, step and the action that led here.

    Episodes end after :func:`episode_length` steps, the odd ones terminated, the even truncated.
    Actions are whole numbers in [0, 255], float32 [1].
    """

    def __init__(self, index: int, seed: int = 0) -> None:
        super().__init__(batch_size=[])
        self.index = index
        self.seed_received = seed
        self.episode = -1
        self.step_number = 0
        self.observation_spec = Composite(
            pixels=Bounded(0, 255, (3, SIZE, SIZE), dtype=torch.uint8),
            foreground_mask=Binary(shape=(1, SIZE, SIZE), dtype=torch.bool),
            seed=Unbounded((1,), dtype=torch.int64),
        )
        self.action_spec = Bounded(0, 255, (1,), dtype=torch.float32)
        self.reward_spec = Unbounded((1,))
        self.done_spec = Composite(
            {key: Binary(shape=(1,), dtype=torch.bool) for key in ("done", "terminated")}
            | {"truncated": Binary(shape=(1,), dtype=torch.bool)}
        )

    def _observe(self, action: float) -> dict[str, Tensor]:
        return {
            "pixels": encode(self.index, self.episode, self.step_number, action),
            "foreground_mask": mask_of(self.step_number),
            "seed": torch.tensor([self.seed_received]),
        }

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: object) -> TensorDict:
        del tensordict, kwargs
        self.episode += 1
        self.step_number = 0
        return TensorDict(self._observe(0), [])

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        action = float(tensordict["action"])
        self.step_number += 1
        ended = self.step_number == episode_length(self.index, self.episode)
        terminated = torch.tensor([ended and self.episode % 2 == 1])
        done = torch.tensor([ended])
        reward = reward_of(self.index, self.episode, self.step_number, action)
        return TensorDict(
            {
                **self._observe(action),
                "reward": torch.tensor([reward]),
                "done": done,
                "terminated": terminated,
                "truncated": done & ~terminated,
            },
            [],
        )

    def _set_seed(self, seed: int | None) -> None:
        del seed


def encode(env: int, episode: int, step: int, action: float) -> Tensor:
    """Make the observation, uint8 [3, 8, 8]."""
    pixels = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
    pixels[0, 0, :4] = torch.tensor([env, episode, step, int(action)], dtype=torch.uint8)
    return pixels


def decode(pixels: Tensor) -> Tensor:
    """Read (env, episode, step, action) out of observations [..., 3, 8, 8]: int64 [..., 4]."""
    return pixels[..., 0, 0, :4].long()


def mask_of(step: int) -> Tensor:
    """A mask, bool [1, 8, 8], that differs from step to step and isn't symmetric."""
    cells = torch.arange(SIZE * SIZE).view(1, SIZE, SIZE)
    return (cells * (step + 1)) % 5 < 2


def make_counting_env(index: int, seed: int) -> EnvBase:
    """Make what ``make_collector`` asks for."""
    return TransformedEnv(CountingEnv(index, seed), Compose(InitTracker(), RewardSum()))


def make_bare_env(index: int, seed: int) -> EnvBase:
    """Make an env without ``is_init``."""
    return CountingEnv(index, seed)


class DummyPolicy(TensorDictModuleBase):
    """Recurrent policy with random actions that counts its steps in ``belief``.

    ``bias`` is written to ``state`` so that the weights in use can be read off the batch.
    """

    in_keys: ClassVar = ["pixels", "is_init", *RECURRENT]
    out_keys: ClassVar = ["action", "embedding", *(("next", key) for key in RECURRENT)]

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))
        self.register_buffer("scale", torch.ones(1))

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Act: see the class."""
        reset = tensordict["is_init"]
        belief = torch.where(reset, 0, tensordict["belief"]) + 1
        action = torch.randint(0, 256, (*tensordict.batch_size, 1)).float()
        tensordict["action"] = action
        tensordict["embedding"] = torch.randn(*tensordict.batch_size, 100)
        tensordict["next", "belief"] = belief
        tensordict["next", "previous_action"] = action
        state = (self.bias * self.scale).detach()
        tensordict["next", "state"] = state.expand(*tensordict.batch_size, RECURRENT["state"])
        return tensordict

"""World2Filter on your own environment, with masks from your own segmenter.

python examples/own_env_and_segmenter.py --run-dir runs/disc

The env can be any TorchRL env with uint8 pixels: here a red disc that must stay in the middle of an
image whose background keeps changing colour. The segmenter can be any callable: here a test of the
colour. A transform joins them, and :func:`register_env` gives them a name for the settings.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Bounded, Composite, Unbounded
from torchrl.envs import EnvBase, TransformedEnv

from w2f_torchrl.envs import register_env
from w2f_torchrl.trainers import Trainer, to_run_config
from w2f_torchrl.transforms import ForegroundMaskTransform

EPISODE = 100  # agent steps


class DiscEnv(EnvBase):
    """Keep a disc in the middle; the action and the wind push it."""

    def __init__(self, image_size: int, action_repeat: int, seed: int, device: str = "cpu"):
        super().__init__(device=device, batch_size=[])
        self.image_size, self.action_repeat = image_size, action_repeat
        self.generator = torch.Generator().manual_seed(seed)
        self.grid = torch.linspace(-1, 1, image_size)
        shape = (3, image_size, image_size)
        self.observation_spec = Composite(pixels=Bounded(0, 255, shape, dtype=torch.uint8))
        self.action_spec = Bounded(-1, 1, (2,))
        self.reward_spec = Unbounded((1,))
        flags = {k: Binary(shape=(1,), dtype=torch.bool) for k in ("done", "terminated")}
        self.done_spec = Composite(flags | {"truncated": Binary(shape=(1,), dtype=torch.bool)})

    def _set_seed(self, seed: int | None) -> None:
        self.generator.manual_seed(seed or 0)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDict:
        del tensordict, kwargs
        self.place = 1.2 * torch.rand(2, generator=self.generator) - 0.6
        self.colour = torch.rand(3, generator=self.generator)
        self.steps = 0
        return TensorDict({"pixels": self._draw()}, [])

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        reward = torch.zeros(1)
        for _ in range(self.action_repeat):
            wind = 0.02 * torch.randn(2, generator=self.generator)
            self.place = (self.place + 0.05 * tensordict["action"].cpu() + wind).clamp(-0.8, 0.8)
            change = 0.1 * torch.randn(3, generator=self.generator)
            self.colour = (self.colour + change).clamp(0, 1)
            reward += 1 - self.place.norm()
        self.steps += 1
        ended = torch.tensor([self.steps == EPISODE])
        flags = {"done": ended, "truncated": ended, "terminated": torch.zeros_like(ended)}
        return TensorDict({"pixels": self._draw(), "reward": reward, **flags}, [])

    def _draw(self) -> Tensor:
        # [3, H, W]: a background of bluish and greenish stripes with the red disc on top.
        stripes = torch.sin(7 * self.grid + 6 * self.colour[0]).abs()
        background = self.colour[:, None, None] * stripes.expand(3, self.image_size, -1)
        background[0] *= 0.3
        disc = (self.grid[:, None] - self.place[1]) ** 2 + (self.grid - self.place[0]) ** 2 < 0.04
        red = torch.tensor([0.9, 0.1, 0.1])[:, None, None]
        return (255 * torch.where(disc, red, background)).to(torch.uint8)


class RedSegmenter:
    """Mark pixels that are clearly more red than green and blue as foreground."""

    def __call__(self, pixels: Tensor) -> Tensor:
        """Map uint8 ``[N, 3, H, W]`` to bool ``[N, 1, H, W]``."""
        red, others = pixels[:, :1].int(), pixels[:, 1:].int().amax(1, keepdim=True)
        return red - others > 100


def make_disc(
    task: str,
    *,
    image_size: int,
    action_repeat: int,
    seed: int,
    foreground_mask: bool = True,
    device: str = "cpu",
    **unused: Any,
) -> EnvBase:
    """Make an env, with masks if requested; the factory for :func:`register_env`."""
    del unused  # `render` and `camera_id`, which do not apply to a disc
    if task != "centre":
        raise ValueError(f"task is {task!r}: disc has centre.")
    env = DiscEnv(image_size, action_repeat, seed, device)
    if not foreground_mask:
        return env
    return TransformedEnv(env, ForegroundMaskTransform(RedSegmenter()))


# At import, not in main(): worker processes import this module as well.
register_env("disc", make_disc)


def main(arguments: list[str] | None = None) -> Path:
    """Train on the disc.

    Returns:
        The run's directory.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/disc"))
    parser.add_argument("--frames", type=int, default=800, help="total control steps")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = to_run_config(
        {
            "environment": {"domain": "disc", "task": "centre", "image_size": 32, "num_envs": 2},
            "model": {"belief_size": 256, "hidden_size": 64, "units": 64, "cnn_depth": 4},
            "training": {
                "total_frames": args.frames,
                "batch_size": 4,
                "batch_length": 16,
                "train_ratio": 16,
                "prefill_steps": 100,
            },
            # A run treats the env's own mask as the simulator's.
            "segmentation": {"source": "simulator"},
            "optimizer": {"lr": 1e-3, "warmup_updates": 20},
            "collection": {"num_workers": 0},
            "evaluation": {"every_frames": args.frames, "episodes": 1},
            "logging": {"every_updates": 10},
            "run_dir": str(args.run_dir),
        }
    )
    Trainer(config).train()
    return args.run_dir


if __name__ == "__main__":
    main()

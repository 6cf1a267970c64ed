"""A model of a few thousand parameters: its losses, learner and samples."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from tensordict import TensorDict
from tiny_run import TINY

from w2f_torchrl.config import OptimizerConfig
from w2f_torchrl.modules import (
    build_actor,
    build_critic,
    build_discrete_actor,
    build_world_model,
)
from w2f_torchrl.objectives import LossConfig, World2FilterLoss
from w2f_torchrl.trainers import Learner

SIZE = 16
LATENTS = ["whole", "split", "shared", "foreground"]


def make_loss(
    latent: str, encoder: str = "own", *, actions: int | None = None, **loss: object
) -> World2FilterLoss:
    """Losses of random networks, of so many discrete actions or of two continuous ones."""
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, background_encoder=encoder)
    size = actions or 2
    world_model = build_world_model(config, action_size=size, image_size=SIZE, latent=latent)
    actor = build_discrete_actor(TINY, actions) if actions else build_actor(TINY, 2)
    critic = build_critic(TINY)
    # Reward and critic start at zero, which would hide what a gradient test looks for.
    for head in (world_model.reward, critic):
        torch.nn.init.normal_(head.model[-1].weight, std=0.3)
    return World2FilterLoss(world_model, actor[0].module, critic, LossConfig(**loss))


def make_sample(batch: int = 3, time: int = 6, *, actions: int | None = None) -> TensorDict:
    """Random records; so many ``actions`` make them one-hot."""
    generator = torch.Generator().manual_seed(1)
    is_init = torch.zeros(batch, time, 1, dtype=torch.bool)
    is_init[0, 0] = is_init[1, 3] = True
    done = torch.zeros_like(is_init)
    done[1, 2] = True
    action = torch.randn(batch, time, 2, generator=generator) * ~is_init
    if actions is not None:
        index = torch.randint(actions, (batch, time), generator=generator)
        action = torch.nn.functional.one_hot(index, actions).float() * ~is_init
    pixels = torch.randint(0, 256, (batch, time, 3, SIZE, SIZE), generator=generator)
    following = {
        "pixels": pixels.to(torch.uint8),
        "foreground_mask": torch.rand(batch, time, 1, SIZE, SIZE, generator=generator) < 0.2,
        "reward": torch.randn(batch, time, 1, generator=generator) * ~is_init,
        "terminated": done.clone(),
        "done": done,
    }
    return TensorDict(
        {"action": action, "is_init": is_init, "next": TensorDict(following, [batch, time])},
        [batch, time],
    )


def make_learner(
    latent: str = "split",
    *,
    seed: int = 0,
    lr: float | None = None,
    actions: int | None = None,
    **settings: Any,
) -> Learner:
    """A tiny learner; with ``lr`` its optimizer is one of three updates' warm-up.

    Its actions are two numbers, or one of ``actions``.
    """
    if lr is not None:
        settings["optimizer"] = OptimizerConfig(lr=lr, warmup_updates=3)
    torch.manual_seed(seed)
    settings |= {"action_size": actions or 2, "discrete_actions": actions is not None}
    return Learner(TINY, image_size=SIZE, latent=latent, **settings)


def filled(value: float, shape: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """What ``torch.rand(*shape, **kwargs)`` returns if every draw is this value."""
    shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    return torch.full(tuple(shape), value, **{k: v for k, v in kwargs.items() if k != "generator"})

"""Other projects from their checkouts, for :mod:`learner` and :mod:`parity`.

None of their code is kept here: a checkout is named on the command line and imported unchanged.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from omegaconf import OmegaConf
from tensordict import TensorDict, TensorDictBase

from w2f_torchrl.modules import PRESETS

ACTION_SIZE = 6


def r2dreamer_update(
    checkout: Path,
    preset: str,
    *,
    device: str = "cpu",
    mixed: bool = False,
    compiled: bool = True,
) -> Callable[[TensorDictBase], Any]:
    """An update of r2dreamer with ``rep_loss=dreamer``: DreamerV3 with a reconstruction.

    Its own configuration with the widths of one of our presets. On a CPU it is eager and in the
    given precision; on CUDA as it is published: compiled with CUDA graphs, and in float16.

    Args:
        checkout: The root of its repository.
        preset: A name of :data:`~w2f_torchrl.modules.PRESETS`.
        device: ``"cpu"`` or ``"cuda"``.
        mixed: On a CPU: autocast to bfloat16.
        compiled: On CUDA: as it is published, or eager.

    Returns:
        An update of samples as ``learner.make_sample`` makes them.

    Raises:
        FileNotFoundError: If the checkout lacks a file that is needed.
    """
    settings = {"compile": compiled and device != "cpu"}
    agent = r2dreamer_agent(
        checkout, preset, ACTION_SIZE, device=device, mixed=mixed, settings=settings
    )
    return lambda sample: agent.update(_Buffer(sample, agent.rssm))


def r2dreamer_agent(
    checkout: Path,
    preset: str,
    action_size: int,
    *,
    device: str = "cpu",
    mixed: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Any:
    """Make r2dreamer's agent with ``rep_loss=dreamer``, as :func:`r2dreamer_update` describes.

    Args:
        checkout: The root of its repository.
        preset: A name of :data:`~w2f_torchrl.modules.PRESETS`.
        action_size: A.
        device: ``"cpu"`` or ``"cuda"``.
        mixed: On a CPU: autocast to bfloat16.
        settings: Values of its model's configuration (``lr``, ``warmup``, ``horizon``, ...) in the
            place of its own.

    Returns:
        Its ``Dreamer``.

    Raises:
        FileNotFoundError: If the checkout lacks a file that is needed.
    """
    base = checkout / "configs" / "model" / "_base_.yaml"
    if not base.exists():
        raise FileNotFoundError(
            f"--r2dreamer={checkout} is not a checkout of r2dreamer: {base} does not exist."
        )
    config = _configuration(base, preset, device, settings or {})
    dreamer = import_from(checkout, "dreamer")
    if device == "cpu":  # its float16 is for GPUs
        dreamer.autocast = lambda **kwargs: torch.autocast("cpu", torch.bfloat16, enabled=mixed)
    spaces = {"image": SimpleNamespace(shape=(64, 64, 3))}
    return dreamer.Dreamer(
        config.model, SimpleNamespace(spaces=spaces), SimpleNamespace(shape=(action_size,))
    ).to(device)


def import_from(checkout: Path, name: str) -> ModuleType:
    """Import a module from a checkout that is not a package.

    Args:
        checkout: The folder that holds it.
        name: The module's.
    """
    sys.path.insert(0, str(checkout))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(checkout))


def _configuration(base: Path, preset: str, device: str, settings: Mapping[str, Any]) -> Any:
    sizes = PRESETS[preset]
    model = OmegaConf.load(base)
    own = {
        "deter": sizes.belief_size,
        "hidden": sizes.hidden_size,
        "discrete": sizes.num_classes,
        "depth": sizes.cnn_depth,
        "units": sizes.units,
        "act": "SiLU",
        "norm": True,
        "rep_loss": "dreamer",
        "compile": device != "cpu",
    }
    keys = {"mlp_keys": "$^", "cnn_keys": "image"}
    root = {"device": device, "env": {"encoder": keys, "decoder": keys}}
    return OmegaConf.create(root | {"model": OmegaConf.merge(model, own, dict(settings))})


class _Buffer:
    """One batch instead of its replay."""

    def __init__(self, sample: TensorDictBase, rssm: Any):
        following = sample["next"]
        flags = {"is_last": following["done"], "is_terminal": following["terminated"]}
        self._batch = TensorDict(
            {
                "image": following["pixels"].movedim(2, -1),
                "action": sample["action"],
                "reward": following["reward"],
                "is_first": sample["is_init"].squeeze(-1),
                **flags,
            },
            sample.shape,
        )
        self._initial = rssm.initial(len(sample))

    def sample(self) -> tuple[TensorDict, None, tuple[torch.Tensor, torch.Tensor]]:
        return self._batch, None, self._initial

    def update(self, *latents: Any) -> None:
        """Nothing is stored."""

"""Complete checkpoints of earlier versions: missing settings, and parameters split since."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from w2f_torchrl._older_weights import split_mask
from w2f_torchrl.checkpoint.file import CheckpointError
from w2f_torchrl.config.model import ModelConfig

#: Settings of the model that were added later, with the former behaviour as value.
MODEL_BEFORE = {
    "background_encoder": "shared",
    "decoder": "torchrl",
    "encoder": "convolutional",
    "resample": "stride",
}

#: Settings that change the computation but not the parameters, so that loading would not fail.
SAME_SHAPES = ("encoder", "decoder", "resample")


def complete_model(model: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a checkpoint's model, completed with those that are newer.

    Args:
        model: ``config["model"]`` as it was saved.
    """
    return MODEL_BEFORE | model


def check_same_networks(saved: dict[str, Any], now: ModelConfig) -> None:
    """Refuse settings that would change the meaning of the saved parameters.

    Args:
        saved: ``config["model"]`` of the checkpoint.
        now: The model settings of the run.

    Raises:
        CheckpointError: If any would; names each such setting and the value to pass.
    """
    complete = complete_model(saved)
    wrong = [name for name in SAME_SHAPES if complete[name] != getattr(now, name)]
    if wrong:
        were = ", ".join(
            f"model.{name} was {complete[name]} and is {getattr(now, name)}" for name in wrong
        )
        wanted = " ".join(f"model.{name}={complete[name]}" for name in wrong)
        raise CheckpointError(f"The checkpoint is of another model: {were}. Pass {wanted}.")


def split_moments(
    optimizer: dict[str, Any], saved_names: set[str], names: Sequence[str]
) -> dict[str, Any]:
    """Split the optimizer's moments like the last layer of the foreground decoder.

    Args:
        optimizer: The saved state dict of an optimizer with one group.
        saved_names: Names of the saved parameters and buffers.
        names: Names of the parameters that are trained now, in the optimizer's order.

    Returns:
        A state dict for the current parameters; the given one if none is split.
    """
    joints = {
        name: _joint_of(name, names)
        for name in names
        if ".mask_head." in name and name not in saved_names
    }
    if not joints:
        return optimizer
    before = [name for name in names if name not in joints]
    state: dict[int, dict[str, Tensor]] = {}
    for i, name in enumerate(names):
        source = joints.get(name, name)
        moments = optimizer["state"].get(before.index(source))
        if moments is None:  # before the first update
            continue
        if source in joints.values():
            dim, part = (1 if name.endswith("weight") else 0), int(name in joints)
            moments = {key: split_mask(moment, dim)[part] for key, moment in moments.items()}
        state[i] = moments
    (group,) = optimizer["param_groups"]
    return {"state": state, "param_groups": [group | {"params": list(range(len(names)))}]}


def _joint_of(name: str, names: Sequence[str]) -> str:
    """Return the parameter of the last layer that contained the mask head's."""
    decoder, _, kind = name.partition(".mask_head.")
    layers = [n for n in names if n.startswith(f"{decoder}.layers.") and n.endswith(f".{kind}")]
    return layers[-1]

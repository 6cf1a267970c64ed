"""Export the policy of a checkpoint as a small file, for publishing.

python -m w2f_torchrl.evaluation.export runs/demo/checkpoints/checkpoint_000000001000.pt policy.pt
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from w2f_torchrl.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from w2f_torchrl.evaluation.policy import load_learner

#: Settings about the place of a run, which a published file must not contain.
PRIVATE: dict[str, Any] = {
    "run_dir": "runs/latest",
    "resume": None,
    "device": "auto",
    "plugins": [],
}
PRIVATE_ENVIRONMENT = {"dmcgb_data": None}
PRIVATE_LOGGING = {"wandb_project": "w2f_torchrl", "wandb_entity": None}
#: Recorded data that the run was trained on.
PRIVATE_DATA = {"path": None}
#: Files for the masks of training, which acting does not need.
PRIVATE_AUGMENTATION = {"source": None}
PRIVATE_SEGMENTATION = dict.fromkeys(
    ("checkpoint", "vocabulary", "student_checkpoint", "labels", "backgrounds")
)

ELSEWHERE = (".onnx", ".pt2")


def export_policy(checkpoint: str | Path, out: str | Path) -> Path:
    """Write the networks of a checkpoint, with weights in 16 bits, and its settings.

    Like any checkpoint, the file can be opened with :func:`~w2f_torchrl.trainers.load_policy`. A
    run cannot resume from it: it contains no optimizer, replay, environments and random streams.
    Paths are removed from the settings, except those that are part of the task:
    ``environment.background_source``, a palette's file, and arguments of the env.

    Args:
        checkpoint: A ``checkpoint_*.pt`` or ``best.pt`` file.
        out: The file to write; directories are created, an existing file is replaced.

    Returns:
        The path of the new file.

    Raises:
        CheckpointError: If the checkpoint cannot be read, a weight is not finite or too large for
            16 bits, or the suffix is that of a file of :mod:`w2f_torchrl.export`.
    """
    if Path(out).suffix in ELSEWHERE:
        raise CheckpointError(
            f"{out}: this writes a checkpoint; `python -m w2f_torchrl.export` writes "
            f"{' and '.join(ELSEWHERE)} files."
        )
    settings, learner, action_size = load_learner(checkpoint)
    saved, out = load_checkpoint(checkpoint), Path(out)
    payload = {
        "config": public_settings(saved.payload["config"]),
        "action_size": action_size,
        "discrete_actions": bool(saved.payload.get("discrete_actions", False)),
        "learner": {"loss": _halved(learner.loss)},
        "exported": True,
    }
    if settings.acts_on_masks and settings.segmentation.source == "student":
        names = ("widths", "network", "threshold")
        payload["masks"] = {name: saved.payload["masks"][name] for name in names}
    counters = {"updates": saved.updates, "frames": saved.frames}
    return save_checkpoint(out.parent, payload, name=out.name, **counters)


def public_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's settings without those about the place of the run.

    Args:
        config: The checkpoint's, as plain values.
    """
    public = config | PRIVATE
    public["environment"] = config["environment"] | PRIVATE_ENVIRONMENT
    public["logging"] = config["logging"] | PRIVATE_LOGGING
    public["data"] = config.get("data", {}) | PRIVATE_DATA
    public["augmentation"] = config.get("augmentation", {}) | PRIVATE_AUGMENTATION
    public["segmentation"] = config["segmentation"] | PRIVATE_SEGMENTATION
    return public


def _halved(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict with parameters in float16, and unchanged buffers."""
    parameters = dict(module.named_parameters())
    state: dict[str, Tensor] = {}
    for name, value in module.state_dict().items():
        state[name] = value.detach().clone()
        if name in parameters:
            state[name] = value.detach().to(torch.float16)
            if not state[name].isfinite().all():
                raise CheckpointError(f"{name} is not finite in 16 bits: it cannot be exported.")
    return state


def main(arguments: list[str] | None = None) -> None:
    """Export one checkpoint from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m w2f_torchrl.evaluation.export", description=__doc__.splitlines()[0]
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args(arguments)
    try:
        path = export_policy(args.checkpoint, args.out)
    except CheckpointError as error:
        parser.error(str(error))
    sys.stdout.write(f"{path}: {path.stat().st_size / 2**20:.1f} MiB\n")


if __name__ == "__main__":
    main()

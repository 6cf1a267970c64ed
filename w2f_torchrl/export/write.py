"""Write the policy of a checkpoint, or a student segmenter, as a file that runs anywhere."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import torch

from w2f_torchrl import __version__
from w2f_torchrl.checkpoint import load_checkpoint
from w2f_torchrl.config import RunConfig
from w2f_torchrl.evaluation.export import public_settings
from w2f_torchrl.evaluation.policy import load_learner
from w2f_torchrl.export.formats import ExportError, Program, check_format, write_program
from w2f_torchrl.export.steps import NEXT, PolicyStep, SegmenterStep
from w2f_torchrl.logging.environment import describe_environment
from w2f_torchrl.modules import latent_sizes
from w2f_torchrl.segmenters.sam3_requirements import SegmenterUnavailableError
from w2f_torchrl.segmenters.student import FORMAT, StudentSegmenter

POLICY, SEGMENTER = "w2f_torchrl.policy", "w2f_torchrl.segmenter"
FORMAT_VERSION = 1
ACTIONS = ("mode", "sample")


def export_file(source: str | Path, out: str | Path, *, action: str | None = None) -> Path:
    """Export a policy or a student segmenter, whichever the file holds.

    Args:
        source: A checkpoint, or a student's file.
        out: As for :func:`export_policy`.
        action: As for :func:`export_policy`; must be None for a segmenter.

    Returns:
        The path of the new file.

    Raises:
        ExportError: As for :func:`export_policy`, or if an action is chosen for a segmenter.
    """
    check_format(Path(out))
    if not _is_student(Path(source)):
        return export_policy(source, out, action=action)
    if action is not None:
        raise ExportError(f"action={action!r} must not be set: {source} holds a segmenter.")
    return export_segmenter(source, out)


def export_policy(checkpoint: str | Path, out: str | Path, *, action: str | None = None) -> Path:
    """Export one step of a policy: observation and carried state in, action and new state out.

    The file contains weights in 32 bits, and a description, which
    :func:`~w2f_torchrl.export.read_description` returns: names, dtypes and shapes of inputs and
    outputs, actions, action repeat, image size, task, settings, versions. It acts as
    :func:`~w2f_torchrl.trainers.load_policy` does. Like that, it draws the latent's state from the
    posterior; the uniform numbers are the input ``state_noise``.

    Args:
        checkpoint: A checkpoint, or a small one of ``python -m w2f_torchrl.evaluation.export``.
        out: The file to write, ``*.onnx`` or ``*.pt2``; folders are created, an existing file is
            replaced atomically.
        action: ``mode``, or ``sample``, which adds the input ``action_noise``; None for the
            checkpoint's ``evaluation.action``.

    Returns:
        The path of the new file.

    Raises:
        ExportError: If the suffix or the action is unknown, a package is missing, or the policy of
            a registered algorithm or encoder cannot be exported.
        CheckpointError: If the checkpoint is missing, damaged or of another format.
    """
    check_format(Path(out))
    return write_program(policy_program(checkpoint, action), Path(out))


def export_segmenter(student: str | Path, out: str | Path) -> Path:
    """Export a student: images in, masks and confidences out, in float32, for any size of image.

    Args:
        student: A file of :meth:`~w2f_torchrl.segmenters.StudentSegmenter.save`, such as a run's
            ``student.pt``.
        out: The file to write, ``*.onnx`` or ``*.pt2``; folders are created, an existing file is
            replaced atomically.

    Returns:
        The path of the new file.

    Raises:
        ExportError: If the suffix is unknown, a package is missing, or the file holds no student.
    """
    check_format(Path(out))
    return write_program(segmenter_program(student), Path(out))


def policy_program(checkpoint: str | Path, action: str | None = None) -> Program:
    """Make what :func:`export_policy` writes."""
    if action is not None and action not in ACTIONS:
        raise ExportError(f"action={action!r} must be one of {', '.join(ACTIONS)}.")
    config, learner, action_size = load_learner(checkpoint)
    saved = load_checkpoint(checkpoint)
    chosen = action or config.evaluation.action
    try:
        step = PolicyStep(learner.policy, chosen).eval()
    except ExportError as error:
        raise ExportError(f"{checkpoint} (algo={config.algo.name}): {error}.") from error
    description = {
        **_header(POLICY),
        "carried": {f"{NEXT}{name}": name for name in latent_sizes(config.model, action_size)},
        "action": _action(step, chosen, action_size),
        **_task(config),
        "trained": {"frames": saved.frames, "updates": saved.updates, "versions": saved.versions},
        "settings": public_settings(saved.payload["config"]),
    }
    inputs = step.inputs(config.environment.image_size)
    return Program(step, inputs, step.outputs(), description)


def segmenter_program(student: str | Path) -> Program:
    """Make what :func:`export_segmenter` writes."""
    try:
        segmenter = StudentSegmenter.load(student)
    except SegmenterUnavailableError as error:
        raise ExportError(str(error)) from error
    step = SegmenterStep(segmenter.network, segmenter.threshold).eval()
    description = {**_header(SEGMENTER), "threshold": segmenter.threshold}
    return Program(step, step.inputs(), step.outputs(), description)


def _header(kind: str) -> dict[str, Any]:
    """Return what every description begins with."""
    commit = describe_environment().get("commit")
    versions = {"w2f_torchrl": __version__, "torch": importlib.metadata.version("torch")}
    return {
        "format": kind,
        "format_version": FORMAT_VERSION,
        "versions": versions | ({"commit": commit} if commit else {}),
    }


def _action(step: PolicyStep, choice: str, size: int) -> dict[str, Any]:
    if step.is_discrete:
        return {"discrete": True, "size": size, "range": [0, 1], "choice": choice}
    return {"discrete": False, "size": size, "range": [-1, 1], "choice": choice}


def _task(config: RunConfig) -> dict[str, Any]:
    environment = config.environment
    return {
        "domain": environment.domain,
        "task": environment.task,
        "action_repeat": environment.action_repeat,
        "image_size": environment.image_size,
        "algorithm": config.algo.name,
        "latent": config.latent,
    }


def _is_student(path: Path) -> bool:
    """Return whether a file holds a student; its tensors are not read."""
    try:
        document = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception:  # noqa: BLE001 - its type depends on the file; load_checkpoint explains it
        return False
    return isinstance(document, dict) and document.get("format") == FORMAT

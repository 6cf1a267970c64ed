"""The first lines of a run: what is trained, where, for how long, and how to stop and continue."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from w2f_torchrl.config import RunConfig
from w2f_torchrl.data import UpdateSchedule
from w2f_torchrl.envs.recorded import DOMAIN as RECORDED


@dataclass(frozen=True)
class RunPlan:
    """What a run, or the rest of one, consists of."""

    frames: int
    """Environment frames so far."""
    updates: int
    """Updates so far."""
    total_updates: int
    """Updates of the whole run, including those so far."""
    evaluations: int
    """Evaluations that are still to be made."""


def make_plan(
    config: RunConfig, schedule: UpdateSchedule, *, steps: int, frames: int, updates: int, last: int
) -> RunPlan:
    """Count what a run still has to do.

    Args:
        config: The run's settings.
        schedule: Of its updates.
        steps: Agent steps so far.
        frames: Environment frames so far.
        updates: Updates so far.
        last: Frames at the last evaluation.
    """
    left = max(config.training.total_frames - frames, 0)
    end = steps + math.ceil(left / config.environment.action_repeat)
    return RunPlan(
        frames=frames,
        updates=updates,
        total_updates=updates + max(schedule.total(end) - schedule.updates, 0),
        evaluations=count_evaluations(
            last, config.training.total_frames, config.evaluation.every_frames
        ),
    )


def count_evaluations(last: int, total_frames: int, every_frames: int) -> int:
    """Return how many evaluations follow, including the one after the last frame.

    Args:
        last: Frames at the last evaluation; 0 before the first.
        total_frames: Frames of the whole run.
        every_frames: ``evaluation.every_frames``.
    """
    if every_frames == 0 or last >= total_frames:
        return 0
    return (total_frames - 1) // every_frames - last // every_frames + 1


def announce(
    config: RunConfig,
    plan: RunPlan,
    *,
    device: torch.device,
    execution: str,
    parameters: int,
    workers: int,
    masks: str,
) -> list[str]:
    """Return the lines with which a run starts.

    Args:
        config: The run's settings.
        plan: What the run consists of.
        device: Of the learner.
        execution: How updates run.
        parameters: Number of weights that are trained.
        workers: Processes that step the envs; 0 if this one does.
        masks: Name of the source of masks.
    """
    environment, recorded = config.environment, config.data.path
    lines = {
        "trains": f"{_algorithm(config)} on {_task(config) if recorded is None else recorded}",
        "model": f"{config.model.preset}, {parameters / 1e6:.1f} million parameters",
        "device": f"{_device(device)}, {execution}; {environment.num_envs} envs in "
        f"{_count(workers, 'worker process', 'worker processes')}",
        "masks": masks,
        "length": _length(config, plan),
        "results": f"{config.run_dir}, with all of them in report.html at the end",
        "stop": "Ctrl+C writes a checkpoint first; resume=auto continues from there",
    }
    if recorded is not None:
        lines["device"] = f"{_device(device)}, {execution}"
        if environment.domain != RECORDED:
            lines["trains"] += f", evaluated in {_task(config)}"
    elif workers == 0:
        lines["device"] = f"{_device(device)}, {execution}; {environment.num_envs} envs"
    if not config.needs_masks:
        del lines["masks"]
    if not config.logging.report:
        lines["results"] = config.run_dir
    return [f"{name:<8} {text}" for name, text in lines.items()]


def _algorithm(config: RunConfig) -> str:
    latent = config.algo.latent
    return config.algo.name if latent is None else f"{config.algo.name}, latent {latent},"


def _task(config: RunConfig) -> str:
    environment = config.environment
    name = f"{environment.domain} {environment.task}"
    distraction = environment.distraction
    if distraction == "none":
        return name
    if not isinstance(distraction, str):  # the fields of a DistractionConfig, or one
        fields = distraction if isinstance(distraction, Mapping) else vars(distraction)
        parts = [part for part, value in fields.items() if value is not None]
        distraction = ", ".join(part for part in parts if part != "step_unit")
    return f"{name}, distraction {distraction}"


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device.type}, {_count(torch.get_num_threads(), 'thread', 'threads')}"


def _length(config: RunConfig, plan: RunPlan) -> str:
    training = config.training
    text = (
        f"{training.total_frames:,} frames, {plan.total_updates:,} updates of "
        f"{config.effective_batch_size} x {training.batch_length} records"
    )
    if plan.evaluations:
        text += f", {_count(plan.evaluations, 'evaluation', 'evaluations')}"
    if plan.frames or plan.updates:
        return f"{text}; resumes at {plan.frames:,} frames, {plan.updates:,} updates"
    return f"{text}; the time follows after a few of them"


def _count(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"

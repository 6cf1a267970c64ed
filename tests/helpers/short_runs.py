"""Short runs of a task whose episodes end early, so that they see many of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_runs import flip_bit, make_short_env, rows, small_run, wait_for

from w2f_torchrl.checkpoint import latest_checkpoint, load_checkpoint
from w2f_torchrl.checkpoint.layout import SHARED_PARTS
from w2f_torchrl.envs import PixelDMControlEnv, register_env
from w2f_torchrl.trainers import RunConfig, Trainer

__all__ = [
    "crash",
    "crash_when",
    "differences",
    "flip_bit",
    "rows",
    "run",
    "short_run",
    "signal_at",
    "wait_for",
]
DOMAIN = "shorter_cartpole"
CONTROL_STEPS = 26
#: Where :func:`short_run` differs from the benchmarks' small run.
CHANGES: dict[str, dict[str, Any]] = {
    "environment": {"domain": DOMAIN},
    "training": {"total_frames": 320},
    "evaluation": {"every_frames": 128},
    "checkpoint": {"every_updates": 8, "keep": 2},
}


class Forgetful(PixelDMControlEnv):
    """An env that can't say its state."""

    resume_state = property()  # type: ignore[assignment]


def make_forgetful_env(task: str, **settings: Any) -> PixelDMControlEnv:
    env = Forgetful("cartpole", task, **settings)
    env._env._step_limit = CONTROL_STEPS
    return env


register_env(DOMAIN, partial(make_short_env, control_steps=CONTROL_STEPS))
register_env("forgetful_cartpole", make_forgetful_env)


def short_run(run_dir: Path, **settings: Any) -> RunConfig:
    """A run of 48 updates and several evaluations, resumed where it is."""
    for group, changes in CHANGES.items():
        settings[group] = changes | settings.get(group, {})
    return small_run(run_dir, "world2filter", **settings)


def run(run_dir: Path, before_update: Callable[[Trainer], None] | None = None, **settings: Any):
    return run_with(short_run(run_dir, **settings), before_update)


def run_with(config: RunConfig, before_update: Callable[[Trainer], None] | None = None) -> Trainer:
    trainer = Trainer(config)
    if before_update is not None:
        update = trainer.learner.update

        def interrupted(sample):
            before_update(trainer)
            return update(sample)

        trainer.learner.update = interrupted
    trainer.train()
    return trainer


def signal_at(updates: int, number: int = signal.SIGTERM) -> Callable[[Trainer], None]:
    def interrupt(trainer: Trainer) -> None:
        if trainer.updates == updates:
            os.kill(os.getpid(), number)

    return interrupt


class Crash(BaseException):
    """Ends the process's work as a kill does: nothing is saved."""


def crash(run_dir: Path, updates: int, **settings: Any) -> None:
    """Run until so many updates, then leave the directory as a kill at that moment would."""
    crash_when(short_run(run_dir, **settings), updates)


def crash_when(config: RunConfig, updates: int) -> None:
    """Run with these settings until so many updates, then leave the directory as a kill would."""

    def interrupt(trainer: Trainer) -> None:
        if trainer.updates == updates:
            trainer.writer.wait()
            trainer.started = False
            raise Crash

    with pytest.raises(Crash):
        run_with(config, interrupt)


def differences(first: Path, second: Path) -> list[str]:
    """Where two runs differ: metrics, networks, optimizer, replay's heads, random streams."""
    found = [] if rows(first) == rows(second) else ["metrics"]
    states = []
    for run_dir in (first, second):
        path = latest_checkpoint(run_dir / "checkpoints")
        assert path is not None
        states.append(load_checkpoint(path).payload)
    for name in (*SHARED_PARTS, "metrics", "sampling", "random"):
        found += [f"{name}{where}" for where in _unequal(*(s[name] for s in states))]
    found += _unequal(*(s["replay"]["digests"] for s in states))
    found += _unequal(*(s["replay"].get("latents", {}).get("digests") for s in states), "latents")
    return found


def _unequal(first: Any, second: Any, where: str = "") -> list[str]:
    if isinstance(first, torch.Tensor):
        return [] if torch.equal(first, second) else [where]
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        return [w for key in first for w in _unequal(first[key], second[key], f"{where}.{key}")]
    if isinstance(first, (list, tuple)):
        pairs = zip(first, second, strict=True)
        return [w for i, pair in enumerate(pairs) for w in _unequal(*pair, f"{where}[{i}]")]
    return [] if first == second or "milliseconds" in where else [where]

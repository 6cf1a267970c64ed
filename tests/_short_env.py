"""A Control Suite task whose episodes end early, so that short runs see many of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from fault_runs import make_short_env, rows, small_run

from w2f_torchrl.checkpoint import latest_checkpoint, load_checkpoint
from w2f_torchrl.checkpoint.layout import SHARED_PARTS
from w2f_torchrl.envs import PixelDMControlEnv, register_env
from w2f_torchrl.trainers import RunConfig

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


def differences(first: Path, second: Path) -> list[str]:
    """Where two runs differ: metrics, networks, optimizer, replay's heads, random streams."""
    found = [] if rows(first) == rows(second) else ["metrics"]
    states = []
    for run in (first, second):
        path = latest_checkpoint(run / "checkpoints")
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

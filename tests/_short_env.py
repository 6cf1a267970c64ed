"""A Control Suite task whose episodes end early, so that short runs see many of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from test_objectives import TINY

from w2f_torchrl.envs import PixelDMControlEnv, register_env
from w2f_torchrl.trainers import RunConfig
from w2f_torchrl.trainers.checkpointing import latest_checkpoint, load_checkpoint
from w2f_torchrl.trainers.config import to_run_config

DOMAIN = "short_cartpole"
CONTROL_STEPS = 26


def make_short_env(task: str, **settings: Any) -> PixelDMControlEnv:
    env = PixelDMControlEnv("cartpole", task, distraction="hard", **settings)
    env._env._step_limit = CONTROL_STEPS
    return env


class Forgetful(PixelDMControlEnv):
    """An env that can't say its state."""

    resume_state = property()  # type: ignore[assignment]


def make_forgetful_env(task: str, **settings: Any) -> PixelDMControlEnv:
    env = Forgetful("cartpole", task, **settings)
    env._env._step_limit = CONTROL_STEPS
    return env


register_env(DOMAIN, make_short_env)
register_env("forgetful_cartpole", make_forgetful_env)


def short_run(run_dir: Path, **settings: Any) -> RunConfig:
    """A run of 48 updates and several evaluations, resumed where it is."""
    values: dict[str, Any] = {
        "environment": {"domain": DOMAIN, "task": "balance", "num_envs": 2, "image_size": 16},
        "model": vars(TINY),
        "training": {
            "total_frames": 320,
            "batch_size": 2,
            "batch_length": 8,
            "train_ratio": 6,
            "prefill_steps": 32,
        },
        "collection": {"num_workers": 0, "steps_per_batch": 8},
        "replay": {"capacity": 400},
        "evaluation": {"every_frames": 128, "episodes": 1, "video": False},
        "checkpoint": {"every_updates": 8, "keep": 2},
        "logging": {
            "every_updates": 5,
            "histograms_every_updates": 20,
            "images_every_updates": 0,
            "imagination_windows": 0,
            "report": False,
        },
        "device": "cpu",
        "run_dir": str(run_dir),
        "resume": "auto",
    }
    for key, value in settings.items():
        values[key] = values[key] | value if isinstance(value, dict) and key in values else value
    return to_run_config(values)


def metrics(run_dir: Path) -> list[dict[str, float]]:
    """All rows but for what a clock says."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [
        {
            name: value
            for name, value in json.loads(line).items()
            if not name.startswith("speed/") and "milliseconds" not in name
        }
        for line in lines
    ]


def differences(first: Path, second: Path) -> list[str]:
    """Where two runs differ: metrics, networks, optimizer, replay's heads, random streams."""
    found = [] if metrics(first) == metrics(second) else ["metrics"]
    states = []
    for run in (first, second):
        path = latest_checkpoint(run / "checkpoints")
        assert path is not None
        states.append(load_checkpoint(path).payload)
    for name in ("learner", "steps", "schedule", "segmentation"):
        found += [f"{name}{where}" for where in _unequal(*(s[name] for s in states))]
    for name in ("sampling", "random", "sums", "evaluated", "best"):
        found += [f"{name}{where}" for where in _unequal(*(s["resume"][name] for s in states))]
    found += _unequal(*(s["replay"]["digests"] for s in states))
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

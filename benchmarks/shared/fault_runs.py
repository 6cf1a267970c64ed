"""Small whole runs for programs that break or compare them: real physics, short episodes."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from first_module import first_module
from tiny_run import MODEL

import w2f_torchrl  # noqa: F401  # before anything that may import dm_control
from w2f_torchrl.envs import PixelDMControlEnv, register_env
from w2f_torchrl.trainers import RunConfig, to_run_config

# same_losses.py trains earlier versions with this file, whose modules had other names.
diagnostics = first_module("logging.diagnostics", "trainers.diagnostics")
run_logging = first_module("trainers.run_logging")
checkpoint = first_module("checkpoint", "trainers.checkpointing")

CONTROL_STEPS = 42
ALGORITHMS: dict[str, dict[str, Any]] = {
    "world2filter": {"name": "world2filter", "latent": "split"},
    "dreamer_v3": {"name": "dreamer_v3", "latent": None},
}


def make_short_env(
    task: str, *, control_steps: int = CONTROL_STEPS, **settings: Any
) -> PixelDMControlEnv:
    """Cart-pole with all distractions, whose episodes end early.

    With W2F_FAULT_DRAWS=N drawing fails after N pictures in a worker process.
    """
    env = PixelDMControlEnv("cartpole", task, distraction="hard", **settings)
    env._env._step_limit = control_steps
    if "W2F_FAULT_DRAWS" in os.environ and multiprocessing.parent_process() is not None:
        env._renderer = FailingRenderer(env._renderer, int(os.environ["W2F_FAULT_DRAWS"]))
    return env


class FailingRenderer:
    """Draws so many pictures, then fails as a lost OpenGL context does."""

    def __init__(self, renderer: Any, draws: int) -> None:
        self._renderer, self._left = renderer, draws

    def draw(self) -> Any:
        """Draw, or raise."""
        self._left -= 1
        if self._left < 0:
            raise RuntimeError("no more pictures: the OpenGL context is lost")
        return self._renderer.draw()

    def __getattr__(self, name: str) -> Any:
        """The renderer's."""
        return getattr(self._renderer, name)


register_env("short_cartpole", make_short_env)


def leave_curves_out() -> None:
    """Draw no curves: that takes longer than the rest of these runs."""
    for module in (diagnostics, run_logging):
        module.plot_curves = lambda run_dir: run_dir / "curves.png"  # type: ignore[attr-defined]


def small_run(run_dir: Path, algorithm: str, **settings: Any) -> RunConfig:
    """Make a run that resumes itself, with many checkpoints, evaluations and rows of metrics."""
    values: dict[str, Any] = {
        "algo": ALGORITHMS[algorithm],
        "environment": {
            "domain": "short_cartpole",
            "task": "balance",
            "num_envs": 2,
            "image_size": 16,
        },
        "model": MODEL,
        "training": {
            "total_frames": 960,
            "batch_size": 2,
            "batch_length": 8,
            "train_ratio": 6,
            "prefill_steps": 32,
        },
        "collection": {"num_workers": 0, "steps_per_batch": 8},
        "replay": {"capacity": 400},
        "evaluation": {"every_frames": 240, "episodes": 1, "video": False},
        "checkpoint": {"every_updates": 4, "keep": 3},
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


def fork(work: Callable[[], None], log: Path) -> int:
    """Do some work in a child process, its output in a file; returns its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        work()
        code = 0
    except BaseException:  # noqa: BLE001  # the child must end here whatever it is
        traceback.print_exc()
    finally:
        os._exit(code)


def has_ended(child: int) -> bool:
    """Whether a child has ended; it stays to be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def kill(child: int) -> int | None:
    """Send SIGKILL; returns the exit code of a child that had ended by itself, None otherwise."""
    ended = has_ended(child)
    os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code if ended else None


def rows(run_dir: Path) -> list[dict[str, float]]:
    """Return the rows of metrics without those that contain times."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [
        {
            name: value
            for name, value in json.loads(line).items()
            if not name.startswith("speed/") and "milliseconds" not in name
        }
        for line in lines
    ]


def final_state(run_dir: Path) -> dict[str, torch.Tensor]:
    """Weights, moments and random streams of the last checkpoint, by name."""
    path = checkpoint.latest_checkpoint(run_dir / "checkpoints")
    assert path is not None, "a run ends with a checkpoint"
    payload = checkpoint.load_checkpoint(path).payload
    state = {f"loss.{name}": value for name, value in payload["learner"]["loss"].items()}
    for i, moments in payload["learner"]["optimizer"]["state"].items():
        state |= {f"optimizer.{i}.{name}": value for name, value in moments.items()}
    parts = payload.get("resume", payload)  # format 2 kept them there
    state["random"] = parts["random"]["torch_cpu"]
    state["samples"] = parts["sampling"]["generator"]
    return state


def flip_bit(path: Path, position: int) -> None:
    """Change one bit of a file."""
    with path.open("r+b") as stream:
        stream.seek(position)
        byte = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([byte ^ 1]))


def wait_for(condition: Callable[[], bool], seconds: float, every: float = 0.0005) -> bool:
    """Poll a condition; return whether it became true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(every)
    return False

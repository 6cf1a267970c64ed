"""Settings that both sides of :mod:`parity` are trained with."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w2f_torchrl.config import RunConfig, to_run_config
from w2f_torchrl.envs import validate_task

PROJECTS = ("r2dreamer", "ours")
ACTION_REPEATS = {"cartpole_swingup": 8, "ball_in_cup_catch": 4}
"""PlaNet's."""
CAPACITY = 20_000
"""Records that ours has room for, over all envs; nothing is ever overwritten."""
ROW = 25
"""Updates that a row of metrics is the mean of."""
EPISODE_FRAMES = 1_000
HORIZON_FRAMES = 666
"""The paper's discount horizon, 333 agent steps of two control steps."""
SETTINGS_NAME = "parity.json"


@dataclass(frozen=True)
class Settings:
    """A run of one project: all that both projects share.

    Raises:
        ValueError: If a setting is out of range.
    """

    task: str
    """``<domain>_<task>`` of the Control Suite."""
    batch_size: int
    batch_length: int
    seed: int
    action_repeat: int
    num_envs: int = 4
    preset: str = "size1m"
    lr: float = 5e-4
    warmup: int = 200
    """Updates over which the learning rate rises."""

    def __post_init__(self) -> None:
        """Check."""
        self.domain_and_task()
        for name in ("batch_size", "batch_length", "action_repeat", "num_envs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")

    @property
    def shape(self) -> str:
        """``<B>x<T>``."""
        return f"{self.batch_size}x{self.batch_length}"

    @property
    def group(self) -> str:
        """What runs share whose seeds are the spread."""
        return f"{self.task}_{self.shape}"

    @property
    def prefill(self) -> int:
        """Agent steps before the first update, over all envs.

        r2dreamer wants more than T + 1 steps of each env, ours B x T in all.
        """
        envs = self.num_envs
        return -(-max(self.batch_size, envs) * (self.batch_length + 2) // envs) * envs

    @property
    def horizon(self) -> int:
        """Discount horizon, agent steps: the same time as the paper's."""
        return round(HORIZON_FRAMES / self.action_repeat)

    @property
    def episode_round(self) -> int:
        """Updates while every env plays an episode of full length."""
        return self.num_envs * EPISODE_FRAMES // self.action_repeat

    def domain_and_task(self) -> tuple[str, str]:
        """Split ``task`` where the Control Suite does."""
        words = self.task.split("_")
        for cut in range(len(words) - 1, 0, -1):
            domain, task = "_".join(words[:cut]), "_".join(words[cut:])
            try:
                validate_task(domain, task)
            except ValueError:
                continue
            return domain, task
        raise ValueError(
            f"task={self.task!r} is not a Control Suite task (such as cartpole_swingup)."
        )

    def total_frames(self, updates: int) -> int:
        """Environment frames of a run of so many updates, one per agent step.

        Raises:
            ValueError: If the envs, which are stepped together, can't make these updates exactly,
                they don't fill whole rows of metrics, or the replay can't hold the run.
        """
        multiple = math.lcm(self.num_envs, ROW)
        if updates < 1 or updates % multiple:
            raise ValueError(f"updates={updates} must be a positive multiple of {multiple}.")
        if self.records(updates) > CAPACITY:
            raise ValueError(f"updates={updates} make more records than the replay's {CAPACITY}.")
        return (self.prefill + updates) * self.action_repeat

    def records(self, updates: int) -> int:
        """An upper bound of a run's records: an episode of L steps makes L + 1."""
        return (self.prefill + updates) * 11 // 10 + 2 * self.num_envs

    def overrides(self, updates: int) -> list[str]:
        """Settings of ours, for ``sota_configs/world2filter.py``.

        One step of each env between two syncs of weights, as in r2dreamer.
        """
        domain, task = self.domain_and_task()
        return [
            "algo=dreamer_v3",
            f"model={self.preset}",
            f"environment.domain={domain}",
            f"environment.task={task}",
            "environment.distraction=none",
            f"environment.num_envs={self.num_envs}",
            f"environment.action_repeat={self.action_repeat}",
            f"training.batch_size={self.batch_size}",
            f"training.batch_length={self.batch_length}",
            f"training.train_ratio={self.batch_size * self.batch_length}",
            f"training.prefill_steps={self.prefill}",
            f"training.total_frames={self.total_frames(updates)}",
            f"optimizer.lr={self.lr}",
            f"optimizer.warmup_updates={self.warmup}",
            f"loss.discount_horizon={self.horizon}",
            "collection.num_workers=0",
            "collection.steps_per_batch=1",
            f"replay.capacity={CAPACITY}",
            "evaluation.every_frames=0",
            "checkpoint.every_updates=500",
            "checkpoint.keep=1",
            f"logging.every_updates={ROW}",
            "logging.histograms_every_updates=0",
            "logging.images_every_updates=0",
            "logging.report=false",
            "device=cpu",
            f"seed={self.seed}",
        ]

    def run_config(self) -> RunConfig:
        """A configuration of ours with the environment of both."""
        domain, task = self.domain_and_task()
        environment = {
            "domain": domain,
            "task": task,
            "num_envs": self.num_envs,
            "action_repeat": self.action_repeat,
        }
        algo = {"name": "dreamer_v3", "latent": None}
        return to_run_config({"algo": algo, "environment": environment})


def run_name(project: str, settings: Settings) -> str:
    """Name of a run's directory."""
    return f"{settings.group}_seed{settings.seed}_{project}"


def note_settings(run_dir: Path, facts: dict[str, Any]) -> None:
    """Write a run's settings, or check them where the run is continued.

    Args:
        run_dir: The run's; created.
        facts: Plain values; ``settings`` and ``overrides`` must stay.

    Raises:
        ValueError: If the run was begun with other settings.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / SETTINGS_NAME
    if path.exists():
        before = json.loads(path.read_text())
        for key in ("settings", "overrides"):
            if before[key] != facts[key]:
                raise ValueError(
                    f"{run_dir} was begun with {key}={before[key]}, and this is {facts[key]}: take "
                    "another --out-dir, or remove the run."
                )
        return
    path.write_text(json.dumps(facts, indent=1) + "\n")


def read_settings(run_dir: Path) -> tuple[dict[str, Any], Settings]:
    """Read what :func:`note_settings` wrote.

    Returns:
        All of it, and the settings among it.
    """
    facts = json.loads((run_dir / SETTINGS_NAME).read_text())
    return facts, Settings(**facts["settings"])


def as_dict(settings: Settings) -> dict[str, Any]:
    """Settings as plain values."""
    return dataclasses.asdict(settings)

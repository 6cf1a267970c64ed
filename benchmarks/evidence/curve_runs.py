"""Train a list of configurations with several seeds, for :mod:`curves`.

The list is a YAML file::

    overrides: [experiment=cpu, environment.distraction=easy]
    seeds: [0, 1]
    configurations:
      dreamer_v3: [algo=dreamer_v3]
      split: [algo.latent=split, loss.background=0.1]

Each run is a process of ``sota_configs/world2filter.py`` with its own directory, and continues
where it was interrupted.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_module

import sota_configs.world2filter  # its settings and presets
from w2f_torchrl.checkpoint import latest_checkpoint
from w2f_torchrl.config import config_to_dict, to_run_config
from w2f_torchrl.logging.metrics_file import read_metrics
from w2f_torchrl.report.runs import flatten

SCRIPT = Path(sota_configs.world2filter.__file__)
RESERVED = ("seed", "run_dir", "resume")


@dataclass(frozen=True)
class Job:
    """One run of a list."""

    label: str
    seed: int
    overrides: tuple[str, ...]
    settings: dict[str, str] = field(compare=False, repr=False)
    """Every setting by its dotted name, as text."""

    @property
    def name(self) -> str:
        """Its directory."""
        return f"{self.label}_seed{self.seed}"


def read_jobs(path: Path) -> list[Job]:
    """Read a list of configurations, and check every setting of every run.

    Args:
        path: The YAML file.

    Returns:
        The runs; all configurations with the first seed come first, so that an interrupted list
        has something to compare.

    Raises:
        ValueError: If the list is invalid; names the file and the error.
    """
    content = yaml.safe_load(path.read_text())
    known = {"overrides", "seeds", "configurations"}
    if not isinstance(content, dict) or not {"seeds", "configurations"} <= set(content) <= known:
        raise ValueError(f"{path} must hold seeds, configurations and perhaps overrides.")
    shared = _overrides(path, "overrides", content.get("overrides", []))
    seeds, configurations = content["seeds"], content["configurations"]
    if not isinstance(seeds, list) or not all(type(seed) is int for seed in seeds) or not seeds:
        raise ValueError(f"{path}: seeds is {seeds!r}: must be a list of integers.")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{path}: seeds={seeds} names a seed twice.")
    if not isinstance(configurations, dict) or not configurations:
        raise ValueError(f"{path}: configurations is {configurations!r}: must be a mapping.")
    own = {}
    for label, overrides in configurations.items():
        if not re.fullmatch(r"[\w.-]+", str(label)):
            raise ValueError(
                f"{path}: configurations has {label!r}: names are letters, digits, _.-"
            )
        own[str(label)] = _overrides(path, str(label), overrides or [])
    settings = {
        label: _settings(path, label, [*shared, *overrides]) for label, overrides in own.items()
    }
    return [
        Job(label, seed, (*shared, *own[label]), settings[label]) for seed in seeds for label in own
    ]


def _overrides(path: Path, name: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ValueError(f"{path}: {name} is {value!r}: must be a list of Hydra overrides.")
    for each in value:
        if (key := each.lstrip("+~").partition("=")[0]) in RESERVED:
            raise ValueError(f"{path}: {name} sets {key}, which the list sets for each run.")
    return value


def _settings(path: Path, label: str, overrides: Sequence[str]) -> dict[str, str]:
    try:
        return settings_of(overrides)
    except Exception as error:  # Hydra has many kinds
        raise ValueError(f"{path}: configuration {label}: {error}") from error


def settings_of(overrides: Sequence[str]) -> dict[str, str]:
    """Return every setting that overrides make, by its dotted name, as text.

    Raises:
        Exception: Hydra's or the package's, if one is unknown or out of range.
    """
    with initialize_config_module("sota_configs", version_base="1.3"):
        config = to_run_config(compose("config", list(overrides)))
    config.validate()
    return flatten(config_to_dict(config))


def check_same_settings(job: Job, run_dir: Path) -> None:
    """Refuse a run directory that another list, or an earlier form of this one, has made.

    Raises:
        ValueError: Naming the first setting that differs.
    """
    path = run_dir / "config.yaml"
    if not path.exists():
        return
    made = flatten(yaml.safe_load(path.read_text()))
    for key, value in job.settings.items():
        if key not in RESERVED and made.get(key) != value:
            raise ValueError(
                f"{run_dir} was trained with {key}={made.get(key)}, and the list has {value}: take "
                "another --runs folder, or remove the run."
            )


def is_finished(run_dir: Path) -> bool:
    """Whether a run has reached its last frame and saved it; a signal ends runs earlier."""
    config, metrics = run_dir / "config.yaml", run_dir / "metrics.jsonl"
    checkpoint = latest_checkpoint(run_dir / "checkpoints")
    if checkpoint is None or not config.exists() or not metrics.exists():
        return False
    total = yaml.safe_load(config.read_text())["training"]["total_frames"]
    last = read_metrics(run_dir)[-1]
    return bool(last["frames"] >= total and int(checkpoint.stem.split("_")[1]) == last["updates"])


class Runs:
    """Trains runs, some at a time.

    Args:
        folder: Run directories are created here, each next to its ``.log``.
        parallel: How many at a time. The cores are shared out among them, unless OMP_NUM_THREADS
            says otherwise.
        say: Gets a line for each start and end.
    """

    def __init__(self, folder: Path, parallel: int, say: Callable[[str], object]) -> None:
        self.folder, self.parallel, self.say = folder, parallel, say
        threads = max(1, len(os.sched_getaffinity(0)) // parallel)
        self._environment = {"OMP_NUM_THREADS": str(threads)} | dict(os.environ)
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def train(self, jobs: Sequence[Job]) -> dict[str, list[Path]]:
        """Train the runs that are not finished; Ctrl+C and SIGTERM end them with checkpoints.

        Returns:
            The run directories of each label.

        Raises:
            ValueError: If a run was trained before with other settings.
            RuntimeError: If runs failed, once the others have ended; with the names of their logs.
        """
        for job in jobs:
            check_same_settings(job, self.folder / job.name)
        self.folder.mkdir(parents=True, exist_ok=True)
        previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            with ThreadPoolExecutor(self.parallel) as pool:
                try:
                    failed = [log for log in pool.map(self._train, jobs) if log is not None]
                except BaseException:
                    self._stop()
                    raise
        finally:
            signal.signal(signal.SIGTERM, previous)
        if failed:
            raise RuntimeError(f"{len(failed)} of {len(jobs)} runs failed: see {', '.join(failed)}")
        found: dict[str, list[Path]] = {}
        for job in jobs:
            found.setdefault(job.label, []).append(self.folder / job.name)
        return found

    def _stop(self) -> None:
        self._stopped = True
        for process in tuple(self._processes):
            process.terminate()

    def _train(self, job: Job) -> str | None:
        """Train one run; returns its log's name if it failed."""
        run_dir, log = self.folder / job.name, self.folder / f"{job.name}.log"
        if self._stopped:
            return None
        if is_finished(run_dir):
            self.say(f"{job.name}: done before")
            return None
        start = time.monotonic()
        self.say(f"{job.name}: training, see {log}")
        settings = [*job.overrides, f"seed={job.seed}", f"run_dir={run_dir.resolve()}"]
        with log.open("a") as output:
            # In its own session, so that Ctrl+C reaches it only once, from here.
            process = subprocess.Popen(
                [sys.executable, str(SCRIPT), *settings, "resume=auto"],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
            self._processes.add(process)
            if self._stopped:  # while it was being started
                process.terminate()
            code = process.wait()
            self._processes.discard(process)
        done = is_finished(run_dir)
        minutes = (time.monotonic() - start) / 60
        self.say(f"{job.name}: {'done' if done else f'ended with {code}'} after {minutes:.0f} min")
        return None if done else str(log)

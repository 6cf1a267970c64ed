"""Versions and hardware of a run, without names of hosts, users or paths."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from w2f_torchrl.utils.files import write_text

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

PACKAGES = (
    "w2f_torchrl",
    "torch",
    "torchrl",
    "tensordict",
    "numpy",
    "mujoco",
    "dm_control",
    "hydra-core",
    "av",
    "sam3",
    "wandb",
)


def describe_environment(device: torch.device | str = "cpu") -> dict[str, str]:
    """Describe the machine and the software.

    Args:
        device: Device of the model.

    Returns:
        Label to text: Python, operating system, processor, cores, device, installed packages, and
        the commit of this package's sources if they are a git checkout.
    """
    import torch  # not at the top: the report reads environments without torch

    device = torch.device(device)
    facts = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else "?"),
        "threads": str(torch.get_num_threads()),
        "device": str(device),
    }
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
        facts["cuda"] = str(torch.version.cuda)
    for name in PACKAGES:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = _commit()
    return facts | ({"commit": commit} if commit else {})


def note_environment(path: Path, frames: int, device: torch.device | str) -> None:
    """Append a start or resume of a run to its ``environment.json``.

    Args:
        path: The file; a list with one entry for each start.
        frames: Environment frames at the start.
        device: Device of the model.
    """
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    entry = {"started": started, "frames": str(frames), **describe_environment(device)}
    entries = [*read_environment(path), entry]
    write_text(path, json.dumps(entries, indent=1) + "\n")


def read_environment(path: Path) -> list[dict[str, str]]:
    """Read an ``environment.json``; if missing or damaged (with a warning), it has no entries."""
    if not path.exists():
        return []
    try:
        entries: Any = json.loads(path.read_text())
    except ValueError:  # UnicodeDecodeError too
        entries = None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        logger.warning("%s is damaged: its records of earlier starts are lost", path)
        return []
    return [{str(key): str(value) for key, value in entry.items()} for entry in entries]


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):  # no git
        return None
    return done.stdout.strip() or None

"""Write results with the command, the versions and the machine that made them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parents[1] / "results"
"""Where results are written by default."""
PACKAGES = ("torch", "torchrl", "tensordict", "dm_control", "mujoco", "numpy")


def provenance() -> dict[str, Any]:
    """Return the command, the versions and the kind of machine of this process.

    Returns:
        Plain values; neither host names nor paths, except those on the command line.
    """
    versions = {"python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in PACKAGES}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cpus = len(os.sched_getaffinity(0))
    return {
        "command": shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "versions": versions,
        "machine": {"system": platform.system(), "cpu": cpu_model(), "cpus": cpus, "gpus": gpus},
    }


def cpu_model() -> str:
    """Return the processor's name, or its architecture where the system doesn't tell."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_results(path: str | os.PathLike[str], results: Mapping[str, Any]) -> Path:
    """Write results and their provenance as JSON.

    Args:
        path: Where to; directories are created.
        results: Plain values; NaN is refused.

    Returns:
        The path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(provenance() | dict(results), indent=2, allow_nan=False)
    path.write_text(text + "\n")
    return path

"""The checkout that is tested: its folder, and fresh interpreters in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_python(code: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter; a variable that is None is unset."""
    variables = dict(os.environ) | {"PYTHONPATH": str(ROOT)}
    variables.pop("PYOPENGL_PLATFORM", None)  # dm_control's import in this process set it
    for name, value in environment.items():
        variables.pop(name, None)
        if value is not None:
            variables[name] = value
    return subprocess.run(
        [sys.executable, "-c", code],
        env=variables,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )

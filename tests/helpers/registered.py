"""Registered parts of a run, which a test leaves behind in this process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from w2f_torchrl import registry
from w2f_torchrl.envs import tasks

REGISTRIES = [value for value in vars(registry).values() if isinstance(value, registry.Registry)]


def forget_registered_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo, after a test, what was registered, and forget the files that were imported."""
    for kind in REGISTRIES:
        monkeypatch.setattr(kind, "_parts", dict(kind._parts))
    monkeypatch.setattr(tasks, "_REGISTRY", dict(tasks._REGISTRY))
    path, modules = list(sys.path), set(sys.modules)
    yield
    added = set(sys.path) - set(path)
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        file = getattr(sys.modules[name], "__file__", None)
        if file is not None and str(Path(file).parent) in added:
            del sys.modules[name]

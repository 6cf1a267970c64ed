"""Import what has another name in an earlier version of the package."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import w2f_torchrl


def first_module(*names: str) -> ModuleType:
    """Import the first of several modules that the imported package has.

    Args:
        names: The present name below the package, then former ones.

    Raises:
        ModuleNotFoundError: If none exists.
    """
    # Looked for as files: an editable installation would offer its own in place of a missing one.
    package = Path(w2f_torchrl.__file__).parent
    for name in names:
        path = package.joinpath(*name.split("."))
        if path.with_suffix(".py").exists() or (path / "__init__.py").exists():
            return importlib.import_module(f"w2f_torchrl.{name}")
    raise ModuleNotFoundError(f"{package} has none of {', '.join(names)}.")

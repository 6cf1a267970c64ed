"""Import the files that register parts of a run."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path


class PluginError(ValueError):
    """A plugin cannot be imported; the message names it."""


def load_plugins(plugins: Sequence[str]) -> None:
    """Import Python files and modules, each once per process.

    A file is imported under its name without ``.py``, and its folder is added to the end of
    ``sys.path``, so that worker processes find classes of the file by that name.

    Args:
        plugins: Paths that end in ``.py``, or names of modules that Python finds.

    Raises:
        PluginError: If a file or module does not exist or raises, or a file has the name of another
            module.
    """
    for plugin in plugins:
        if not isinstance(plugin, str) or not plugin.strip():
            raise PluginError(f"plugins: {plugin!r} must be a Python file or the name of a module.")
        name = _name_of_file(Path(plugin)) if plugin.endswith(".py") else plugin
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not f"{name}.".startswith(f"{error.name}."):  # something that the plugin imports
                raise _raised(plugin, error) from error
            raise PluginError(
                f"plugins: {plugin} is not found; allowed: a Python file (FILE.py), or the name of "
                "a module that Python can import."
            ) from error
        except (Exception, SystemExit) as error:
            raise _raised(plugin, error) from error


def _name_of_file(path: Path) -> str:
    """Make a file importable and return the name of its module."""
    if not path.is_file():
        raise PluginError(f"plugins: {path} does not exist.")
    path = path.resolve()
    if not path.stem.isidentifier():
        raise PluginError(f"plugins: {path.name} must be named like a module, such as my_loss.py.")
    loaded = sys.modules.get(path.stem)
    if loaded is None:
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))
        importlib.invalidate_caches()
        spec = importlib.util.find_spec(path.stem)
        origin = None if spec is None else spec.origin
    else:
        origin = getattr(loaded, "__file__", None)
    if origin is None or Path(origin).resolve() != path:
        raise PluginError(
            f"plugins: {path.name} has the name of another module ({origin or path.stem}): rename "
            "the file."
        )
    return path.stem


def _raised(plugin: str, error: BaseException) -> PluginError:
    """Return an error that says where in the plugin another one was raised."""
    own = Path(plugin).resolve()
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve() == own
    ]
    where = f", line {lines[-1]}" if lines else ""
    return PluginError(f"plugins: {plugin}{where}: {type(error).__name__}: {error}")

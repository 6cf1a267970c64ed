"""Torch's compiler is loaded before MuJoCo's renderer, whichever is asked for first."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

SIMULATORS = ("dm_control", "mujoco")


def _mesa_llvm_is_loaded() -> bool:
    """Whether this process has mapped Mesa's LLVM (Linux; elsewhere the crash is unknown)."""
    maps = Path("/proc/self/maps")
    return maps.exists() and "/libLLVM" in maps.read_text()


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def check_order() -> None:
    """Raise where triton would be loaded after Mesa's LLVM, which would crash.

    Raises:
        ImportError: If Mesa's renderer is loaded and torch's compiler is not.
    """
    if "triton" not in sys.modules and _mesa_llvm_is_loaded() and _has_triton():
        raise ImportError(
            "Mesa's software renderer was loaded before torch's compiler, and the process would "
            "crash: import w2f_torchrl (or torch and torchrl) before mujoco and dm_control."
        )


def import_torch() -> None:
    """Import torch, triton and TorchRL, so that a renderer may be loaded.

    Raises:
        ImportError: If it is too late for that.
    """
    check_order()
    importlib.import_module("torch")
    if _has_triton():
        importlib.import_module("triton")
    importlib.import_module("torchrl")


class _TorchFirst(MetaPathFinder):
    """Finds nothing: it imports torch when a simulator is about to be imported, and steps aside."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Called at the first import of every module."""
        del path, target
        if name.partition(".")[0] in SIMULATORS:
            import_torch()
            # Who uses the envs has the backend chosen before dm_control reads it.
            if (gl := sys.modules.get("w2f_torchrl.envs.renderers._gl")) is not None:
                gl.choose_gl_backend()
        return None


def install_guard() -> None:
    """Have torch imported before dm_control and MuJoCo from now on; now, if one is there already.

    Raises:
        ImportError: If it is too late for that.
    """
    check_order()
    if any(name in sys.modules for name in SIMULATORS):
        import_torch()
    if not any(isinstance(finder, _TorchFirst) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TorchFirst())

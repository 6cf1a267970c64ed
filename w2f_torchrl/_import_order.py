"""Load torch's compiler before MuJoCo's renderer, whichever is imported first."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from w2f_torchrl._known_noise import drop_known_messages

SIMULATORS = ("dm_control", "mujoco")


def _mesa_llvm_is_loaded() -> bool:
    """Return whether Mesa's LLVM is mapped (on Linux; the crash is unknown elsewhere)."""
    maps = Path("/proc/self/maps")
    return maps.exists() and "/libLLVM" in maps.read_text()


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def check_order() -> None:
    """Raise if triton would be loaded after Mesa's LLVM, which would crash.

    Raises:
        ImportError: If Mesa's renderer is loaded and torch's compiler is not.
    """
    if "triton" not in sys.modules and _mesa_llvm_is_loaded() and _has_triton():
        raise ImportError(
            "Mesa's software renderer was loaded before torch's compiler, and the process would "
            "crash: import w2f_torchrl (or torch and torchrl) before mujoco and dm_control."
        )


def import_torch() -> None:
    """Import torch, triton and TorchRL, so that a renderer can be loaded.

    Raises:
        ImportError: If it is too late for that.
    """
    check_order()
    importlib.import_module("torch")
    if _has_triton():
        importlib.import_module("triton")
    importlib.import_module("torchrl")


class _TorchFirst(MetaPathFinder):
    """Import torch when a simulator is about to be imported; never find a module itself."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Import torch first if a simulator is imported; called for every module's first import."""
        del path, target
        if name.partition(".")[0] in SIMULATORS:
            import_torch()
            # If the envs are in use, choose the backend before dm_control reads it.
            if (gl := sys.modules.get("w2f_torchrl.envs.renderers._gl")) is not None:
                gl.choose_gl_backend()
        return None


def install_guard() -> None:
    """Import torch before dm_control and MuJoCo from now on; at once if one is already imported.

    Raises:
        ImportError: If it is too late for that.
    """
    check_order()
    # PyOpenGL is imported by MuJoCo, and that by TorchRL.
    drop_known_messages(logging.getLogger("OpenGL.acceleratesupport"))
    if any(name in sys.modules for name in SIMULATORS):
        import_torch()
    if not any(isinstance(finder, _TorchFirst) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TorchFirst())

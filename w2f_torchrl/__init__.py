"""World2Filter on TorchRL: DreamerV3 from pixels whose latent holds the agent, not the scenery.

Importing this package imports torch, triton and TorchRL before anything can import dm_control.
With Mesa's software rendering the other order ends in a segmentation fault: Mesa and triton each
bring an LLVM, and triton's can't be loaded second. Where that is about to happen the import raises.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

__version__ = "0.1.0"


def _mesa_llvm_is_loaded() -> bool:
    """Whether this process has mapped Mesa's LLVM (Linux; elsewhere the crash is unknown)."""
    maps = Path("/proc/self/maps")
    return maps.exists() and "/libLLVM" in maps.read_text()


_has_triton = importlib.util.find_spec("triton") is not None
if _has_triton and "triton" not in sys.modules and _mesa_llvm_is_loaded():
    raise ImportError(
        "Mesa's software renderer was loaded before torch's compiler, and the process would crash: "
        "import w2f_torchrl (or torch and torchrl) before mujoco and dm_control."
    )

import torch  # noqa: E402, F401

if _has_triton:
    importlib.import_module("triton")

import torchrl  # noqa: E402, F401

"""The switch between plain operations and hand-written kernels.

Kernels look it up as an attribute, ``switch.use_cpu_kernels(x)``, so that a test can replace
each of the three functions in one place.
"""

from __future__ import annotations

import torch
from torch import Tensor


def use_cpu_kernels(x: Tensor) -> bool:
    """Return whether the kernels for CPUs apply to ``x`` of any shape ``[...]``.

    They do in eager execution without autocast. A compiler fuses the plain operations instead.
    """
    return on_cpu(x) and not torch.compiler.is_compiling()


def on_cpu(x: Tensor) -> bool:
    """Return whether ``x`` ``[...]`` is on a CPU, without autocast."""
    return x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


def on_gpu(x: Tensor) -> bool:
    """Return whether the recurrence uses the layout for GPUs for ``x`` ``[...]``."""
    return x.is_cuda

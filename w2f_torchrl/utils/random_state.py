"""The state of this process's random streams."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torchrl.checkpoint import GlobalRNGState

logger = logging.getLogger(__name__)


def random_state() -> dict[str, Any]:
    """The state of Python's, numpy's and torch's generators, those of CUDA devices in use too."""
    state: dict[str, Any] = GlobalRNGState().state_dict()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Put a state from :func:`random_state` back.

    The streams of CUDA devices that are missing here start anew; the log says so.
    """
    saved = len(state.get("torch_cuda", ()))
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if saved > here:
        logger.warning("random streams of %d CUDA devices are left out: here are %d", saved, here)
        state = {name: value for name, value in state.items() if name != "torch_cuda"}
    GlobalRNGState().load_state_dict(state)

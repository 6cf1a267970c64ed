"""Save and restore the state of this process's random streams."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torchrl.checkpoint import GlobalRNGState

logger = logging.getLogger(__name__)


def random_state() -> dict[str, Any]:
    """Return the state of Python's, numpy's and torch's generators, including CUDA's if in use."""
    state: dict[str, Any] = GlobalRNGState().state_dict()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Restore a state from :func:`random_state`.

    Streams of CUDA devices that this machine lacks restart, with a warning.
    """
    saved = len(state.get("torch_cuda", ()))
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if saved > here:
        logger.warning("the random streams of %d CUDA devices restart: found %d", saved, here)
        state = {name: value for name, value in state.items() if name != "torch_cuda"}
    GlobalRNGState().load_state_dict(state)


class RandomStreams:
    """The random streams of this process as a part of a checkpoint."""

    def __init__(self) -> None:
        self._saved: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all streams."""
        return random_state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep a state for :meth:`resume`, since building the rest of a run draws numbers."""
        self._saved = state

    def resume(self) -> None:
        """Restore the loaded state, if any."""
        if self._saved is not None:
            restore_random_state(self._saved)
            self._saved = None

"""Signals and exceptions that end a run early."""

from __future__ import annotations

import logging
import time
import traceback
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from tensordict import NestedKey, TensorDictBase

from w2f_torchrl.trainers.preemption import stop_signals
from w2f_torchrl.utils.stopping import listen

logger = logging.getLogger(__name__)

EXCEPTIONS_NAME = "exceptions.txt"


def stop_on_signal() -> AbstractContextManager[list[int]]:
    """Collect the stop signals in a list: see :func:`~w2f_torchrl.utils.stopping.listen`."""
    return listen(stop_signals())


def save_batch(path: Path, batch: TensorDictBase) -> Path:
    """Save the batch of a failed update.

    Args:
        path: The file to write.
        batch: What the update learned from, ``[B, T]``.

    Returns:
        ``path``, for ``torch.load(weights_only=True)``: the entries ``[B, T, ...]`` by key.
    """
    torch.save({"/".join(_path(key)): leaf for key, leaf in batch.items(True, True)}, path)
    return path


def _path(key: NestedKey) -> tuple[str, ...]:
    return key if isinstance(key, tuple) else (key,)


def keep_exception(run_dir: Path, error: BaseException, *, frames: int, updates: int) -> str:
    """Append an exception to ``run_dir/exceptions.txt``.

    Returns:
        Its traceback.
    """
    text = "".join(traceback.format_exception(error))
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    try:
        with (run_dir / EXCEPTIONS_NAME).open("a") as stream:
            stream.write(f"{when}, frame {frames}, update {updates}\n{text}\n")
    except OSError as full:  # the exception itself may be a full disk
        logger.error("%s cannot be written: %s", run_dir / EXCEPTIONS_NAME, full)
    return text

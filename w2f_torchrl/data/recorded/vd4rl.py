"""V-D4RL's hdf5 shards, and the folders that TorchRL's ``VD4RLExperienceReplay`` makes.

Both keep the rows of V-D4RL's files: an observation, the action and reward that led to it. (TorchRL
arranges the rows as transitions, but its ``action`` of a row still is the one that led to the
``pixels`` of that row: rows are read, not transitions.) The 64-pixel ``.npz`` episodes are read by
:mod:`w2f_torchrl.data.recorded.npz`, the distracted variants by the same readers.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from w2f_torchrl.config import DataConfig
from w2f_torchrl.data.recorded.episodes import DataError
from w2f_torchrl.data.recorded.form import check_image
from w2f_torchrl.data.recorded.rows import Rows, RowsData, require

EXTRA = "pip install 'w2f_torchrl[recorded]'"
FIRST = 0
"""dm_env's step type of an episode's first observation."""


def open_shards(settings: DataConfig, image_size: int, paths: list[Path]) -> RowsData:
    """Open ``.hdf5`` shards: ``observation``, ``action``, ``reward``, ``discount``, ``step_type``.

    Raises:
        DataError: If h5py is missing, or a file can't be read or lacks an entry.
    """
    if importlib.util.find_spec("h5py") is None:
        raise DataError(f"{paths[0]} needs h5py: {EXTRA}")
    import h5py

    tables = []
    for path in paths:
        try:
            file = h5py.File(path, "r")
        except OSError as error:
            raise DataError(f"{path} can't be read as an hdf5 file: {error}") from error
        require(str(path), ("observation", "action", "reward", "step_type"), file)
        image = file["observation"]
        check_image(str(path), "observation", image.shape, image.dtype)
        small = {
            "action": file["action"][:],
            "reward": file["reward"][:],
            "is_first": file["step_type"][:] == FIRST,
            "is_terminal": file["discount"][:] == 0 if "discount" in file else None,
        }
        small["is_terminal"] = _flags(small["is_terminal"], len(small["action"]))
        _check_length(path, "observation", image.shape, len(small["action"]))
        tables.append(Rows(path, small, {"image": image}))
    return RowsData(settings, image_size, tables, "led_to")


def open_memmap(settings: DataConfig, image_size: int, path: Path) -> RowsData:
    """Open a folder of ``VD4RLExperienceReplay``: ``ROOT/DATASET_ID``.

    Raises:
        DataError: If it can't be read, or lacks an entry.
    """
    from tensordict import TensorDict

    try:
        rows = TensorDict.load_memmap(path)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(f"{path} can't be read as a stored tensordict: {error}") from error
    names = ["/".join(k if isinstance(k, tuple) else (k,)) for k in rows.keys(True, True)]
    require(str(path), ("pixels", "action", "next/reward"), names)
    if rows.ndim != 1:
        raise DataError(
            f"{path}: batch size {list(rows.shape)}; allowed: [N], made with split_trajs=False."
        )
    if "is_init" in names:
        first = rows["is_init"].numpy().reshape(-1)
    else:
        require(str(path), ("state/step_type",), names)
        first = rows["state", "step_type"].numpy().reshape(-1) == FIRST
    image = rows["pixels"].numpy()
    check_image(str(path), "pixels", image.shape, image.dtype)
    ends = rows["next", "terminated"].numpy() if "next/terminated" in names else None
    small = {
        "action": rows["action"].numpy(),
        "reward": rows["next", "reward"].numpy().reshape(-1),
        "is_first": first,
        "is_terminal": _flags(ends, len(rows)),
    }
    return RowsData(settings, image_size, [Rows(path, small, {"image": image})], "led_to")


def _flags(values: Any, length: int) -> Any:
    return np.zeros(length, bool) if values is None else values.reshape(-1).astype(bool)


def _check_length(path: Path, key: str, shape: tuple[int, ...], length: int) -> None:
    if shape[0] != length:
        raise DataError(
            f"{path}: {key} has {shape[0]} rows, but action has {length}; all entries must have as "
            "many."
        )

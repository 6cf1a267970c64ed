"""Write episodes in the form of DreamerV2 and V-D4RL: an ``.npz`` file each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from w2f_torchrl.config import ConfigError
from w2f_torchrl.data.recorded.episodes import Array, RecordedEpisode
from w2f_torchrl.keys import MASK
from w2f_torchrl.utils.files import atomic_path, write_text

FACTS_FILE = "recording.json"
"""Describes a folder's recording; the episodes of one folder share it."""


def note_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write what a recording is of, or compare it with what an earlier call wrote.

    Args:
        folder: The folder; created if missing.
        facts: Plain values.

    Raises:
        ConfigError: If the folder holds another recording.
    """
    path = folder / FACTS_FILE
    now: dict[str, Any] = json.loads(json.dumps(facts, default=vars))
    if path.exists():
        before = json.loads(path.read_text())
        for name in sorted(now.keys() | before.keys()):
            if before.get(name) != now.get(name):
                raise ConfigError(
                    f"{path}: {name} was {before.get(name)} and is {now.get(name)}: record into "
                    "another folder."
                )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(now, indent=2) + "\n")


def write_episode(path: str | Path, episode: RecordedEpisode) -> Path:
    """Write an episode atomically, compressed.

    The file holds ``image`` uint8 ``[T, H, W, 3]``, ``action`` float32 ``[T, A]`` (the one that led
    to the observation), ``reward`` and ``discount`` float32 ``[T]``, ``is_first``, ``is_last`` and
    ``is_terminal`` bool ``[T]``, ``foreground_mask`` bool ``[T, H, W]`` if the episode has masks,
    and its true states.

    Args:
        path: The file; its folder must exist.
        episode: The episode.
    """
    length = len(episode)
    steps = np.arange(length)
    terminal = (steps == length - 1) & episode.terminated
    arrays: dict[str, Array] = {
        "image": episode.pixels.permute(0, 2, 3, 1).numpy(),
        "action": episode.action.numpy(),
        "reward": episode.reward.numpy(),
        "discount": 1 - terminal.astype(np.float32),
        "is_first": steps == 0,
        "is_last": steps == length - 1,
        "is_terminal": terminal,
    }
    if episode.mask is not None:
        arrays[MASK] = episode.mask[:, 0].numpy()
    return write_arrays(path, arrays | episode.states)


def write_arrays(path: str | Path, arrays: Mapping[str, Array]) -> Path:
    """Write arrays to an ``.npz`` file, which appears under its name when it is complete."""
    path = Path(path)
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, **dict[str, Any](arrays))
    return path

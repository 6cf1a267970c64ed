"""One recorded episode, in the form of the replay, and what a data set of them offers."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tensordict import TensorDict
from torch import Tensor

from w2f_torchrl.config import ConfigError, DataConfig
from w2f_torchrl.config.training import FROM_DATA
from w2f_torchrl.keys import MASK, PIXELS

Array = npt.NDArray[Any]

SMALL = ("action", "reward", "is_first", "is_last", "is_terminal", "discount")
"""Entries of a file that have few numbers per step."""
STATES = ("agent/", "scenery/")
"""Prefixes of entries that describe the true state; the measures of filtering read them."""


class DataError(ConfigError):
    """Recorded data that can't be used; the message names the file, the key and what is allowed."""


@dataclass(frozen=True)
class RecordedEpisode:
    """An episode of T observations.

    Attributes:
        name: Its file, and its place there if the file has several.
        pixels: uint8 ``[T, 3, H, W]``.
        action: float32 ``[T, A]``: the action that led to each observation, zero for the first;
            one-hot if actions are discrete.
        reward: float32 ``[T]``, which came with each observation; zero for the first.
        terminated: Whether the last observation ends the task; otherwise the episode was only cut.
        mask: bool ``[T, 1, H, W]``; None if the data have no masks.
        states: True states of each observation, float ``[T, K]``, by names such as ``agent/pose``
            and ``scenery/clip``.
    """

    name: str
    pixels: Tensor
    action: Tensor
    reward: Tensor
    terminated: bool
    mask: Tensor | None = None
    states: dict[str, Array] = field(default_factory=dict)

    def __len__(self) -> int:
        """T, the number of observations."""
        return len(self.pixels)

    def records(self) -> TensorDict:
        """Return the replay's records ``[T]``, as :func:`~w2f_torchrl.data.records_from_rollout`.

        Without ``stream``. The last one is ``done`` even if the episode was cut there.
        """
        length = len(self)
        first, last = torch.zeros(length, 1, dtype=torch.bool), torch.zeros(length, 1).bool()
        first[0], last[-1] = True, True
        following = {
            PIXELS: self.pixels,
            "reward": self.reward[:, None],
            "terminated": last & self.terminated,
            "done": last,
        }
        if self.mask is not None:
            following[MASK] = self.mask
        return TensorDict(
            {
                "action": self.action,
                "is_init": first,
                "next": TensorDict(following, [length]),
            },
            [length],
        )


@dataclass(frozen=True)
class Span:
    """Where an episode lies.

    Attributes:
        name: For messages.
        parts: Files, and their first and last + 1 rows, in order.
    """

    name: str
    parts: tuple[tuple[Path, int, int], ...]

    def __len__(self) -> int:
        """T, the number of observations."""
        return sum(stop - start for _, start, stop in self.parts)


class RecordedData(ABC):
    """Recorded episodes of one task, read when they are needed.

    Args:
        settings: The run's settings of recorded data.
        image_size: Side of the images that a run trains on, pixels; others are resized.

    Attributes:
        spans: The episodes, in the order of their names.
        action_size: A: numbers of a continuous action, choices of a discrete one.
        has_mask: Whether every episode has ``foreground_mask``.
        states: Names of the true states that every episode has.
        action_limits: Lowest and highest value of each number of a continuous action ``[A]``.
        zero_first: Whether the first action of an episode must be zero if rows hold the one that
            led to their observation, because the convention is only assumed.
        convention: ``led_to`` or ``taken_at``: which action stands next to an observation.
    """

    spans: list[Span]
    action_size: int
    has_mask: bool
    states: tuple[str, ...]
    convention: str
    zero_first: bool = False
    action_limits: tuple[Array, Array]

    def __init__(self, settings: DataConfig, image_size: int) -> None:
        assert settings.path is not None, "only built for recorded data"
        self.settings, self.image_size = settings, image_size
        self.path = Path(settings.path)

    @abstractmethod
    def read(self, span: Span) -> dict[str, Array]:
        """Read the entries of an episode, as they are in its files.

        Returns:
            ``image`` uint8 ``[T, H, W, 3]`` or ``[T, 3, H, W]``, ``action`` ``[T, ...]``,
            ``reward`` ``[T]``, ``is_terminal`` bool ``[T]``, and, if the data have them,
            ``foreground_mask`` and true states.

        Raises:
            DataError: If a file can't be read.
        """

    def learn_actions(self, paths: Sequence[Path], actions: Sequence[Array]) -> None:
        """Set the size and the range of the actions.

        Args:
            paths: The files, for messages.
            actions: The actions of each, ``[N]`` or ``[N, A]``.

        Raises:
            DataError: If the actions are integers, and ``data.choices`` is not set.
        """
        first, choices = actions[0], self.settings.choices
        if choices is not None:
            self.action_size = choices
            return
        if np.issubdtype(first.dtype, np.integer):
            raise DataError(
                f"{paths[0]}: action is {first.dtype} {list(first.shape)}, a discrete action; set "
                "data.choices to the number of choices."
            )
        self.action_size = 1 if first.ndim == 1 else int(first.shape[-1])
        size, chosen = self.action_size, self.settings.action_range
        if chosen != FROM_DATA:
            low, high = chosen or (-1.0, 1.0)
            self.action_limits = np.full(size, low), np.full(size, high)
            return
        same = [each.reshape(len(each), -1) for each in actions]
        rows = np.concatenate([each for each in same if each.shape[1] == size])
        low, high = rows.min(0), rows.max(0)
        constant = low == high  # maps to 0
        self.action_limits = low - constant, high + constant

    @property
    def steps(self) -> int:
        """Observations of all episodes."""
        return sum(map(len, self.spans))

    def split(self) -> tuple[list[int], list[int]]:
        """Return the episodes to train on, and those to evaluate: ``data.holdout`` of them."""
        everything = list(range(len(self.spans)))
        share = self.settings.holdout
        if share == 0 or len(everything) == 1:
            return everything, everything[:1]
        count = min(max(round(share * len(everything)), 1), len(everything) - 1)
        places = np.linspace(0, len(everything) - 1, count + 2).round().astype(int)[1:-1]
        kept = {int(place) for place in places}
        return [index for index in everything if index not in kept], sorted(kept)

    def fingerprint(self) -> str:
        """Return a digest that changes if episodes are added, removed, renamed or cut."""
        digest = hashlib.sha256()
        for path, start, stop in (part for span in self.spans for part in span.parts):
            name = path.relative_to(self.path) if path.is_relative_to(self.path) else path.name
            digest.update(f"{name} {start} {stop}\n".encode())
        return digest.hexdigest()

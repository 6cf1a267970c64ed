"""Data sets whose episodes lie one after the other in long tables of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from w2f_torchrl.config import DataConfig
from w2f_torchrl.data.recorded.episodes import Array, DataError, RecordedData, Span
from w2f_torchrl.data.recorded.form import check_rows
from w2f_torchrl.utils.checks import check_choice


@dataclass(frozen=True)
class Rows:
    """The rows of one file, of several episodes.

    Attributes:
        path: The file, for messages.
        small: ``action``, ``reward``, ``is_first`` and ``is_terminal``, in memory. A reward came
            with the observation of its row.
        large: Further entries, of which slices are read: ``image``, and ``foreground_mask`` if
            the data have it.
    """

    path: Path
    small: dict[str, Array]
    large: Mapping[str, Any]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.small["action"])


class RowsData(RecordedData):
    """Episodes cut out of rows at ``is_first``.

    Args:
        settings: The run's settings of recorded data.
        image_size: Side of the images that a run trains on, pixels.
        tables: The rows of each file.
        convention: Which action stands next to an observation, unless a setting says it.

    Raises:
        DataError: If an entry has a wrong shape, dtype or value.
    """

    def __init__(
        self, settings: DataConfig, image_size: int, tables: Sequence[Rows], convention: str
    ) -> None:
        super().__init__(settings, image_size)
        self.convention = convention if settings.actions == "auto" else settings.actions
        self.has_mask = all("foreground_mask" in table.large for table in tables)
        self.states = ()
        self.tables = {table.path: table for table in tables}
        self.learn_actions([table.path for table in tables], [t.small["action"] for t in tables])
        self.spans = []
        for table in tables:
            starts = sorted({0, *np.flatnonzero(table.small["is_first"]).tolist()})
            check_rows(str(table.path), table.small, starts, self)
            for start, stop in zip(starts, [*starts[1:], len(table)], strict=True):
                name = f"{table.path}, row {start}"
                self.spans.append(Span(name, ((table.path, start, stop),)))

    def read(self, span: Span) -> dict[str, Array]:
        """Read an episode."""
        path, start, stop = span.parts[0]
        table = self.tables[path]
        large = {key: np.asarray(values[start:stop]) for key, values in table.large.items()}
        return {key: values[start:stop] for key, values in table.small.items()} | large


def rewards_with_observations(reward: Array, starts: Array) -> Array:
    """Move rewards from the row of their action to the row of the observation that followed.

    What followed an episode's last action was not recorded: its reward, often the only one of a
    task with sparse rewards, is added to that of the last observation.

    Args:
        reward: ``[N]``, of the action that was taken in each row.
        starts: bool ``[N]``: whether an episode begins in a row.
    """
    moved = np.zeros_like(reward)
    moved[1:] = reward[:-1]
    moved[starts] = 0
    last = np.append(starts[1:], True)
    moved[last] += reward[last]
    return moved


def require(name: str, keys: Sequence[str], there: Any) -> None:
    """Check that entries exist.

    Raises:
        DataError: Naming the first that is missing, and those that exist.
    """
    for key in keys:
        if key not in there:
            listed = ", ".join(sorted(map(str, there))) or "nothing"
            raise DataError(f"{name}: {key} is missing; it holds {listed}.")


def choose_camera(path: Path, cameras: Sequence[str], chosen: str | None) -> str:
    """Return the images to train on.

    Args:
        path: The data set, for messages.
        cameras: Names of all images.
        chosen: ``data.camera``.

    Raises:
        DataError: If none exist, or several and none was chosen, or the chosen one does not exist.
    """
    if not cameras:
        raise DataError(f"{path}: images are missing.")
    if chosen is None and len(cameras) > 1:
        raise DataError(
            f"{path} has images of several cameras: set data.camera to one of {', '.join(cameras)}."
        )
    if chosen is not None:
        try:
            check_choice("data.camera", chosen, tuple(cameras))
        except ValueError as error:
            raise DataError(f"{path}: {error}") from error
    return chosen or cameras[0]

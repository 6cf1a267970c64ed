"""Colours of sky, floor and agent, drawn from a table at each reset, as in DMControl-GB."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from w2f_torchrl.utils.seeding import derive_seed
from w2f_torchrl.utils.settings import check_fields, setting

FloatArray = npt.NDArray[np.float64]
PaletteLevel = Literal["easy", "hard"]
LEVELS: tuple[str, ...] = get_args(PaletteLevel)

ENTRIES = 100
"""Entries of a table, as many as DMControl-GB's have."""
USUAL = {"grid": (0.1, 0.2, 0.3), "agent": (0.7, 0.5, 0.3), "sky": (0.4, 0.6, 0.8)}
"""The suite's own colours, RGB in [0, 1]: of the floor's dark squares, the agent, and the sky."""
SPREAD = {"easy": 0.1, "hard": 0.2}
"""Standard deviation of the stand-ins around them, that of DMControl-GB's tables."""
LIGHTER = 0.1
"""By how much the floor's light squares are lighter than the dark ones in DMControl-GB's tables."""
_KEYS = {
    "grid": "grid_rgb1",
    "light_grid": "grid_rgb2",
    "agent": "self_rgb",
    "sky": "skybox_rgb",
}


@dataclass(frozen=True)
class PaletteConfig:
    """Colours from a table; see :class:`~w2f_torchrl.envs.protocols.palette.PaletteWalk`."""

    level: PaletteLevel = setting(
        "easy",
        "How far the built-in stand-ins for DMControl-GB's tables are from the suite's colours.",
        choices=LEVELS,
    )
    file: str | None = setting(
        None, "A table of DMControl-GB, color_easy.pt or color_hard.pt, instead of the stand-ins."
    )

    def __post_init__(self) -> None:
        """Check the values."""
        check_fields("palette", self)


class Palette(NamedTuple):
    """Colours, RGB in [0, 1] each."""

    grid: tuple[float, ...]
    """Of the floor's dark squares."""
    light_grid: tuple[float, ...]
    """Of its light squares."""
    agent: tuple[float, ...]
    """Of the material ``self``."""
    sky: tuple[float, ...]
    """Of the sky's upper end; the lower one is black."""


class PaletteWalk:
    """The colours of an episode, drawn uniformly from a table at its reset.

    Args:
        table: The table.
    """

    def __init__(self, table: list[Palette]) -> None:
        self._table = table
        self.index = 0

    @property
    def palette(self) -> Palette:
        """The present colours."""
        return self._table[self.index]

    def start(self, generator: np.random.Generator) -> None:
        """Draw an entry."""
        self.index = int(generator.integers(len(self._table)))

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next pictures depend on, except the generator."""
        return {"index": self.index}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of :meth:`state_dict`."""
        self.index = state["index"]


def load_table(config: PaletteConfig) -> list[Palette]:
    """Return the table of a configuration.

    Raises:
        ValueError: If the file cannot be read, or is not a table of DMControl-GB.
    """
    return _stand_ins(config.level) if config.file is None else _read(Path(config.file))


def _stand_ins(level: str) -> list[Palette]:
    """Draw a table whose means and standard deviations are about those of DMControl-GB's."""
    generator = np.random.default_rng(derive_seed(0, "palette", level))
    table = []
    for _ in range(ENTRIES):
        drawn = {
            name: np.clip(generator.normal(mean, SPREAD[level]), 0.0, 1.0)
            for name, mean in USUAL.items()
        }
        drawn["grid"] = np.minimum(drawn["grid"], 1.0 - LIGHTER)
        drawn["light_grid"] = drawn["grid"] + LIGHTER
        table.append(Palette(**{name: tuple(color.tolist()) for name, color in drawn.items()}))
    return table


def _read(path: Path) -> list[Palette]:
    import torch  # not at the top: the validation of settings imports this module

    # A pickle of numpy's arrays, whose maker has another name since numpy 2; nothing else is run.
    make_array: Any = np.empty(0).__reduce__()[0]
    allowed: list[Any] = [make_array, (make_array, "numpy.core.multiarray._reconstruct")]
    allowed += [np.ndarray, np.dtype, np.dtypes.Float64DType]
    try:
        with torch.serialization.safe_globals(allowed):
            entries = torch.load(path, weights_only=True)
        table = [
            Palette(**{name: _color(entry[key]) for name, key in _KEYS.items()})
            for entry in entries
        ]
    except Exception as error:  # torch.load has many kinds
        raise ValueError(
            f"palette.file={path} is not a table of DMControl-GB: {str(error).splitlines()[0]}"
        ) from error
    if not table:
        raise ValueError(f"palette.file={path} is empty.")
    return table


def _color(value: npt.ArrayLike) -> tuple[float, ...]:
    color = np.asarray(value, dtype=np.float64)
    if color.shape != (3,) or not ((color >= 0) & (color <= 1)).all():
        raise ValueError(f"{color.tolist()} is no colour, three numbers in [0, 1]")
    return tuple(color.tolist())

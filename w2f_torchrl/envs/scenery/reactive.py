"""Scenery that reacts: a grid of coloured cells that depends on action, reward or time.

The reafferent worlds of Hutson, Kauvar and Haber (2024, Policy-Shaped Prediction, arXiv
2412.05766), where the background is caused by the agent but does not matter for the task. Learned
filters fail there: a background that follows from the action is easy to predict, and one that
follows from the reward predicts it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from w2f_torchrl.envs.scenery.backgrounds import SPLITS
from w2f_torchrl.envs.scenery.distractions import ReactiveConfig
from w2f_torchrl.utils.seeding import derive_seed

UInt8Array = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float64]


class ReactiveGrid:
    """A picture of G x G coloured cells, a fixed random function of the last agent step.

    The picture at time t shows the action a(t - 1) that led to it and the reward r(t) that came
    with it, as a record of the replay holds them. After a reset it is the picture of action zero,
    reward zero and time zero.

    The colours of all cells are drawn from a generator seeded with the bins, so that every env with
    the same seed and split shows the same picture for the same bins. No table is kept: it would
    have ``action_bins ** A`` entries.

    Args:
        config: The function, its bins and its seed.
        action_size: A, the number of action dimensions.
        size: Side S of the pictures, pixels.
        split: ``"train"`` or ``"val"``, whose colours are unrelated.

    Raises:
        ValueError: If the function reads more action dimensions than there are.
    """

    def __init__(
        self, config: ReactiveConfig, *, action_size: int, size: int, split: str = "train"
    ) -> None:
        dimensions = config.action_dimensions
        if config.reads_action and dimensions is not None and dimensions > action_size:
            raise ValueError(
                f"reactive.action_dimensions={dimensions} must be at most {action_size}, the "
                "number of the task's action dimensions, or null."
            )
        self.config = config
        self.split = split
        self.time = 0
        """Agent steps since the reset."""
        self._action_size = action_size
        self._seeds = {
            name: derive_seed(config.seed, "reactive", config.function, name) for name in SPLITS
        }
        self._cell_of_pixel = (2 * np.arange(size) + 1) * config.grid // (2 * size)
        self._shown: tuple[object, ...] | None = None
        self._frame: UInt8Array = np.zeros((size, size, 3), dtype=np.uint8)
        self.bins: tuple[int, ...] = ()
        """What the picture is a function of: the action's bins, the reward's, the time's."""
        self.start()

    def start(self) -> None:
        """Start an episode: action zero, reward zero, time zero."""
        self.time = 0
        self.bins = self._bins(np.zeros(self._action_size), 0.0)

    def step(self, action: npt.ArrayLike, reward: float) -> None:
        """React to an agent step.

        Args:
            action: [A], clipped to [-1, 1].
            reward: Mean reward of a control step, clipped to [0, 1].
        """
        self.time += 1
        self.bins = self._bins(np.asarray(action, dtype=np.float64), reward)

    def _bins(self, action: FloatArray, reward: float) -> tuple[int, ...]:
        config, bins = self.config, []
        if config.reads_action:
            read = np.clip(action[: config.action_dimensions], -1.0, 1.0)
            bins += [_bin(share, config.action_bins) for share in ((read + 1) / 2).tolist()]
        if config.function == "reward":
            bins.append(_bin(min(max(float(reward), 0.0), 1.0), config.reward_bins))
        if config.reads_time:
            bins.append(self.time % config.time_period)
        return tuple(bins)

    def labels(self) -> FloatArray:
        """Return the bins, float64 [K], each scaled to [0, 1], for probes of a model's latents."""
        config = self.config
        last = {"reward": config.reward_bins}.get(config.function, config.time_period)
        counts = [config.action_bins] * len(self.bins)
        if config.function != "action":
            counts[-1] = last
        scaled: FloatArray = np.array(self.bins) / np.maximum(np.array(counts) - 1.0, 1.0)
        return scaled

    @property
    def key(self) -> tuple[object, ...]:
        """What the picture depends on."""
        return (self.split, *self.bins)

    def cells(self) -> UInt8Array:
        """Return the colours of the cells, uint8 [G, G, 3], each uniform in 0 to 255."""
        generator = np.random.default_rng([self._seeds[self.split], *self.bins])
        shape = self.config.grid, self.config.grid, 3
        return generator.integers(256, size=shape, dtype=np.uint8)

    @property
    def frame(self) -> UInt8Array:
        """The picture, uint8 [S, S, 3]; do not write to it."""
        if self._shown != self.key:
            rows = self._cell_of_pixel
            self._frame = self.cells().take(rows, 0).take(rows, 1)
            self._shown = self.key
        return self._frame

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next pictures depend on."""
        return {"time": self.time, "bins": list(self.bins)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of :meth:`state_dict`."""
        self.time, self.bins = state["time"], tuple(state["bins"])


def _bin(share: float, count: int) -> int:
    """Return the index of the bin of a number in [0, 1]; the last bin includes 1."""
    return min(int(share * count), count - 1)

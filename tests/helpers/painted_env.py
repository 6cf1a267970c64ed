"""An env of Gymnasium that says in its picture which action it got."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

HEIGHT, WIDTH = 40, 60


class PaintedEnv(gymnasium.Env):
    """Paints a block whose brightness is the action; counts its drawings.

    Args:
        action_space: Its actions.
        render_mode: As ``gymnasium.make`` passes it.
        picture: Drawn instead.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012  # Gymnasium's way

    def __init__(
        self,
        action_space: spaces.Space | None = None,
        render_mode: str | None = None,
        picture: np.ndarray | None = None,
    ):
        self.action_space = action_space or spaces.Discrete(3, start=-1)
        self.observation_space = spaces.Box(-1, 1, (5,))
        self.render_mode, self.picture = render_mode, picture
        self.received: list[Any] = []
        self.drawn = 0

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.received.clear()
        return np.zeros(5, np.float32), {}

    def step(self, action: Any):
        self.received.append(action)
        return np.zeros(5, np.float32), 1.0, len(self.received) == 7, False, {}

    def _block(self) -> tuple[slice, slice]:
        return slice(10, 30), slice(15, 45)

    def render(self):
        self.drawn += 1
        if self.picture is not None:
            return self.picture
        picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        shade = 100 if not self.received else 150 + 50 * int(np.sum(self.received[-1]))
        picture[self._block()] = shade
        return picture


class MaskedEnv(PaintedEnv):
    """Gives its mask, too."""

    def foreground_mask(self) -> np.ndarray:
        mask = np.zeros((HEIGHT, WIDTH), bool)
        mask[self._block()] = True
        return mask


def register() -> None:
    """Make both known to Gymnasium."""
    for name, env in (("Painted-v0", PaintedEnv), ("Masked-v0", MaskedEnv)):
        if f"w2f/{name}" not in gymnasium.registry:
            gymnasium.register(f"w2f/{name}", entry_point=env, max_episode_steps=50)

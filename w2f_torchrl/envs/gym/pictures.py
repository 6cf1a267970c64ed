"""A Gymnasium env that repeats each action and returns one picture for all its observations."""

from __future__ import annotations

from typing import Any, SupportsFloat

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.spaces import Box, Dict, Discrete
from PIL import Image

Picture = npt.NDArray[np.uint8]
Observation = dict[str, npt.NDArray[Any]]


def resize(picture: Picture, size: int) -> Picture:
    """Resize a picture ``[H, W, 3]`` to ``[size, size, 3]`` by means over areas.

    Sides of different length are scaled separately, so that nothing is cut off.
    """
    if picture.shape[:2] == (size, size):
        return picture
    image = Image.fromarray(picture)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


class RepeatedPictures(gymnasium.Wrapper[Observation, Any, Any, Any]):
    """Repeat each action, sum the rewards, draw once.

    The observation is ``pixels`` uint8 ``[3, H, W]``. An env whose unwrapped object has a method
    ``foreground_mask()``, which returns bool ``[h, w]`` of the size of its picture, gives
    ``foreground_mask`` bool ``[1, H, W]`` as well. An end within a repeat cuts it short.

    Args:
        env: Made with ``render_mode="rgb_array"``.
        image_size: H = W, pixels.
        action_repeat: Steps of the env per action.
        foreground_mask: Whether to return the mask, if the env has one.
    """

    def __init__(
        self,
        env: gymnasium.Env[Any, Any],
        image_size: int,
        action_repeat: int,
        foreground_mask: bool = True,
    ) -> None:
        super().__init__(env)
        self.image_size, self.action_repeat = image_size, action_repeat
        mask = getattr(env.unwrapped, "foreground_mask", None)
        self._mask = mask if foreground_mask and callable(mask) else None
        spaces: dict[str, Any] = {"pixels": Box(0, 255, (3, image_size, image_size), np.uint8)}
        if self._mask is not None:
            spaces["foreground_mask"] = Box(0, 1, (1, image_size, image_size), np.bool_)
        space: Any = Dict(spaces)
        self.observation_space = space
        self._first_action = 0
        if isinstance(env.action_space, Discrete):
            self._first_action = int(env.action_space.start)
            self.action_space = Discrete(int(env.action_space.n))  # counted from 0

    def reset(self, **kwargs: Any) -> tuple[Observation, dict[str, Any]]:
        """Start an episode and draw it."""
        self.env.reset(**kwargs)
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Observation, SupportsFloat, bool, bool, dict[str, Any]]:
        """Take an action ``action_repeat`` times, or until the episode ends, and draw once."""
        total = 0.0
        for _ in range(self.action_repeat):
            _, reward, terminated, truncated, _ = self.env.step(action + self._first_action)
            total += float(reward)
            if terminated or truncated:
                break
        return self._observe(), total, bool(terminated), bool(truncated), {}

    def _observe(self) -> Observation:
        picture = self.env.render()
        if not (isinstance(picture, np.ndarray) and picture.ndim == 3 and picture.shape[2] == 3):
            found = getattr(picture, "shape", type(picture).__name__)
            raise ValueError(f"the env draws {found}; it must draw [H, W, 3], rgb_array.")
        small = resize(picture.astype(np.uint8, copy=False), self.image_size)
        observation: Observation = {"pixels": np.ascontiguousarray(small.transpose(2, 0, 1))}
        if self._mask is not None:
            mask = np.asarray(self._mask(), dtype=np.bool_)
            if mask.shape != picture.shape[:2]:
                raise ValueError(
                    f"foreground_mask() returns {mask.shape}; it must be {picture.shape[:2]}, the "
                    "size of the picture."
                )
            shown = resize(np.repeat(mask[..., None] * np.uint8(255), 3, 2), self.image_size)
            observation["foreground_mask"] = shown[None, :, :, 0] > 127
        return observation

"""A Gymnasium env that repeats each action and returns one picture for all its observations."""

from __future__ import annotations

from typing import Any, Protocol, SupportsFloat

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.spaces import Box, Dict, Discrete
from PIL import Image

Picture = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Observation = dict[str, npt.NDArray[Any]]


def resize(picture: Picture, size: int) -> Picture:
    """Resize a picture ``[H, W, 3]`` to ``[size, size, 3]`` by means over areas.

    Sides of different length are scaled separately, so that nothing is cut off.
    """
    if picture.shape[:2] == (size, size):
        return picture
    image = Image.fromarray(picture)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


class Painter(Protocol):
    """Draws an env, and is told what happens in it."""

    @property
    def image_size(self) -> int:
        """H = W, pixels."""

    @property
    def has_mask(self) -> bool:
        """Whether :meth:`draw` returns a mask."""

    def start(self) -> None:
        """Begin an episode; the env has been reset."""

    def control_step(self) -> None:
        """Note that the env has made a step."""

    def agent_step(self, action: Any, reward: float) -> None:
        """Note the action that the steps repeated, and the mean of their rewards."""

    def draw(self) -> tuple[Picture, Mask | None]:
        """Return the picture uint8 ``[3, H, W]`` and the mask bool ``[1, H, W]``."""

    def close(self) -> None:
        """Free what drawing needs."""


class OwnPictures:
    """An env's own pictures, resized.

    Args:
        env: Made with ``render_mode="rgb_array"``. If its unwrapped object has a method
            ``foreground_mask()``, which returns bool ``[h, w]`` of the size of its picture, that is
            the mask.
        image_size: H = W, pixels.
        foreground_mask: Whether to return the mask, if the env has one.
    """

    def __init__(
        self, env: gymnasium.Env[Any, Any], image_size: int, foreground_mask: bool = True
    ) -> None:
        self.image_size = image_size
        self._env = env
        self._mask = own_mask(env) if foreground_mask else None
        self.has_mask = self._mask is not None

    def start(self) -> None:
        """Do nothing."""

    def control_step(self) -> None:
        """Do nothing."""

    def agent_step(self, action: Any, reward: float) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing: the env closes its own renderer."""

    def draw(self) -> tuple[Picture, Mask | None]:
        """Return the picture and the mask.

        Raises:
            ValueError: If the env draws something else, or its mask has another size.
        """
        picture = self._env.render()
        if not (isinstance(picture, np.ndarray) and picture.ndim == 3 and picture.shape[2] == 3):
            found = getattr(picture, "shape", type(picture).__name__)
            raise ValueError(f"the env draws {found}; it must draw [H, W, 3], rgb_array.")
        small = resize(picture.astype(np.uint8, copy=False), self.image_size)
        pixels = np.ascontiguousarray(small.transpose(2, 0, 1))
        if self._mask is None:
            return pixels, None
        mask = np.asarray(self._mask(), dtype=np.bool_)
        if mask.shape != picture.shape[:2]:
            raise ValueError(
                f"foreground_mask() returns {mask.shape}; it must be {picture.shape[:2]}, the "
                "size of the picture."
            )
        shown = resize(np.repeat(mask[..., None] * np.uint8(255), 3, 2), self.image_size)
        return pixels, shown[None, :, :, 0] > 127


def own_mask(env: gymnasium.Env[Any, Any]) -> Any:
    """Return the method ``foreground_mask`` of the unwrapped env, None without one."""
    method = getattr(env.unwrapped, "foreground_mask", None)
    return method if callable(method) else None


class RepeatedPictures(gymnasium.Wrapper[Observation, Any, Any, Any]):
    """Repeat each action, sum the rewards, draw once.

    The observation is ``pixels`` uint8 ``[3, H, W]``, and ``foreground_mask`` bool ``[1, H, W]`` if
    the painter has one. An end within a repeat cuts it short.

    Args:
        env: The env.
        painter: Draws it.
        action_repeat: Steps of the env per action.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], painter: Painter, action_repeat: int) -> None:
        super().__init__(env)
        self.painter, self.action_repeat = painter, action_repeat
        size = painter.image_size
        spaces: dict[str, Any] = {"pixels": Box(0, 255, (3, size, size), np.uint8)}
        if painter.has_mask:
            spaces["foreground_mask"] = Box(0, 1, (1, size, size), np.bool_)
        space: Any = Dict(spaces)
        self.observation_space = space
        self._first_action = 0
        if isinstance(env.action_space, Discrete):
            self._first_action = int(env.action_space.start)
            self.action_space = Discrete(int(env.action_space.n))  # counted from 0

    def reset(self, **kwargs: Any) -> tuple[Observation, dict[str, Any]]:
        """Start an episode and draw it."""
        self.env.reset(**kwargs)
        self.painter.start()
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Observation, SupportsFloat, bool, bool, dict[str, Any]]:
        """Take an action ``action_repeat`` times, or until the episode ends, and draw once."""
        total, steps = 0.0, 0
        for _ in range(self.action_repeat):
            _, reward, terminated, truncated, _ = self.env.step(action + self._first_action)
            total, steps = total + float(reward), steps + 1
            self.painter.control_step()
            if terminated or truncated:
                break
        self.painter.agent_step(action, total / steps)
        return self._observe(), total, bool(terminated), bool(truncated), {}

    def close(self) -> None:
        """Free the env and what draws it."""
        self.painter.close()
        super().close()

    def _observe(self) -> Observation:
        pixels, mask = self.painter.draw()
        return {"pixels": pixels} if mask is None else {"pixels": pixels, "foreground_mask": mask}

"""Wandering colours, videos that play back and forth, and a camera that is disturbed at times."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from w2f_torchrl.envs.scenery.distractions import CORRUPTIONS, CorruptionConfig, Playback

FloatArray = npt.NDArray[np.float64]


class ColorWalk:
    """The colours of a model's materials, and of geoms without one.

    Args:
        original: The original colours, float [M, 3] in [0, 1].
        scale: Intensity s: colours stay within s of the original, and in [0, 1]. A step adds
            Gaussian noise of standard deviation 0.03 s to each channel.
        dynamic: Whether the colours change after their start.
    """

    def __init__(self, original: FloatArray, scale: float, *, dynamic: bool = True) -> None:
        self.scale = scale
        self.dynamic = dynamic
        self.low: FloatArray = np.clip(original - scale, 0.0, 1.0)
        self.high: FloatArray = np.clip(original + scale, 0.0, 1.0)
        self.colors: FloatArray = original.astype(np.float64)
        """Float64 [M, 3]."""

    def start(self, generator: np.random.Generator) -> None:
        """Draw each channel uniformly in its range."""
        self.colors = generator.uniform(self.low, self.high)

    def step(self, generator: np.random.Generator) -> None:
        """Change every channel a little, if the walk is dynamic."""
        if not self.dynamic:
            return
        noise = generator.standard_normal(self.colors.shape)
        moved = self.colors + 0.03 * self.scale * noise
        self.colors = np.minimum(np.maximum(moved, self.low), self.high)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next steps depend on, except the generator."""
        return {"colors": self.colors.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of :meth:`state_dict`."""
        self.colors = np.asarray(state["colors"], dtype=np.float64)


class Paint:
    """A model's colours: its materials', and those of geoms that have none.

    The Control Suite's models have a material for everything. In others most geoms have only a
    colour; those of the same colour are one entry, so that they keep looking alike.

    Args:
        model: The simulation's model.
        plain_geoms: Whether to include geoms without a material.
    """

    def __init__(self, model: Any, *, plain_geoms: bool = False) -> None:
        self._model = model
        plain = np.flatnonzero(np.asarray(model.geom_matid) < 0)
        self._geoms = plain if plain_geoms else plain[:0]
        _, first, group = np.unique(
            np.asarray(model.geom_rgba)[self._geoms], axis=0, return_index=True, return_inverse=True
        )
        self._first, self._group = self._geoms[first], group.reshape(-1)

    def colors(self) -> FloatArray:
        """Return the present colours, float64 [M, 3]: the materials, then the other colours."""
        materials = np.array(self._model.mat_rgba[:, :3], dtype=np.float64)
        plain = np.array(self._model.geom_rgba[self._first, :3], dtype=np.float64)
        return np.concatenate([materials, plain])

    def apply(self, colors: FloatArray) -> None:
        """Paint the model.

        Args:
            colors: Float [M, 3] in [0, 1], in the order of :meth:`colors`.
        """
        materials = len(self._model.mat_rgba)
        self._model.mat_rgba[:, :3] = colors[:materials]
        if len(self._geoms):
            self._model.geom_rgba[self._geoms, :3] = colors[materials:][self._group]

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Give the model its colours back at the end."""
        model = self._model
        saved = model.mat_rgba.copy(), model.geom_rgba[self._geoms].copy()
        try:
            yield
        finally:
            model.mat_rgba[:], model.geom_rgba[self._geoms] = saved


class VideoWalk:
    """The visible frame of a clip.

    Each episode draws a clip, a first frame and a direction; a dynamic walk then moves one frame
    per step, and turns around at the clip's ends. A loop has only one direction, and its first
    frame follows the last.

    Args:
        lengths: Frames of each clip, at least 2.
        dynamic: Whether the frame changes after its start.
        playback: ``"pingpong"`` or ``"loop"``.
    """

    def __init__(
        self, lengths: Sequence[int], *, dynamic: bool = True, playback: Playback = "pingpong"
    ) -> None:
        self._lengths = list(lengths)
        self.dynamic = dynamic
        self._loops = playback == "loop"
        self.clip = 0
        self.frame = 0
        self.direction = 1

    @property
    def num_clips(self) -> int:
        """Number of clips."""
        return len(self._lengths)

    def start(self, generator: np.random.Generator) -> None:
        """Draw clip, frame and direction, each uniformly."""
        self.clip = int(generator.integers(len(self._lengths)))
        self.frame = int(generator.integers(self._lengths[self.clip]))
        self.direction = 1 if self._loops or generator.integers(2) else -1

    def step(self) -> None:
        """Move to the next frame, if the walk is dynamic."""
        if not self.dynamic:
            return
        if self._loops:
            self.frame = (self.frame + 1) % self._lengths[self.clip]
            return
        if not 0 <= self.frame + self.direction < self._lengths[self.clip]:
            self.direction = -self.direction
        self.frame += self.direction

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next steps depend on."""
        return {"clip": self.clip, "frame": self.frame, "direction": self.direction}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of :meth:`state_dict`."""
        self.clip, self.frame = state["clip"], state["frame"]
        self.direction = state["direction"]


class ClipsInOrder:
    """The visible frame of clips that are played one after another.

    Each episode shows the next clip from its first frame; the first follows the last.

    Args:
        num_clips: Number of clips.
        dynamic: Whether the frame changes after its start.
    """

    def __init__(self, num_clips: int, *, dynamic: bool = True) -> None:
        self.num_clips, self.dynamic = num_clips, dynamic
        self.clip, self.frame = -1, 0

    def rewind(self) -> None:
        """Let the next episode show the first clip."""
        self.clip = -1

    def start(self, generator: np.random.Generator) -> None:
        """Show the next clip; nothing is drawn."""
        del generator
        self.clip, self.frame = (self.clip + 1) % self.num_clips, 0

    def step(self) -> None:
        """Move to the next frame, if the walk is dynamic; it is counted beyond a clip's end."""
        self.frame += self.dynamic

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next steps depend on."""
        return {"clip": self.clip, "frame": self.frame}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of :meth:`state_dict`."""
        self.clip, self.frame = state["clip"], state["frame"]


class CorruptionWalk:
    """A Markov chain of what disturbs the camera.

    Its states are the clear view and the kinds of corruption. A clear view is disturbed with the
    probability ``start`` per step, by a kind drawn uniformly; a disturbed one clears with the
    probability ``stop``. So disturbances last 1 / stop steps on average, and the share of disturbed
    steps is start / (start + stop), which is also the probability at an episode's start.

    Args:
        config: The kinds and their probabilities.
    """

    def __init__(self, config: CorruptionConfig) -> None:
        self.config = config
        self._kinds = [kind for kind in CORRUPTIONS if getattr(config, kind) > 0]
        self.kind: str | None = None
        """What disturbs the view, None if it is clear."""
        self.values: list[float] = [0.0] * 5
        """Uniform in [0, 1), drawn when a disturbance begins: where it is, what it looks like."""
        self.noise_seed = 0
        """Seed of the noise, new at every step."""

    def start(self, generator: np.random.Generator) -> None:
        """Draw the state of an episode's start."""
        self.kind = None
        self._move(generator, self.config.start / (self.config.start + self.config.stop))

    def step(self, generator: np.random.Generator) -> None:
        """Make a step of the chain."""
        self._move(generator, self.config.start)

    def _move(self, generator: np.random.Generator, start: float) -> None:
        """Switch, with the given probability for a clear view; every step draws as many numbers."""
        switch, which, *values = generator.random(7).tolist()
        self.noise_seed = int(generator.integers(2**31))
        if self.kind is None and switch < start:
            self.kind = self._kinds[int(which * len(self._kinds))]
            self.values = values
        elif self.kind is not None and switch < self.config.stop:
            self.kind = None

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next steps depend on, except the generator."""
        return {"kind": self.kind, "values": list(self.values), "noise_seed": self.noise_seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of :meth:`state_dict`."""
        self.kind, self.noise_seed = state["kind"], state["noise_seed"]
        self.values = list(state["values"])

"""The distractions of one environment: their walks, their generators, and their effects."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from w2f_torchrl.envs.protocols.palette import PaletteWalk, load_table
from w2f_torchrl.envs.scenery.camera_walk import CameraPose, CameraWalk, camera_box
from w2f_torchrl.envs.scenery.distractions import (
    CORRUPTIONS,
    BackgroundConfig,
    DistractionConfig,
)
from w2f_torchrl.envs.scenery.reactive import ReactiveGrid
from w2f_torchrl.envs.scenery.walks import ClipsInOrder, ColorWalk, CorruptionWalk, Paint, VideoWalk
from w2f_torchrl.envs.simulation import Camera, Simulation
from w2f_torchrl.utils.seeding import derive_seed

UInt8Array = npt.NDArray[np.uint8]

_STREAMS = ("background", "camera", "color", "corruption")
"""The palette's is the colours', which it replaces."""
AGENT_MATERIAL = "self"


class Distractor:
    """Step all distractions of a simulation.

    The simulation is changed only while an image is rendered, within :meth:`applied`: states,
    rewards and ``physics.render`` are those of the undistracted task.

    Each distraction has a separate generator, so that it is the same with and without the others.
    Call :meth:`reset` after the task's reset, :meth:`step` once per step, and :meth:`react` after
    each agent step.

    Args:
        config: The distractions.
        simulation: The simulation.
        camera: The camera that wanders.
        clips: Backgrounds, arrays uint8 [T, S, S, 3]; needed if the configuration has one.
        reactive: A grid of the configuration's settings; needed if it has one.
        seed: Seed of all distractions.
        plain_geoms: Whether colours change of geoms without a material too.

    Raises:
        ValueError: If the camera cannot wander.
    """

    def __init__(
        self,
        config: DistractionConfig,
        simulation: Simulation,
        *,
        camera: Camera,
        clips: Sequence[UInt8Array] = (),
        reactive: ReactiveGrid | None = None,
        seed: int = 0,
        plain_geoms: bool = False,
    ) -> None:
        self.config = config
        self._model = simulation.model
        self._paint = Paint(self._model, plain_geoms=plain_geoms)
        self._clips = clips
        self.reactive = reactive
        self.video: VideoWalk | ClipsInOrder | None = None
        self.camera: CameraWalk | None = None
        self.color: ColorWalk | None = None
        self.palette: PaletteWalk | None = None
        self.corruption: CorruptionWalk | None = None
        if config.background is not None:
            self.video = _video_walk(config.background, clips)
        if config.camera is not None:
            self.camera = CameraWalk(config.camera.scale, dynamic=config.camera.dynamic)
            self._pose = CameraPose(simulation, camera)
        if config.color is not None:
            original = self._paint.colors()
            self.color = ColorWalk(original, config.color.scale, dynamic=config.color.dynamic)
        if config.palette is not None:
            self.palette = PaletteWalk(load_table(config.palette))
            names = [self._model.id2name(i, "material") for i in range(self._model.nmat)]
            self._agent = [index for index, name in enumerate(names) if name == AGENT_MATERIAL]
        if config.corruption is not None:
            self.corruption = CorruptionWalk(config.corruption)
        self._generators: dict[str, np.random.Generator] = {}
        self.seed(seed)

    def seed(self, seed: int, *, streams: Sequence[str] = _STREAMS) -> None:
        """Seed the generators again; the next reset starts their streams.

        Args:
            seed: Any non-negative number.
            streams: Which of ``"background"``, ``"camera"``, ``"color"``, ``"corruption"`` to seed.
        """
        for name in streams:
            self._generators[name] = np.random.default_rng(derive_seed(seed, "distraction", name))
        if "background" in streams and isinstance(self.video, ClipsInOrder):
            self.video.rewind()

    def labels(self) -> dict[str, npt.NDArray[np.float64]]:
        """Return the present distractions as vectors, for probes of a model's latents.

        Returns:
            For the distractions that exist: ``clip`` (index of the video) and ``frame``, both [1];
            ``camera`` [4]: radius, azimuth and polar angle relative to its target, and roll;
            ``color`` [3 M], the colours that change; ``grid`` [K], the bins of a grid that reacts;
            ``corruption`` [4], 1 for the kind that disturbs the camera, in the order of
            :data:`~w2f_torchrl.envs.scenery.distractions.CORRUPTIONS`.
        """
        found: dict[str, npt.NDArray[np.float64]] = {}
        if self.video is not None:
            found["clip"] = np.array([self.video.clip], dtype=np.float64)
            found["frame"] = np.array([self.video.frame], dtype=np.float64)
        if self.camera is not None:
            found["camera"] = np.array([*self.camera.sphere, self.camera.roll], dtype=np.float64)
        if self.color is not None:
            found["color"] = self.color.colors.ravel().copy()
        if self.reactive is not None:
            found["grid"] = self.reactive.labels()
        if self.corruption is not None:
            found["corruption"] = (
                np.array([self.corruption.kind == kind for kind in CORRUPTIONS]) * 1.0
            )
        return found

    def reset(self) -> None:
        """Start an episode with a new clip, camera position and colours."""
        if self.video is not None:
            self.video.start(self._generators["background"])
        if self.camera is not None:
            box = camera_box(self._pose.start(), self.camera.scale)
            self.camera.start(box, self._generators["camera"])
        if self.color is not None:
            self.color.start(self._generators["color"])
        if self.palette is not None:
            self.palette.start(self._generators["color"])
        if self.corruption is not None:
            self.corruption.start(self._generators["corruption"])
        if self.reactive is not None:
            self.reactive.start()

    def step(self) -> None:
        """Advance each distraction by one step."""
        if self.video is not None:
            self.video.step()
        if self.camera is not None:
            self.camera.step(self._generators["camera"])
        if self.color is not None:
            self.color.step(self._generators["color"])
        if self.corruption is not None:
            self.corruption.step(self._generators["corruption"])

    def react(self, action: npt.ArrayLike, reward: float) -> None:
        """Show the agent step that was made, if the scenery reacts.

        Args:
            action: [A], in [-1, 1].
            reward: Mean reward of its control steps.
        """
        if self.reactive is not None:
            self.reactive.step(action, reward)

    @property
    def frame(self) -> UInt8Array:
        """The background's present frame, uint8 [S, S, 3]."""
        if self.reactive is not None:
            return self.reactive.frame
        assert self.video is not None, "only called with a background"
        clip = self._clips[self.video.clip]
        frame: UInt8Array = clip[self.video.frame % len(clip)]
        return frame

    @property
    def frame_key(self) -> tuple[object, ...]:
        """What tells the present frame from other frames of this env."""
        if self.reactive is not None:
            return self.reactive.key
        assert self.video is not None, "only called with a background"
        return self.video.clip, self.video.frame

    @property
    def replaceable(self) -> bool:
        """Whether the same episode can be shown in front of another background."""
        return self.reactive is not None or (self.video is not None and self.video.num_clips > 1)

    @contextlib.contextmanager
    def other_split(self) -> Iterator[None]:
        """Show the other split's colours of scenery that reacts; a video does not change."""
        grid = self.reactive
        if grid is None:
            yield
            return
        saved = grid.split
        grid.split = "train" if saved == "val" else "val"
        try:
            yield
        finally:
            grid.split = saved

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Change camera and colours of the simulation, then restore them."""
        if self.camera is not None:
            self._pose.apply(self.camera)
        with self._paint.restored():
            if self.color is not None:
                self._paint.apply(self.color.colors)
            if self.palette is not None:
                self._model.mat_rgba[self._agent, :3] = self.palette.palette.agent
            try:
                yield
            finally:
                if self.camera is not None:
                    self._pose.restore()

    def state_dict(self) -> dict[str, Any]:
        """Return everything besides the simulation that the next images depend on."""
        state: dict[str, Any] = {
            "generators": {
                name: generator.bit_generator.state for name, generator in self._generators.items()
            }
        }
        for name, walk in self._walks().items():
            state[name] = walk.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of :meth:`state_dict`, in a simulation in the same state.

        Raises:
            ValueError: If the state belongs to other distractions.
        """
        walks = self._walks()
        if set(state) != {"generators", *walks}:
            raise ValueError(
                f"the state is of {sorted(set(state) - {'generators'})}, but the distractions are "
                f"{sorted(walks)}."
            )
        for name, values in state["generators"].items():
            self._generators[name].bit_generator.state = values
        for name, walk in walks.items():
            walk.load_state_dict(state[name])

    def _walks(self) -> dict[str, Any]:
        walks: dict[str, Any] = {"video": self.video, "camera": self.camera, "color": self.color}
        walks |= {
            "reactive": self.reactive,
            "palette": self.palette,
            "corruption": self.corruption,
        }
        if self.camera is not None:
            walks["pose"] = self._pose
        return {name: walk for name, walk in walks.items() if walk is not None}


def _video_walk(config: BackgroundConfig, clips: Sequence[UInt8Array]) -> VideoWalk | ClipsInOrder:
    if config.playback == "in_order":
        return ClipsInOrder(len(clips), dynamic=config.dynamic)
    lengths = [len(clip) for clip in clips]
    return VideoWalk(lengths, dynamic=config.dynamic, playback=config.playback)

"""Make the renderer of a simulation, and what distracts from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from w2f_torchrl.envs.renderers.distracted_rendering import frame_size, make_distracted_renderer
from w2f_torchrl.envs.renderers.drawing import validate_distraction
from w2f_torchrl.envs.renderers.rendering import Drawing, Renderer, SceneRenderer
from w2f_torchrl.envs.scenery.backgrounds import LazyClips, load_clips, select_clips
from w2f_torchrl.envs.scenery.distractions import Distraction, DistractionConfig
from w2f_torchrl.envs.scenery.distractor import Distractor
from w2f_torchrl.envs.scenery.reactive import ReactiveGrid
from w2f_torchrl.envs.simulation import Simulation


@dataclass(frozen=True)
class Distractions:
    """The distractions of an env.

    Attributes:
        config: Which.
        source: ``background_source``.
        split: ``background_split``.
    """

    config: DistractionConfig
    source: str | None = None
    split: str = "train"

    @classmethod
    def parse(cls, distraction: Distraction, source: str | None, split: str) -> Distractions | None:
        """Return an env's distractions, None for none.

        Args:
            distraction: As the user gave it.
            source: ``background_source``.
            split: ``background_split``.

        Raises:
            ValueError: As :func:`~w2f_torchrl.envs.validate_distraction`.
        """
        config = validate_distraction(distraction, source, split)
        return None if config is None else cls(config, source, split)


def make_renderer(
    simulation: Simulation,
    drawing: Drawing,
    distractions: Distractions | None,
    *,
    seed: int | None = None,
    action_size: int | None = None,
) -> tuple[Renderer, Distractor | None]:
    """Make the renderer of an env, and its distractions.

    Args:
        simulation: The simulation.
        drawing: How to render it.
        distractions: What distracts, None for nothing.
        seed: Of the distractions; None draws one.
        action_size: Action dimensions; None for as many as there are actuators.

    Raises:
        ValueError: As :func:`make_distractor`; or if the rule of the foreground names no body.
    """
    if distractions is None:
        return SceneRenderer(simulation, drawing), None
    distractor = make_distractor(
        simulation, drawing, distractions, seed=seed, action_size=action_size
    )
    return make_distracted_renderer(simulation, distractor, drawing), distractor


def make_distractor(
    simulation: Simulation,
    drawing: Drawing,
    distractions: Distractions,
    *,
    seed: int | None = None,
    action_size: int | None = None,
) -> Distractor:
    """Make the distractions of an env, and decode their videos unless the cache has them.

    Args:
        simulation: The simulation.
        drawing: How the env is rendered.
        distractions: What distracts.
        seed: The env's seed; None draws one.
        action_size: Action dimensions; None for as many as there are actuators.

    Raises:
        ValueError: If a video cannot be read, the camera cannot wander, the scenery reacts to more
            action dimensions than there are, or a palette is meant for a model that is not of the
            Control Suite.
    """
    config, split = distractions.config, distractions.split
    if config.palette is not None and drawing.domain is None:
        raise ValueError(
            "distraction.palette colours the sky, floor and agent of the Control Suite's models, "
            "and this model is another: leave it out."
        )
    clips: Sequence[npt.NDArray[np.uint8]] = []
    reactive, size = None, drawing.image_size
    if config.scenery is not None:
        size = frame_size(simulation, config, drawing)
    if config.background is not None:
        count = config.background.num_videos
        if config.background.playback == "in_order":
            clips = LazyClips(select_clips(distractions.source, split, count), size)
        else:
            clips = load_clips(distractions.source, split, count, size)
    if config.reactive is not None:
        actions = int(simulation.model.nu) if action_size is None else action_size
        reactive = ReactiveGrid(config.reactive, action_size=actions, size=size, split=split)
    if seed is None:
        seed = int(np.random.SeedSequence().generate_state(1)[0])
    return Distractor(
        config,
        simulation,
        camera=drawing.camera,
        clips=clips,
        reactive=reactive,
        seed=seed,
        plain_geoms=drawing.domain is None,
    )

"""How an env is drawn, as its settings say; imports neither torch nor a simulator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from w2f_torchrl.envs.scenery.backgrounds import SPLITS, select_clips, validate_split
from w2f_torchrl.envs.scenery.distractions import Distraction, DistractionConfig, parse_distraction

RenderMode = Literal["fast", "reference"]
RENDER_MODES: tuple[str, ...] = get_args(RenderMode)


@dataclass(frozen=True)
class ForegroundRule:
    """What is foreground, where the default is not what a task is about.

    Attributes:
        include: Names or patterns of names (``*``, ``?``, ``[abc]``; case matters) of what is
            foreground: bodies, together with everything that is attached to them; geoms; sites.
        exclude: The same of what is background. The nearest name counts: the object's, then its
            body's, then that of the body to which this one is attached, and so on up to ``world``.
            A name that matches both is excluded.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


DEFAULT_RULE = ForegroundRule()


def validate_distraction(
    distraction: Distraction, background_source: str | None, background_split: str
) -> DistractionConfig | None:
    """Check the distractions, and that enough videos exist. No video is decoded.

    Args:
        distraction: See :func:`~w2f_torchrl.envs.scenery.distractions.parse_distraction`.
        background_source: Source of the videos; None for the procedural ones.
        background_split: ``"train"``, ``"val"`` or, for videos, ``"all"``.

    Returns:
        The distractions, None for none.

    Raises:
        ValueError: If a setting is not allowed; names it, its value and what is allowed.
    """
    validate_split(background_split)
    config = parse_distraction(distraction)
    if config is not None and config.reactive is not None and background_split not in SPLITS:
        raise ValueError(
            f"background_split is {background_split!r}: must be one of {', '.join(SPLITS)} for "
            "scenery that reacts."
        )
    if config is not None and config.background is not None:
        select_clips(background_source, background_split, config.background.num_videos)
    elif background_source is not None:
        raise ValueError(
            f"background_source is {background_source!r}: must be None, since "
            f"distraction={distraction!r} shows no video."
        )
    return config


def find_camera(domain: str, camera_id: int | str, cameras: Sequence[str]) -> int:
    """Return the index of a model's camera.

    Args:
        domain: The model's name, for the message.
        camera_id: Index or name, as the user gave it.
        cameras: Names of the model's cameras; empty for one without a name.

    Raises:
        ValueError: If the model does not have the camera; lists those that it has.
    """
    if isinstance(camera_id, str) and camera_id and camera_id in cameras:
        return cameras.index(camera_id)
    whole = isinstance(camera_id, int) and not isinstance(camera_id, bool)
    if whole and camera_id in range(len(cameras)):
        return int(camera_id)
    found = "only a free camera"
    if cameras:
        names = ", ".join(f"{index} {name}".strip() for index, name in enumerate(cameras))
        found = f"cameras 0 to {len(cameras) - 1} ({names})"
    raise ValueError(f"camera_id is {camera_id!r}: {domain} has {found}.")


def validate_further_cameras(cameras: Sequence[int], distraction: object) -> None:
    """Check the cameras that are drawn in addition to the env's own.

    Args:
        cameras: Their indices.
        distraction: The env's distractions; None without.

    Raises:
        ValueError: If there are distractions, which only the env's own camera shows, or one camera
            comes twice.
    """
    if cameras and distraction is not None:
        raise ValueError(
            f"further_cameras={list(cameras)} must be empty with distractions, which only the "
            "env's own camera shows."
        )
    if len(set(cameras)) < len(cameras):
        raise ValueError(f"further_cameras={list(cameras)} must be different cameras.")

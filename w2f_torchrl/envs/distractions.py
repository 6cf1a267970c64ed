"""What distracts in an environment: a background video, a moving camera, changing colours.

The Distracting Control Suite's difficulties are :data:`DIFFICULTIES`; a :class:`DistractionConfig`
says each distraction on its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

StepUnit = Literal["control", "agent"]
STEP_UNITS: tuple[str, ...] = get_args(StepUnit)
DIFFICULTIES: dict[str, tuple[float, int | None]] = {
    "easy": (0.1, 4),
    "medium": (0.2, 8),
    "hard": (0.3, None),
}
"""Scale of camera and colours, and number of videos (None: all of the split)."""
DISTRACTIONS = ("none", *DIFFICULTIES)

_GROUND_ALPHA = {"reacher": 0.0, "walker": 1.0, "cheetah": 1.0}
_OTHER_GROUND_ALPHA = 0.3


@dataclass(frozen=True)
class BackgroundConfig:
    """A video in the place of the sky.

    Attributes:
        num_videos: The first so many clips of the source's split; None for all.
        dynamic: Whether the video plays; otherwise an episode shows one random frame.
        ground_alpha: How opaque the floor is before the video, in [0, 1]; None for the domain's
            (1 for walker and cheetah, 0 for reacher, 0.3 for the others).
    """

    num_videos: int | None = 4
    dynamic: bool = True
    ground_alpha: float | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        number = self.num_videos
        if number is not None and (type(number) is not int or number < 1):
            raise ValueError(
                f"background.num_videos is {number!r}: must be an integer of at least 1, or None "
                "for all."
            )
        _check_flag("background.dynamic", self.dynamic)
        if self.ground_alpha is not None:
            _check_number("background.ground_alpha", self.ground_alpha, least=0.0)

    def alpha(self, domain: str) -> float:
        """The floor's opacity in a domain."""
        if self.ground_alpha is not None:
            return self.ground_alpha
        return _GROUND_ALPHA.get(domain, _OTHER_GROUND_ALPHA)


@dataclass(frozen=True)
class CameraConfig:
    """A camera that wanders; see :mod:`w2f_torchrl.envs.camera_walk`.

    Attributes:
        scale: Intensity in [0, 1].
        dynamic: Whether it moves after an episode's random start.
    """

    scale: float = 0.1
    dynamic: bool = True

    def __post_init__(self) -> None:
        """Check the values."""
        _check_number("camera.scale", self.scale, least=0.0)
        _check_flag("camera.dynamic", self.dynamic)


@dataclass(frozen=True)
class ColorConfig:
    """Materials that change their colour; see :class:`~w2f_torchrl.envs.walks.ColorWalk`.

    Attributes:
        scale: Intensity in [0, 1].
        dynamic: Whether they change after an episode's random start.
    """

    scale: float = 0.1
    dynamic: bool = True

    def __post_init__(self) -> None:
        """Check the values."""
        _check_number("color.scale", self.scale, least=0.0)
        _check_flag("color.dynamic", self.dynamic)


@dataclass(frozen=True)
class DistractionConfig:
    """Which distractions an environment has.

    Attributes:
        background: A video, or None.
        camera: A wandering camera, or None.
        color: Changing colours, or None.
        step_unit: Whether they change once per ``"control"`` step, as in the paper, where an action
            repeat makes them faster, or once per ``"agent"`` step.
    """

    background: BackgroundConfig | None = None
    camera: CameraConfig | None = None
    color: ColorConfig | None = None
    step_unit: StepUnit = "control"

    def __post_init__(self) -> None:
        """Check the values."""
        for name, kind in _PARTS.items():
            value = getattr(self, name)
            if not isinstance(value, kind | None):
                raise ValueError(f"{name} is {value!r}: must be a {kind.__name__} or None.")
        if self.step_unit not in STEP_UNITS:
            raise ValueError(
                f"step_unit is {self.step_unit!r}: must be one of {', '.join(STEP_UNITS)}."
            )

    @classmethod
    def of_difficulty(
        cls,
        difficulty: str,
        *,
        background: bool = True,
        camera: bool = True,
        color: bool = True,
        dynamic: bool = True,
    ) -> DistractionConfig:
        """The Distracting Control Suite's setting of a difficulty.

        Args:
            difficulty: ``"easy"``, ``"medium"`` or ``"hard"``.
            background: Whether it has the video.
            camera: Whether it has the camera.
            color: Whether it has the colours.
            dynamic: Whether they change within an episode.

        Raises:
            ValueError: If there is no such difficulty.
        """
        if difficulty not in DIFFICULTIES:
            raise ValueError(f"difficulty is {difficulty!r}: must be {', '.join(DIFFICULTIES)}.")
        scale, num_videos = DIFFICULTIES[difficulty]
        return cls(
            background=BackgroundConfig(num_videos, dynamic) if background else None,
            camera=CameraConfig(scale, dynamic) if camera else None,
            color=ColorConfig(scale, dynamic) if color else None,
        )


_PARTS: dict[str, type] = {
    "background": BackgroundConfig,
    "camera": CameraConfig,
    "color": ColorConfig,
}

Distraction = str | DistractionConfig | Mapping[str, Any]


def parse_distraction(value: Distraction) -> DistractionConfig | None:
    """Understand a ``distraction`` setting.

    Args:
        value: ``"none"``, ``"easy"``, ``"medium"``, ``"hard"``, a :class:`DistractionConfig`, or a
            mapping of its fields, as a YAML file has it: ``{camera: {scale: 0.2}}``.

    Returns:
        The distractions, or None for none.

    Raises:
        ValueError: If it is nothing of that; names the setting, its value and what is allowed.
    """
    if isinstance(value, DistractionConfig):
        config = value
    elif isinstance(value, Mapping):
        config = _from_mapping(value)
    elif isinstance(value, str) and value in DIFFICULTIES:
        config = DistractionConfig.of_difficulty(value)
    elif value == "none":
        return None
    else:
        raise ValueError(
            f"distraction is {value!r}: must be one of {', '.join(DISTRACTIONS)}, or a "
            "DistractionConfig."
        )
    nothing = config.background is None and config.camera is None and config.color is None
    return None if nothing else config


def shows_video(value: Distraction) -> bool:
    """Whether a ``distraction`` setting has a background video."""
    config = parse_distraction(value)
    return config is not None and config.background is not None


def _from_mapping(value: Mapping[str, Any]) -> DistractionConfig:
    settings = dict(value)
    _check_keys("distraction", settings, DistractionConfig)
    for name, kind in _PARTS.items():
        if isinstance(settings.get(name), Mapping):
            _check_keys(f"distraction.{name}", settings[name], kind)
            settings[name] = kind(**settings[name])
    return DistractionConfig(**settings)


def _check_keys(name: str, settings: Mapping[str, Any], kind: type) -> None:
    allowed = [field.name for field in fields(kind)]
    for key in settings:
        if key not in allowed:
            raise ValueError(f"{name}.{key} is unknown: must be one of {', '.join(allowed)}.")


def _check_number(name: str, value: object, *, least: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value <= 1.0:  # type: ignore[operator]
        raise ValueError(f"{name} is {value!r}: must be a number from {least:g} to 1.")


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}: must be true or false.")

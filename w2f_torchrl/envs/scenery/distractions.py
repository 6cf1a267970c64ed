"""The distractions of an environment: a video or a grid, colours, a camera that moves or fails.

:data:`DIFFICULTIES` has the Distracting Control Suite's difficulties, :data:`REACTIVE` the grids
that react to the agent; a :class:`DistractionConfig` sets each distraction separately.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from w2f_torchrl.envs.protocols.palette import PaletteConfig
from w2f_torchrl.utils.settings import check_fields, setting

Playback = Literal["pingpong", "loop", "in_order"]
Replaces = Literal["scenery", "floor", "sky"]
StepUnit = Literal["control", "agent"]
STEP_UNITS: tuple[str, ...] = get_args(StepUnit)
DIFFICULTIES: dict[str, tuple[float, int | None]] = {
    "easy": (0.1, 4),
    "medium": (0.2, 8),
    "hard": (0.3, None),
}
"""Scale of camera and colours, and number of videos (None: all of the split)."""
ReactiveFunction = Literal["action", "reward", "time", "action_time"]
REACTIVE_FUNCTIONS: tuple[str, ...] = get_args(ReactiveFunction)

_GROUND_ALPHA = {"reacher": 0.0, "walker": 1.0, "cheetah": 1.0}
_OTHER_GROUND_ALPHA = 0.3


@dataclass(frozen=True)
class BackgroundConfig:
    """A video in place of the sky."""

    num_videos: int | None = setting(
        4,
        "How many of the first clips of the source's split are used; null uses all.",
        unit="clips",
        minimum=1,
    )
    dynamic: bool = setting(
        True, "Whether the video plays; otherwise each episode shows one random frame."
    )
    ground_alpha: float | None = setting(
        None,
        "Opacity of the floor in front of the video; null uses the domain's (1 for walker and "
        "cheetah, 0 for reacher, 0.3 for the others).",
        unit="share",
        minimum=0,
        maximum=1,
    )

    playback: Playback = setting(
        "pingpong",
        "pingpong: from a random frame of a random clip, forwards or backwards, turning at its "
        "ends; loop: forwards from there, and from the start again; in_order: clip after clip, "
        "each episode from the next one's first frame.",
        choices=get_args(Playback),
    )
    replaces: Replaces = setting(
        "scenery",
        "What the video replaces. scenery: everything behind the agent but the floor, whose "
        "opacity is ground_alpha; floor: sky and floor; sky: only the sky. With the last two the "
        "video is fixed to the screen in both render modes.",
        choices=get_args(Replaces),
    )

    def __post_init__(self) -> None:
        """Check the values."""
        check_fields("background", self)
        if self.replaces != "scenery" and self.ground_alpha is not None:
            raise ValueError(
                f"background.ground_alpha={self.ground_alpha} must be null with "
                f"background.replaces={self.replaces}."
            )

    def alpha(self, domain: str | None) -> float:
        """Return the floor's opacity in a domain of the suite, or in another model (None)."""
        if self.replaces != "scenery":
            return 0.0 if self.replaces == "floor" else 1.0
        if self.ground_alpha is not None:
            return self.ground_alpha
        return _GROUND_ALPHA.get(domain or "", _OTHER_GROUND_ALPHA)


@dataclass(frozen=True)
class CameraConfig:
    """A wandering camera; see :mod:`w2f_torchrl.envs.scenery.camera_walk`."""

    scale: float = setting(0.1, "Intensity.", unit="share", minimum=0, maximum=1)
    dynamic: bool = setting(True, "Whether it moves after each episode's random start.")

    def __post_init__(self) -> None:
        """Check the values."""
        check_fields("camera", self)


@dataclass(frozen=True)
class ColorConfig:
    """Materials whose colour changes; see :class:`~w2f_torchrl.envs.scenery.walks.ColorWalk`."""

    scale: float = setting(0.1, "Intensity.", unit="share", minimum=0, maximum=1)
    dynamic: bool = setting(True, "Whether they change after each episode's random start.")

    def __post_init__(self) -> None:
        """Check the values."""
        check_fields("color", self)


@dataclass(frozen=True)
class ReactiveConfig:
    """A grid that reacts; see :class:`~w2f_torchrl.envs.scenery.reactive.ReactiveGrid`."""

    function: ReactiveFunction = setting(
        "action",
        "What the colours are a function of: the action that led to the picture, the reward that "
        "came with it, the time in the episode, or action and time together.",
        choices=REACTIVE_FUNCTIONS,
    )
    grid: int = setting(16, "Cells along each side of the picture.", unit="cells", minimum=1)
    action_bins: int = setting(
        3, "Equal bins into which [-1, 1] is divided in each action dimension.", unit="bins",
        minimum=1,
    )  # fmt: skip
    action_dimensions: int | None = setting(
        None, "How many of the first action dimensions are read; null reads all.", minimum=1
    )
    reward_bins: int = setting(
        256,
        "Equal bins into which the mean reward of a control step, in [0, 1], is divided.",
        unit="bins",
        minimum=1,
    )
    time_period: int = setting(
        1000, "Agent steps after which the pictures of the time repeat.", unit="agent steps",
        minimum=1,
    )  # fmt: skip
    ground_alpha: float = setting(
        0.0,
        "Opacity of the floor in front of the grid; with 0 the grid is everywhere but on the "
        "foreground.",
        unit="share",
        minimum=0,
        maximum=1,
    )
    seed: int = setting(
        0,
        "Seed of the colours, for all envs of a run. background_split=val shows other colours "
        "than train.",
        unit="seed",
        minimum=0,
    )

    def __post_init__(self) -> None:
        """Check the values."""
        check_fields("reactive", self)

    @property
    def reads_action(self) -> bool:
        """Whether the colours depend on the action."""
        return self.function in ("action", "action_time")

    @property
    def reads_time(self) -> bool:
        """Whether the colours depend on the time."""
        return self.function in ("time", "action_time")

    def alpha(self, domain: str | None) -> float:
        """Return the floor's opacity, the same in every domain."""
        del domain
        return self.ground_alpha


REACTIVE: dict[str, ReactiveConfig] = {
    "reactive_action": ReactiveConfig("action"),
    "reactive_reward": ReactiveConfig("reward"),
    "reactive_time": ReactiveConfig("time"),
    "reactive_action_time": ReactiveConfig(
        "action_time", action_bins=4, action_dimensions=1, time_period=625
    ),
}
"""Grids by name, with the bins of the original World2Filter research code; 2,500
pictures of action and time, as in Policy-Shaped Prediction."""
CORRUPTION = "corruption"
CORRUPTIONS = ("noise", "blur", "brightness", "occluder")
DISTRACTIONS = ("none", *DIFFICULTIES, *REACTIVE, CORRUPTION)


@dataclass(frozen=True)
class CorruptionConfig:
    """A camera that is disturbed at times; see :mod:`w2f_torchrl.envs.renderers.corruption`."""

    noise: float = setting(
        40.0,
        "Standard deviation of the noise; 0 leaves this kind out.",
        unit="colour levels",
        minimum=0,
        maximum=255,
    )
    blur: float = setting(
        0.04,
        "Standard deviation of the blur, as a share of the picture's side; 0 leaves this kind out.",
        unit="share",
        minimum=0,
        maximum=1,
    )
    brightness: float = setting(
        0.6,
        "Share by which the picture is darker or brighter; 0 leaves this kind out.",
        unit="share",
        minimum=0,
        maximum=1,
    )
    occluder: float = setting(
        0.4,
        "Side of an opaque square, as a share of the picture's side; 0 leaves this kind out. Masks "
        "do not mark what it covers.",
        unit="share",
        minimum=0,
        maximum=1,
    )
    start: float = setting(
        0.05,
        "Probability that a clear view is disturbed in a step, by one of the kinds.",
        unit="probability",
        above=0,
        maximum=1,
    )
    stop: float = setting(
        0.1,
        "Probability that a disturbed view clears in a step.",
        unit="probability",
        above=0,
        maximum=1,
    )

    def __post_init__(self) -> None:
        """Check the values."""
        check_fields("corruption", self)
        if not any(getattr(self, kind) for kind in CORRUPTIONS):
            raise ValueError(
                f"one of corruption.{', corruption.'.join(CORRUPTIONS)} must be above 0."
            )


@dataclass(frozen=True)
class DistractionConfig:
    """The distractions of an environment."""

    background: BackgroundConfig | None = setting(None, "A video, or null.")
    camera: CameraConfig | None = setting(None, "A wandering camera, or null.")
    color: ColorConfig | None = setting(None, "Changing colours, or null.")
    step_unit: StepUnit = setting(
        "control",
        "Whether distractions change once per control step, as in the paper, where an action "
        "repeat makes them faster, or once per agent step.",
        choices=STEP_UNITS,
    )
    reactive: ReactiveConfig | None = setting(
        None, "A grid that reacts to the agent, instead of a video, or null."
    )
    palette: PaletteConfig | None = setting(
        None, "Colours of sky, floor and agent from a table at each reset, or null."
    )
    corruption: CorruptionConfig | None = setting(
        None, "Noise, blur, brightness or an occluder in front of the camera at times, or null."
    )

    def __post_init__(self) -> None:
        """Check the values."""
        for name, kind in _PARTS.items():
            value = getattr(self, name)
            if not isinstance(value, kind | None):
                raise ValueError(f"{name}={value!r} must be a {kind.__name__} or null.")
        for one, other in _EXCLUSIVE:
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ValueError(
                    f"distraction.{one} and distraction.{other} change the same: set only one."
                )
        check_fields("distraction", self)

    @property
    def scenery(self) -> BackgroundConfig | ReactiveConfig | None:
        """What is shown behind the agent, None for the task's own sky."""
        return self.background or self.reactive

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
        """Make the Distracting Control Suite's settings for a difficulty.

        Args:
            difficulty: ``"easy"``, ``"medium"`` or ``"hard"``.
            background: Whether to include the video.
            camera: Whether to include the camera.
            color: Whether to include the colours.
            dynamic: Whether they change within an episode.

        Raises:
            ValueError: If the difficulty is unknown.
        """
        if difficulty not in DIFFICULTIES:
            raise ValueError(f"difficulty is {difficulty!r}: must be {', '.join(DIFFICULTIES)}.")
        scale, num_videos = DIFFICULTIES[difficulty]
        return cls(
            background=BackgroundConfig(num_videos, dynamic) if background else None,
            camera=CameraConfig(scale, dynamic) if camera else None,
            color=ColorConfig(scale, dynamic) if color else None,
        )


_EXCLUSIVE = (
    ("background", "reactive"),
    ("background", "palette"),
    ("reactive", "palette"),
    ("color", "palette"),
)
_PARTS: dict[str, type] = {
    "background": BackgroundConfig,
    "camera": CameraConfig,
    "color": ColorConfig,
    "reactive": ReactiveConfig,
    "palette": PaletteConfig,
    "corruption": CorruptionConfig,
}

Distraction = str | DistractionConfig | Mapping[str, Any]


def parse_distraction(value: Distraction) -> DistractionConfig | None:
    """Parse a ``distraction`` setting.

    Args:
        value: One of :data:`DISTRACTIONS`, such as ``"none"``, ``"easy"`` or
            ``"reactive_action"``; a :class:`DistractionConfig`; or a mapping of its fields, as in a
            YAML file: ``{camera: {scale: 0.2}}``.

    Returns:
        The distractions, or None for none.

    Raises:
        ValueError: If it is none of these; names the setting, its value and what is allowed.
    """
    if isinstance(value, DistractionConfig):
        config = value
    elif isinstance(value, Mapping):
        config = _from_mapping(value)
    elif isinstance(value, str) and value in DIFFICULTIES:
        config = DistractionConfig.of_difficulty(value)
    elif isinstance(value, str) and value in REACTIVE:
        config = DistractionConfig(reactive=REACTIVE[value])
    elif value == CORRUPTION:
        config = DistractionConfig(corruption=CorruptionConfig())
    elif value == "none":
        return None
    else:
        raise ValueError(
            f"distraction is {value!r}: must be one of {', '.join(DISTRACTIONS)}, or a "
            "DistractionConfig."
        )
    return config if any(getattr(config, name) is not None for name in _PARTS) else None


def shows_video(value: Distraction) -> bool:
    """Return whether a ``distraction`` setting has a background video."""
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

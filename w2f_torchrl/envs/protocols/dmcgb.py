"""DMControl-GB's four test sets, from a checkout's data folder or as built-in stand-ins.

The DMControl Generalization Benchmark (Hansen and Wang 2021, arXiv 2011.13389) trains without
distractions and tests with other colours (``color_easy``, ``color_hard``) and with videos in place
of the sky (``video_easy``) and of the floor too (``video_hard``).
"""

from __future__ import annotations

from pathlib import Path

from w2f_torchrl.envs.protocols.palette import PaletteConfig
from w2f_torchrl.envs.scenery.backgrounds import PROCEDURAL
from w2f_torchrl.envs.scenery.clip_cache import cache_directory
from w2f_torchrl.envs.scenery.distractions import BackgroundConfig, DistractionConfig

MODES = ("color_easy", "color_hard", "video_easy", "video_hard")
STAND_IN = "stand_in"
STAND_IN_SOURCE = f"{PROCEDURAL}:2011"
"""Procedural clips of a seed that no other name uses."""
REPOSITORY = "https://github.com/nicklashansen/dmcontrol-generalization-benchmark"


def data_folder(chosen: str | None) -> Path | None:
    """Return the folder with DMControl-GB's data, None without one.

    Args:
        chosen: ``environment.dmcgb_data``; None for ``dmcgb`` in the cache, if it exists.
    """
    if chosen is not None:
        return Path(chosen).expanduser()
    default = cache_directory() / "dmcgb"
    return default if default.is_dir() else None


def distraction_of(mode: str, data: Path | None) -> DistractionConfig:
    """Return the distraction of a test set.

    Args:
        mode: One of :data:`MODES`.
        data: DMControl-GB's data; None for the stand-ins.
    """
    kind, _, level = mode.partition("_")
    if kind == "video":
        background = BackgroundConfig(
            num_videos=None,
            playback="in_order",
            replaces="floor" if level == "hard" else "sky",
        )
        return DistractionConfig(background=background, step_unit="agent")
    file = None if data is None else str(data / f"{mode}.pt")
    return DistractionConfig(palette=PaletteConfig(level, file))  # type: ignore[arg-type]


def source_of(mode: str, data: Path | None) -> str | None:
    """Return the source of a test set's videos; None for the sets without."""
    if not mode.startswith("video"):
        return None
    return STAND_IN_SOURCE if data is None else str(data / mode)


def required_data(mode: str, chosen: str | None) -> Path:
    """Return the folder with DMControl-GB's data.

    Raises:
        ValueError: If it is missing, or lacks what the set needs; says how to get it.
    """
    folder = data_folder(chosen)
    needed = f"{mode}.pt" if mode.startswith("color") else mode
    if folder is not None and (folder / needed).exists():
        return folder
    where = "environment.dmcgb_data is null" if folder is None else f"{folder} has no {needed}"
    raise ValueError(
        f"dmcgb_{mode} needs DMControl-GB's data, but {where}. Clone {REPOSITORY} and set "
        "environment.dmcgb_data to its folder src/env/data; or use the built-in stand-ins of "
        f"dmcgb_{mode}_{STAND_IN}, whose scores are not comparable with published ones."
    )

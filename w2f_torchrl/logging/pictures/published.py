"""Published scores for the curves of runs that follow the protocol they were measured with.

The scores are in ``benchmarks/reference`` of a checkout. An installed package has none, and draws
none.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w2f_torchrl.envs.protocols.dmcgb import MODES
from w2f_torchrl.envs.scenery.distractions import (
    BackgroundConfig,
    DistractionConfig,
    parse_distraction,
)

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks" / "reference"
DREAMER_V3 = "dmc_vision_dreamerv3.csv"
NATURAL_VIDEO = "natural_video.csv"
DMCGB = "dmcgb.csv"

DRIVING_VIDEOS = ("kinetics400", "videos")
"""The end of the path of Kinetics' driving videos, as DreamerPro's program writes them."""
NATURAL = DistractionConfig(
    background=BackgroundConfig(num_videos=None, playback="loop", ground_alpha=0.0),
    step_unit="agent",
)
"""The distraction of DreamerPro's natural-background protocol."""
_REPEATS = {"cartpole": 8, "finger": 2}
_OTHER_REPEAT = 4
"""DMControl-GB's action repeats."""


@dataclass(frozen=True)
class Published:
    """A published curve, or a single score.

    Attributes:
        label: Name for the legend.
        metric: The run's metric that it is comparable with.
        frames: Environment frames, ascending.
        means: Mean return at these frames.
        deviations: Standard deviation over seeds; None if it was not published.
    """

    label: str
    metric: str
    frames: tuple[float, ...]
    means: tuple[float, ...]
    deviations: tuple[float, ...] | None = None


def published_scores(settings: Mapping[str, Any], folder: Path = FOLDER) -> list[Published]:
    """Return the published scores whose protocol a run follows.

    - DreamerV3's curves on DMC vision: 64 x 64 pixels, action repeat 2, no distraction; for the
      return of training episodes.
    - Natural video: the settings of ``experiment=natural_video``, with clips in a folder named
      ``kinetics400/videos``; for the evaluation set ``unseen``.
    - DMControl-GB: 64 x 64 pixels, the benchmark's action repeat, no distraction while training;
      for its evaluation sets, but not for their stand-ins.

    Args:
        settings: The run's settings as nested mappings, from its ``config.yaml``.
        folder: Folder with the tables.

    Returns:
        They may be none, as for a task that a table lacks.
    """
    environment = settings.get("environment", {})
    if environment.get("image_size") != 64 or not folder.is_dir():
        return []
    task = f"dmc_{environment.get('domain')}_{environment.get('task')}"
    repeat, distraction = environment.get("action_repeat"), environment.get("distraction")
    found: list[Published] = []
    if repeat == 2 and distraction == "none":
        found += _curve(folder / DREAMER_V3, task)
    if repeat == 2 and _is_natural_video(environment):
        found += _scores(folder / NATURAL_VIDEO, task, ("unseen",))
    usual = _REPEATS.get(str(environment.get("domain")), _OTHER_REPEAT)
    if repeat == usual and distraction == "none":
        found += _scores(folder / DMCGB, task, [f"dmcgb_{mode}" for mode in MODES])
    return found


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table; lines that begin with ``#`` are comments."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return list(csv.DictReader(lines))


def _is_natural_video(environment: Mapping[str, Any]) -> bool:
    source = environment.get("background_source")
    if source is None or Path(source).parts[-2:] != DRIVING_VIDEOS:
        return False
    if environment.get("background_split") != "train":
        return False
    try:
        return parse_distraction(environment.get("distraction", "none")) == NATURAL
    except ValueError:  # of another version
        return False


def _curve(path: Path, task: str) -> list[Published]:
    rows = [row for row in read_table(path) if row["task"] == task]
    rows.sort(key=lambda row: float(row["env_steps"]))
    if not rows:
        return []
    frames, means, deviations = (
        tuple(float(row[name]) for row in rows) for name in ("env_steps", "mean", "sd_over_seeds")
    )
    label = f"DreamerV3, published (mean ± sd over {rows[0]['n_seeds']} seeds)"
    return [Published(label, "episode/return", frames, means, deviations)]


def _scores(path: Path, task: str, sets: Any) -> Iterator[Published]:
    for row in read_table(path):
        if row["task"] == task and row["set"] in sets:
            frames = float(row["env_steps"])
            label = f"{row['method']}, published, at {frames / 1e6:g}M frames"
            metric = f"eval/{row['set']}/return_mean"
            yield Published(label, metric, (frames,), (float(row["mean"]),))

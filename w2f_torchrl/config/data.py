"""Settings of runs that train on recorded episodes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from w2f_torchrl.envs.recorded import DOMAIN as RECORDED
from w2f_torchrl.envs.tasks import validate_action_range
from w2f_torchrl.utils.checks import check_choice as check_choice
from w2f_torchrl.utils.settings import Settings, setting

FORMATS = ("auto", "npz", "vd4rl", "lerobot", "videos")
FROM_DATA = "data"
"""Value of ``data.action_range``."""
ACTIONS = ("auto", "led_to", "taken_at")


@dataclass
class DataConfig(Settings):
    """Recorded episodes to train on, in place of an environment."""

    path: str | None = setting(
        None,
        "Folder of recorded episodes, which fill the replay instead of workers that step an "
        "environment; null collects. With environment=recorded none exists at all; any other "
        "environment is only played in evaluations.",
    )
    format: str = setting(
        "auto",
        "npz: files of DreamerV2, DreamerV3, V-D4RL or sota_configs/record.py; vd4rl: V-D4RL's "
        "hdf5 shards, or the folder of TorchRL's VD4RLExperienceReplay; lerobot: a LeRobot "
        "dataset; videos: videos with a file of actions; or auto, by what the folder holds.",
        choices=FORMATS,
    )
    actions: str = setting(
        "auto",
        "Which action a row holds with its observation: led_to, the one that led to it, as in "
        "files of DreamerV2, V-D4RL and record.py; taken_at, the one that was taken there and "
        "leads to the next, as in DreamerV3's replay and in LeRobot; or auto, by the format.",
        choices=ACTIONS,
    )
    action_range: Any = setting(
        None,
        "[LOWEST, HIGHEST] recorded action, scaled to the policy's [-1, 1]; data takes the lowest "
        "and highest of each number of an action in the data; null expects actions within [-1, 1].",
    )
    choices: int | None = setting(
        None,
        "Number of choices of a discrete action, recorded as its index or one-hot; null for "
        "continuous actions.",
        unit="number",
        minimum=2,
    )
    camera: str | None = setting(
        None, "Name of the images, if a dataset has those of several cameras; null with only one."
    )
    holdout: float = setting(
        0.1,
        "Share of the episodes that are not trained on but evaluated, evenly spread, at least one; "
        "0 trains on all of them and evaluates on the first.",
        unit="share",
        minimum=0,
        below=1,
    )

    def validate(self, domain: str) -> None:
        """Check the settings together; the data are opened later.

        Args:
            domain: ``environment.domain``.

        Raises:
            ValueError: Naming the setting, its value and what is allowed.
        """
        if self.path is None:
            if domain == RECORDED:
                raise ValueError(
                    f"environment.domain={RECORDED} trains on recorded episodes: set data.path to "
                    "their folder."
                )
            for field in fields(self):
                value = getattr(self, field.name)
                if value != field.default:
                    raise ValueError(
                        f"data.{field.name}={value!r} has no effect without data.path: leave it "
                        "out."
                    )
        elif not Path(self.path).exists():
            raise ValueError(f"data.path={self.path} does not exist.")
        if self.action_range is None:
            return
        if self.choices is not None:
            raise ValueError(
                f"data.action_range={self.action_range} must be null with data.choices="
                f"{self.choices}: discrete actions have no range."
            )
        if isinstance(self.action_range, str):
            check_choice("data.action_range", self.action_range, (FROM_DATA,))
        else:
            validate_action_range(self.action_range, "data.action_range")

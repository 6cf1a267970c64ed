"""Settings of what a run evaluates, saves and logs."""

from __future__ import annotations

from dataclasses import dataclass

from w2f_torchrl.utils.checks import check_choice as check_choice
from w2f_torchrl.utils.settings import Settings, setting

EVALUATION_ACTIONS = ("mode", "sample")
WANDB_MODES = ("auto", "online", "offline")


@dataclass
class EvaluationConfig(Settings):
    """Episodes in a separate env."""

    every_frames: int = setting(
        10_000,
        "Frames between two evaluations; 0 disables them. Otherwise the run also ends with one.",
        unit="frames",
        minimum=0,
    )
    episodes: int = setting(2, "Episodes per evaluation.", unit="episodes", minimum=1)
    action: str = setting(
        "mode",
        "mode: the most likely action, which is the mean of continuous ones; or sample: drawn from "
        "the policy, as during collection and in the reference.",
        choices=EVALUATION_ACTIONS,
    )
    video: bool = setting(True, "Write videos of the first episode of each evaluation.")
    sets: list[str] = setting(
        [],
        "Further evaluations by name, such as clean or unseen_videos_easy, each of `episodes` "
        "episodes; w2f_torchrl.envs.evaluation_sets() lists them.",
    )
    filtering: bool = setting(
        False,
        "Measure at each evaluation what the latents contain of scenery and agent (leakage, "
        "content, change with another background). Requires scikit-learn (the extra "
        "``analysis``).",
    )
    filtering_episodes: int = setting(
        24,
        "Episodes of random actions for these measures, recorded once.",
        unit="episodes",
        minimum=8,
    )
    max_control_steps: int | None = setting(
        None,
        "Control steps after which an episode is truncated; null uses the environment's limit, or "
        "1,000 if it has none.",
        unit="control steps",
        minimum=1,
    )
    max_failures: int = setting(
        3,
        "The run ends with a checkpoint after this many failures in a row of one kind: "
        "evaluations, their videos, images and histograms, or the measures of filtering. Each "
        "failure is written to exceptions.txt.",
        unit="failures",
        minimum=1,
    )


@dataclass
class CheckpointConfig(Settings):
    """When checkpoints are written; the run always ends with one."""

    every_updates: int = setting(
        2_000, "Updates between two checkpoints.", unit="updates", minimum=1
    )
    keep: int = setting(
        3, "How many of the newest checkpoints are kept.", unit="checkpoints", minimum=1
    )


@dataclass
class LoggingConfig(Settings):
    """What is logged, and where; metrics.jsonl is always written."""

    every_updates: int = setting(
        50, "Updates averaged per line of training metrics.", unit="updates", minimum=1
    )
    histograms_every_updates: int = setting(
        1_000,
        "Updates between two rows of statistics of weights, gradients and latents; 0 disables "
        "them.",
        unit="updates",
        minimum=0,
    )
    images_every_updates: int = setting(
        1_000,
        "Updates between two images of a training batch, its masks and reconstruction; 0 disables "
        "them.",
        unit="updates",
        minimum=0,
    )
    videos_every_frames: int = setting(
        0,
        "Minimum environment frames between video evaluations; 0 records a video at every "
        "evaluation.",
        unit="frames",
        minimum=0,
    )
    imagination_windows: int = setting(
        3,
        "Windows of an evaluation episode shown in the videos of the imagination; 0 disables them.",
        unit="windows",
        minimum=0,
    )
    report: bool = setting(
        True, "Write report.html, a page about the whole run, when the run ends."
    )
    csv: bool = setting(
        False, "Also write csv/scalars/<group>/<name>.csv, with rows of frames and value."
    )
    tensorboard: bool = setting(
        False, "Also write TensorBoard files to tensorboard/ in the run directory."
    )
    use_wandb: bool = setting(False, "Also log to Weights & Biases.")
    wandb_project: str = setting("w2f_torchrl", "Project at Weights & Biases.")
    wandb_entity: str | None = setting(
        None, "User or team at Weights & Biases; null uses the account's default."
    )
    wandb_mode: str = setting(
        "auto",
        "online, offline, or auto: the value of WANDB_MODE if set; otherwise online if a key is "
        "configured (wandb login, WANDB_API_KEY), and offline if not.",
        choices=WANDB_MODES,
    )

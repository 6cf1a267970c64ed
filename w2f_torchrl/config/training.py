"""Settings of training: optimizer, batches, ranks, workers, replay, recorded data."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from w2f_torchrl.envs import BackgroundError
from w2f_torchrl.envs.recorded import DOMAIN as RECORDED
from w2f_torchrl.envs.scenery.backgrounds import list_clips
from w2f_torchrl.envs.tasks import validate_action_range
from w2f_torchrl.utils.checks import check_choice as check_choice
from w2f_torchrl.utils.settings import Settings, check_fields, setting

FORMATS = ("auto", "npz", "vd4rl", "lerobot", "videos")
FROM_DATA = "data"
"""Value of ``data.action_range``."""
ACTIONS = ("auto", "led_to", "taken_at")
STORAGES = ("memory", "disk")
PRECISIONS = ("auto", "float32", "bfloat16")
ON_NAN = ("stop", "skip")
EXECUTIONS = ("eager", "compile", "compile_all", "cuda_graph", "cuda_graph_parallel", "auto")
GRAPHED = ("cuda_graph", "cuda_graph_parallel")
COLLECTION_DEVICES = ("cpu", "learner")
GRADIENTS = ("auto", "ddp", "flat")
LONGEST_TIMEOUT = 1_000_000_000
"""Seconds; the process group's clock fails with an unreadable error above its own limit."""


@dataclass
class OptimizerConfig(Settings):
    """LaProp with adaptive gradient clipping, as in the paper."""

    lr: float = setting(4e-5, "Learning rate after the warm-up.", unit="rate", above=0)
    actor_lr: float | None = setting(
        None,
        "Learning rate of the actor after the warm-up; null: lr, as in the paper.",
        unit="rate",
        above=0,
    )
    critic_lr: float | None = setting(
        None,
        "Learning rate of the critic after the warm-up; null: lr, as in the paper.",
        unit="rate",
        above=0,
    )
    warmup_updates: int = setting(
        1000,
        "Updates over which the learning rate rises linearly from 0.",
        unit="updates",
        minimum=0,
    )
    agc: float = setting(
        0.3,
        "Maximum norm of a gradient, as a share of its parameter's norm; 0 disables clipping.",
        unit="share",
        minimum=0,
    )
    beta1: float = setting(
        0.9, "Decay rate of the momentum of the scaled gradients.", unit="rate", minimum=0, below=1
    )
    beta2: float = setting(
        0.999, "Decay rate of the mean of the squared gradients.", unit="rate", minimum=0, below=1
    )
    eps: float = setting(
        1e-20, "Added to the denominator for numerical stability.", unit="number", minimum=0
    )
    precision: str = setting(
        "auto",
        "float32; bfloat16 (autocast; parameters and optimizer stay in float32); or auto: bfloat16 "
        "on CUDA, as in the reference, and float32 on a CPU.",
        choices=PRECISIONS,
    )

    def validate(self) -> None:
        """Raise ``ValueError`` naming the first setting out of range."""
        check_fields("optimizer", self)


@dataclass
class TrainingConfig(Settings):
    """Length of the run and amount of data per update."""

    total_frames: int = setting(
        1_000_000,
        "Environment frames (control steps) of the whole run, over all ranks.",
        unit="frames",
        minimum=1,
    )
    batch_size: int = setting(
        16, "B, sequences per update on each rank.", unit="sequences", minimum=1
    )
    batch_length: int = setting(64, "T, records per sequence.", unit="records", minimum=2)
    train_ratio: float = setting(
        512.0,
        "Replayed records per agent step, both counted over all ranks. There are "
        "train_ratio / (B x T x ranks) updates per agent step.",
        unit="records",
        minimum=0,
    )
    prefill_steps: int | None = setting(
        None,
        "Agent steps collected before the first update, over all ranks; null collects B x T per "
        "rank, and at least one sequence per env.",
        unit="agent steps",
    )
    on_nan: str = setting(
        "stop",
        "If gradients are not finite: stop before the weights are changed and save the batch and "
        "the state, or skip the update.",
        choices=ON_NAN,
    )
    execution: str = setting(
        "auto",
        "eager (no compilation); compile (recurrence, imagination and, on a GPU, encoders and "
        "decoders, each separately); compile_all (losses and time loop as one graph, slow "
        "to compile); cuda_graph (compile, with the whole update replayed as one graph; CUDA "
        "only); cuda_graph_parallel (as cuda_graph, with the background's latent computed in "
        "parallel with the foreground's; algo.latent=split only); or auto: eager on a CPU; on "
        "CUDA the first of cuda_graph_parallel (split only), cuda_graph, compile and eager that "
        "works and whose first update equals eager's up to rounding.",
        choices=EXECUTIONS,
    )


@dataclass
class DistributedConfig(Settings):
    """Several processes that train together, started by torchrun or by submitit."""

    ranks: int = setting(
        1,
        "World size. Set from the launcher's environment; do not set it yourself.",
        unit="processes",
    )
    gradients: str = setting(
        "auto",
        "ddp: DistributedDataParallel averages gradients during the backward pass; flat: a single "
        "all-reduce of one buffer after it; auto: flat if the update may become a CUDA graph, "
        "otherwise ddp.",
        choices=GRADIENTS,
    )
    timeout_seconds: float = setting(
        1800.0,
        "How long a rank waits for another that is busy compiling, evaluating or writing. A rank "
        "that dies is noticed at once.",
        unit="seconds",
        above=0,
        maximum=LONGEST_TIMEOUT,
    )


@dataclass
class CollectionConfig(Settings):
    """How the environments are stepped."""

    num_workers: int | None = setting(
        None,
        "Worker processes on each rank; must divide environment.num_envs. 0 steps the envs in the "
        "trainer's process; null uses one per core, at most one per env.",
        unit="processes",
    )
    steps_per_batch: int = setting(
        16,
        "Agent steps of each env between two rounds of updates.",
        unit="agent steps",
        minimum=1,
    )
    device: str = setting(
        "cpu",
        "Where the workers run the policy: cpu, or learner for the learner's device. On CUDA each "
        "worker process then holds its own CUDA context.",
        choices=COLLECTION_DEVICES,
    )
    overlap: bool = setting(
        False,
        "Collect the next batch while the learner trains; the acting policy is then one batch "
        "older.",
    )
    timeout_seconds: float = setting(
        300.0,
        "Time after which a worker process that does not respond counts as lost, like one that "
        "has died.",
        unit="seconds",
        above=0,
    )
    max_restarts: int = setting(
        3,
        "How many times in a row lost workers are replaced, with new episodes; after that the run "
        "ends with a checkpoint. 0 ends it the first time.",
        unit="restarts",
        minimum=0,
    )


@dataclass
class ReplayConfig(Settings):
    """Where records are kept."""

    capacity: int = setting(
        500_000,
        "Records kept on each rank, over all its envs. A record takes 12.8 kB at 64 x 64 with "
        "masks, and with latents 2 bytes more per feature of a belief and 1 per categorical.",
        unit="records",
    )
    storage: str = setting(
        "memory", "memory, or disk: memory-mapped in the run directory.", choices=STORAGES
    )
    newest_first: bool = setting(
        True, "Sample each new sequence once as soon as it is complete, then uniformly."
    )
    latents: bool = setting(
        True,
        "Keep state and belief in the replay, as computed while acting and refreshed by each "
        "update, and start sequences from them. false starts sequences from zero.",
    )


@dataclass
class AugmentationConfig(Settings):
    """Changes of the replayed images; records keep what was observed."""

    scenery: float = setting(
        0.0,
        "Share of the sampled sequences whose scenery is replaced by a video: every pixel that the "
        "mask does not mark. Needs masks in training.",
        unit="share",
        minimum=0,
        maximum=1,
    )
    source: str | None = setting(
        None,
        "The videos, all training clips of a source in the form of environment.background_source; "
        "null: procedural.",
    )
    colors: bool = setting(
        True,
        "Whether these videos also change: the order of the colour channels, brightness, contrast, "
        "saturation, left and right.",
    )

    def validate(self, algorithm: str, *, has_masks: bool) -> None:
        """Check the settings together; the clips are decoded later.

        Args:
            algorithm: ``algo.name``.
            has_masks: Whether it learns from masks, and sees what they do not mark.

        Raises:
            ValueError: Naming the setting, its value and what is allowed.
        """
        if not self.scenery:
            for field in fields(self):
                value = getattr(self, field.name)
                if value != field.default:
                    raise ValueError(
                        f"augmentation.{field.name}={value} has no effect with "
                        "augmentation.scenery=0: leave it out."
                    )
            return
        if not has_masks:
            raise ValueError(
                f"augmentation.scenery={self.scenery} must be 0 with algo={algorithm}, which has "
                "no masks in training, or sees only what they mark; allowed: world2filter."
            )
        try:
            list_clips(self.source, "train")
        except BackgroundError as error:
            raise ValueError(f"augmentation.source={self.source}: {error}") from error


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

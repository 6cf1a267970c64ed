"""Every setting of a run with its type, unit, range and default, and their validation.

Torch, TorchRL and the simulator are not imported, so that a bad setting is reported before they
are. Only the check that this machine has the requested CUDA device needs torch; it comes last.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import warnings
from dataclasses import dataclass, field, fields, is_dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from w2f_torchrl.envs import evaluation_sets, validate_distraction, validate_task
from w2f_torchrl.envs.backgrounds import SPLITS
from w2f_torchrl.envs.distractions import Distraction, shows_video
from w2f_torchrl.envs.tasks import (
    MAX_IMAGE_SIZE,
    MIN_IMAGE_SIZE,
    RENDER_MODES,
    registered_factory,
    validate_action_range,
)
from w2f_torchrl.modules.config import LATENTS, ModelConfig
from w2f_torchrl.objectives.config import LossConfig
from w2f_torchrl.segmenters.sam3_requirements import missing_requirement
from w2f_torchrl.utils.checks import check_choice as check_choice
from w2f_torchrl.utils.files import atomic_path
from w2f_torchrl.utils.settings import Settings, check_fields, setting

if TYPE_CHECKING:
    import torch

ALGORITHMS = ("world2filter", "dreamer_v3")
SEGMENTATIONS = ("simulator", "sam3", "student", "median", "auto")
TEACHERS = ("simulator", "sam3")
STORAGES = ("memory", "disk")
PRECISIONS = ("auto", "float32", "bfloat16")
LOGGER_PACKAGES = {"use_wandb": ("wandb", "moviepy"), "tensorboard": ("tensorboard",)}
WANDB_MODES = ("auto", "online", "offline")
ON_NAN = ("stop", "skip")
EXECUTIONS = ("eager", "compile", "compile_all", "cuda_graph", "cuda_graph_parallel", "auto")
GRAPHED = ("cuda_graph", "cuda_graph_parallel")
COLLECTION_DEVICES = ("cpu", "learner")
GRADIENTS = ("auto", "ddp", "flat")
LONGEST_TIMEOUT = 1_000_000_000
"""Seconds; the process group's clock fails with an unreadable error above its own limit."""

_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,9})?")
_LONGEST_PATH = 3800
"""Bytes: the system's 4096, less the room for paths inside a run directory."""


class ConfigError(ValueError):
    """A setting is out of range; the message names it, its value and what is allowed."""


@dataclass
class EnvironmentConfig(Settings):
    """The task and how it is rendered."""

    domain: str = setting("walker", "Domain of the Control Suite, or one added by `register_env`.")
    task: str = setting("walk", "Task of the domain.")
    num_envs: int = setting(
        4, "Number of environments stepped together.", unit="environments", minimum=1
    )
    image_size: int = setting(
        64,
        "Side of the square image; a multiple of 16.",
        unit="pixels",
        minimum=MIN_IMAGE_SIZE,
        maximum=MAX_IMAGE_SIZE,
    )
    action_repeat: int = setting(
        2,
        "Control steps for which each action is held. ``frames`` count control steps.",
        unit="control steps",
        minimum=1,
    )
    camera_id: int | None = setting(
        None, "MuJoCo camera; null uses 2 for quadruped and 0 otherwise.", unit="index"
    )
    render: str = setting(
        "fast",
        "fast renders without multisampling, shadows and reflections; reference renders as "
        "dm_control does.",
        choices=RENDER_MODES,
    )
    distraction: Any = setting(
        "none",
        "none; easy, medium or hard, as in the Distracting Control Suite; or the fields of a "
        "DistractionConfig, for example {camera: {scale: 0.2}, step_unit: agent}.",
    )
    background_source: str | None = setting(
        None,
        "Background videos: a folder, davis, procedural or procedural:SEED. null uses procedural.",
    )
    background_split: str = setting(
        "train", "Which clips of the source to use: train or val.", choices=SPLITS
    )
    action_range: list[float] | None = setting(
        None,
        "Lowest and highest action of a registered env whose spec has no limits; the policy's "
        "[-1, 1] is scaled to it. null uses the spec's limits.",
        unit="action",
    )


@dataclass
class AlgoConfig(Settings):
    """The algorithm."""

    name: str = setting(
        "world2filter",
        "world2filter, or dreamer_v3: the same code with a single latent and no masks.",
        choices=ALGORITHMS,
        option="algo",
    )
    latent: str | None = setting(
        "split", "split, shared or foreground; null for dreamer_v3.", choices=LATENTS
    )


@dataclass
class SegmentationConfig(Settings):
    """The source of the training masks."""

    source: str = setting(
        "simulator",
        "simulator, sam3, student, median or auto. auto uses SAM3 if its package and weights are "
        "installed; otherwise the simulator's masks; otherwise a student, if there are labels or "
        "trained weights for it; otherwise the median.",
        choices=SEGMENTATIONS,
        option="segmentation",
    )
    chosen: str | None = setting(
        None, "The source that auto chose; written by the run and kept when it is resumed."
    )
    checkpoint: str | None = setting(
        None, "SAM3's weights, as source or as teacher; null downloads them from Hugging Face."
    )
    prompts: list[str] = setting(
        ["robot"], "Text prompts for SAM3; the masks of all prompts are united."
    )
    resolution: int | None = setting(
        None,
        "Side of the image that SAM3 receives, a multiple of 336; null uses the resolution of the "
        "weights.",
        unit="pixels",
    )
    score_threshold: float = setting(
        0.5, "Minimum score of a SAM3 detection.", unit="probability", minimum=0, maximum=1
    )
    batch_size: int = setting(
        32, "Maximum number of frames per SAM3 forward pass.", unit="frames", minimum=1
    )
    compile: bool = setting(False, "Compile SAM3's vision trunk.")
    vocabulary: str | None = setting(
        None, "Vocabulary file of SAM3's tokenizer; null uses the one in open_clip."
    )
    student_checkpoint: str | None = setting(
        None,
        "A trained student (student.pt of a run); null trains one when the run starts.",
    )
    labels: str | None = setting(
        None,
        "Labelled frames for the student: an .npz file with pixels and masks; null asks the "
        "teacher.",
    )
    backgrounds: str | None = setting(
        None,
        "Images onto which the student's foregrounds are pasted: an .npz file with pixels, or "
        "clips in the form of environment.background_source (a folder, davis, procedural:SEED).",
    )
    teacher: str = setting(
        "simulator", "The student's teacher: simulator or sam3.", choices=TEACHERS
    )
    teacher_frames: int = setting(
        2000,
        "Frames of a random policy, chosen for diversity, that the student is first trained on.",
        unit="frames",
        minimum=1,
    )
    teacher_every: int = setting(
        100,
        "During collection the teacher labels one frame out of this many; 0 disables it.",
        unit="frames",
        minimum=0,
    )
    train_steps: int = setting(
        700,
        "Gradient steps of the student when the run starts. A tenth as many follow after every 200 "
        "frames that the teacher labels.",
        unit="gradient steps",
        minimum=1,
    )
    threshold: int = setting(
        24,
        "Colour difference above which the median counts a pixel as foreground.",
        unit="colour levels",
        minimum=0,
        maximum=254,
    )
    mask_dropout: float = setting(
        0.0,
        "Share of frames whose simulator mask is emptied before it reaches the replay, to study "
        "imperfect masks. Evaluations use the true masks.",
        unit="share",
        minimum=0,
        below=1,
    )
    lost: float | None = setting(
        None,
        "Former name of mask_dropout, accepted until the next release.",
        unit="share",
        minimum=0,
        below=1,
    )

    def __post_init__(self) -> None:
        """Accept the former name of ``mask_dropout``; older configurations hold it."""
        if self.lost:
            warnings.warn(
                "segmentation.lost was renamed and will be removed: use "
                f"segmentation.mask_dropout={self.lost}.",
                FutureWarning,
                stacklevel=3,  # the caller of the generated __init__
            )
            if self.mask_dropout:
                return  # validation refuses two values
            self.mask_dropout = self.lost
        self.lost = None

    @property
    def needs_sam3(self) -> bool:
        """Whether SAM3 is used, as the source or as the student's teacher."""
        if self.source == "student":
            return self.teacher == "sam3"
        return self.source == "sam3"


@dataclass
class OptimizerConfig(Settings):
    """LaProp with adaptive gradient clipping, as in the paper."""

    lr: float = setting(4e-5, "Learning rate after the warm-up.", unit="rate", above=0)
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
        "eager; compile (the core's parts); compile_all (losses and time loop as one graph, slow "
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
        "How long a rank waits for another that is alive but compiles, evaluates or writes. A "
        "rank that dies is noticed at once.",
        unit="seconds",
        above=0,
        maximum=LONGEST_TIMEOUT,
    )


@dataclass
class CollectionConfig(Settings):
    """How the environments are stepped."""

    num_workers: int | None = setting(
        None,
        "Worker processes; 0 steps the envs in the trainer's process; null uses one per core, at "
        "most one per env.",
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
        "Time after which a worker process that does not respond counts as lost, as a dead one "
        "does.",
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
        "Records kept, over all envs. A record takes 12.8 kB at 64 x 64 with masks, and with "
        "latents 2 bytes more per feature of the beliefs.",
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
class EvaluationConfig(Settings):
    """Episodes with the mode action, in a separate env."""

    every_frames: int = setting(
        10_000,
        "Frames between two evaluations; 0 disables them. Otherwise the run also ends with one.",
        unit="frames",
        minimum=0,
    )
    episodes: int = setting(2, "Episodes per evaluation.", unit="episodes", minimum=1)
    video: bool = setting(True, "Write videos of the first episode of each evaluation.")
    sets: list[str] = setting(
        [],
        "Names of further evaluations, each with as many episodes: see envs.evaluation_sets.",
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
        "Evaluations, videos or probes that may fail in a row before the run ends. Each failure is "
        "written to exceptions.txt.",
        unit="evaluations",
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


@dataclass
class RunConfig(Settings):
    """Every setting of a run."""

    algo: AlgoConfig = field(default_factory=AlgoConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    segmentation: SegmentationConfig = field(default_factory=SegmentationConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    collection: CollectionConfig = field(default_factory=CollectionConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    seed: int = setting(0, "Seed from which all others are derived.", unit="seed", minimum=0)
    device: str = setting(
        "auto",
        "Where the model trains and acts: auto (cuda if available), cpu, cuda, cuda:1, ...",
    )
    run_dir: str = setting(
        "runs/latest",
        "Directory of the run: config.yaml, metrics.jsonl, checkpoints/, videos/, curves.png.",
    )
    resume: str | None = setting(
        None,
        "null starts a new run in an empty directory; auto resumes if there is a checkpoint; or "
        "the path of a checkpoint or run.",
    )

    @property
    def name(self) -> str:
        """Name of the run: ``{algo}_{domain}_{task}_{seed}``."""
        return f"{self.group}_{self.seed}"

    @property
    def group(self) -> str:
        """Name shared with the runs of other seeds: ``{algo}_{domain}_{task}``."""
        return f"{self.algo.name}_{self.environment.domain}_{self.environment.task}"

    @property
    def latent(self) -> str:
        """The world model's latent: ``whole`` for DreamerV3."""
        return self.algo.latent or "whole"

    @property
    def needs_masks(self) -> bool:
        """Whether training needs masks."""
        return self.latent != "whole"

    @property
    def prefill_steps(self) -> int:
        """Agent steps before the first update, over all ranks."""
        if self.training.prefill_steps is not None:
            return self.training.prefill_steps
        sequences = max(self.training.batch_size, self.environment.num_envs)
        return self.distributed.ranks * sequences * self.training.batch_length

    @property
    def effective_batch_size(self) -> int:
        """Sequences per update, over all ranks."""
        return self.distributed.ranks * self.training.batch_size

    @property
    def gradients(self) -> str:
        """How ranks share gradients: ``none`` (one rank), ``ddp`` or ``flat``."""
        if self.distributed.ranks == 1:
            return "none"
        if self.distributed.gradients == "auto":
            graphed = self.training.execution in GRAPHED
            graphed |= self.training.execution == "auto" and self.torch_device().type == "cuda"
            return "flat" if graphed else "ddp"
        return self.distributed.gradients

    def torch_device(self) -> torch.device:
        """Return the device, with ``auto`` resolved; several ranks get one GPU each."""
        import torch

        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda" and self.distributed.ranks > 1:
            # A launcher may show each rank all GPUs of its machine, or only its own.
            alone = torch.cuda.device_count() == 1
            return torch.device("cuda", 0 if alone else int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device(name)

    def validated(self, *, ranks: int = 1) -> RunConfig:
        """Return a validated, frozen copy for a run of so many processes.

        Raises:
            ConfigError: If a setting is out of range.
        """
        if self.frozen and self.distributed.ranks == ranks:
            return self
        config = self.thawed()
        config.distributed.ranks = ranks
        config.validate()
        return config.freeze()

    def with_masks_from(self, source: str) -> RunConfig:
        """Return settings that say which source ``segmentation=auto`` chose."""
        chosen = source if self.segmentation.source == "auto" else None
        return self.thawed(segmentation=self.segmentation.thawed(chosen=chosen)).freeze()

    def validate(self) -> None:
        """Check every setting before anything is built.

        Raises:
            ConfigError: Naming the setting, its value and what is allowed.
        """
        try:
            _validate(self)
        except ConfigError:
            raise
        except (ValueError, OSError) as error:  # OSError: an impossible path
            raise ConfigError(str(error)) from error


def _validate(config: RunConfig) -> None:
    check_fields("", config)
    for group in fields(config):
        if is_dataclass(getattr(config, group.name)):
            check_fields(group.name, getattr(config, group.name))
    if config.algo.name == "dreamer_v3":
        if config.algo.latent is not None:
            raise ConfigError(
                f"algo.latent={config.algo.latent!r} must be null with algo=dreamer_v3, which has "
                "one latent and no masks; for split, shared or foreground use algo=world2filter."
            )
    else:
        check_choice("algo.latent", config.algo.latent, LATENTS)
    _validate_environment(config.environment)
    _validate_distractions(config)
    _validate_segmentation(config)
    config.model.validate(config.environment.image_size)
    config.loss.validate()
    if (
        config.latent == "foreground"
        and config.loss.selective is not None
        and config.loss.foreground_target == "inside"
    ):
        raise ConfigError(
            f"loss.selective={config.loss.selective} drops colour errors outside the mask, and "
            "with algo.latent=foreground and loss.foreground_target=inside there are none: use "
            "loss.foreground_target=zero_outside, or leave it out."
        )
    _validate_training(config)
    _validate_device(config)
    _validate_distributed(config)
    _validate_run_dir(config.run_dir)


def _validate_run_dir(run_dir: str) -> None:
    if not run_dir.strip() or "\0" in run_dir:
        raise ConfigError(f"run_dir={run_dir!r} must name a directory.")
    path = Path(run_dir).absolute()
    parts = [os.fsencode(part) for part in path.parts]
    if sum(map(len, parts)) + len(parts) > _LONGEST_PATH or max(map(len, parts)) > 255:
        raise ConfigError(f"run_dir={run_dir[:60]}... is too long for a path: shorten it.")
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir():
        where = "is" if there == path else f"lies below {there}, which is"
        raise ConfigError(f"run_dir={run_dir} {where} a file: name a directory.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"run_dir={run_dir}: no permission to write to {there}.")


def _validate_segmentation(config: RunConfig) -> None:
    segmentation = config.segmentation
    if not config.needs_masks and segmentation.source != "simulator":
        raise ConfigError(
            f"segmentation={segmentation.source!r} has no effect with algo=dreamer_v3, which has "
            "no masks: leave it out."
        )
    if segmentation.lost is not None:  # set after construction, or in addition to the new name
        raise ConfigError(
            f"segmentation.lost={segmentation.lost} is the former name of "
            "segmentation.mask_dropout: set only the latter."
        )
    dropout, source = segmentation.mask_dropout, segmentation.source
    if dropout and not (config.needs_masks and source == "simulator"):
        raise ConfigError(
            f"segmentation.mask_dropout={dropout} empties masks of the simulator, but this run has "
            f"algo={config.algo.name} with segmentation={source}: leave it out."
        )
    if not segmentation.prompts or not all(map(str.strip, segmentation.prompts)):
        raise ConfigError(
            f"segmentation.prompts={list(segmentation.prompts)} must hold at least one text, for "
            "example segmentation.prompts=[robot]."
        )
    for name in ("student_checkpoint", "labels"):
        path = getattr(segmentation, name)
        if path is not None and not _is_file(path):
            raise ConfigError(f"segmentation.{name}={path} is not a file.")
    if segmentation.needs_sam3:
        missing = missing_requirement(
            segmentation.checkpoint, segmentation.vocabulary, download=True
        )
        if missing is not None:
            raise ConfigError(f"segmentation={segmentation.source}: {missing}")


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except OSError:  # the path is too long
        return False


def _validate_environment(environment: EnvironmentConfig) -> None:
    validate_task(environment.domain, environment.task)
    if environment.action_range is not None:
        validate_action_range(environment.action_range)


def _validate_distractions(config: RunConfig) -> None:
    environment = config.environment
    if registered_factory(environment.domain) and (
        environment.distraction != "none" or config.evaluation.sets
    ):
        raise ConfigError(
            f"environment.distraction={environment.distraction!r} must be none, and "
            f"evaluation.sets={config.evaluation.sets} empty, for the registered domain "
            f"{environment.domain!r}, whose factory renders its own images."
        )
    source, sets = environment.background_source, evaluation_sets()
    for name in config.evaluation.sets:
        check_choice("evaluation.sets", name, tuple(sets))
        wanted = sets[name].background_source(source)
        _validate_distraction(
            f"evaluation.sets={name}", sets[name].distraction, wanted, sets[name].split
        )
    # The videos may be meant for the evaluation only.
    wanted_by_sets = {sets[name].background_source(source) for name in config.evaluation.sets}
    if source in wanted_by_sets and not shows_video(environment.distraction):
        source = None
    _validate_distraction(
        f"environment.distraction={environment.distraction!r}",
        environment.distraction,
        source,
        environment.background_split,
    )


def _validate_distraction(
    setting: str, distraction: Distraction | None, source: str | None, split: str
) -> None:
    try:
        validate_distraction("none" if distraction is None else distraction, source, split)
    except ValueError as error:
        raise ConfigError(f"{setting}: {error}") from error


def _validate_training(config: RunConfig) -> None:
    training, envs = config.training, config.environment.num_envs
    minimum = config.distributed.ranks * envs * training.batch_length
    if config.prefill_steps < minimum:
        ranks = f"{config.distributed.ranks} ranks x " if config.distributed.ranks > 1 else ""
        raise ConfigError(
            f"training.prefill_steps={training.prefill_steps} must be at least {ranks}"
            f"environment.num_envs x training.batch_length = {minimum}, so "
            "that every env holds a sequence before the first update."
        )
    _validate_updates(config)
    if config.replay.capacity < envs * (training.batch_length + 1):
        raise ConfigError(
            f"replay.capacity={config.replay.capacity} must be at least environment.num_envs x "
            f"(training.batch_length + 1) = {envs * (training.batch_length + 1)}."
        )
    workers = config.collection.num_workers
    if workers is not None and (workers < 0 or (workers and envs % workers)):
        raise ConfigError(
            f"collection.num_workers={workers} must be 0 or divide environment.num_envs={envs}."
        )
    if config.collection.overlap and workers == 0:
        raise ConfigError(
            "collection.overlap=true needs worker processes, but collection.num_workers=0."
        )
    _validate_filtering(config)
    _validate_logging(config.logging)


def _validate_updates(config: RunConfig) -> None:
    """Check that a run with updates is long enough for the first one."""
    training = config.training
    if training.train_ratio == 0:
        return
    records = config.effective_batch_size * training.batch_length
    due = config.prefill_steps + math.ceil(records / Fraction(str(training.train_ratio)))
    repeat = config.environment.action_repeat
    batch = config.collection.steps_per_batch * config.environment.num_envs
    batch *= config.distributed.ranks * repeat
    collected = math.ceil(training.total_frames / batch) * batch
    if collected < due * repeat:
        raise ConfigError(
            f"training.total_frames={training.total_frames} ends the run before its first update, "
            f"which is due after {due * repeat} frames with training.prefill_steps="
            f"{config.prefill_steps}, training.train_ratio={training.train_ratio:g} and "
            f"environment.action_repeat={repeat}."
        )


def _validate_logging(settings: LoggingConfig) -> None:
    for name, packages in LOGGER_PACKAGES.items():
        missing = [p for p in packages if importlib.util.find_spec(p) is None]
        if getattr(settings, name) and missing:
            raise ConfigError(
                f"logging.{name}=true needs {' and '.join(missing)}, which is not installed: "
                f"pip install {' '.join(packages)}"
            )


def _validate_filtering(config: RunConfig) -> None:
    if not config.evaluation.filtering:
        return
    if registered_factory(config.environment.domain):
        raise ConfigError(
            "evaluation.filtering=true reads the agent's state from the Control Suite's simulator, "
            f"but environment.domain={config.environment.domain} is registered; allowed: false."
        )
    if importlib.util.find_spec("sklearn") is None:
        raise ConfigError(
            "evaluation.filtering=true needs scikit-learn: pip install 'w2f_torchrl[analysis]'."
        )


def _validate_device(config: RunConfig) -> None:
    name = config.device
    if not _DEVICE.fullmatch(name):
        raise ConfigError(f"device={name!r} is unknown; allowed: auto, cpu, cuda, cuda:N.")
    if name.startswith("cuda"):
        import torch

        count = torch.cuda.device_count()
        # Parsed here, since torch.device raises its own error for a large index.
        if int(name.partition(":")[2] or 0) >= count:
            raise ConfigError(f"device={name!r}: this machine has {count} CUDA devices.")
    execution = config.training.execution
    if execution == "cuda_graph_parallel" and config.latent != "split":
        raise ConfigError(
            f"training.execution={execution!r} needs two latents, algo.latent=split, but this run "
            f"has latent {config.latent!r}: use cuda_graph."
        )
    if execution in GRAPHED and config.torch_device().type != "cuda":
        raise ConfigError(
            f"training.execution={execution!r} needs device=cuda, got device={name!r}; on a CPU "
            "use eager or compile."
        )


def _validate_distributed(config: RunConfig) -> None:
    distributed = config.distributed
    if distributed.gradients == "ddp" and config.training.execution in GRAPHED:
        raise ConfigError(
            "distributed.gradients='ddp' hooks into the backward pass, which training.execution="
            f"{config.training.execution!r} replays without it; allowed there: auto, flat."
        )
    if distributed.ranks == 1 or config.torch_device().type == "cpu":
        return
    if config.device not in ("auto", "cuda"):
        raise ConfigError(
            f"device={config.device!r} is a single GPU for {distributed.ranks} ranks; allowed: "
            "auto, cuda, cpu."
        )
    import torch

    count, index = torch.cuda.device_count(), config.torch_device().index
    if index >= count:
        raise ConfigError(f"local rank {index} has no GPU: this machine has {count}.")


def to_run_config(config: DictConfig | dict[str, Any]) -> RunConfig:
    """Build a typed configuration from Hydra's, or from a run's config.yaml.

    Raises:
        ConfigError: Naming the key that is unknown or has a value of the wrong type.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), config)
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        first = str(error.msg or error).partition("\n")[
            0
        ]  # the rest is about OmegaConf's internals
        name = error.full_key or error.key or _setting_of_another_kind(config)
        raise ConfigError(f"{name}: {first}") from error


def _setting_of_another_kind(config: DictConfig | dict[str, Any]) -> str:
    """Return the setting that OmegaConf does not name, such as a mapping instead of a list."""
    for group, settings in config.items():
        for name, value in settings.items() if isinstance(settings, dict | DictConfig) else ():
            try:
                OmegaConf.merge(OmegaConf.structured(RunConfig), {group: {name: value}})
            except OmegaConfBaseException:
                return ".".join((str(group), str(name)))
    return "a setting"


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as plain nested dictionaries."""
    return OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[return-value]


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write the configuration as YAML; an existing file is replaced atomically."""
    with atomic_path(path) as temporary:
        OmegaConf.save(OmegaConf.structured(config), temporary)

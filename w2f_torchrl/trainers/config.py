"""Every setting of a run, typed, with its unit and default, and its validation.

Torch, TorchRL and the simulator are not imported: a bad setting is reported before they are. Only
the question whether this machine has the CUDA device that is asked for needs torch; it comes last.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import os
import re
from dataclasses import dataclass, field, fields, is_dataclass, replace
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
    registered_factory,
    validate_action_range,
)
from w2f_torchrl.modules.config import LATENTS, ModelConfig
from w2f_torchrl.objectives.config import LossConfig
from w2f_torchrl.segmenters.sam3_requirements import missing_requirement
from w2f_torchrl.utils.checks import check_fields, check_number
from w2f_torchrl.utils.files import atomic_path

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
"""Seconds; more than what the process group's clock can count would be a raw error."""

_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,9})?")
_LONGEST_PATH = 3800
"""Bytes: the system's 4096, less what is made below a run directory."""


class ConfigError(ValueError):
    """A setting is out of range; the message names it, its value and what is allowed."""


@dataclass
class EnvironmentConfig:
    """The task and how it is seen."""

    domain: str = "walker"
    """A domain of the Control Suite, or one that `register_env` added."""
    task: str = "walk"
    """One of the domain's tasks."""
    num_envs: int = 4
    """Environments that are stepped together."""
    image_size: int = 64
    """Side of the square picture, pixels; a multiple of 16."""
    action_repeat: int = 2
    """Control steps an action is held for; ``frames`` count control steps."""
    camera_id: int | None = None
    """MuJoCo camera; null: 2 for quadruped, 0 otherwise."""
    render: str = "fast"
    """fast (no multisampling, shadows, reflections) or reference (dm_control's own picture)."""
    distraction: Any = "none"
    """none, easy, medium, hard (the Distracting Control Suite's), or the fields of a
    DistractionConfig: {camera: {scale: 0.2}, step_unit: agent}."""
    background_source: str | None = None
    """Videos: a folder, davis, procedural or procedural:SEED; null: procedural."""
    background_split: str = "train"
    """train or val: which of the source's clips."""
    action_range: list[float] | None = None
    """Lowest and highest action of a registered env whose spec names no limits: the policy's
    [-1, 1] is scaled to it. null: the spec's own."""


@dataclass
class AlgoConfig:
    """Which algorithm."""

    name: str = "world2filter"
    """world2filter, or dreamer_v3: the same code with one latent and no masks."""
    latent: str | None = "split"
    """split, shared or foreground; null for dreamer_v3."""


@dataclass
class SegmentationConfig:
    """Where the training masks come from."""

    source: str = "simulator"
    """simulator, sam3, student, median, or auto: SAM3 if its package and weights are there, else
    the simulator's mask, else a student if there is something to learn from, else the median."""
    chosen: str | None = None
    """What auto chose; written by the run, kept by a resume."""
    checkpoint: str | None = None
    """SAM3's weights (as source or as teacher); null: from Hugging Face."""
    prompts: list[str] = field(default_factory=lambda: ["robot"])
    """What SAM3 looks for; the masks of all are united."""
    resolution: int | None = None
    """Side of the picture that SAM3 sees, pixels: a multiple of 336; null: the weights' own."""
    score_threshold: float = 0.5
    """Least score of a detection of SAM3, in [0, 1]."""
    batch_size: int = 32
    """Most frames of a forward pass of SAM3."""
    compile: bool = False
    """Compile SAM3's vision trunk."""
    vocabulary: str | None = None
    """Vocabulary of SAM3's tokenizer; null: open_clip's."""
    student_checkpoint: str | None = None
    """A student that is trained already (a run's student.pt); null: it learns at the start."""
    labels: str | None = None
    """A few labelled frames for the student: .npz with pixels and masks; null: asks the teacher."""
    backgrounds: str | None = None
    """Pictures that the student's foregrounds are pasted onto: .npz with pixels, or clips as
    environment.background_source names them (a folder, davis, procedural:SEED)."""
    teacher: str = "simulator"
    """simulator or sam3: whom the student learns from."""
    teacher_frames: int = 2000
    """Frames of a random policy, chosen for diversity, that the student starts from."""
    teacher_every: int = 100
    """During collection the teacher labels every so many-th frame; 0: none."""
    train_steps: int = 700
    """Gradient steps of the student at the start; a tenth after each 200 frames of the teacher."""
    threshold: int = 24
    """Colour difference that the median takes for foreground, in [0, 255)."""
    lost: float = 0.0
    """To study imperfect masks: share of the frames, in [0, 1), whose mask from the simulator is
    emptied on its way into the replay. Evaluations see the right ones."""

    @property
    def needs_sam3(self) -> bool:
        """Whether SAM3 is used, as the source or as the student's teacher."""
        if self.source == "student":
            return self.teacher == "sam3"
        return self.source == "sam3"


@dataclass
class OptimizerConfig:
    """LaProp with adaptive gradient clipping, as the paper has it."""

    lr: float = 4e-5
    """Learning rate after the warm-up."""
    warmup_updates: int = 1000
    """Updates over which the learning rate rises linearly from 0."""
    agc: float = 0.3
    """Largest norm of a gradient, as a share of its parameter's norm; 0: no clipping."""
    beta1: float = 0.9
    """Rate at which the momentum of the scaled gradients decays, in [0, 1)."""
    beta2: float = 0.999
    """Rate at which the mean of the squared gradients decays, in [0, 1)."""
    eps: float = 1e-20
    """A plain number added to the root of that mean; at least 0."""
    precision: str = "auto"
    """float32; bfloat16 (autocast; parameters and optimizer stay in float32); or auto: bfloat16 on
    CUDA, as the reference has it, float32 on a CPU."""

    def validate(self) -> None:
        """Raise ``ValueError`` naming the first setting out of range."""
        check_fields("optimizer", self)
        check_choice("optimizer.precision", self.precision, PRECISIONS)
        check_number("optimizer.lr", self.lr, above=0)
        for name in ("warmup_updates", "agc", "eps"):
            _at_least(f"optimizer.{name}", getattr(self, name), 0)
        for name in ("beta1", "beta2"):
            check_number(f"optimizer.{name}", getattr(self, name), minimum=0, below=1)


@dataclass
class TrainingConfig:
    """How long, and on how much data."""

    total_frames: int = 1_000_000
    """Environment frames (control steps) of the whole run, over all ranks."""
    batch_size: int = 16
    """B, sequences of an update, on each rank."""
    batch_length: int = 64
    """T, records of a sequence."""
    train_ratio: float = 512.0
    """Replayed records per agent step, both over all ranks; updates per agent step are this /
    (B x T x ranks)."""
    prefill_steps: int | None = None
    """Agent steps collected before the first update, over all ranks; null: B x T for each rank,
    and one sequence per env."""
    on_nan: str = "stop"
    """When gradients are not finite: stop before the weights are spoiled, with the batch and the
    state saved; or skip that update."""
    execution: str = "auto"
    """auto: eager on a CPU; on CUDA the first of cuda_graph_parallel (split only), cuda_graph,
    compile and eager that works and whose first update equals eager's up to rounding. Or by name:
    eager; compile (the core's pieces); compile_all (losses and time loop as one graph, slow to
    compile); cuda_graph (compile, and the whole update replayed as one graph; CUDA only);
    cuda_graph_parallel (in that graph the background's latent runs in parallel with the
    foreground's; algo.latent=split only)."""


@dataclass
class DistributedConfig:
    """Several processes that learn together: started by torchrun, or by submitit with tasks."""

    ranks: int = 1
    """Processes that there are; the run writes what the launcher says."""
    gradients: str = "auto"
    """ddp: DistributedDataParallel averages them during the backward pass; flat: one all-reduce of
    one buffer after it; auto: flat where the update may become a CUDA graph, else ddp."""
    timeout_seconds: float = 1800.0
    """Seconds that a rank waits for one that is alive and compiles, evaluates or writes; one that
    dies is noticed at once."""


@dataclass
class CollectionConfig:
    """How the environments are stepped."""

    num_workers: int | None = None
    """Worker processes; 0: in the trainer's own; null: one per core, at most one per env."""
    steps_per_batch: int = 16
    """Agent steps of each env between two rounds of updates."""
    device: str = "cpu"
    """Where the policy acts in the workers: cpu, or learner (the learner's device: on CUDA every
    worker process then has a context of its own)."""
    overlap: bool = False
    """Collect the next batch while the learner learns; the policy that acts is one batch older."""
    timeout_seconds: float = 300.0
    """Seconds after which a worker process that gives no sign counts as lost, as a dead one does;
    above 0."""
    max_restarts: int = 3
    """Number of times in a row that lost workers are replaced, their episodes beginning anew; then
    the run ends with a checkpoint. 0: at once."""


@dataclass
class ReplayConfig:
    """Where records are kept."""

    capacity: int = 500_000
    """Records kept, over all envs (12.8 kB each at 64 x 64 with masks, and 2 bytes per feature
    of the beliefs with latents)."""
    storage: str = "memory"
    """memory, or disk (memory-mapped below the run directory)."""
    newest_first: bool = True
    """Sample each new sequence once as soon as it is complete, then uniformly."""
    latents: bool = True
    """Keep state and belief in the replay, as acting and then each update computed them, and start
    sequences from them; false: sequences start from zero."""


@dataclass
class EvaluationConfig:
    """Episodes with the mode action, in an env of their own."""

    every_frames: int = 10_000
    """Frames between two evaluations, and one at the end; 0: never."""
    episodes: int = 2
    """Episodes of each evaluation."""
    video: bool = True
    """Write videos of each evaluation's first episode."""
    sets: list[str] = field(default_factory=list)
    """More evaluations by name, each with as many episodes: see envs.evaluation_sets."""
    filtering: bool = False
    """Measure at each evaluation what the latents hold of scenery and agent (leakage, content,
    change by another background); needs scikit-learn (the extra ``analysis``)."""
    filtering_episodes: int = 24
    """Episodes of random actions for these measures, recorded once."""
    max_control_steps: int | None = None
    """Control steps after which an episode is cut; null: what the environment names, 1,000 where it
    names nothing."""
    max_failures: int = 3
    """Number of evaluations, or of their videos or probes, that fail in a row before the run ends;
    each is written to exceptions.txt; at least 1."""


@dataclass
class CheckpointConfig:
    """When checkpoints are written; one is always written at the end."""

    every_updates: int = 2_000
    """Updates between two checkpoints."""
    keep: int = 3
    """Checkpoints that are kept, the newest ones."""


@dataclass
class LoggingConfig:
    """What is written where; metrics.jsonl is always written."""

    every_updates: int = 50
    """Updates that one line of training metrics averages over."""
    histograms_every_updates: int = 1_000
    """Updates between two rows of the spread of weights, gradients and latents; 0: none."""
    images_every_updates: int = 1_000
    """Updates between two pictures of a training batch, its masks and reconstruction; 0: none."""
    videos_every_frames: int = 0
    """Least environment frames between two evaluations that make videos; 0: every evaluation."""
    imagination_windows: int = 3
    """Windows of an evaluation episode in the videos of the imagination; 0: no such videos."""
    report: bool = True
    """Write report.html, the whole run on one page, at the end."""
    csv: bool = False
    """Also write csv/scalars/<group>/<name>.csv, rows of frames and value."""
    tensorboard: bool = False
    """Also write TensorBoard's files, to tensorboard/ in the run directory."""
    use_wandb: bool = False
    """Also log to Weights & Biases."""
    wandb_project: str = "w2f_torchrl"
    """The project there."""
    wandb_entity: str | None = None
    """The user or team there; null: the account's default."""
    wandb_mode: str = "auto"
    """online; offline; or auto: as WANDB_MODE says, else online if a key is configured (wandb
    login, WANDB_API_KEY), else offline."""


@dataclass
class RunConfig:
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
    seed: int = 0
    """The seed that all others are derived from; at least 0."""
    device: str = "auto"
    """Where the model learns and acts: auto (cuda if there is one), cpu, cuda, cuda:1, ..."""
    run_dir: str = "runs/latest"
    """Where the run writes: config.yaml, metrics.jsonl, checkpoints/, videos/, curves.png."""
    resume: str | None = None
    """null: a new run in an empty directory; auto: go on if there is a checkpoint; or a path."""

    @property
    def name(self) -> str:
        """What the run is called: ``{algo}_{domain}_{task}_{seed}``."""
        return f"{self.group}_{self.seed}"

    @property
    def group(self) -> str:
        """What it has in common with the runs of other seeds: ``{algo}_{domain}_{task}``."""
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
        most = max(self.training.batch_size, self.environment.num_envs)
        return self.distributed.ranks * most * self.training.batch_length

    @property
    def effective_batch_size(self) -> int:
        """Sequences of an update over all ranks."""
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
        """The device; ``auto`` resolved, and with several ranks to one GPU for each."""
        import torch

        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda" and self.distributed.ranks > 1:
            # A launcher may show each rank all GPUs of its machine, or its own alone.
            alone = torch.cuda.device_count() == 1
            return torch.device("cuda", 0 if alone else int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device(name)

    def validated(self, *, ranks: int = 1) -> RunConfig:
        """Return a validated copy for a run of so many processes.

        Raises:
            ConfigError: If a setting is out of range.
        """
        config = copy.deepcopy(self)
        config.distributed.ranks = ranks
        config.validate()
        return config

    def with_masks_from(self, source: str) -> RunConfig:
        """Return settings that say which source ``segmentation=auto`` chose."""
        chosen = source if self.segmentation.source == "auto" else None
        return replace(self, segmentation=replace(self.segmentation, chosen=chosen))

    def validate(self) -> None:
        """Check every setting before anything is built.

        Raises:
            ConfigError: Naming the setting, its value and what is allowed.
        """
        try:
            _validate(self)
        except ConfigError:
            raise
        except (ValueError, OSError) as error:  # OSError: a path that no file can have
            raise ConfigError(str(error)) from error


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Check a setting that is one of a few words.

    Args:
        name: Of the setting, for the message.
        value: What the user gave.
        allowed: The words.

    Raises:
        ConfigError: Naming the setting, its value and what is allowed.
    """
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is unknown; allowed: {', '.join(allowed)}.")


def _at_least(name: str, value: float, least: float) -> None:
    check_number(name, value, minimum=least)


def _validate(config: RunConfig) -> None:
    for group in fields(config):
        if is_dataclass(getattr(config, group.name)):
            check_fields(group.name, getattr(config, group.name))
    check_choice("algo", config.algo.name, ALGORITHMS)
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
    config.optimizer.validate()
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
        raise ConfigError(f"run_dir={run_dir}: there is no permission to write to {there}.")


def _validate_segmentation(config: RunConfig) -> None:
    segmentation = config.segmentation
    check_choice("segmentation", segmentation.source, SEGMENTATIONS)
    if not config.needs_masks and segmentation.source != "simulator":
        raise ConfigError(
            f"segmentation={segmentation.source!r} has no effect with algo=dreamer_v3, which has "
            "no masks: leave it out."
        )
    check_number("segmentation.lost", segmentation.lost, minimum=0, below=1)
    if segmentation.lost and not (config.needs_masks and segmentation.source == "simulator"):
        raise ConfigError(
            f"segmentation.lost={segmentation.lost} takes away masks of the simulator, and this is "
            f"algo={config.algo.name} with segmentation={segmentation.source}: leave it out."
        )
    check_choice("segmentation.teacher", segmentation.teacher, TEACHERS)
    for name in ("batch_size", "teacher_frames", "train_steps"):
        _at_least(f"segmentation.{name}", getattr(segmentation, name), 1)
    _at_least("segmentation.teacher_every", segmentation.teacher_every, 0)
    for name, most in (("score_threshold", 1), ("threshold", 254)):
        value = getattr(segmentation, name)
        check_number(f"segmentation.{name}", value, minimum=0, maximum=most)
    if not segmentation.prompts or not all(map(str.strip, segmentation.prompts)):
        raise ConfigError(
            f"segmentation.prompts={list(segmentation.prompts)} must be one text or more, "
            "segmentation.prompts=[robot] say."
        )
    for name in ("student_checkpoint", "labels"):
        path = getattr(segmentation, name)
        if path is not None and not _is_file(path):
            raise ConfigError(f"segmentation.{name}={path} is no file.")
    if segmentation.needs_sam3:
        missing = missing_requirement(
            segmentation.checkpoint, segmentation.vocabulary, download=True
        )
        if missing is not None:
            raise ConfigError(f"segmentation={segmentation.source}: {missing}")


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except OSError:  # too long to be one
        return False


def _validate_environment(environment: EnvironmentConfig) -> None:
    validate_task(environment.domain, environment.task)
    _at_least("environment.num_envs", environment.num_envs, 1)
    _at_least("environment.action_repeat", environment.action_repeat, 1)
    size, least, most = environment.image_size, MIN_IMAGE_SIZE, MAX_IMAGE_SIZE
    check_number("environment.image_size", size, minimum=least, maximum=most)
    if environment.action_range is not None:
        validate_action_range(environment.action_range)
    check_choice("environment.render", environment.render, ("fast", "reference"))
    check_choice("environment.background_split", environment.background_split, SPLITS)


def _validate_distractions(config: RunConfig) -> None:
    environment = config.environment
    if registered_factory(environment.domain) and (
        environment.distraction != "none" or config.evaluation.sets
    ):
        raise ConfigError(
            f"environment.distraction={environment.distraction!r} must be none, and "
            f"evaluation.sets={config.evaluation.sets} empty, for the registered domain "
            f"{environment.domain!r}, whose factory draws its own pictures."
        )
    source, sets = environment.background_source, evaluation_sets()
    for name in config.evaluation.sets:
        check_choice("evaluation.sets", name, tuple(sets))
        wanted = sets[name].background_source(source)
        _validate_distraction(
            f"evaluation.sets={name}", sets[name].distraction, wanted, sets[name].split
        )
    # The videos may be for the evaluation only.
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
    check_choice("training.execution", training.execution, EXECUTIONS)
    check_choice("training.on_nan", training.on_nan, ON_NAN)
    _at_least("training.total_frames", training.total_frames, 1)
    _at_least("training.batch_size", training.batch_size, 1)
    _at_least("training.batch_length", training.batch_length, 2)
    _at_least("training.train_ratio", training.train_ratio, 0)
    least = config.distributed.ranks * envs * training.batch_length
    if config.prefill_steps < least:
        ranks = f"{config.distributed.ranks} ranks x " if config.distributed.ranks > 1 else ""
        raise ConfigError(
            f"training.prefill_steps={training.prefill_steps} must be at least {ranks}"
            f"environment.num_envs x training.batch_length = {least}, so "
            "that every env holds a sequence before the first update."
        )
    _validate_updates(config)
    if config.replay.capacity < envs * (training.batch_length + 1):
        raise ConfigError(
            f"replay.capacity={config.replay.capacity} must be at least environment.num_envs x "
            f"(training.batch_length + 1) = {envs * (training.batch_length + 1)}."
        )
    check_choice("replay.storage", config.replay.storage, STORAGES)
    _at_least("collection.steps_per_batch", config.collection.steps_per_batch, 1)
    check_choice("collection.device", config.collection.device, COLLECTION_DEVICES)
    workers = config.collection.num_workers
    if workers is not None and (workers < 0 or (workers and envs % workers)):
        raise ConfigError(
            f"collection.num_workers={workers} must be 0 or divide environment.num_envs={envs}."
        )
    timeout = config.collection.timeout_seconds
    if not 0 < timeout < math.inf:
        raise ConfigError(f"collection.timeout_seconds={timeout} must be above 0, and finite.")
    _at_least("collection.max_restarts", config.collection.max_restarts, 0)
    if config.collection.overlap and workers == 0:
        raise ConfigError(
            "collection.overlap=true needs worker processes, and collection.num_workers=0 has none."
        )
    _at_least("evaluation.every_frames", config.evaluation.every_frames, 0)
    _at_least("evaluation.episodes", config.evaluation.episodes, 1)
    _at_least("evaluation.max_failures", config.evaluation.max_failures, 1)
    if config.evaluation.max_control_steps is not None:
        _at_least("evaluation.max_control_steps", config.evaluation.max_control_steps, 1)
    _validate_filtering(config)
    _at_least("checkpoint.every_updates", config.checkpoint.every_updates, 1)
    _at_least("checkpoint.keep", config.checkpoint.keep, 1)
    _validate_logging(config.logging)
    check_number("seed", config.seed, integer=True, minimum=0)


def _validate_updates(config: RunConfig) -> None:
    """A run that asks for updates must have the frames for one."""
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
    _at_least("logging.every_updates", settings.every_updates, 1)
    for name in ("histograms_every_updates", "images_every_updates", "videos_every_frames"):
        _at_least(f"logging.{name}", getattr(settings, name), 0)
    _at_least("logging.imagination_windows", settings.imagination_windows, 0)
    check_choice("logging.wandb_mode", settings.wandb_mode, WANDB_MODES)
    for name, packages in LOGGER_PACKAGES.items():
        missing = [p for p in packages if importlib.util.find_spec(p) is None]
        if getattr(settings, name) and missing:
            raise ConfigError(
                f"logging.{name}=true needs {' and '.join(missing)}, which is not installed: "
                f"pip install {' '.join(packages)}"
            )


def _validate_filtering(config: RunConfig) -> None:
    _at_least("evaluation.filtering_episodes", config.evaluation.filtering_episodes, 8)
    if not config.evaluation.filtering:
        return
    if registered_factory(config.environment.domain):
        raise ConfigError(
            "evaluation.filtering=true asks the Control Suite's simulator for the agent's state, "
            f"and environment.domain={config.environment.domain} is registered; allowed: false."
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
        # Not torch.device's index: a large one is an error to it.
        if int(name.partition(":")[2] or 0) >= count:
            raise ConfigError(f"device={name!r}: this machine has {count} CUDA devices.")
    execution = config.training.execution
    if execution == "cuda_graph_parallel" and config.latent != "split":
        raise ConfigError(
            f"training.execution={execution!r} is for two latents, algo.latent=split, and this run "
            f"has latent {config.latent!r}: use cuda_graph."
        )
    if execution in GRAPHED and config.torch_device().type != "cuda":
        raise ConfigError(
            f"training.execution={execution!r} needs device=cuda, got device={name!r}; on a CPU "
            "use eager or compile."
        )


def _validate_distributed(config: RunConfig) -> None:
    distributed = config.distributed
    check_choice("distributed.gradients", distributed.gradients, GRADIENTS)
    timeout, longest = distributed.timeout_seconds, LONGEST_TIMEOUT
    check_number("distributed.timeout_seconds", timeout, above=0)
    check_number("distributed.timeout_seconds", timeout, maximum=longest)
    if distributed.gradients == "ddp" and config.training.execution in GRAPHED:
        raise ConfigError(
            "distributed.gradients='ddp' hooks into the backward pass, which training.execution="
            f"{config.training.execution!r} replays without it; allowed there: auto, flat."
        )
    if distributed.ranks == 1 or config.torch_device().type == "cpu":
        return
    if config.device not in ("auto", "cuda"):
        raise ConfigError(
            f"device={config.device!r} is one GPU for {distributed.ranks} ranks; allowed: auto, "
            "cuda, cpu."
        )
    import torch

    count, index = torch.cuda.device_count(), config.torch_device().index
    if index >= count:
        raise ConfigError(f"local rank {index} has no GPU: this machine has {count}.")


def to_run_config(config: DictConfig | dict[str, Any]) -> RunConfig:
    """Make a typed configuration from Hydra's, or from a run's config.yaml.

    Raises:
        ConfigError: Naming the key that is unknown or has a value of another type.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), config)
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        first = str(error.msg or error).partition("\n")[0]  # the rest is OmegaConf's own affair
        name = error.full_key or error.key or _setting_of_another_kind(config)
        raise ConfigError(f"{name}: {first}") from error


def _setting_of_another_kind(config: DictConfig | dict[str, Any]) -> str:
    """The setting that OmegaConf doesn't name: a mapping in the place of a list, for example."""
    for group, settings in config.items():
        for name, value in settings.items() if isinstance(settings, dict | DictConfig) else ():
            try:
                OmegaConf.merge(OmegaConf.structured(RunConfig), {group: {name: value}})
            except OmegaConfBaseException:
                return ".".join((str(group), str(name)))
    return "a setting"


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain nested dictionaries."""
    return OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[return-value]


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write the configuration as YAML; what had the name before is replaced, not written to."""
    with atomic_path(path) as temporary:
        OmegaConf.save(OmegaConf.structured(config), temporary)

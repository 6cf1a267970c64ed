"""The checks of a run's settings that concern more than one of them, or the machine."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from dataclasses import fields, is_dataclass
from fractions import Fraction
from pathlib import Path

from w2f_torchrl.config.environment import EnvironmentConfig
from w2f_torchrl.config.groups import RunSettings
from w2f_torchrl.config.methods import METHODS
from w2f_torchrl.config.output import LoggingConfig
from w2f_torchrl.config.training import GRAPHED
from w2f_torchrl.envs import evaluation_sets, validate_distraction, validate_task
from w2f_torchrl.envs.scenery.distractions import Distraction, shows_video
from w2f_torchrl.envs.tasks import (
    registered_factory,
    takes_distractions,
    validate_action_range,
    validate_kwargs,
)
from w2f_torchrl.plugins import load_plugins
from w2f_torchrl.segmenters.sam3_requirements import missing_requirement
from w2f_torchrl.utils.checks import check_choice as check_choice
from w2f_torchrl.utils.settings import check_fields

LOGGER_PACKAGES = {"use_wandb": ("wandb", "moviepy"), "tensorboard": ("tensorboard",)}
ACTING_SOURCES = ("simulator", "student")
"""Sources of masks that are there, and fast enough, for every observation that is acted on."""
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,9})?")
_LONGEST_PATH = 3800
"""Bytes: the system's 4096, less the room for paths inside a run directory."""


class ConfigError(ValueError):
    """A setting is out of range; the message names it, its value and what is allowed."""


def validate(config: RunSettings) -> None:
    """Check every setting, then what follows from several of them, then the machine.

    Raises:
        ValueError: Naming the setting, its value and what is allowed.
    """
    load_plugins(config.plugins)
    check_fields("", config)
    for group in fields(config):
        if is_dataclass(getattr(config, group.name)):
            check_fields(group.name, getattr(config, group.name))
    config.algo.validate()
    _validate_environment(config.environment)
    config.data.validate(config.environment.domain)
    if config.data.path is not None:
        _validate_recorded(config)
    _validate_distractions(config)
    _validate_segmentation(config)
    config.augmentation.validate(
        config.algo.name, has_masks=config.needs_masks and not config.acts_on_masks
    )
    config.model.validate(config.environment.image_size)
    _validate_observations(config)
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


def _validate_segmentation(config: RunSettings) -> None:
    segmentation = config.segmentation
    if not config.needs_masks and segmentation.source != "simulator":
        raise ConfigError(
            f"segmentation={segmentation.source!r} has no effect with algo={config.algo.name}, "
            "which has no masks: leave it out."
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
    if config.acts_on_masks:
        check_choice(f"segmentation with algo={config.algo.name}", source, ACTING_SOURCES)
        if dropout:
            raise ConfigError(
                f"segmentation.mask_dropout={dropout} must be 0 with algo={config.algo.name}, "
                "which acts on masks: those that it acts on are never emptied."
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


def _validate_observations(config: RunSettings) -> None:
    """Check what is observed besides ``pixels`` against the algorithm and the masks."""
    model, source = config.model, config.segmentation.source
    if not model.observes_more:
        return
    if config.algo.name in METHODS and config.algo.name != "dreamer_v3":
        raise ConfigError(
            f"model.pictures={model.pictures} and model.vectors={model.vectors} must be empty with "
            f"algo={config.algo.name}, which reads pixels only; allowed: world2filter, dreamer_v3."
        )
    if model.pictures and config.needs_masks and source != "simulator":
        raise ConfigError(
            f"model.pictures={model.pictures} needs masks of the env, but segmentation={source} "
            "makes those of `pixels` only; allowed: simulator."
        )
    if model.encoder != "convolutional":
        raise ConfigError(
            f"model.encoder={model.encoder} chooses itself what it reads: leave model.pictures and "
            "model.vectors empty, or use model.encoder=convolutional."
        )


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except OSError:  # the path is too long
        return False


def _validate_environment(environment: EnvironmentConfig) -> None:
    validate_task(environment.domain, environment.task)
    validate_kwargs(environment.domain, environment.kwargs)
    if environment.action_range is not None:
        validate_action_range(environment.action_range)
    if environment.camera_name is not None and environment.camera_id is not None:
        raise ConfigError(
            f"environment.camera_name={environment.camera_name!r} and environment.camera_id="
            f"{environment.camera_id} both choose a camera: set only one."
        )
    for name in ("foreground_include", "foreground_exclude"):
        patterns = getattr(environment, name)
        if patterns and not takes_distractions(environment.domain):
            raise ConfigError(
                f"environment.{name}={list(patterns)} must be empty for the domain "
                f"{environment.domain!r}, whose factory makes its own masks."
            )


def _validate_recorded(config: RunSettings) -> None:
    if config.collection.overlap:
        raise ConfigError("collection.overlap=true must be false with data.path: nothing acts.")
    if config.model.observes_more:
        raise ConfigError(
            f"model.pictures={config.model.pictures} and model.vectors={config.model.vectors} must "
            "be empty with data.path: recorded episodes are read with one picture, and no vectors."
        )


def _validate_distractions(config: RunSettings) -> None:
    environment = config.environment
    if not takes_distractions(environment.domain) and (
        environment.distraction != "none" or config.evaluation.sets
    ):
        raise ConfigError(
            f"environment.distraction={environment.distraction!r} must be none, and "
            f"evaluation.sets={config.evaluation.sets} empty, for the domain "
            f"{environment.domain!r}, whose factory renders its own images."
        )
    source, sets = environment.background_source, evaluation_sets()
    wanted_by_sets = set()
    for name in config.evaluation.sets:
        check_choice("evaluation.sets", name, tuple(sets))
        try:
            chosen = sets[name].resolved(environment.distraction, environment.dmcgb_data)
        except ValueError as error:
            raise ConfigError(f"evaluation.sets={name}: {error}") from error
        wanted = chosen.background_source(source)
        _validate_distraction(f"evaluation.sets={name}", chosen.distraction, wanted, chosen.split)
        wanted_by_sets.add(wanted)
    # The videos may be meant for the evaluation only.
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


def _validate_training(config: RunSettings) -> None:
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


def _validate_updates(config: RunSettings) -> None:
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


def _validate_filtering(config: RunSettings) -> None:
    if not config.evaluation.filtering:
        return
    if registered_factory(config.environment.domain) and config.has_environment:
        raise ConfigError(
            "evaluation.filtering=true reads the agent's state from the Control Suite's simulator, "
            f"but environment.domain={config.environment.domain} has another; allowed: false."
        )
    if importlib.util.find_spec("sklearn") is None:
        raise ConfigError(
            "evaluation.filtering=true needs scikit-learn: pip install 'w2f_torchrl[analysis]'."
        )


def _validate_device(config: RunSettings) -> None:
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


def _validate_distributed(config: RunSettings) -> None:
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

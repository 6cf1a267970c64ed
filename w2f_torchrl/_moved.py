"""Modules that have moved: their former names still import, for one release, with a warning."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import InspectLoader, Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType

MOVED = {
    "data.collection": "data.collector.make",
    "data.latent_files": "data.replay.latent_files",
    "data.latents": "data.replay.latents",
    "data.mask_store": "masks.store",
    "data.masks": "masks.packing",
    "data.overlap": "data.collector.overlap",
    "data.record_files": "data.replay.record_files",
    "data.replay_files": "data.replay.replay_files",
    "data.resumable": "data.collector.resumable",
    "data.sampler": "data.replay.sampler",
    "data.streams": "data.replay.streams",
    "data.workers": "data.collector.workers",
    "data.write_back": "data.replay.write_back",
    "envs.backgrounds": "envs.scenery.backgrounds",
    "envs.camera_walk": "envs.scenery.camera_walk",
    "envs.clip_cache": "envs.scenery.clip_cache",
    "envs.clip_files": "envs.scenery.clip_files",
    "envs.davis": "envs.scenery.davis",
    "envs.distracted_rendering": "envs.renderers.distracted_rendering",
    "envs.distractions": "envs.scenery.distractions",
    "envs.distractor": "envs.scenery.distractor",
    "envs.foreground": "envs.renderers.foreground",
    "envs.procedural": "envs.scenery.procedural",
    "envs.rendering": "envs.renderers.rendering",
    "envs.scene": "envs.renderers.scene",
    "envs.walks": "envs.scenery.walks",
    "learner.algorithm": "algorithms.base algorithms.build",
    "modules.config": "config.model config.presets",
    "modules.convolution": "kernels.convolution modules.image_decoder modules.networks",
    "modules.layers": "kernels.dense modules.networks",
    "modules.reference_decoder": "modules.image_decoder",
    "modules.scan": "kernels.scan kernels.scan_step",
    "modules.two_hot": "kernels.categoricals",
    "objectives.config": "config.loss",
    "trainers.auto_execution": "learner.auto_execution",
    "trainers.checkpoint_writer": "checkpoint.writer",
    "trainers.checkpointing": "checkpoint",
    "trainers.config": "config",
    "trainers.device_copy": "data.device_copy",
    "trainers.diagnostics": "logging.diagnostics",
    "trainers.distributed": "utils.ranks",
    "trainers.environments": "data.environments",
    "trainers.evaluator": "evaluation.evaluator evaluation.policy",
    "trainers.execution": "learner.execution",
    "trainers.export": "evaluation.export",
    "trainers.filtering": "evaluation.run_filtering",
    "trainers.finite": "learner.non_finite_guard",
    "trainers.gradients": "learner.gradients",
    "trainers.graphed_update": "learner.graphed_update",
    "trainers.imagination": "evaluation.imagination",
    "trainers.learner": "learner.learner",
    "trainers.mask_source": "masks.sources",
    "trainers.older_checkpoints": "checkpoint.older",
    "trainers.optimizer": "learner.optimizer",
    "trainers.resume_settings": "checkpoint.rules",
    "trainers.run_evaluations": "evaluation.run_evaluations",
    "trainers.run_lock": "checkpoint.lock",
    "trainers.segmentation": "masks.choose masks.labels masks.prepare",
    "utils.background_worker": "logging.background_worker",
    "utils.contact_sheet": "logging.pictures.contact_sheet",
    "utils.environment": "logging.environment",
    "utils.file_loggers": "logging.file_loggers",
    "utils.film": "logging.pictures.film",
    "utils.leftovers": "data.collector.leftovers",
    "utils.logging": "logging.metrics",
    "utils.metric_names": "logging.metric_names",
    "utils.metrics_file": "logging.metrics_file",
    "utils.plotting": "logging.pictures.plotting",
    "utils.progress": "logging.progress",
    "utils.sinks": "logging.sinks",
    "utils.video": "logging.pictures.video",
    "utils.wandb_logging": "logging.wandb",
}
"""Former name to present names, all below ``w2f_torchrl``."""


class _Finder(MetaPathFinder, Loader):
    """Find a module by its former name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for a former name, None for any other."""
        package, _, name = fullname.partition(".")
        if package != "w2f_torchrl" or name not in MOVED:
            return None
        return ModuleSpec(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        """Give the former module what the present one has."""
        names = MOVED[module.__name__.partition(".")[2]].split()
        present = [f"w2f_torchrl.{name}" for name in names]
        warnings.warn(
            f"{module.__name__} has moved to {' and '.join(present)}; the former name will be "
            "removed in the next release.",
            FutureWarning,
            stacklevel=2,
        )
        for name in present:
            found = vars(importlib.import_module(name))
            module.__dict__.update({k: v for k, v in found.items() if not k.startswith("__")})

    def get_code(self, fullname: str) -> CodeType | None:
        """Return the present module's code, for ``python -m`` with the former name."""
        found = importlib.util.find_spec(f"w2f_torchrl.{MOVED[fullname.partition('.')[2]]}")
        assert found is not None
        assert isinstance(found.loader, InspectLoader)
        return found.loader.get_code(found.name)


def find_moved_modules() -> None:
    """Let former names be imported from now on."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())

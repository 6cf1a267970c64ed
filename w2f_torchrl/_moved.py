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
    "envs.backgrounds": "envs.scenery.backgrounds",
    "envs.davis": "envs.scenery.davis",
    "envs.distractions": "envs.scenery.distractions",
    "envs.evaluation_sets": "envs.scenery.evaluation_sets",
    "envs.procedural": "envs.scenery.procedural",
    "envs.rendering": "envs.renderers.rendering",
    "modules.config": "config.model config.presets",
    "objectives.config": "config.loss",
    "trainers.config": "config",
    "trainers.environments": "data.environments",
    "trainers.mask_source": "masks.sources",
    "trainers.segmentation": "masks.choose masks.labels masks.prepare",
    "trainers.checkpointing": "checkpoint",
    "trainers.learner": "learner.learner",
    "trainers.execution": "learner.execution",
    "trainers.evaluator": "evaluation.evaluator evaluation.policy",
    "trainers.distributed": "utils.ranks",
    "trainers.export": "evaluation.export",
    "trainers.resume_settings": "checkpoint.rules",
    "data.mask_store": "masks.store",
    "data.masks": "masks.packing",
    "data.collection": "data.collector.make",
    "data.resumable": "data.collector.resumable",
    "data.streams": "data.replay.streams",
    "data.latents": "data.replay.latents",
    "utils.logging": "logging.metrics",
    "utils.metrics_file": "logging.metrics_file",
    "utils.progress": "logging.progress",
    "utils.wandb_logging": "logging.wandb",
    "utils.video": "logging.pictures.video",
    "utils.plotting": "logging.pictures.plotting",
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

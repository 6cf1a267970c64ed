"""Train World2Filter or DreamerV3: ``python sota_configs/world2filter.py [overrides]``."""

from __future__ import annotations

import logging
import os
import sys

# Threads that spin at barriers starve the environments' workers on a small machine. OpenMP reads
# this only once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from w2f_torchrl.modules import PRESETS
from w2f_torchrl.trainers import ConfigError, RunConfig, to_run_config

# The typed settings and their defaults are in w2f_torchrl.config; the YAML groups in this
# folder only choose among them.
store = ConfigStore.instance()
node = OmegaConf.structured(RunConfig)
OmegaConf.set_struct(node.loss.extra, False)  # loss.extra.NAME= adds a weight
OmegaConf.set_struct(node.environment.kwargs, False)  # environment.kwargs.NAME= an argument
OmegaConf.set_struct(node.model.vectors, False)  # model.vectors.NAME=SIZE adds a vector
store.store(name="run_config", node=node)
for name, preset in PRESETS.items():
    store.store(group="model", name=name, node=preset)


def run_directory(config: DictConfig) -> str:
    """Return the run's directory; each run of a sweep gets one, unless the command line sets it."""
    job = HydraConfig.get()
    named = any(override.lstrip("+").startswith("run_dir=") for override in job.overrides.task)
    in_sweep = job.mode is RunMode.MULTIRUN and not named
    return str(job.runtime.output_dir if in_sweep else config.run_dir)


@hydra.main(version_base="1.3", config_path=".", config_name="config")
def main(config: DictConfig) -> None:
    """Check the settings, then train."""
    try:
        config.run_dir = run_directory(config)
        to_run_config(config).validate()  # before torch and the simulator, whose import takes long
    except ConfigError as error:
        sys.exit(f"error: {error}" if os.environ.get("RANK", "0") == "0" else 1)
    train(config)


def train(config: DictConfig) -> None:
    """Build every part of a run from settings that are checked, and train.

    To swap a part, replace its line; docs/howto has a page for each kind.
    """
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger(__name__).info("loading PyTorch and the simulator ...")
    from w2f_torchrl.checkpoint import CheckpointError
    from w2f_torchrl.trainers import Trainer
    from w2f_torchrl.trainers import run as parts
    from w2f_torchrl.utils.ranks import RankError, Ranks, lost_ranks_explained

    ranks = Ranks.from_environment()  # one, unless torchrun or submitit started several
    quiet = "torchrl" if ranks.is_first else None  # the other ranks only warn
    logging.getLogger(quiet).setLevel(logging.WARNING)
    try:
        with lost_ranks_explained(ranks), parts.open_run(to_run_config(config)) as run:
            scenery = parts.build_replaced_scenery(run.config)  # None without augmentation.scenery
            env = parts.probe_env(run.config)  # what the env offers: actions, masks
            masks = parts.choose_masks(run, env)  # the simulator's, SAM3's, a student's, a median's
            learner = parts.build_learner(run, env, masks)  # networks, losses, optimizer
            # Workers step the envs with the policy, or recorded episodes are read -> records ->
            # replay -> slices [B, T].
            collection = parts.build_collection(run, learner, env, masks)
            evaluator = parts.build_evaluator(run, learner, masks, env)
            progress = parts.build_progress(run, learner)  # counters, metrics, pictures
            checkpoints = parts.build_checkpoints(
                run, env=env, learner=learner, masks=masks, collection=collection, progress=progress
            )
            made = parts.Parts(
                learner, masks, collection, evaluator, progress, checkpoints, scenery
            )
            Trainer(run, made).train()
    except (ConfigError, CheckpointError, ModuleNotFoundError, RankError) as error:
        sys.exit(f"error: {error}" if ranks.is_first or isinstance(error, RankError) else 1)
    except KeyboardInterrupt:  # before the first update, or a second Ctrl+C; already logged
        sys.exit(130)


if __name__ == "__main__":
    main()

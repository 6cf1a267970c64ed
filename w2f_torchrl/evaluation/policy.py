"""Policies loaded from a checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.data import Unbounded
from torchrl.envs import TensorDictPrimer, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type

from w2f_torchrl.algorithms.masked_input import act_on_saved_student
from w2f_torchrl.checkpoint.file import (
    CheckpointError,
    load_checkpoint,
    malformed_is_an_error,
)
from w2f_torchrl.checkpoint.older import complete_model
from w2f_torchrl.config import EvaluationConfig, RunConfig, to_run_config
from w2f_torchrl.data.environments import build_env
from w2f_torchrl.envs import evaluation_sets
from w2f_torchrl.keys import MASK
from w2f_torchrl.learner.learner import Learner
from w2f_torchrl.modules import latent_sizes
from w2f_torchrl.modules.components import encoder_keys
from w2f_torchrl.utils.settings import unregistered
from w2f_torchrl.utils.tensors import check_tensor

logger = logging.getLogger(__name__)


def exploration_type(settings: EvaluationConfig) -> ExplorationType:
    """Return how evaluations act: ``evaluation.action``."""
    samples = settings.action == "sample"
    return ExplorationType.RANDOM if samples else ExplorationType.MODE


class LoadedPolicy(TensorDictModuleBase):
    """A trained policy that plays in any TorchRL env with ``pixels`` and ``is_init``.

    It acts as in the run's evaluations (``evaluation.action``). The tensordict carries its state,
    belief and previous action: append :meth:`make_tensordict_primer` to your env, or call
    :meth:`make_env`.

    A policy of ``algo=masked_input`` (:attr:`acts_on_masks`) sees pixels x mask. If it learned with
    the simulator's masks, the env must have ``foreground_mask`` too; a student's come with it.
    """

    def __init__(self, config: RunConfig, learner: Learner, action_size: int):
        super().__init__()
        self.config = config
        self.policy = learner.policy
        self.world_model = learner.world_model
        self.action_size = action_size
        self.acts_on_masks = config.acts_on_masks
        read = encoder_keys(learner.world_model.encoder)
        observed = [key for key in read if key in self.policy.in_keys]
        self.in_keys = [*observed, "is_init", *latent_sizes(config.model, action_size)]
        self.out_keys = self.policy.out_keys

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write ``action`` ``[*B, A]`` and the entries carried to the next step.

        Raises:
            KeyError: If the tensordict has no latent, or lacks a mask that the policy acts on.
            TypeError: If the images are not uint8; their range is never guessed.
            ValueError: If their size differs from the training images.
        """
        if "belief" not in tensordict.keys():
            raise KeyError(
                "the tensordict has no `belief`: append policy.make_tensordict_primer() to the env."
            )
        if MASK in self.in_keys and MASK not in tensordict.keys():
            raise KeyError(
                f"the tensordict has no `{MASK}`, and this policy (algo={self.config.algo.name}) "
                "acts on pixels x mask: append a ForegroundMaskTransform to the env."
            )
        size = self.config.environment.image_size
        check_tensor("pixels", tensordict.get("pixels"), torch.uint8, ("...", 3, size, size))
        check_tensor("is_init", tensordict.get("is_init"), torch.bool, ("...", 1))
        with torch.no_grad(), set_exploration_type(exploration_type(self.config.evaluation)):
            return self.policy(tensordict)

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """Return the transform that adds the carried entries to an env, zero at a reset."""
        sizes = latent_sizes(self.config.model, self.action_size)
        return TensorDictPrimer({key: Unbounded((size,)) for key, size in sizes.items()})

    def make_env(self, seed: int = 0, evaluation_set: str | None = None) -> TransformedEnv:
        """Make the env that the policy was trained in.

        Args:
            seed: The env's seed.
            evaluation_set: Name of a set in
                :func:`~w2f_torchrl.envs.scenery.evaluation_sets`, whose distraction replaces the
                run's.

        Raises:
            ValueError: If the set does not exist.
        """
        sets = evaluation_sets()
        if evaluation_set is not None and evaluation_set not in sets:
            raise ValueError(f"evaluation_set is {evaluation_set!r}: must be {', '.join(sets)}.")
        chosen = None if evaluation_set is None else sets[evaluation_set]
        env = build_env(self.config.environment, seed, evaluation_set=chosen)
        return env.append_transform(self.make_tensordict_primer())


def load_policy(checkpoint: str | Path, device: torch.device | str = "cpu") -> LoadedPolicy:
    """Load the policy of a run.

    Args:
        checkpoint: A ``checkpoint_*.pt`` file.
        device: Device of the policy.

    Returns:
        The policy; a line is logged if it reads masks of what it observes.

    Raises:
        CheckpointError: If the file is missing, damaged or in an unknown format.

    Examples:
        >>> path = "runs/demo/checkpoints/checkpoint_000000001000.pt"
        >>> policy = load_policy(path)  # doctest: +SKIP
        >>> env = policy.make_env(seed=1)  # doctest: +SKIP
        >>> env.rollout(500, policy)["next", "reward"].sum()  # doctest: +SKIP
    """
    config, learner, action_size = load_learner(checkpoint, device)
    policy = LoadedPolicy(config, learner, action_size)
    if policy.acts_on_masks:
        env = f"the env must have `{MASK}`" if MASK in policy.in_keys else "from its own student"
        logger.warning("algo=%s acts on pixels x mask: %s", config.algo.name, env)
    return policy


def load_learner(
    checkpoint: str | Path, device: torch.device | str = "cpu"
) -> tuple[RunConfig, Learner, int]:
    """Load a run's settings, its networks in evaluation mode, and the size of its actions.

    Args:
        checkpoint: A ``checkpoint_*.pt`` file.
        device: Device of the networks.

    Raises:
        CheckpointError: If the file is missing, damaged or in an unknown format.
    """
    payload = load_checkpoint(checkpoint, device).payload
    with malformed_is_an_error(checkpoint):
        payload["config"]["model"] = complete_model(payload["config"]["model"])
        config = to_run_config(payload["config"]).thawed(device=str(device))
        _check_registered(config, checkpoint)
        discrete = bool(payload.get("discrete_actions", False))
        learner = Learner.from_config(config, payload["action_size"], discrete_actions=discrete)
        if payload.get("exported"):
            learner.load_networks(payload["learner"]["loss"])
        else:
            learner.load_state_dict(payload["learner"])
        if config.acts_on_masks and config.segmentation.source == "student":
            learner.policy = act_on_saved_student(learner.policy, payload["masks"], device)
        return config, learner.eval(), int(payload["action_size"])


def _check_registered(config: RunConfig, checkpoint: str | Path) -> None:
    """Refuse settings with names that nothing in this process has registered."""
    missing = [*unregistered("algo", config.algo), *unregistered("model", config.model)]
    if missing:
        plugins = ", ".join(config.plugins) or "the file that registers it"
        raise CheckpointError(
            f"{checkpoint} was made with {', '.join(missing)}, which is not registered here. A "
            f"checkpoint imports no code: first import {plugins}, for example with "
            "w2f_torchrl.plugins.load_plugins."
        )

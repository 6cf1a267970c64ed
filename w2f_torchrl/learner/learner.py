"""One update of all networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from w2f_torchrl.algorithms import AlgorithmSettings, build_algorithm
from w2f_torchrl.checkpoint.file import CheckpointError
from w2f_torchrl.checkpoint.older import split_moments
from w2f_torchrl.config import (
    EXECUTIONS,
    ON_NAN,
    LossConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
)
from w2f_torchrl.learner.auto_execution import AutoUpdate
from w2f_torchrl.learner.gradients import ComposedLoss, SharedGradients, share_gradients
from w2f_torchrl.learner.non_finite_guard import FiniteGuard
from w2f_torchrl.learner.optimizer import (
    CapturableOptimizer,
    choose_precision,
    load_optimizer,
    make_optimizer,
    save_optimizer,
)
from w2f_torchrl.learner.update_modes import UpdateModes
from w2f_torchrl.modules import WorldModel
from w2f_torchrl.modules.packed_latents import LATENTS
from w2f_torchrl.utils.checks import check_choice


class Learner(nn.Module):
    """World model, actor, critic, losses and optimizer, and the update that trains them.

    Args:
        model: Sizes of the networks.
        action_size: A.
        discrete_actions: Whether an action is one of A, one-hot, and not A numbers.
        image_size: Side of the square picture, pixels.
        latent: ``whole``, ``split``, ``shared`` or ``foreground``.
        loss: Scales and constants of the losses.
        algorithm: ``world2filter``, ``dreamer_v3`` (the same with latent ``whole``), another
            method of the package, or a registered name.
        method: The group of settings named like the algorithm; None for its defaults.
        loss_name: A registered loss; None for World2FilterLoss.
        optimizer: Settings of the optimizer.
        device: Where the networks live.
        execution: One of the modes of :mod:`~w2f_torchrl.learner.execution`.
        gradients: ``none``: this process learns alone. ``ddp`` (DistributedDataParallel) or
            ``flat`` (one all-reduce of one buffer): they are averaged over the ranks of the
            process group, which must be there; all ranks start from rank 0's networks.
        on_nan: What an update does whose gradients are not finite: ``skip`` it, or ``stop``: it and
            all after it change nothing. Either is to be read off the metric ``finite``.

    Raises:
        ValueError: Naming the setting that is out of range, its value and what is allowed.
    """

    def __init__(
        self,
        model: ModelConfig,
        *,
        action_size: int,
        image_size: int = 64,
        latent: str = "split",
        loss: LossConfig | None = None,
        algorithm: str = "world2filter",
        method: MethodConfig | None = None,
        loss_name: str | None = None,
        optimizer: OptimizerConfig | None = None,
        device: torch.device | str = "cpu",
        execution: str = "eager",
        gradients: str = "none",
        on_nan: str = "stop",
        discrete_actions: bool = False,
    ):
        super().__init__()
        settings = optimizer or OptimizerConfig()
        settings.validate()
        check_choice("execution", execution, EXECUTIONS)
        check_choice("gradients", gradients, ("none", "ddp", "flat"))
        check_choice("on_nan", on_nan, ON_NAN)
        parts = AlgorithmSettings(model, loss or LossConfig(), latent, action_size, image_size)
        parts = replace(parts, discrete_actions=discrete_actions, method=method)
        self.loss, self.policy = build_algorithm(algorithm, parts, loss_name)
        self.guard = FiniteGuard(self.loss, on_nan)
        self.to(device)
        self.device_type = torch.device(device).type
        self.precision = choose_precision(settings.precision, self.device_type)
        trained = {name: p for name, p in self.loss.named_parameters() if p.requires_grad}
        self.parameters_trained = list(trained.values())
        self.optimizer = make_optimizer(trained, settings)
        if execution == "auto" and self.device_type == "cpu":
            execution = "eager"
        self.execution = execution
        self.intact = True
        """False while an update changes the networks: an exception then leaves them half done."""
        self.latents: TensorDictBase | None = None
        """Packed posterior latents ``[B, T]`` of the last update, on the device; None where its
        sample did not say what slices start from."""
        self._gradients: SharedGradients = share_gradients(
            gradients, ComposedLoss(self.loss), self.parameters_trained
        )
        self._modes = UpdateModes(
            self.loss, self.guard, self.optimizer, self._eager_update, self.precision
        )
        self._update = self._modes.choose(execution, gradients)

    @classmethod
    def from_config(
        cls,
        config: RunConfig,
        action_size: int,
        *,
        gradients: str = "none",
        discrete_actions: bool = False,
    ) -> Learner:
        """Build the learner of a run."""
        return cls(
            config.model,
            action_size=action_size,
            image_size=config.environment.image_size,
            latent=config.latent,
            loss=config.loss,
            algorithm=config.algo.name,
            method=config.method,
            loss_name=config.algo.loss,
            optimizer=config.optimizer,
            device=config.torch_device(),
            execution=config.training.execution,
            gradients=gradients,
            on_nan=config.training.on_nan,
            discrete_actions=discrete_actions,
        )

    @property
    def mode(self) -> str:
        """How updates run: :attr:`execution`, and for ``auto`` what was chosen at the first one."""
        return self._update.mode if isinstance(self._update, AutoUpdate) else self.execution

    @property
    def world_model(self) -> WorldModel:
        """The world model."""
        return self.loss.world_model

    def update(self, sample: TensorDictBase) -> TensorDictBase:
        """Do one update.

        Args:
            sample: Records ``[B, T]`` on the learner's device. With packed latents under
                ``initial`` slices start from those, and :attr:`latents` holds the new ones.

        Returns:
            Detached scalars on the device, nothing read by the host: every ``loss_*`` and the
            metrics, ``wm/grad_norm`` included (before clipping), and ``finite``, whether the update
            was applied.
        """
        metrics = self._update(sample)
        self.latents = metrics.pop(LATENTS, None)
        return metrics

    def _eager_update(self, sample: TensorDictBase) -> TensorDictBase:
        remembered = self.guard.remember()
        mixed = self.precision == "bfloat16"
        with torch.autocast(self.device_type, torch.bfloat16, enabled=mixed):
            total, metrics = self._gradients.composed(sample)
        latents = metrics.pop(LATENTS, None)
        self.optimizer.zero_grad()
        # In this thread on CUDA too: what is first compiled in autograd's own threads, or launched
        # from them into a capture, depends on their state.
        with torch.autograd.set_multithreading_enabled(False):
            total.backward()
        self._gradients.average()
        grads = [p.grad for p in self.parameters_trained if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(grads))
        metrics["wm/grad_norm"] = torch.linalg.vector_norm(norms)
        good, metrics = self.guard.judge(metrics, metrics["wm/grad_norm"], remembered)
        self.intact = False
        self._apply_if(good)
        self.intact = True
        return metrics if latents is None else metrics.set(LATENTS, latents)

    def _apply_if(self, good: Tensor) -> None:
        if not isinstance(self.optimizer, CapturableOptimizer):
            if good:  # the host is the device
                self.optimizer.step()
                self.loss.update_slow_critic()
            return
        self.optimizer.applied = good
        self.optimizer.step()
        self.loss.update_slow_critic(good)

    def is_finite(self) -> bool:
        """Whether every parameter and every moment of the optimizer is finite; reads the device."""
        moments = [m for state in self.optimizer.state.values() for m in state.values()]
        tensors = [t for t in (*self.loss.parameters(), *moments) if isinstance(t, Tensor)]
        # A finite sum of absolute values has finite terms, and makes no copy of bools; large finite
        # values may overflow it, and are then looked at one by one.
        sums = torch.stack([norm.double() for norm in torch._foreach_norm(tensors, 1)])
        return bool(sums.isfinite().all()) or all(bool(t.isfinite().all()) for t in tensors)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return all that updates change: ``loss`` (networks, statistics) and ``optimizer``."""
        del args, kwargs  # of torch.nn.Module
        moments = save_optimizer(self.optimizer, self.parameters_trained)
        return {"loss": dict(self.loss.state_dict()), "optimizer": moments}

    def load_networks(self, state: dict[str, Any]) -> None:
        """Load the entry ``loss`` alone, which is all that acting needs.

        Raises:
            CheckpointError: If the networks have other shapes, naming the first difference.
        """
        try:
            self.loss.load_state_dict(state)
        except RuntimeError as error:
            lines = str(error).splitlines()
            raise CheckpointError(
                f"The checkpoint is of another model: {lines[min(1, len(lines) - 1)].strip()}"
            ) from error

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Load a state from :meth:`state_dict`; the optimizer's settings stay this learner's.

        Raises:
            CheckpointError: If the networks have other shapes, naming the first difference.
        """
        del args, kwargs  # of torch.nn.Module
        self.load_networks(state_dict["loss"])
        names = [name for name, p in self.loss.named_parameters() if p.requires_grad]
        moments = split_moments(state_dict["optimizer"], set(state_dict["loss"]), names)
        load_optimizer(self.optimizer, moments, self.parameters_trained)
        self._update = self._modes.capture_again(self._update)

"""One update of all networks."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torch import nn
from torchrl.trainers.algorithms import DreamerV3Optimizer

from w2f_torchrl.modules import (
    ModelConfig,
    WorldModel,
    build_actor,
    build_critic,
    build_policy,
    build_world_model,
)
from w2f_torchrl.objectives import LossConfig, World2FilterLoss
from w2f_torchrl.trainers.checkpointing import CheckpointError
from w2f_torchrl.trainers.config import OptimizerConfig, RunConfig
from w2f_torchrl.trainers.execution import (
    CapturableOptimizer,
    GraphedUpdate,
    Update,
    compile_core,
)
from w2f_torchrl.trainers.gradients import ComposedLoss, Losses, SharedGradients, share_gradients


class Learner(nn.Module):
    """World model, actor, critic, losses and optimizer, and the update that trains them.

    Args:
        model: Sizes of the networks.
        action_size: A.
        image_size: Side of the square picture, pixels.
        latent: ``whole``, ``split``, ``shared`` or ``foreground``.
        loss: Scales and constants of the losses.
        optimizer: Settings of the optimizer.
        device: Where the networks live.
        execution: One of :data:`~w2f_torchrl.trainers.execution.MODES`.
        gradients: ``none``: this process learns alone. ``ddp`` (DistributedDataParallel) or
            ``flat`` (one all-reduce of one buffer): they are averaged over the ranks of the
            process group, which must be there; all ranks start from rank 0's networks.
    """

    def __init__(
        self,
        model: ModelConfig,
        *,
        action_size: int,
        image_size: int = 64,
        latent: str = "split",
        loss: LossConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        device: torch.device | str = "cpu",
        execution: str = "eager",
        gradients: str = "none",
    ):
        super().__init__()
        settings = optimizer or OptimizerConfig()
        world_model = build_world_model(
            model,
            action_size=action_size,
            image_size=image_size,
            latent=latent,  # type: ignore[arg-type]
        )
        actor = build_actor(model, action_size)
        self.loss = World2FilterLoss(world_model, actor[0].module, build_critic(model), loss)
        # Shares the encoder, the foreground's prior and posterior and the actor.
        self.policy = build_policy(world_model, actor)
        self.to(device)
        self.device_type = torch.device(device).type
        self.mixed_precision = settings.precision == "bfloat16"
        self.parameters_trained = [p for p in self.loss.parameters() if p.requires_grad]
        optimizer_class = CapturableOptimizer if execution == "cuda_graph" else DreamerV3Optimizer
        self.optimizer = optimizer_class(
            self.parameters_trained,
            lr=settings.lr,
            agc=settings.agc,
            beta1=settings.beta1,
            beta2=settings.beta2,
            eps=settings.eps,
            warmup_steps=settings.warmup_updates,
        )
        self.execution = execution
        self._losses: Losses = self.loss.forward
        self._update: Update = self._eager_update
        self._choose_execution()
        self._gradients: SharedGradients = share_gradients(
            gradients, ComposedLoss(self.loss, self._losses), self.parameters_trained
        )

    @classmethod
    def from_config(
        cls, config: RunConfig, action_size: int, *, gradients: str = "none"
    ) -> Learner:
        """Build the learner of a run."""
        return cls(
            config.model,
            action_size=action_size,
            image_size=config.environment.image_size,
            latent=config.latent,
            loss=config.loss,
            optimizer=config.optimizer,
            device=config.torch_device(),
            execution=config.training.execution,
            gradients=gradients,
        )

    def _choose_execution(self) -> None:
        if self.execution in ("compile", "cuda_graph"):
            compile_core(self.loss)
        if self.execution == "compile_all":
            self._losses = torch.compile(self.loss.forward)
        if self.execution == "cuda_graph":
            self._update = GraphedUpdate(self._eager_update, self.loss, self.optimizer)

    @property
    def world_model(self) -> WorldModel:
        """The world model."""
        return self.loss.world_model

    def update(self, sample: TensorDictBase) -> TensorDictBase:
        """Do one update.

        Args:
            sample: Records ``[B, T]`` on the learner's device.

        Returns:
            Detached scalars on the device, nothing read by the host: every ``loss_*`` and the
            metrics, ``wm/grad_norm`` included (before clipping).
        """
        return self._update(sample)

    def _eager_update(self, sample: TensorDictBase) -> TensorDictBase:
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.mixed_precision):
            total, metrics = self._gradients.composed(sample)
        self.optimizer.zero_grad()
        total.backward()
        self._gradients.average()
        grads = [p.grad for p in self.parameters_trained if p.grad is not None]
        metrics["wm/grad_norm"] = torch.nn.utils.get_total_norm(grads)
        self.optimizer.step()
        self.loss.update_slow_critic()
        return metrics

    def checkpoint(self) -> dict[str, Any]:
        """Everything that the learner needs to go on: parameters, normaliser, optimizer."""
        return {"loss": dict(self.loss.state_dict()), "optimizer": self.optimizer.state_dict()}

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Load what :meth:`checkpoint` gave.

        Raises:
            CheckpointError: If the networks have other shapes, naming the first difference.
        """
        try:
            self.loss.load_state_dict(checkpoint["loss"])
        except RuntimeError as error:
            lines = str(error).splitlines()
            raise CheckpointError(
                f"The checkpoint is of another model: {lines[min(1, len(lines) - 1)].strip()}"
            ) from error
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        if isinstance(self._update, GraphedUpdate):  # it holds the old moments' addresses
            self._update = GraphedUpdate(self._eager_update, self.loss, self.optimizer)

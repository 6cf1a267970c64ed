"""The update of a learner in each mode of execution."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torchrl.trainers.algorithms import DreamerV3Optimizer

from w2f_torchrl.config import GRAPHED
from w2f_torchrl.learner.auto_execution import AutoUpdate
from w2f_torchrl.learner.execution import compile_core, pieces_worth_compiling, undo_compilation
from w2f_torchrl.learner.graphed_update import GraphedUpdate, Update, UpdateState
from w2f_torchrl.learner.non_finite_guard import FiniteGuard
from w2f_torchrl.learner.optimizer import CapturableOptimizer
from w2f_torchrl.objectives import World2FilterLoss


@dataclass
class UpdateModes:
    """Make a learner's update: eager, compiled, or captured in a CUDA graph."""

    loss: World2FilterLoss
    guard: FiniteGuard
    optimizer: DreamerV3Optimizer
    eager: Update
    """The learner's uncompiled update."""
    precision: str

    @property
    def device(self) -> torch.device:
        """Device of the networks."""
        device: torch.device = next(self.loss.parameters()).device
        return device

    def choose(self, execution: str, gradients: str) -> Update:
        """Make the update of a mode; ``auto`` chooses the fastest that works at its first call.

        Args:
            execution: One of :data:`~w2f_torchrl.config.EXECUTIONS`.
            gradients: How ranks share gradients.
        """
        if execution != "auto":
            return self.make(execution)
        # DistributedDataParallel uses hooks in the backward pass, which a graph does not replay.
        modes = ["compile"]
        if gradients != "ddp":
            modes.insert(0, "cuda_graph")
            if self.loss.world_model.background_rollout is not None:
                modes.insert(0, "cuda_graph_parallel")
        return AutoUpdate(
            {mode: partial(self.make, mode) for mode in modes},
            eager=self.eager,
            undo=partial(undo_compilation, self.loss),
            state=self._state(),
            parameters=[p for p in self.loss.parameters() if p.requires_grad],
            precision=self.precision,
        )

    def make(self, mode: str) -> Update:
        """Make the update of a mode other than ``auto``."""
        if mode in ("compile", *GRAPHED):
            compile_core(self.loss, pieces_worth_compiling(self.device))
        if mode == "compile_all":
            self.loss.compute = torch.compile(self.loss.compute)  # type: ignore[method-assign]
        if mode == "cuda_graph_parallel":
            self.loss.world_model.side_stream = torch.cuda.Stream(self.device)
        if mode in GRAPHED:
            return self.graphed()
        return self.eager

    def capture_again(self, update: Update) -> Update:
        """Return the update for new moments: a graph holds the addresses of the old ones."""
        if isinstance(update, GraphedUpdate):
            return self.graphed()
        if isinstance(update, AutoUpdate):
            update.recapture(self.graphed)
        return update

    def graphed(self) -> GraphedUpdate:
        """Make the update that is captured at its first call."""
        return GraphedUpdate(self.eager, self._state(), self.device)

    def _state(self) -> UpdateState:
        assert isinstance(self.optimizer, CapturableOptimizer), "graphs are for CUDA"
        changed = nn.ModuleList([self.loss, self.guard])
        return UpdateState(changed, self.optimizer, self.device)

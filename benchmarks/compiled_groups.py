"""What Inductor makes of the pieces that ``training.execution=compile`` compiles, without a GPU.

Inductor is asked for the CPU's graph and stopped before it writes code. What it has planned by
then, groups of operations that are fused and calls of libraries, is the number of kernels that a
call of the piece takes. On CUDA the groups are chosen by nearly the same rules: an estimate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from unittest import mock

import torch
from learner import ACTION_SIZE, make_sample
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import InductorError
from torch._inductor.scheduler import Scheduler

from w2f_torchrl.modules import PRESETS
from w2f_torchrl.trainers import Learner
from w2f_torchrl.trainers.config import OptimizerConfig


class _Planned(Exception):
    """Inductor has chosen its kernels."""


def planned_kernels(function: Callable[..., Any], args: tuple[Any, ...]) -> int:
    """How many kernels a compiled call without gradients would launch.

    Raises:
        RuntimeError: If Inductor planned not one graph but none or several.
    """
    plans: list[Counter[str]] = []

    def stop(scheduler: Scheduler) -> None:
        plans.append(Counter(type(node).__name__ for node in scheduler.nodes))
        raise _Planned

    torch._dynamo.reset()
    stopped = suppress(_Planned, BackendCompilerFailed, InductorError)
    with mock.patch.object(Scheduler, "codegen", stop), torch.no_grad(), stopped:
        torch.compile(function, dynamic=False)(*args)
    torch._dynamo.reset()
    if len(plans) != 1:
        raise RuntimeError(f"Inductor planned {len(plans)} graphs for {function.__name__}.")
    return plans[0].total() - plans[0]["NopKernelSchedulerNode"]


def count_pieces(precision: str, model: str = "size1m") -> dict[str, int]:
    """Kernels of one call of each piece: ``step_forward``, ``step_backward``, ``imagine_step``.

    Args:
        precision: ``float32`` or ``bfloat16``.
        model: A preset; what is fused hardly depends on it.
    """
    learner = Learner(
        PRESETS[model],
        action_size=ACTION_SIZE,
        latent="whole",
        optimizer=OptimizerConfig(precision=precision),
    )
    counts: dict[str, int] = {}

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if function.__name__ not in counts:
                counts[function.__name__] = planned_kernels(function, args)
            return function(*args)

        return call

    rollout = learner.world_model.rollout
    forward, backward = rollout.steps
    rollout.steps = (counted(forward), counted(backward))
    learner.loss.imagine_step = counted(learner.loss.imagine_step)
    learner.update(make_sample(2, 3))
    return counts

"""TorchRL's DreamerV3 optimizer in a form that a CUDA graph can capture."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchrl.trainers.algorithms import DreamerV3Optimizer

from w2f_torchrl.config import OptimizerConfig

SETTINGS = ("lr", "agc", "beta1", "beta2", "eps", "warmup_steps")
"""Entries of a group that are settings of the run and not its state."""


def choose_precision(precision: str, device_type: str) -> str:
    """Return ``float32`` or ``bfloat16``; ``auto`` selects ``bfloat16`` if CUDA supports it."""
    if precision != "auto":
        return precision
    mixed = device_type == "cuda" and torch.cuda.is_bf16_supported()
    return "bfloat16" if mixed else "float32"


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], settings: OptimizerConfig
) -> DreamerV3Optimizer:
    """Make TorchRL's optimizer, on a GPU in the form that a CUDA graph can capture.

    Args:
        parameters: Of the loss, by their names. Actor and critic are separate groups if they have
            their own learning rates.
        settings: Of the optimizer.
    """
    rates = {"actor": settings.actor_lr, "critic": settings.critic_lr}
    rates = {module: rate for module, rate in rates.items() if rate is not None}
    members: dict[str, list[nn.Parameter]] = {"": [], **{module: [] for module in rates}}
    for name, parameter in parameters.items():
        module = name.split(".")[0]
        members[module if module in rates else ""].append(parameter)
    groups = [
        {"params": each, "lr": rates.get(name, settings.lr)} for name, each in members.items()
    ]
    # TorchRL's optimizer counts on the host, which does not know whether an update is applied.
    on_host = members[""][0].device.type == "cpu"
    make = DreamerV3Optimizer if on_host else CapturableOptimizer
    return make(
        groups,
        lr=settings.lr,
        agc=settings.agc,
        beta1=settings.beta1,
        beta2=settings.beta2,
        eps=settings.eps,
        warmup_steps=settings.warmup_updates,
    )


def save_optimizer(
    optimizer: DreamerV3Optimizer, parameters: Sequence[nn.Parameter]
) -> dict[str, Any]:
    """Return the optimizer's state as one group, whatever its groups are.

    Args:
        optimizer: From :func:`make_optimizer`.
        parameters: All that it trains, in the order in which they are numbered.
    """
    saved: dict[str, Any] = optimizer.state_dict()
    if len(optimizer.param_groups) == 1:
        return saved
    order = _numbers(optimizer, parameters)
    state = {order[number]: moments for number, moments in saved["state"].items()}
    group = saved["param_groups"][0] | {"params": list(range(len(parameters)))}
    return {"state": {number: state[number] for number in sorted(state)}, "param_groups": [group]}


def load_optimizer(
    optimizer: DreamerV3Optimizer, saved: Mapping[str, Any], parameters: Sequence[nn.Parameter]
) -> None:
    """Load moments and the count of updates; the optimizer's settings stay.

    Args:
        optimizer: From :func:`make_optimizer`.
        saved: From :func:`save_optimizer`.
        parameters: As there.
    """
    settings = [{name: group[name] for name in SETTINGS} for group in optimizer.param_groups]
    moments, order = saved["state"], _numbers(optimizer, parameters)
    state = {i: moments[number] for i, number in enumerate(order) if number in moments}
    groups, begin = [], 0
    for group in optimizer.param_groups:
        end = begin + len(group["params"])
        # Each group counts by itself, so none may share the tensor of another's count.
        copied = copy.deepcopy(saved["param_groups"][0])
        groups.append(copied | {"params": list(range(begin, end))})
        begin = end
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def _numbers(optimizer: DreamerV3Optimizer, parameters: Sequence[nn.Parameter]) -> list[int]:
    """Return the numbers of the parameters in the order of the optimizer's groups."""
    numbers = {id(parameter): number for number, parameter in enumerate(parameters)}
    return [numbers[id(p)] for group in optimizer.param_groups for p in group["params"]]


class CapturableOptimizer(DreamerV3Optimizer):
    """TorchRL's DreamerV3 optimizer with its step counter on the device.

    TorchRL counts on the host, and a captured graph would freeze the warm-up and the bias
    corrections, which the host computes from the count. Numbers and state dict are the same.
    """

    applied: Tensor | None = None
    """A bool scalar on the device. If False, :meth:`step` changes nothing, whatever the gradients
    are. None applies every step."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        """Update every parameter that has a gradient; every group counts the step.

        Raises:
            ValueError: If a closure is given.
            RuntimeError: If no parameter has a gradient.
        """
        if closure is not None:
            raise ValueError("closure must be None: a captured update cannot call it.")
        trained = [
            [p for p in group["params"] if p.grad is not None] for group in self.param_groups
        ]
        if not any(trained):
            raise RuntimeError("no parameter has a gradient: call backward() before step().")
        for group, parameters in zip(self.param_groups, trained, strict=True):
            good = self._count(group)
            if parameters:
                self._step_group(group, parameters, good)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict; the step counter follows the parameters to their device."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            # Torch moves only the moments, and checkpoints of a CPU hold an int, which UpdateState
            # would not restore after the warm-up of a capture.
            step = torch.as_tensor(group["step"], dtype=torch.float32)
            group["step"] = step.to(group["params"][0].device)

    def _count(self, group: dict[str, Any]) -> Tensor:
        """Count the step if it is applied; return on the device whether it is."""
        count = group["step"]
        if not isinstance(count, Tensor):  # TorchRL's checkpoints hold an int
            count = torch.tensor(float(count), device=group["params"][0].device)
            group["step"] = count
        good = self.applied
        if good is None:
            good = torch.ones((), dtype=torch.bool, device=count.device)
        count.add_(good)
        return good

    def _step_group(self, group: dict[str, Any], parameters: list[Tensor], good: Tensor) -> None:
        count, beta1, beta2 = group["step"], group["beta1"], group["beta2"]
        gradients = [p.grad.float() for p in parameters if p.grad is not None]
        if self.applied is not None:
            gradients = _zero_unless(good, gradients)
        warmup = group["warmup_steps"]
        rate = group["lr"] * ((count - 1) / warmup).clamp(max=1) if warmup else group["lr"]
        rate = torch.where(good, rate, 0.0)
        gradients = _clip(gradients, parameters, group)
        rms, momentum = self._moments(parameters)
        # Zero gradients add nothing below; with decays of 1 and a rate of 0 nothing changes.
        keep1, keep2 = (torch.where(good, beta, 1.0) for beta in (beta1, beta2))
        count = count.clamp(min=1)
        torch._foreach_mul_(rms, keep2)
        torch._foreach_addcmul_(rms, gradients, gradients, value=1 - beta2)
        denominator = torch._foreach_div(rms, _bias_correction(beta2, count))
        torch._foreach_sqrt_(denominator)
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_mul_(momentum, keep1)
        torch._foreach_add_(momentum, torch._foreach_div(gradients, denominator), alpha=1 - beta1)
        change = torch._foreach_mul(momentum, rate / _bias_correction(beta1, count))
        torch._foreach_sub_(parameters, change)

    def _moments(self, parameters: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        for parameter in parameters:
            state = self.state[parameter]
            for name in ("rms", "momentum"):
                if name not in state:
                    state[name] = torch.zeros_like(parameter, dtype=torch.float32)
        states = [self.state[parameter] for parameter in parameters]
        return [s["rms"] for s in states], [s["momentum"] for s in states]


def _bias_correction(beta: float, count: Tensor) -> Tensor:
    """Return ``1 - beta ** count`` in float32; the power in float32 would lose three digits."""
    if beta == 0:
        return torch.ones_like(count)
    return torch.expm1(count.double() * math.log(beta)).neg().float()


def _zero_unless(good: Tensor, gradients: list[Tensor]) -> list[Tensor]:
    """Return the gradients, or zeros if ``good`` is False; one buffer needs only two kernels.

    A product with zero would not replace NaN.
    """
    buffer = torch.where(good, torch.cat([g.flatten() for g in gradients]), 0)
    parts = buffer.split([g.numel() for g in gradients])
    return [part.view(g.shape) for part, g in zip(parts, gradients, strict=True)]


def _clip(gradients: list[Tensor], parameters: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """Clip gradients adaptively per tensor (Brock et al. 2021, as in the reference)."""
    if not group["agc"]:
        return gradients
    largest = list(torch._foreach_norm([p.detach().float() for p in parameters]))
    torch._foreach_clamp_min_(largest, group["parameter_norm_min"])
    torch._foreach_mul_(largest, group["agc"])
    norms = torch._foreach_maximum(list(torch._foreach_norm(gradients)), largest)
    return list(torch._foreach_mul(gradients, torch._foreach_div(largest, norms)))

"""How an update is run: eager, compiled, or as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.trainers.algorithms import DreamerV3Optimizer

from w2f_torchrl.modules.convolution import ImageDecoder
from w2f_torchrl.objectives import World2FilterLoss
from w2f_torchrl.trainers.config import EXECUTIONS

#: ``eager``; ``compile``: the pieces that hold nearly all of the work (on a CPU those that gain),
#: each compiled on its own, so that compiling takes no longer for longer sequences;
#: ``compile_all``: losses and the whole time loop as one graph; ``cuda_graph``: ``compile``, and
#: the whole update captured once and replayed, which leaves no launch to the host;
#: ``cuda_graph_parallel``: the graph has two branches where the two latents of ``split`` don't
#: depend on each other.
MODES = EXECUTIONS

#: Real updates that precede the capture, undone after it: they compile, and they make the
#: optimizer's state and the libraries' work spaces.
CAPTURE_WARMUP = 3

Update = Callable[[TensorDictBase], TensorDictBase]


#: What ``compile`` compiles: a step of each recurrence and a step back; an imagined step; encoders
#: and decoders.
PIECES = ("recurrence", "imagination", "pictures")


def pieces_worth_compiling(device: torch.device) -> tuple[str, ...]:
    """All of :data:`PIECES`; on a CPU not the pictures'.

    Encoders and decoders are faster by hand there (``benchmarks/learner_parts.py``).
    """
    return PIECES[:2] if device.type == "cpu" else PIECES


def compile_core(loss: World2FilterLoss, pieces: Collection[str]) -> None:
    """Compile some of :data:`PIECES`, each on its own.

    Acting is not touched: the policy calls the encoder itself, with batches of other sizes.
    """
    # Every shape is known: kernels for any size would be slower, and the two recurrences, which
    # share their code, would otherwise be compiled for any.
    compiled = partial(torch.compile, dynamic=False)
    if next(loss.parameters()).device.type == "cpu":
        # What the graphs fuse is small: a team of threads costs more than it does.
        compiled = partial(compiled, options={"cpp.threads": 1})
    world_model = loss.world_model
    if "pictures" in pieces:
        for name in ("encoder", "background_encoder"):
            if (encoder := getattr(world_model, name)) is not None:
                world_model.compiled[name] = compiled(encoder.forward)
        for module in world_model.decoder.modules():
            if isinstance(module, ImageDecoder):
                module.compile(dynamic=False)
    if "recurrence" in pieces:
        for rollout in (world_model.rollout, world_model.background_rollout):
            if rollout is not None:
                forward, backward = rollout.steps
                rollout.steps = (compiled(forward), compiled(backward))
    if "imagination" in pieces:
        loss.imagine_step = compiled(loss.imagine_step)


class CapturableOptimizer(DreamerV3Optimizer):
    """TorchRL's DreamerV3 optimizer with its step counter on the device.

    TorchRL counts on the host, and what the host computes from the count, the warm-up and the
    bias corrections, would be frozen into a captured graph. The same numbers and state dict.
    """

    applied: Tensor | None = None
    """A bool scalar on the device: where False, :meth:`step` changes nothing, whatever gradients
    there are. None: every step is applied."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("closure must be None: a captured update calls none.")
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._step_group(group, parameters)

    def _step_group(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        count = group["step"]
        if not isinstance(count, Tensor):  # TorchRL's checkpoints hold an int
            count = torch.tensor(float(count), device=parameters[0].device)
            group["step"] = count
        beta1, beta2 = group["beta1"], group["beta2"]
        gradients = [p.grad.float() for p in parameters if p.grad is not None]
        good = self.applied
        if good is None:
            good = torch.ones((), dtype=torch.bool, device=count.device)
        else:
            gradients = [torch.where(good, gradient, 0) for gradient in gradients]
        count.add_(good)
        warmup = group["warmup_steps"]
        rate = group["lr"] * ((count - 1) / warmup).clamp(max=1) if warmup else group["lr"]
        rate = torch.where(good, rate, 0.0)
        gradients = _clip(gradients, parameters, group)
        rms, momentum = self._moments(parameters)
        # Zero gradients add nothing below: with decays of 1 and a rate of 0 nothing changes.
        keep1, keep2 = (torch.where(good, beta, 1.0) for beta in (beta1, beta2))
        count = count.clamp(min=1)
        torch._foreach_mul_(rms, keep2)
        torch._foreach_addcmul_(rms, gradients, gradients, value=1 - beta2)
        denominator = torch._foreach_div(rms, 1 - torch.pow(beta2, count))
        torch._foreach_sqrt_(denominator)
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_mul_(momentum, keep1)
        torch._foreach_add_(momentum, torch._foreach_div(gradients, denominator), alpha=1 - beta1)
        change = torch._foreach_mul(momentum, rate / (1 - torch.pow(beta1, count)))
        torch._foreach_sub_(parameters, change)

    def _moments(self, parameters: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        for parameter in parameters:
            state = self.state[parameter]
            for name in ("rms", "momentum"):
                if name not in state:
                    state[name] = torch.zeros_like(parameter, dtype=torch.float32)
        states = [self.state[parameter] for parameter in parameters]
        return [s["rms"] for s in states], [s["momentum"] for s in states]


def _clip(gradients: list[Tensor], parameters: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """Adaptive gradient clipping, tensor by tensor (Brock et al. 2021, as the reference has it)."""
    if not group["agc"]:
        return gradients
    largest = list(torch._foreach_norm([p.detach().float() for p in parameters]))
    torch._foreach_clamp_min_(largest, group["parameter_norm_min"])
    torch._foreach_mul_(largest, group["agc"])
    norms = torch._foreach_maximum(list(torch._foreach_norm(gradients)), largest)
    return list(torch._foreach_mul(gradients, torch._foreach_div(largest, norms)))


class GraphedUpdate:
    """An update captured as a CUDA graph at its first call.

    Args:
        update: Samples ``[B, T]`` to metrics, all on the device, no read by the host.
        module: Holds every parameter and buffer that the update changes.
        optimizer: Its state is changed too.
    """

    def __init__(self, update: Update, module: nn.Module, optimizer: CapturableOptimizer):
        self._update, self._module, self._optimizer = update, module, optimizer
        self._graph: torch.cuda.CUDAGraph | None = None
        self._sample: TensorDictBase = TensorDict()
        self._metrics: TensorDictBase = TensorDict()

    def __call__(self, sample: TensorDictBase) -> TensorDictBase:
        """Update on a sample of the captured shape."""
        if self._graph is None:
            self._capture(sample)
        elif sample.shape != self._sample.shape:
            raise ValueError(
                f"the update was captured for samples {tuple(self._sample.shape)}, got "
                f"{tuple(sample.shape)}."
            )
        self._sample.copy_(sample)
        self._graph.replay()  # type: ignore[union-attr]
        return self._metrics.clone()

    def _capture(self, sample: TensorDictBase) -> None:
        self._sample = sample.clone()
        random = torch.cuda.get_rng_state()
        before = self._copy_of_state()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(CAPTURE_WARMUP):
                self._update(self._sample)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._metrics = self._update(self._sample)
        self._undo(before)
        torch.cuda.set_rng_state(random)

    def _copy_of_state(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self._state().items()}

    def _state(self) -> dict[str, Tensor]:
        """Every tensor that an update changes, by name."""
        state: dict[str, Tensor] = dict(self._module.state_dict())
        for i, moments in enumerate(self._optimizer.state.values()):
            state |= {f"optimizer.{i}.{name}": tensor for name, tensor in moments.items()}
        for i, group in enumerate(self._optimizer.param_groups):
            state[f"optimizer.step.{i}"] = torch.as_tensor(group["step"])
        return state

    @torch.no_grad()
    def _undo(self, before: dict[str, Tensor]) -> None:
        """Take the warm-up's updates back, in place: the graph holds these tensors' addresses."""
        for name, tensor in self._state().items():
            if name in before:
                tensor.copy_(before[name])
            else:  # the optimizer's first moments
                tensor.zero_()

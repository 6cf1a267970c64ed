"""An update captured as one CUDA graph, and the state that a trial restores."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from w2f_torchrl.learner.optimizer import CapturableOptimizer

Update = Callable[[TensorDictBase], TensorDictBase]

#: Number of updates before the capture, undone after it: they compile, and they create the
#: optimizer's state and the work spaces of libraries.
CAPTURE_WARMUP = 3


class UpdateState:
    """The state that an update changes, so that updates can be undone in place.

    Args:
        module: The module with every parameter and buffer that an update changes.
        optimizer: The optimizer, with its moments and step counter.
        device: The CUDA device whose random state an update advances.
    """

    def __init__(self, module: nn.Module, optimizer: CapturableOptimizer, device: torch.device):
        self._module, self._optimizer, self._device = module, optimizer, device

    def copy(self) -> dict[str, Tensor]:
        """Copy every tensor that an update changes, and the device's random state."""
        copied = {name: tensor.detach().clone() for name, tensor in self._tensors().items()}
        return copied | {"random": torch.cuda.get_rng_state(self._device)}

    @torch.no_grad()
    def restore(self, before: dict[str, Tensor]) -> None:
        """Write the values of :meth:`copy` back to the same addresses, which a graph may use."""
        for name, tensor in self._tensors().items():
            if name in before:
                tensor.copy_(before[name])
            else:  # moments that the update created
                tensor.zero_()
        torch.cuda.set_rng_state(before["random"], self._device)

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = dict(self._module.state_dict())
        for i, moments in enumerate(self._optimizer.state.values()):
            tensors |= {f"optimizer.{i}.{name}": tensor for name, tensor in moments.items()}
        for i, group in enumerate(self._optimizer.param_groups):
            if isinstance(group["step"], Tensor):  # in a new optimizer it is still the int 0
                tensors[f"optimizer.step.{i}"] = group["step"]
        return tensors


class GraphedUpdate:
    """An update captured as a CUDA graph at its first call.

    A capture that fails changes nothing: warm-up and random state are undone, and the next call
    captures again.

    Args:
        update: Maps samples ``[B, T]`` to metrics on the device, without a read by the host.
        state: The state that the update changes.
        device: The CUDA device.
    """

    def __init__(self, update: Update, state: UpdateState, device: torch.device):
        self._update, self._state, self._device = update, state, device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._sample: TensorDictBase = TensorDict()
        self._metrics: TensorDictBase = TensorDict()

    def __call__(self, sample: TensorDictBase) -> TensorDictBase:
        """Update on a sample of the captured shape."""
        if self._graph is None:
            self.capture(sample)
        elif sample.shape != self._sample.shape:
            raise ValueError(
                f"the update was captured for samples {tuple(self._sample.shape)}, got "
                f"{tuple(sample.shape)}."
            )
        self._sample.copy_(sample)
        self._graph.replay()  # type: ignore[union-attr]
        return self._metrics.clone()

    def capture(self, sample: TensorDictBase) -> None:
        """Capture the update for samples of this shape; no update is applied."""
        before = self._state.copy()
        try:
            with torch.cuda.device(self._device):
                self._sample = sample.clone()
                self._warm_up()
                graph, self._metrics = self._captured()
        finally:
            self._state.restore(before)
        self._graph = graph

    def _warm_up(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(CAPTURE_WARMUP):
                self._update(self._sample)
        torch.cuda.current_stream().wait_stream(stream)

    def _captured(self) -> tuple[torch.cuda.CUDAGraph, TensorDictBase]:
        graph = torch.cuda.CUDAGraph()
        # Other threads (copies of samples, videos) may use the device meanwhile. If the garbage
        # collector freed a tensor of another stream, the capture would fail.
        with _no_garbage_collection(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            metrics = self._update(self._sample)
        return graph, metrics


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()

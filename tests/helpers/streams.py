"""Stand-ins for CUDA's streams, events and graphs, which see what waits for what.

The host's order of launches says nothing about the device's: work on two streams is ordered only by
events. Here each stream counts its operations and knows how far the others had come when it last
waited for them (a vector clock), so that a tensor that is read before the stream has waited for
the one that wrote it is found, whatever the words were by which it should have waited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def index_of(device: Any, current: int) -> int:
    """A device's number, from all the forms that torch takes."""
    if device is None:
        return current
    if isinstance(device, int):
        return device
    index = torch.device(device).index
    return current if index is None else index


class FakeStream:
    """A stream: how many operations it has had, and which of the others' come before its next."""

    def __init__(self, streams: Streams, device: Any = None) -> None:
        self.device_index = index_of(device, streams.current)
        self.device = torch.device("cuda", self.device_index)
        self.knows: dict[FakeStream, int] = {self: 0}
        self._streams = streams
        streams.made.append(self)

    def launch(self) -> int:
        """Note one more operation; its number."""
        self.knows[self] += 1
        return self.knows[self]

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        event = event or FakeEvent(self._streams)
        event.record(self)
        return event

    def wait_event(self, event: FakeEvent) -> None:
        for stream, count in event.knows.items():
            self.knows[stream] = max(count, self.knows.get(stream, 0))

    def wait_stream(self, stream: FakeStream) -> None:
        self.wait_event(stream.record_event())

    def synchronize(self) -> None:
        """The host waits: no order among streams."""


class FakeEvent:
    """What its stream knew when it was recorded; before that it orders nothing."""

    def __init__(self, streams: Streams, *_: Any, **__: Any) -> None:
        self._streams = streams
        self.knows: dict[FakeStream, int] = {}

    def record(self, stream: FakeStream | None = None) -> None:
        self.knows = dict((stream or self._streams.stream()).knows)

    def wait(self, stream: FakeStream | None = None) -> None:
        (stream or self._streams.stream()).wait_event(self)


class FakeGraph:
    """A graph whose replay is the function that the test gives."""

    def __init__(self, streams: Streams, *_: Any, **__: Any) -> None:
        self._streams = streams
        self.device_index: int | None = None

    def replay(self) -> None:
        assert self.device_index is not None, "replayed before it was captured"
        self._streams.on_replay()

    def reset(self) -> None:
        self.device_index = None


class Streams:
    """The stand-ins' state: devices, streams, and what went wrong.

    Args:
        on_replay: What a graph's replay does.
    """

    def __init__(self, on_replay: Callable[[], None] = lambda: None) -> None:
        self.current = 0
        """The current device."""
        self.on_replay = on_replay
        self.made: list[FakeStream] = []
        self.captured: list[FakeGraph] = []
        self.seeded: set[int] = set()
        """Devices whose random state was read or written."""
        self.races: list[str] = []
        """Operations on tensors whose writing their stream hadn't waited for."""
        self.kept: set[tuple[int, FakeStream]] = set()
        """Storages, by :meth:`record_stream`, with the stream they are kept for."""
        self.borrowed: dict[tuple[int, FakeStream], str] = {}
        """Storages of a side stream's tensors that another stream has read."""
        self._writers: dict[int, tuple[FakeStream, int, Any]] = {}
        self._active: dict[int, FakeStream] = {}

    def stream(self, device: Any = None) -> FakeStream:
        """The current stream of a device."""
        index = index_of(device, self.current)
        if index not in self._active:
            self._active[index] = FakeStream(self, index)
        return self._active[index]

    @contextmanager
    def on(self, stream: FakeStream | None) -> Iterator[None]:
        """``torch.cuda.stream``, which makes the stream's device current too."""
        if stream is None:
            yield
            return
        device, before = self.current, self.stream(stream.device_index)
        self.current, self._active[stream.device_index] = stream.device_index, stream
        try:
            yield
        finally:
            self._active[stream.device_index], self.current = before, device

    @contextmanager
    def on_device(self, device: Any) -> Iterator[None]:
        """``torch.cuda.device``."""
        before, self.current = self.current, index_of(device, self.current)
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def capture(self, graph: FakeGraph, *_: Any, stream: Any = None, **__: Any) -> Iterator[None]:
        """``torch.cuda.graph``: on a stream of its own, which waits for the current one."""
        own = stream or FakeStream(self)
        own.wait_stream(self.stream())
        with self.on(own):
            yield
        graph.device_index = own.device_index
        self.captured.append(graph)

    def note(self, func: Any, args: tuple[Any, ...], out: Any) -> None:
        """An operation is launched on the current stream: for ``Watch(note=...)``."""
        if func.is_view or func.namespace == "prim" or _only_reads_the_shape(func):
            return
        stream = self.stream(next(x.device for x in tree_leaves((args, out)) if _on_cuda(x)))
        for tensor in filter(_on_cuda, tree_leaves(args)):
            storage = tensor.untyped_storage()
            writer, count, _ = self._writers.get(storage._cdata, (stream, 0, None))
            if stream.knows.get(writer, 0) < count:
                self.races.append(f"{func} reads {tuple(tensor.shape)} too early")
            if writer is not stream and writer is not self._main(stream):
                self.borrowed[storage._cdata, stream] = f"{func} of {tuple(tensor.shape)}"
        count = stream.launch()
        for tensor in filter(_on_cuda, tree_leaves(out)):
            storage = tensor.untyped_storage()
            self._writers[storage._cdata] = (stream, count, storage)

    def _main(self, stream: FakeStream) -> FakeStream:
        return next(s for s in self.made if s.device_index == stream.device_index)

    def keep(self, tensor: Tensor, stream: FakeStream) -> None:
        """``Tensor.record_stream``."""
        self.kept.add((tensor.untyped_storage()._cdata, stream))

    def not_kept(self) -> list[str]:
        """Uses of another stream's memory, which may be given away too early."""
        return [use for key, use in self.borrowed.items() if key not in self.kept]

    def _seed(self, device: Any = "cuda", *_: Any) -> Tensor:
        self.seeded.add(index_of(device, self.current))
        return torch.get_rng_state()

    def _reseed(self, state: Tensor, device: Any = "cuda") -> None:
        self.seeded.add(index_of(device, self.current))
        torch.set_rng_state(state)

    def _set_device(self, device: Any) -> None:
        self.current = index_of(device, self.current)

    @contextmanager
    def installed(self) -> Iterator[Streams]:
        """Put the stand-ins in the places of torch's."""
        names: dict[str, Any] = {
            "Stream": lambda device=None, priority=0: FakeStream(self, device),
            "Event": lambda *a, **k: FakeEvent(self, *a, **k),
            "CUDAGraph": lambda *a, **k: FakeGraph(self, *a, **k),
            "graph": self.capture,
            "stream": self.on,
            "device": self.on_device,
            "current_stream": self.stream,
            "default_stream": self.stream,
            "current_device": lambda: self.current,
            "set_device": self._set_device,
            "synchronize": lambda device=None: None,
            "get_rng_state": self._seed,
            "set_rng_state": self._reseed,
        }
        with ExitStack() as stack:
            for name, stand_in in names.items():
                stack.enter_context(mock.patch(f"torch.cuda.{name}", stand_in))
            keep = lambda tensor, stream: self.keep(tensor, stream)  # noqa: E731
            stack.enter_context(mock.patch("torch.Tensor.record_stream", keep))
            yield self


def _only_reads_the_shape(func: Any) -> bool:
    name = func._schema.name.removeprefix("aten::")
    return name.startswith("new_") or name.endswith("_like") or name == "detach"


def _on_cuda(x: Any) -> bool:
    return isinstance(x, Tensor) and x.device.type == "cuda"

"""Run work on a second CUDA stream, in parallel to work that leaves most of a GPU idle."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class SideStream:
    """Run work of a forward pass on a second stream, from an earlier marked point.

    The host launches everything in the same order as without a second stream, so the draws are the
    same. Autograd runs the backward pass of each operation on the stream of its forward pass.

    Args:
        stream: The second stream; None runs everything on the current stream.
    """

    def __init__(self, stream: torch.cuda.Stream | None):
        self.stream = stream
        self.start: torch.cuda.Event | None = None

    def mark(self) -> None:
        """Mark the point; the work must not need anything launched after it."""
        if self.stream is not None:
            self.start = torch.cuda.current_stream(self.stream.device).record_event()

    def run(self, work: Callable[[], Iterable[Tensor]]) -> None:
        """Run ``work`` from the marked point on; the current stream waits for it.

        Args:
            work: The function; returns all of its tensors ``[...]`` that are read afterwards.
        """
        if self.stream is None or self.start is None:
            work()
            return
        self.stream.wait_event(self.start)
        with torch.cuda.stream(self.stream):
            made = work()
        main = torch.cuda.current_stream(self.stream.device)
        main.wait_stream(self.stream)
        for tensor in made:
            tensor.record_stream(main)  # its memory belongs to the other stream

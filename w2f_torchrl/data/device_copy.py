"""Samples on their way to the device, beside what it computes."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase

from w2f_torchrl.modules.packed_latents import INITIAL


class DeviceCopy:
    """Copies samples to the device; on CUDA on a stream of its own.

    An update that the host has launched still runs when the host draws the next sample, which is
    then copied beside it instead of after it. Samples are drawn in the same order and at the same
    point of the run as without it, none ahead of a checkpoint or of a write: only the copy's place
    in the device's queue differs.

    Args:
        device: Where to.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, sample: TensorDictBase) -> TensorDictBase:
        """Copy a sample, best from page-locked memory: the host doesn't wait.

        Returns:
            The sample on the device, safe to use on the current stream.
        """
        if self._stream is None:
            return sample.to(self._device)
        with torch.cuda.stream(self._stream):
            copied = self._copy(sample)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for leaf in copied.values(include_nested=True, leaves_only=True):
            leaf.record_stream(current)  # its memory is the other stream's: not to be reused early
        return copied

    def _copy(self, sample: TensorDictBase) -> TensorDictBase:
        initial = sample.get(INITIAL, None)
        copied = sample.exclude(INITIAL).to(self._device, non_blocking=True)
        if initial is not None:  # T equal rows: one is copied
            first = initial[:, :1].to(self._device, non_blocking=True)
            copied.set(INITIAL, first.expand(initial.shape))
        return copied

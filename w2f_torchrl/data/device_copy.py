"""Copies replay samples to the device, overlapped with computation."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase

from w2f_torchrl.modules.packed_latents import INITIAL


class DeviceCopy:
    """Copy samples to the device; on CUDA in a separate stream.

    An update that the host has launched is still running when the host draws the next sample. That
    sample is copied during the update instead of after it. Samples are drawn in the same order and
    at the same point of the run as without this class, never ahead of a checkpoint or of a write:
    only the order of work on the device differs.

    Args:
        device: The device to copy to.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, sample: TensorDictBase) -> TensorDictBase:
        """Copy a sample; from page-locked memory the host does not wait.

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
            leaf.record_stream(current)  # allocated on the other stream: must not be reused early
        return copied

    def _copy(self, sample: TensorDictBase) -> TensorDictBase:
        initial = sample.get(INITIAL, None)
        copied = sample.exclude(INITIAL).to(self._device, non_blocking=True)
        if initial is not None:  # T equal rows: one is copied
            first = initial[:, :1].to(self._device, non_blocking=True)
            copied.set(INITIAL, first.expand(initial.shape))
        return copied

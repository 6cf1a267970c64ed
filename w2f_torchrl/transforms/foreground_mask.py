"""A TorchRL transform that writes the foreground's mask next to the pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from torch import Tensor
from torchrl.data import Binary, Bounded, TensorSpec
from torchrl.envs import EnvBase, ObservationTransform
from torchrl.envs.transforms.transforms import _apply_to_composite
from torchrl.envs.transforms.utils import _set_missing_tolerance

from w2f_torchrl.keys import MASK
from w2f_torchrl.segmenters import Sam3Segmenter, Segmenter
from w2f_torchrl.segmenters.base import check_masks
from w2f_torchrl.utils.tensors import check_tensor


class ForegroundMaskTransform(ObservationTransform):
    """Write a segmenter's masks: bool ``[*B, 1, H, W]``, or float32 confidences in [0, 1].

    It works wherever TorchRL accepts a transform:

    - appended to an env, single or batched: one call of the segmenter for the whole batch at each
      step. Inside a ParallelEnv's workers each worker would need a separate segmenter: append it to
      the ParallelEnv instead;
    - as a collector's ``postproc``: one call for a whole batch;
    - appended to a replay buffer: each frame is segmented once, when it is written, with one call
      per ``extend``. Samples contain the stored masks;
    - called on a tensordict with any leading shape, also inside a ``Compose`` or a module.

    An existing entry under the mask's key, such as an env's own mask, is overwritten.

    If several keys of one tensordict hold images, as ``pixels`` and ``("next", "pixels")`` of a
    rollout do, equal frames are segmented once.

    Args:
        segmenter: See :class:`~w2f_torchrl.segmenters.Segmenter`. It is called without gradients
            and chooses the device it computes on; masks are on the device of the pixels. It is not
            a submodule: moving the transform does not move it.
        in_keys: Keys of images, uint8 ``[*B, 3, H, W]``.
        out_keys: Keys of the masks; by default ``foreground_mask`` next to each in-key.
        confidence: Whether the segmenter returns confidences instead of bool masks; None reads its
            attribute ``confidence``, and assumes bool without one.

    Raises:
        ValueError: If the numbers of keys differ.
        TypeError: When called, if pixels are not uint8, or masks do not have the announced dtype.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> transform = ForegroundMaskTransform(lambda pixels: pixels[:, :1] > 127)
        >>> pixels = torch.full((2, 5, 3, 8, 8), 200, dtype=torch.uint8)
        >>> transform(TensorDict({"pixels": pixels}, [2, 5]))["foreground_mask"].shape
        torch.Size([2, 5, 1, 8, 8])
    """

    def __init__(
        self,
        segmenter: Segmenter,
        in_keys: Sequence[NestedKey] = ("pixels",),
        out_keys: Sequence[NestedKey] | None = None,
        *,
        confidence: bool | None = None,
    ) -> None:
        if out_keys is None:
            out_keys = [_beside(key) for key in in_keys]
        if len(in_keys) != len(out_keys):
            raise ValueError(
                f"ForegroundMaskTransform needs one out-key for each in-key, got {list(in_keys)} "
                f"and {list(out_keys)}."
            )
        super().__init__(in_keys=list(in_keys), out_keys=list(out_keys))
        self.__dict__["segmenter"] = segmenter  # not as a submodule: see Args
        if confidence is None:
            confidence = bool(getattr(segmenter, "confidence", False))
        self.confidence = confidence
        self._made_by: str | None = None

    # ------------------------------------------------------------------ where TorchRL calls

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        """Write masks into the output of an env's step or reset."""
        self._made_by = self._made_by or "call"
        return self._write(next_tensordict)

    def _reset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        with _set_missing_tolerance(self, True):
            return self._call(tensordict_reset)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write masks into a tensordict; keep stored masks when a replay buffer samples."""
        return self._on_data(tensordict, "forward")

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write masks into data entering a replay buffer; ignore the input of an env's step."""
        if self._in_env():
            return tensordict
        return self._on_data(tensordict, "inverse")

    def _on_data(self, tensordict: TensorDictBase, direction: str) -> TensorDictBase:
        # A replay buffer calls one method when data is written (the inverse, or `_call` with
        # TorchRL's `invert=True`) and another when it is read. Data is written before it is read,
        # so the method that is called first is the one that must make masks.
        self._made_by = self._made_by or direction
        made = direction != self._made_by and all(
            tensordict.get(key, None) is not None for key in self.out_keys
        )
        return tensordict if made else self._write(tensordict)

    def _write(self, tensordict: TensorDictBase) -> TensorDictBase:
        present = [
            (in_key, out_key)
            for in_key, out_key in zip(self.in_keys, self.out_keys, strict=True)
            if self._has(tensordict, in_key)
        ]
        pictures = [tensordict.get(in_key) for in_key, _ in present]
        for (_, out_key), masks in zip(present, self._segment(pictures), strict=True):
            tensordict.set(out_key, masks)
        return tensordict

    def _in_env(self) -> bool:
        """Return whether an env holds this transform; TorchRL's way fails in replay buffers."""
        container: Any = self
        while container is not None and not isinstance(container, EnvBase):
            reference = container.__dict__.get("_container")
            container = reference() if reference is not None else None
        return container is not None

    def _has(self, tensordict: TensorDictBase, key: NestedKey) -> bool:
        if tensordict.get(key, None) is not None:
            return True
        if not self.missing_tolerance:
            raise KeyError(
                f"ForegroundMaskTransform reads {key!r}, but the tensordict has only "
                f"{sorted(map(str, tensordict.keys(True, True)))}."
            )
        return False

    # ------------------------------------------------------------------ masks

    def _apply_transform(self, pixels: Tensor) -> Tensor:
        return self._segment([pixels])[0]

    def _segment(self, pictures: list[Tensor]) -> list[Tensor]:
        """Segment tensors ``[*B, 3, H, W]``, those of the same size in one call."""
        if len({pixels.shape[-3:] for pixels in pictures}) > 1:
            return [self._apply_transform(pixels) for pixels in pictures]
        if not pictures:
            return []
        for pixels in pictures:  # checked like check_pixels, except for the leading dimensions
            check_tensor("pixels", pixels, torch.uint8, ("...", 3, "H", "W"), empty=True)
        flat = [p.reshape(p.shape[:-3].numel(), *p.shape[-3:]) for p in pictures]
        frames = torch.cat(flat) if len(flat) > 1 else flat[0]  # [N, 3, H, W]
        if not len(frames):
            dtype = torch.float32 if self.confidence else torch.bool
            masks = frames.new_empty((0, 1, *frames.shape[2:]), dtype=dtype)
        elif len(flat) > 1:
            first, inverse = _distinct(frames)
            masks = self._checked(frames[first])[inverse]
        else:
            masks = self._checked(frames)
        parts = masks.split([len(part) for part in flat])
        return [
            part.reshape(*pixels.shape[:-3], 1, *pixels.shape[-2:])
            for part, pixels in zip(parts, pictures, strict=True)
        ]

    def _checked(self, frames: Tensor) -> Tensor:
        """Call the segmenter and check that its output has the announced dtype."""
        with torch.no_grad():
            masks: Tensor = self.segmenter(frames)
        check_masks(masks, frames)
        if masks.is_floating_point() != self.confidence:
            promised = "confidences (float)" if self.confidence else "bool masks"
            raise TypeError(
                f"{type(self.segmenter).__name__} returned {masks.dtype}, but {promised} were "
                f"announced: pass confidence={not self.confidence} to ForegroundMaskTransform."
            )
        return masks.to(frames.device, torch.float32 if self.confidence else torch.bool)

    @_apply_to_composite  # type: ignore[untyped-decorator]
    def transform_observation_spec(self, observation_spec: TensorSpec) -> TensorSpec:
        """Return the masks' spec for the pixels' spec."""
        shape = (*observation_spec.shape[:-3], 1, *observation_spec.shape[-2:])
        device = observation_spec.device
        if self.confidence:
            return Bounded(0.0, 1.0, shape, dtype=torch.float32, device=device)
        return Binary(shape=shape, dtype=torch.bool, device=device)


class SAM3MaskTransform(ForegroundMaskTransform):
    """A :class:`ForegroundMaskTransform` with SAM3, which finds the foreground by text prompts.

    Args:
        prompts: Names of the foreground, such as ``["robot"]``; the masks of all prompts are
            united.
        checkpoint: Path of SAM3's weights; None loads them from Hugging Face (gated).
        resolution: Side of the square image that SAM3 receives, pixels: a multiple of 336 for the
            published weights. 336 costs a tenth of 1008.
        score_threshold: Minimum score of a detection, in [0, 1].
        device: Where SAM3 computes; None for CUDA if available, otherwise the CPU.
        in_keys: Keys of images, uint8 ``[*B, 3, H, W]``.
        out_keys: Keys of the masks; by default ``foreground_mask`` next to each in-key.
        **settings: Other settings of :class:`~w2f_torchrl.segmenters.Sam3Segmenter`, such as
            ``batch_size``, ``confidence`` or ``compile``.

    Raises:
        SegmenterUnavailableError: If the package, its vocabulary or the weights are missing; the
            message has the commands to get them.
        ValueError: If a setting is out of range.

    Examples:
        >>> transform = SAM3MaskTransform(["robot"], resolution=336)  # doctest: +SKIP
        >>> env.append_transform(transform)  # doctest: +SKIP
    """

    def __init__(
        self,
        prompts: Sequence[str],
        *,
        checkpoint: str | Path | None = None,
        resolution: int | None = 1008,
        score_threshold: float = 0.5,
        device: torch.device | str | None = None,
        in_keys: Sequence[NestedKey] = ("pixels",),
        out_keys: Sequence[NestedKey] | None = None,
        **settings: Any,
    ) -> None:
        segmenter = Sam3Segmenter(
            prompts,
            checkpoint=checkpoint,
            resolution=resolution,
            score_threshold=score_threshold,
            device=device,
            **settings,
        )
        super().__init__(segmenter, in_keys, out_keys)


def _beside(key: NestedKey) -> NestedKey:
    """Return the mask's key next to an image's: ``("next", "pixels")`` to ``("next", MASK)``."""
    key = unravel_key(key)
    return MASK if isinstance(key, str) else (*key[:-1], MASK)


def _distinct(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Find equal frames by a hash of their bytes.

    Args:
        frames: uint8 ``[N, ...]``.

    Returns:
        For each of M distinct frames the index of one such frame, int64 ``[M]``, and for each frame
        the row of its distinct frame, int64 ``[N]``.
    """
    size = frames[0].numel()
    generator = torch.Generator().manual_seed(size)
    factors = torch.randint(-(2**62), 2**62, (size,), generator=generator).to(frames.device)
    codes = torch.stack([(frame.flatten() * factors).sum() for frame in frames])  # wraps around
    _, inverse = codes.unique(return_inverse=True)
    first = torch.zeros(int(inverse.max()) + 1, dtype=torch.int64, device=frames.device)
    first[inverse] = torch.arange(len(frames), device=frames.device)
    return first, inverse

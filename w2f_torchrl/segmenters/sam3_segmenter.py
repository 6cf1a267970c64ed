"""SAM3 as a segmenter: batches of tensors in, combined masks out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from w2f_torchrl.segmenters import sam3
from w2f_torchrl.segmenters.base import check_masks, check_pixels
from w2f_torchrl.utils.checks import check_number
from w2f_torchrl.utils.stopping import check_stop

logger = logging.getLogger(__name__)

Box = tuple[float, float, float, float]


class Sam3Segmenter:
    """Segment the objects named by text prompts, with Meta's SAM3.

    A detection counts if its score, the query's times the prompt's presence, is above the
    threshold. Its mask is resized to the frame and thresholded at zero; the masks of all detections
    of all prompts are united. The prompts' text features are computed once and the text tower is
    dropped, so a frame costs 0.6 TFLOP at a resolution of 336 and 6 at 1008.

    Weights stay float32 and CUDA computes in bfloat16 by autocast (casting the weights would
    silently break the rotary position tables).

    Args:
        prompts: Names of the foreground, such as ``["robot"]``; at least one. Choose them with
            ``benchmarks/evidence/masks.py --prompts``.
        checkpoint: Path of the weights; None loads them from Hugging Face (gated).
        resolution: Side of the square image that SAM3 receives, pixels, a multiple of 336 for the
            published weights; None for the one that the weights were trained with (1008).
        score_threshold: Minimum score of a detection, in [0, 1].
        boxes: Boxes around the foreground in every frame, as (centre x, centre y, width, height) in
            [0, 1]; for cameras that follow the agent.
        examples: Example frames, uint8 ``[E, 3, H, W]``, and masks of their foreground, bool
            ``[E, 1, H, W]``. Each mask's box is encoded once, on its frame, and added to every
            prompt.
        confidence: Whether calls return confidences, float32 in [0, 1], instead of bool masks: the
            sigmoid of the highest mask logit among the detections, 0 without a detection.
        batch_size: Maximum number of frames per forward pass. If CUDA runs out of memory it is
            halved, with a warning, down to one frame.
        device: Where to compute; None for CUDA if available, otherwise the CPU.
        compile: Whether to compile the vision trunk (takes minutes at the first call).
        vocabulary: Path of the tokenizer's vocabulary; None for the one in open_clip_torch.

    Raises:
        SegmenterUnavailableError: If the package, its vocabulary or the weights are missing; the
            message has the commands to get them.
        ValueError: If a setting is out of range.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        *,
        checkpoint: str | Path | None = None,
        resolution: int | None = 1008,
        score_threshold: float = 0.5,
        boxes: Sequence[Box] | None = None,
        examples: tuple[Tensor, Tensor] | None = None,
        confidence: bool = False,
        batch_size: int = 32,
        device: torch.device | str | None = None,
        compile: bool = False,
        vocabulary: str | Path | None = None,
    ) -> None:
        self.prompts = _check_prompts(prompts)
        if not 0 <= score_threshold <= 1:
            raise ValueError(f"score_threshold={score_threshold} must be in [0, 1].")
        check_number("batch_size", batch_size, integer=True, minimum=1)
        self.boxes = _check_boxes(boxes)
        self.score_threshold = score_threshold
        self.confidence = confidence
        self.batch_size = batch_size
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.model, architecture = sam3.load_sam3(
            checkpoint, resolution=resolution, vocabulary=vocabulary, device=self.device
        )
        self.resolution = resolution or architecture.image_size
        self._text = self._encode_text()
        if examples is not None:
            self._append_examples(*examples)
        if compile:
            vision = self.model.backbone.vision_backbone
            vision.trunk.forward = torch.compile(vision.trunk.forward, fullgraph=True)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Find the foreground.

        Args:
            pixels: uint8 ``[N, 3, H, W]``.

        Returns:
            bool ``[N, 1, H, W]``, or float32 confidences in [0, 1], on the device of the pixels.
        """
        check_pixels(pixels)
        dtype = torch.float32 if self.confidence else torch.bool
        out = torch.empty((len(pixels), 1, *pixels.shape[2:]), dtype=dtype, device=pixels.device)
        start = 0
        while start < len(pixels):
            check_stop()
            stop = start + self.batch_size
            try:
                logits = self._mask_logits(pixels[start:stop])
            except torch.cuda.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                self.batch_size //= 2
                logger.warning("SAM3: out of memory, retrying with batch_size=%d", self.batch_size)
                continue
            out[start:stop] = logits.sigmoid() if self.confidence else logits > 0
            start = stop
        return out

    def _mask_logits(self, pixels: Tensor) -> Tensor:
        """Return the highest mask logit of all detections: float32 ``[N, 1, H, W]``, or -inf."""
        with self._autocast():
            found = sam3.ground(self.model, self._features(pixels), self._text, self.boxes)
        detected = found["scores"] > self.score_threshold  # [N, P, Q]
        logits = found["mask_logits"].flatten(1, 2)  # [N, P * Q, h, w]
        # The logit of no detection is far below zero, but finite: resizing mixes neighbours.
        logits = logits.masked_fill(~detected.flatten(1, 2)[..., None, None], -1e4)
        united = logits.amax(1, keepdim=True)
        return interpolate(united, pixels.shape[-2:], mode="bilinear", align_corners=False)

    def _features(self, pixels: Tensor) -> dict[str, Any]:
        size = (self.resolution, self.resolution)
        images = interpolate(
            pixels.to(self.device).float(), size, mode="bilinear", antialias=True
        ).round_()
        features: dict[str, Any] = self.model.backbone.forward_image(images / 127.5 - 1)
        return features

    @torch.no_grad()
    def _encode_text(self) -> dict[str, Tensor]:
        """Encode the prompts, then free the text tower: 354 of 840 million parameters."""
        with self._autocast():
            text = self.model.backbone.forward_text(list(self.prompts), device=self.device)
        self.model.backbone.language_backbone = None
        return {name: text[name].clone() for name in ("language_features", "language_mask")}

    @torch.no_grad()
    def _append_examples(self, frames: Tensor, masks: Tensor) -> None:
        """Add the examples to every prompt: their tokens follow the text's."""
        check_pixels(frames)
        check_masks(masks, frames)
        features, padding = [self._text["language_features"]], [self._text["language_mask"]]
        count = len(self.prompts)
        for frame, mask in zip(frames, masks, strict=True):
            with self._autocast():
                tokens, padded = sam3.encode_example(
                    self.model, self._features(frame.unsqueeze(0)), mask_box(mask > 0.5)
                )
            features.append(tokens.expand(-1, count, -1))
            padding.append(padded.expand(count, -1))
        self._text = {
            "language_features": torch.cat(features),
            "language_mask": torch.cat(padding, 1),
        }

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")


def mask_box(mask: Tensor) -> Tensor:
    """Return a mask's box: bool ``[1, H, W]`` to (centre x, centre y, width, height) in [0, 1].

    Raises:
        ValueError: If the mask is empty.
    """
    rows, columns = mask[0].any(1).nonzero(), mask[0].any(0).nonzero()
    if not len(rows):
        raise ValueError("an example's mask is empty: it must show some foreground.")
    top, bottom = int(rows.min()), int(rows.max()) + 1
    left, right = int(columns.min()), int(columns.max()) + 1
    height, width = mask.shape[1:]
    corners = torch.tensor([left / width, top / height, right / width, bottom / height])
    return torch.cat([(corners[:2] + corners[2:]) / 2, corners[2:] - corners[:2]])


def _check_prompts(prompts: Sequence[str]) -> tuple[str, ...]:
    if isinstance(prompts, str) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"prompts={prompts!r} must be a list of texts, such as ['robot'].")
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError(f"prompts={list(prompts)!r}: a prompt must not be empty.")
    return tuple(prompts)


def _check_boxes(boxes: Sequence[Box] | None) -> Tensor | None:
    if not boxes:
        return None
    tensor = torch.tensor(boxes, dtype=torch.float32)
    if tensor.ndim != 2 or tensor.shape[1] != 4 or not ((tensor >= 0) & (tensor <= 1)).all():
        raise ValueError(
            f"boxes={list(boxes)!r} must be (centre x, centre y, width, height) each, in [0, 1]."
        )
    return tensor

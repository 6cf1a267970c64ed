"""The model of the ``sam3`` package and its weights. Only this file and ``sam3_parts`` import it.

The package (0.1.4) is written for one CUDA device and single PIL images. The model is therefore
assembled here from its classes, which run on any device and at any size: the published one, or a
tiny one for tests and dry runs. Three traps are avoided: importing the package switches TF32 on, it
requests pinned memory even without CUDA, and the rotary tables in a checkpoint are valid for only
one resolution.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, nn

from w2f_torchrl.segmenters.sam3_parts import (
    PATCH,
    TINY,
    Sam3Architecture,
    backbone,
    geometry_encoder,
    scoring,
    segmentation_head,
    transformer,
    tuples,
)
from w2f_torchrl.segmenters.sam3_requirements import (
    SegmenterUnavailableError,
    find_vocabulary,
    find_weights,
    require_package,
)

if TYPE_CHECKING:
    from sam3.model.sam3_image import Sam3Image


def load_sam3(
    checkpoint: str | Path | None,
    *,
    resolution: int | None,
    vocabulary: str | Path | None,
    device: torch.device,
) -> tuple[Sam3Image, Sam3Architecture]:
    """Build the model at a working resolution, with its weights, on a device.

    Args:
        checkpoint: Path of the weights; None loads them from Hugging Face.
        resolution: Working resolution, pixels; None for the one that the model was trained on.
        vocabulary: Path of the tokenizer's vocabulary; None for open_clip's.
        device: Device of the model.

    Raises:
        SegmenterUnavailableError: If the package, the vocabulary or the weights are missing, or the
            file has the wrong weights.
        ValueError: If the resolution is not a multiple of the model's step.
    """
    require_package()
    vocabulary = find_vocabulary(vocabulary)
    path = find_weights(checkpoint)
    try:
        document = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise SegmenterUnavailableError(f"{path} holds no weights: {error}") from error
    sizes = document.get("architecture", {})  # in our files, but not in the published one
    architecture = Sam3Architecture(**sizes | tuples(sizes))
    model = build_sam3(architecture, resolution=resolution, vocabulary=vocabulary)
    _load_weights(model, document.get("model", document), path)
    return model.to(device).eval().requires_grad_(False), architecture


def build_sam3(
    architecture: Sam3Architecture, *, resolution: int | None, vocabulary: Path
) -> Sam3Image:
    """Assemble a model from the package's classes, with random weights, on the CPU.

    The rotary tables are computed for the working resolution.
    """
    step = architecture.resolution_step
    resolution = architecture.image_size if resolution is None else resolution
    if resolution < step or resolution % step:
        raise ValueError(
            f"resolution={resolution} must be a positive multiple of {step} (patches of {PATCH} "
            f"pixels in windows of {architecture.window}), such as {step} or {2 * step}."
        )
    with _unchanged_tf32():
        from sam3.model.sam3_image import Sam3Image
    a = architecture
    model = Sam3Image(
        backbone=backbone(a, resolution, vocabulary),
        transformer=transformer(a),
        input_geometry_encoder=geometry_encoder(a),
        segmentation_head=segmentation_head(a),
        dot_prod_scoring=scoring(a),
        use_instance_query=False,
    )
    for name in ("positional_embedding", "text_projection"):  # uninitialised memory otherwise
        nn.init.normal_(getattr(model.backbone.language_backbone.encoder, name), std=0.02)
    return model


def save_tiny_sam3(path: str | Path, seed: int = 0) -> Path:
    """Write a tiny model with random weights, for tests and dry runs.

    Its masks are meaningless. It needs the package and the vocabulary, as the real one does.
    """
    require_package()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_sam3(TINY, resolution=None, vocabulary=find_vocabulary())
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"architecture": asdict(TINY), "model": dict(model.state_dict())}, path)
    return path


def make_prompt(boxes: Tensor | None, count: int, device: torch.device) -> Any:
    """Make the package's geometric prompt: the same boxes for each of ``count`` queries.

    Args:
        boxes: float32 ``[K, 4]``: centre x, centre y, width, height, in [0, 1]; None for none.
        count: Images times prompts.
        device: Device of the model.
    """
    from sam3.model.geometry_encoders import Prompt

    boxes = torch.zeros(0, 4) if boxes is None else boxes
    return Prompt(
        box_embeddings=boxes.to(device).unsqueeze(1).expand(-1, count, -1),  # [K, count, 4]
        box_mask=torch.zeros(count, len(boxes), dtype=torch.bool, device=device),
    )


def ground(
    model: Sam3Image,
    features: dict[str, Any],
    text: dict[str, Tensor],
    boxes: Tensor | None,
) -> dict[str, Tensor]:
    """Detect every prompt in every image, in one pass.

    Args:
        model: From :func:`load_sam3`.
        features: Output of its vision backbone for N images.
        text: ``language_features`` ``[L, P, D]`` and ``language_mask`` ``[P, L]``.
        boxes: See :func:`make_prompt`.

    Returns:
        ``scores`` float ``[N, P, Q]`` in [0, 1] and ``mask_logits`` ``[N, P, Q, h, w]`` of the Q
        queries.
    """
    from sam3.model.data_misc import FindStage

    device = model.device
    pictures, prompts = len(features["vision_features"]), text["language_mask"].shape[0]
    stage = FindStage(
        img_ids=torch.arange(pictures, device=device).repeat_interleave(prompts),
        text_ids=torch.arange(prompts, device=device).repeat(pictures),
        input_boxes=None,
        input_boxes_mask=None,
        input_boxes_label=None,
        input_points=None,
        input_points_mask=None,
    )
    with no_pinning(device):
        found = model.forward_grounding(
            backbone_out=features | text,
            find_input=stage,
            find_target=None,
            geometric_prompt=make_prompt(boxes, pictures * prompts, device),
        )
    presence = found["presence_logit_dec"].float().sigmoid()  # [N * P, 1]
    scores = found["pred_logits"].float().sigmoid().squeeze(-1) * presence
    shape = (pictures, prompts, -1)
    logits = found["pred_masks"].float()
    return {
        "scores": scores.view(shape),
        "mask_logits": logits.view(*shape, *logits.shape[-2:]),
    }


def encode_example(
    model: Sam3Image, features: dict[str, Any], box: Tensor
) -> tuple[Tensor, Tensor]:
    """Encode a box on one image with the geometry encoder, for use with other images.

    Args:
        model: From :func:`load_sam3`.
        features: Output of its vision backbone for the one image.
        box: float32 ``[4]``, see :func:`make_prompt`.

    Returns:
        Tokens ``[L, 1, D]`` and their padding mask bool ``[1, L]``.
    """
    device = model.device
    maps, positions = features["backbone_fpn"][-1:], features["vision_pos_enc"][-1:]
    rows: Sequence[list[Tensor]] = [
        [item.flatten(2).permute(2, 0, 1) for item in items] for items in (maps, positions)
    ]
    with no_pinning(device):
        tokens, padding = model.geometry_encoder(
            geo_prompt=make_prompt(box.unsqueeze(0), 1, device),
            img_feats=rows[0],
            img_sizes=[item.shape[-2:] for item in maps],
            img_pos_embeds=rows[1],
        )
    return tokens, padding


def _load_weights(model: Sam3Image, weights: dict[str, Tensor], path: Path) -> None:
    prefix = "detector."  # the published file also holds the video tracker
    weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    wanted = model.state_dict()
    tables = {name for name in wanted if name.endswith("freqs_cis")}
    missing = sorted(wanted.keys() - weights.keys() - tables)
    wrong = [
        name
        for name in sorted(wanted.keys() & weights.keys() - tables)
        if wanted[name].shape != weights[name].shape
    ]
    if missing or wrong:
        raise SegmenterUnavailableError(
            f"{path} does not hold the weights of this SAM3 model: {len(missing)} are missing and "
            f"{len(wrong)} have another shape, for example {(missing + wrong)[0]}."
        )
    kept = {name: weights[name] for name in wanted.keys() - tables}
    model.load_state_dict(kept, strict=False)


@contextlib.contextmanager
def _unchanged_tf32() -> Iterator[None]:
    """Import the package, and undo its switching TF32 on for the whole process."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextlib.contextmanager
def no_pinning(device: torch.device) -> Iterator[None]:
    """Let the geometry encoder request pinned memory on a machine without it."""
    if device.type == "cuda":
        yield
        return
    with mock.patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor):
        yield

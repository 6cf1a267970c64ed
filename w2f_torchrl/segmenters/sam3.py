"""The model of the ``sam3`` package and its weights. No other file imports the package.

The package (0.1.4) is written for one CUDA device and single PIL images. The model is therefore
assembled here from its classes, which run on any device and at any size: the published one, or a
tiny one for tests and dry runs. Three traps are avoided: importing the package switches TF32 on, it
requests pinned memory even without CUDA, and the rotary tables in a checkpoint are valid for only
one resolution.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, nn

from w2f_torchrl.segmenters.sam3_requirements import (
    SegmenterUnavailableError,
    find_vocabulary,
    find_weights,
    require_package,
)

if TYPE_CHECKING:
    from sam3.model.sam3_image import Sam3Image

PATCH = 14


@dataclass(frozen=True)
class Sam3Architecture:
    """The sizes of a SAM3 image model; the defaults are the published ones."""

    image_size: int = 1008
    """Side of the images that the model was trained on, pixels."""
    vision_width: int = 1024
    vision_depth: int = 32
    vision_heads: int = 16
    global_blocks: tuple[int, ...] = (7, 15, 23, 31)
    """Blocks that attend over the whole image; the others attend within windows."""
    window: int = 24
    """Side of a window, in patches of 14 pixels."""
    mlp_ratio: float = 4.625
    width: int = 256
    heads: int = 8
    hidden: int = 2048
    layers: int = 6
    """Layers of the encoder, and of the decoder."""
    geometry_layers: int = 3
    queries: int = 200
    text_width: int = 1024
    text_heads: int = 16
    text_layers: int = 24

    @property
    def resolution_step(self) -> int:
        """Working resolutions must be multiples of this: whole windows of patches."""
        return PATCH * self.window


#: Small enough for tests: 1.8 M parameters, nearly all of them the vocabulary's.
TINY = Sam3Architecture(
    image_size=112,
    vision_width=32,
    vision_depth=2,
    vision_heads=2,
    global_blocks=(1,),
    window=4,
    mlp_ratio=2.0,
    width=32,
    heads=2,
    hidden=64,
    layers=1,
    geometry_layers=1,
    queries=10,
    text_width=32,
    text_heads=2,
    text_layers=1,
)


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
    architecture = Sam3Architecture(**sizes | _tuples(sizes))
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
        backbone=_backbone(a, resolution, vocabulary),
        transformer=_transformer(a),
        input_geometry_encoder=_geometry_encoder(a),
        segmentation_head=_segmentation_head(a),
        dot_prod_scoring=_scoring(a),
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


def _tuples(sizes: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) for name, value in sizes.items() if isinstance(value, list)}


# ------------------------------------------------------------------ the model's parts


def _backbone(a: Sam3Architecture, resolution: int, vocabulary: Path) -> Any:
    from sam3.model.necks import Sam3DualViTDetNeck
    from sam3.model.text_encoder_ve import VETextEncoder
    from sam3.model.tokenizer_ve import SimpleTokenizer
    from sam3.model.vitdet import ViT
    from sam3.model.vl_combiner import SAM3VLBackbone

    trunk = ViT(
        img_size=resolution,
        pretrain_img_size=PATCH * a.window,
        patch_size=PATCH,
        embed_dim=a.vision_width,
        depth=a.vision_depth,
        num_heads=a.vision_heads,
        mlp_ratio=a.mlp_ratio,
        global_att_blocks=a.global_blocks,
        rel_pos_blocks=(),
        use_rope=True,
        use_interp_rope=True,
        window_size=a.window,
        retain_cls_token=False,
        ln_pre=True,
        bias_patch_embed=False,
    )
    neck = Sam3DualViTDetNeck(
        position_encoding=_position_encoding(a),
        d_model=a.width,
        scale_factors=[4.0, 2.0, 1.0, 0.5],
        trunk=trunk,
    )
    text = VETextEncoder(
        tokenizer=SimpleTokenizer(bpe_path=str(vocabulary)),
        d_model=a.width,
        width=a.text_width,
        heads=a.text_heads,
        layers=a.text_layers,
    )
    return SAM3VLBackbone(visual=neck, text=text, scalp=1)


def _position_encoding(a: Sam3Architecture) -> Any:
    from sam3.model.position_encoding import PositionEmbeddingSine

    return PositionEmbeddingSine(num_pos_feats=a.width)


def _attention(a: Sam3Architecture, *, batch_first: bool, dropout: float = 0.1) -> Any:
    from sam3.model.model_misc import MultiheadAttentionWrapper

    return MultiheadAttentionWrapper(
        embed_dim=a.width, num_heads=a.heads, dropout=dropout, batch_first=batch_first
    )


def _encoder_layer(a: Sam3Architecture, *, batch_first: bool, geometry: bool) -> Any:
    """A layer of the fusion encoder, or of the geometry encoder."""
    from sam3.model.encoder import TransformerEncoderLayer

    return TransformerEncoderLayer(
        activation="relu",
        d_model=a.width,
        dim_feedforward=a.hidden,
        dropout=0.1,
        pos_enc_at_attn=not geometry,
        pos_enc_at_cross_attn_keys=geometry,
        pos_enc_at_cross_attn_queries=False,
        pre_norm=True,
        self_attention=_attention(a, batch_first=batch_first),
        cross_attention=_attention(a, batch_first=batch_first),
    )


def _transformer(a: Sam3Architecture) -> Any:
    from sam3.model.decoder import TransformerDecoder, TransformerDecoderLayer
    from sam3.model.encoder import TransformerEncoderFusion
    from sam3.model.model_misc import TransformerWrapper

    encoder = TransformerEncoderFusion(
        layer=_encoder_layer(a, batch_first=True, geometry=False),
        num_layers=a.layers,
        d_model=a.width,
        num_feature_levels=1,
        add_pooled_text_to_img_feat=False,
        pool_text_with_mask=True,
    )
    decoder = TransformerDecoder(
        layer=TransformerDecoderLayer(
            activation="relu",
            d_model=a.width,
            dim_feedforward=a.hidden,
            dropout=0.1,
            cross_attention=_attention(a, batch_first=False),
            n_heads=a.heads,
            use_text_cross_attention=True,
        ),
        num_layers=a.layers,
        num_queries=a.queries,
        return_intermediate=True,
        box_refine=True,
        num_o2m_queries=0,
        dac=True,
        boxRPB="log",
        d_model=a.width,
        frozen=False,
        interaction_layer=None,
        dac_use_selfatt_ln=True,
        presence_token=True,
    )
    return TransformerWrapper(encoder=encoder, decoder=decoder, d_model=a.width)


def _geometry_encoder(a: Sam3Architecture) -> Any:
    from sam3.model.geometry_encoders import SequenceGeometryEncoder

    return SequenceGeometryEncoder(
        pos_enc=_position_encoding(a),
        encode_boxes_as_points=False,
        points_direct_project=True,
        points_pool=True,
        points_pos_enc=True,
        boxes_direct_project=True,
        boxes_pool=True,
        boxes_pos_enc=True,
        d_model=a.width,
        num_layers=a.geometry_layers,
        layer=_encoder_layer(a, batch_first=False, geometry=True),
    )


def _segmentation_head(a: Sam3Architecture) -> Any:
    from sam3.model.maskformer_segmentation import PixelDecoder, UniversalSegmentationHead

    return UniversalSegmentationHead(
        hidden_dim=a.width,
        upsampling_stages=3,
        aux_masks=False,
        presence_head=False,
        dot_product_scorer=None,
        act_ckpt=True,
        cross_attend_prompt=_attention(a, batch_first=False, dropout=0.0),
        pixel_decoder=PixelDecoder(
            num_upsampling_stages=3, interpolation_mode="nearest", hidden_dim=a.width
        ),
    )


def _scoring(a: Sam3Architecture) -> Any:
    from sam3.model.model_misc import MLP, DotProductScoring

    prompt_mlp = MLP(
        input_dim=a.width,
        hidden_dim=a.hidden,
        output_dim=a.width,
        num_layers=2,
        dropout=0.1,
        residual=True,
        out_norm=nn.LayerNorm(a.width),
    )
    return DotProductScoring(d_model=a.width, d_proj=a.width, prompt_mlp=prompt_mlp)

"""The parts of SAM3's model, assembled from the classes of the ``sam3`` package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

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


def tuples(sizes: dict[str, Any]) -> dict[str, Any]:
    """Return the sizes with lists, which JSON and YAML have, as tuples."""
    return {name: tuple(value) for name, value in sizes.items() if isinstance(value, list)}


# ------------------------------------------------------------------ the model's parts


def backbone(a: Sam3Architecture, resolution: int, vocabulary: Path) -> Any:
    """Build the vision trunk and the text encoder."""
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


def transformer(a: Sam3Architecture) -> Any:
    """Build the encoder and the decoder."""
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


def geometry_encoder(a: Sam3Architecture) -> Any:
    """Build the encoder of boxes and example masks."""
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


def segmentation_head(a: Sam3Architecture) -> Any:
    """Build the head that makes masks."""
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


def scoring(a: Sam3Architecture) -> Any:
    """Build the head that scores queries against the prompt."""
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

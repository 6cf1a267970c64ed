"""The paper's sizes of the networks, by name."""

from __future__ import annotations

from w2f_torchrl.config.model import ModelConfig


def _preset(
    name: str, belief: int, hidden: int, classes: int, depth: int, background: tuple[int, ...]
) -> ModelConfig:
    return ModelConfig(
        preset=name,
        belief_size=belief,
        hidden_size=hidden,
        num_classes=classes,
        cnn_depth=depth,
        units=hidden,
        background_belief_size=background[0],
        background_hidden_size=background[1],
        background_num_classes=background[2],
        background_cnn_depth=background[3],
    )


#: The paper's sizes by name. The background's sizes are ours: about a quarter of the belief and
#: half of the other widths, since scenery needs no actions, rewards or plans.
PRESETS: dict[str, ModelConfig] = {
    config.preset: config
    for config in (
        _preset("size1m", 512, 64, 4, 4, (256, 64, 4, 4)),
        _preset("size12m", 2048, 256, 16, 16, (512, 128, 16, 8)),
        _preset("size25m", 3072, 384, 24, 24, (768, 192, 24, 12)),
        _preset("size50m", 4096, 512, 32, 32, (1024, 256, 32, 16)),
        _preset("size100m", 6144, 768, 48, 48, (1536, 384, 48, 24)),
        _preset("size200m", 8192, 1024, 64, 64, (2048, 512, 64, 32)),
        _preset("size400m", 12288, 1536, 96, 96, (3072, 768, 96, 48)),
    )
}

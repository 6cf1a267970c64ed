"""Sizes of the world model and of the actor and critic, and the named presets."""

from __future__ import annotations

from dataclasses import dataclass, fields

from w2f_torchrl.utils.checks import check_fields, check_number

#: Where the mask decides what is learned: see :func:`w2f_torchrl.modules.build_world_model`.
LATENTS = ("split", "shared", "foreground")

#: Whether the background of latent ``split`` has an encoder of its own.
BACKGROUND_ENCODERS = ("own", "shared")

#: Forms of the image decoder.
DECODERS = ("reference", "torchrl")

#: How encoders halve pictures and decoders double them.
RESAMPLINGS = ("stride", "nearest", "reference")


@dataclass
class ModelConfig:
    """Widths and depths of every network.

    The defaults that the presets share are the paper's: 32 categoricals, 8 blocks in the GRU,
    1 dynamics, 2 prior and 1 posterior layers, convolutions of kernel 5 with multipliers
    2, 3, 4, 4, reward and continuation heads of one layer, actor and critic of three
    (DreamerV3, Nature 2025, methods and extended tables).
    """

    preset: str = "size12m"
    """Name of the preset that the sizes are from; only a label."""
    belief_size: int = 2048
    """D, features of the deterministic recurrent belief; a multiple of ``num_blocks``."""
    hidden_size: int = 256
    """Features of the RSSM's hidden layers."""
    num_categoricals: int = 32
    """K, number of categorical variables of the stochastic state."""
    num_classes: int = 16
    """Classes of each categorical; the state has S = K x classes features."""
    cnn_depth: int = 16
    """Base channels of encoder and decoder."""
    units: int = 256
    """Units of each layer of reward, continuation, actor and critic; the state's layer in the
    reference decoder has twice as many."""
    background_belief_size: int = 512
    """Features of the belief of the background RSSM (latent ``split`` only)."""
    background_hidden_size: int = 128
    """Hidden features of the background RSSM (latent ``split`` only), and the units of the
    background's decoder."""
    background_num_classes: int = 16
    """Classes of each categorical of the background state (latent ``split`` only)."""
    background_cnn_depth: int = 8
    """Base channels of the background's decoder, and of its encoder if it has one."""
    decoder: str = "reference"
    """reference: belief and state enter the decoder by layers of their own, and colours end in a
    sigmoid, as in the paper's code; torchrl: TorchRL's decoder, one layer for both and unbounded
    colours."""
    resample: str = "nearest"
    """How pictures are halved and doubled. stride: by convolutions of stride 2 and transposed ones;
    nearest: by convolutions of stride 2, and by nearest neighbours with convolutions of stride 1;
    reference: as the paper's code does, by convolutions of stride 1 with max-pooling, and by
    nearest neighbours."""
    background_encoder: str = "own"
    """own: the background has an encoder of its own (latent ``split`` only), so that the scenery
    neither fills the foreground's encoder nor has a say in what it learns; shared: both latents
    read one encoder."""
    num_blocks: int = 8
    """Blocks of the belief's recurrent layer, each with weights of its own."""
    dynamics_layers: int = 1
    """Layers of the recurrence before its gates."""
    prior_layers: int = 2
    """Layers of the prior, from the belief to the state."""
    posterior_layers: int = 1
    """Layers of the posterior, from belief and embedding to the state."""
    head_layers: int = 1
    """Layers of the reward's and of the continuation's head."""
    actor_critic_layers: int = 3
    """Layers of actor and critic."""
    kernel_size: int = 5
    """Side of the convolutions' kernels, pixels, odd: 3 or more, for a stride of 2."""
    cnn_multipliers: tuple[int, ...] = (2, 3, 4, 4)
    """Factors of the base channels, one for each stage that halves the picture."""
    unimix: float = 0.01
    """Share of the uniform distribution in every categorical, in [0, 1)."""
    num_bins: int = 255
    """Bins of the two-hot distributions of reward and value; an odd number."""

    @property
    def state_size(self) -> int:
        """S, features of the stochastic state."""
        return self.num_categoricals * self.num_classes

    @property
    def background_state_size(self) -> int:
        """Features of the background's stochastic state."""
        return self.num_categoricals * self.background_num_classes

    @property
    def image_factor(self) -> int:
        """The image's sides must be multiples of this, one halving a stage."""
        return int(2 ** len(self.cnn_multipliers))

    def validate(self, image_size: int) -> None:
        """Raise ``ValueError`` naming the first size that can't be built.

        Args:
            image_size: Side of the square image, pixels.
        """
        check_fields("model", self)
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int):
                check_number(f"model.{field.name}", value, minimum=1)
        if not self.cnn_multipliers:
            raise ValueError("model.cnn_multipliers=[] must hold one factor or more.")
        for factor in self.cnn_multipliers:
            check_number("model.cnn_multipliers", factor, integer=True, minimum=1)
        for name in ("belief_size", "background_belief_size"):
            if getattr(self, name) % self.num_blocks:
                raise ValueError(
                    f"model.{name}={getattr(self, name)} must be a multiple of "
                    f"model.num_blocks={self.num_blocks}."
                )
        if self.kernel_size < 3 or self.kernel_size % 2 == 0:
            raise ValueError(
                f"model.kernel_size={self.kernel_size} must be odd and at least 3: at a stride of "
                "2, a kernel of 1 would never see three of four pixels."
            )
        for name, allowed in (
            ("background_encoder", BACKGROUND_ENCODERS),
            ("decoder", DECODERS),
            ("resample", RESAMPLINGS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"model.{name}={getattr(self, name)!r} is unknown; allowed: "
                    f"{', '.join(allowed)}."
                )
        if self.num_bins < 3 or self.num_bins % 2 == 0:
            raise ValueError(
                f"model.num_bins={self.num_bins} must be odd and at least 3: bins below, at and "
                "above 0."
            )
        check_number("model.unimix", self.unimix, minimum=0, below=1)
        check_number("environment.image_size", image_size, integer=True, minimum=1)
        if image_size % self.image_factor:
            raise ValueError(
                f"environment.image_size={image_size} must be a multiple of {self.image_factor}, "
                f"since the decoder doubles the picture {len(self.cnn_multipliers)} times."
            )


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


#: The paper's sizes by name. The background's are ours: about a quarter of the belief and half
#: of the other widths, since scenery needs no actions, rewards or plans.
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

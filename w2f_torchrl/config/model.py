"""Sizes of the world model and of the actor and critic, and the named presets."""

from __future__ import annotations

from dataclasses import dataclass

from w2f_torchrl.config.observations import ObservationSettings
from w2f_torchrl.registry import decoders, encoders
from w2f_torchrl.utils.checks import check_number
from w2f_torchrl.utils.settings import check_fields, setting

#: How the mask divides the latent: see :func:`w2f_torchrl.modules.build_world_model`.
LATENTS = ("split", "shared", "foreground")

#: Whether the background of latent ``split`` has its own encoder.
BACKGROUND_ENCODERS = ("own", "shared")

#: Forms of the image decoder.
DECODERS = decoders.builtin

#: How encoders halve images and decoders double them.
RESAMPLINGS = ("stride", "nearest", "reference")


@dataclass
class ModelConfig(ObservationSettings):
    """Widths and depths of every network.

    The defaults that the presets share are the paper's: 32 categoricals, 8 blocks in the GRU,
    1 dynamics, 2 prior and 1 posterior layers, convolutions of kernel 5 with multipliers
    2, 3, 4, 4, reward and continuation heads of one layer, actor and critic of three
    (DreamerV3, Nature 2025, methods and extended tables).
    """

    preset: str = setting("size12m", "Name of the preset that the sizes are from; only a label.")
    belief_size: int = setting(
        2048,
        "D, features of the deterministic recurrent belief; a multiple of ``num_blocks``.",
        unit="features",
        minimum=1,
    )
    hidden_size: int = setting(
        256, "Features of the RSSM's hidden layers.", unit="features", minimum=1
    )
    num_categoricals: int = setting(
        32,
        "K, number of categorical variables in the stochastic state.",
        unit="categoricals",
        minimum=1,
    )
    num_classes: int = setting(
        16,
        "Classes of each categorical; the state has S = K x classes features.",
        unit="classes",
        minimum=1,
    )
    cnn_depth: int = setting(
        16, "Base channels of encoder and decoder.", unit="channels", minimum=1
    )
    units: int = setting(
        256,
        "Units in each layer of reward, continuation, actor and critic. The state's layer in the "
        "reference decoder has twice as many.",
        unit="units",
        minimum=1,
    )
    background_belief_size: int = setting(
        512,
        "Features of the background RSSM's belief (latent ``split`` only).",
        unit="features",
        minimum=1,
    )
    background_hidden_size: int = setting(
        128,
        "Hidden features of the background RSSM (latent ``split`` only), and units of the "
        "background's decoder.",
        unit="features",
        minimum=1,
    )
    background_num_classes: int = setting(
        16,
        "Classes of each categorical of the background state (latent ``split`` only).",
        unit="classes",
        minimum=1,
    )
    background_cnn_depth: int = setting(
        8,
        "Base channels of the background's decoder, and of its encoder if it has one.",
        unit="channels",
        minimum=1,
    )
    encoder: str = setting(
        "convolutional", "Network that turns images into embeddings.", registry=encoders
    )
    decoder: str = setting(
        "reference",
        "reference: belief and state enter the decoder through separate layers and colours pass "
        "through a sigmoid, as in the paper's code; torchrl: TorchRL's decoder, with one layer for "
        "both and unbounded colours.",
        registry=decoders,
    )
    resample: str = setting(
        "nearest",
        "How images are halved and doubled. stride: convolutions and transposed convolutions of "
        "stride 2; nearest: convolutions of stride 2, and nearest-neighbour upsampling followed by "
        "convolutions of stride 1; reference: as in the paper's code, convolutions of stride 1 "
        "with max-pooling, and nearest-neighbour upsampling.",
        choices=RESAMPLINGS,
    )
    background_encoder: str = setting(
        "own",
        "own: the background has a separate encoder (latent ``split`` only), so that the scenery "
        "neither takes up capacity of the foreground's encoder nor affects what it learns; shared: "
        "both latents read one encoder.",
        choices=BACKGROUND_ENCODERS,
    )
    num_blocks: int = setting(
        8,
        "Blocks of the belief's recurrent layer, each with separate weights.",
        unit="blocks",
        minimum=1,
    )
    dynamics_layers: int = setting(
        1, "Layers of the recurrence before its gates.", unit="layers", minimum=1
    )
    prior_layers: int = setting(
        2, "Layers of the prior, from the belief to the state.", unit="layers", minimum=1
    )
    posterior_layers: int = setting(
        1,
        "Layers of the posterior, from belief and embedding to the state.",
        unit="layers",
        minimum=1,
    )
    head_layers: int = setting(
        1, "Layers of the reward and continuation heads.", unit="layers", minimum=1
    )
    actor_critic_layers: int = setting(3, "Layers of actor and critic.", unit="layers", minimum=1)
    kernel_size: int = setting(
        5,
        "Side of the convolution kernels. At a stride of 2, a kernel of 1 would miss three out of "
        "four pixels.",
        unit="pixels",
        minimum=3,
        odd=True,
    )
    cnn_multipliers: tuple[int, ...] = setting(
        (2, 3, 4, 4),
        "Factors of the base channels, one for each stage that halves the image.",
        unit="factor",
        minimum=1,
    )
    unimix: float = setting(
        0.01,
        "Share of the uniform distribution in every categorical.",
        unit="share",
        minimum=0,
        below=1,
    )
    num_bins: int = setting(
        255,
        "Bins of the two-hot distributions of reward and value: one at 0, and as many below as "
        "above.",
        unit="bins",
        minimum=3,
        odd=True,
    )

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
        """The image's sides must be multiples of this: each stage halves them."""
        return int(2 ** len(self.cnn_multipliers))

    def validate(self, image_size: int) -> None:
        """Raise ``ValueError`` naming the first size that cannot be built.

        Args:
            image_size: Side of the square image, pixels.
        """
        check_fields("model", self)
        if not self.cnn_multipliers:
            raise ValueError("model.cnn_multipliers=[] must hold at least one factor.")
        for name in ("belief_size", "background_belief_size"):
            if getattr(self, name) % self.num_blocks:
                raise ValueError(
                    f"model.{name}={getattr(self, name)} must be a multiple of "
                    f"model.num_blocks={self.num_blocks}."
                )
        check_number("environment.image_size", image_size, integer=True, minimum=1)
        if image_size % self.image_factor:
            raise ValueError(
                f"environment.image_size={image_size} must be a multiple of {self.image_factor}, "
                f"since the decoder doubles the image {len(self.cnn_multipliers)} times."
            )

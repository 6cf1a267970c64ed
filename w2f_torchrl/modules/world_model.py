"""The world model: encoder, recurrent latents, decoders, reward and continuation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import Tensor, nn
from torchrl.modules import RSSMPosteriorV3, RSSMPriorV3

from w2f_torchrl.config.model import LATENTS, PRESETS, ModelConfig
from w2f_torchrl.modules.convolution import ImageEncoder
from w2f_torchrl.modules.dual_decoder import DualImageDecoder
from w2f_torchrl.modules.layers import MLP
from w2f_torchrl.modules.packed_latents import (
    INITIAL,
    pack_belief,
    pack_state,
    unpack_belief,
    unpack_state,
)
from w2f_torchrl.modules.reference_decoder import build_image_decoder
from w2f_torchrl.modules.rssm import RSSMRollout
from w2f_torchrl.modules.two_hot import TwoHot
from w2f_torchrl.utils.checks import check_number
from w2f_torchrl.utils.tensors import FLOATING, check_tensor

Latent = Literal["whole", "split", "shared", "foreground"]


class WorldModel(TensorDictModuleBase):
    """DreamerV3's world model, with one latent or with one for the agent and one for the scenery.

    Reads records ``[B, T]``: ``action`` (the one that led to the observation), ``is_init`` and
    ``("next", "pixels")``. Writes under ``next``: ``state``, ``belief``, ``prior_logits``,
    ``posterior_logits``, the reconstructions, ``reward_logits`` and ``continue_logits``; latent
    ``split`` also ``background_state``, ``background_belief``, ``background_prior_logits`` and
    ``background_posterior_logits``.

    Slices start from the packed latents under ``initial`` (their first row is read) unless
    ``is_init`` resets them; without that entry from zero.

    Args:
        config: Sizes.
        action_size: A.
        image_size: Side of the square picture, pixels.
        latent: ``"whole"`` (DreamerV3: one latent, one picture), ``"shared"`` (one latent, two
            heads), ``"split"`` (two latents; reward, continuation, actor and critic read the
            foreground's only and the background's sees no action) or ``"foreground"``.
    """

    def __init__(self, config: ModelConfig, action_size: int, image_size: int, latent: Latent):
        super().__init__()
        self.config, self.latent = config, latent
        self.action_size, self.image_size = action_size, image_size
        self.encoder = _build_encoder(config)
        embedding = self.encoder.output_features((3, image_size, image_size))
        self.rollout = _build_rollout(config, embedding, action_size)
        self.background_rollout = None
        self.background_encoder: ImageEncoder | None = None
        if latent == "split":
            background, embedding_key = _background(config), "encoded_latents"
            if config.background_encoder == "own":
                self.background_encoder = _build_encoder(background)
                embedding = self.background_encoder.output_features((3, image_size, image_size))
                embedding_key = "background_encoded_latents"
            self.background_rollout = _build_rollout(background, embedding, None, embedding_key)
        self.decoder = _build_decoder(config, image_size, latent)
        features = config.state_size + config.belief_size
        self.reward = MLP(features, config.num_bins, config.head_layers, config.units, outscale=0.0)
        self.continuation = MLP(features, 1, config.head_layers, config.units)
        self.two_hot = TwoHot(config.num_bins)
        self.compiled: dict[str, Callable[..., Tensor]] = {}
        """Compiled forms of submodules that the acting policy shares and calls as they are."""
        self.side_stream: torch.cuda.Stream | None = None
        """Where the background's encoder and recurrence run beside the foreground's, which leave
        most of a GPU idle: each step waits for the one before. None: after them."""
        self.in_keys = ["action", "is_init", ("next", "pixels")]
        self.out_keys = self._out_keys()

    def _out_keys(self) -> list[tuple[str, str]]:
        names = ["state", "belief", "prior_logits", "posterior_logits"]
        if self.background_rollout is not None:
            names += [f"background_{name}" for name in names]
        keys = [("next", name) for name in names]
        return [
            *keys,
            *self.decoder.out_keys,
            ("next", "reward_logits"),
            ("next", "continue_logits"),
        ]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write latents, reconstructions and predictions into ``tensordict``."""
        tensordict = self.infer(tensordict)
        self.decoder(tensordict)
        state, belief = tensordict.get(("next", "state")), tensordict.get(("next", "belief"))
        features = torch.cat((belief, state), -1)
        tensordict.set(("next", "reward_logits"), self.reward(features).float())
        tensordict.set(("next", "continue_logits"), self.continuation(features).float())
        return tensordict

    def check_records(self, records: TensorDictBase) -> None:
        """Check what the model reads of records ``[B, T]``.

        Args:
            records: ``action``, ``is_init`` and ``("next", "pixels")``.

        Raises:
            TypeError: If an entry has another dtype; a picture's range is never guessed.
            ValueError: If an entry has another shape, or there are no records.
        """
        if records.ndim != 2 or 0 in records.shape:
            raise ValueError(f"records must be [B, T], 1 or more, got {list(records.shape)}.")
        leading, size = tuple(records.shape), self.image_size
        check_tensor("action", records.get("action"), FLOATING, (*leading, self.action_size))
        check_tensor("is_init", records.get("is_init"), torch.bool, (*leading, 1))
        pixels = records.get(("next", "pixels"))
        check_tensor("pixels", pixels, torch.uint8, (*leading, 3, size, size))

    def infer(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the posterior latents ``[B, T, ...]`` only."""
        self.check_records(tensordict)
        self._unpack_initial(tensordict)
        side, start = self.side_stream, None
        if side is not None and self.background_encoder is not None:
            start = torch.cuda.current_stream(side.device).record_event()
        encode = self.compiled.get("encoder", self.encoder)
        tensordict.set(("next", "encoded_latents"), encode(tensordict.get(("next", "pixels"))))
        if side is not None and start is None:  # the background reads this encoder's output
            start = torch.cuda.current_stream(side.device).record_event()
        self.rollout(tensordict)
        if side is None or start is None:
            self._infer_background(tensordict)
            return tensordict
        # The host launches both latents in the same order as without a side stream, so the draws
        # are the same; autograd runs the backward pass of each on the stream of its forward pass.
        side.wait_event(start)
        with torch.cuda.stream(side):
            written = self._infer_background(tensordict)
        main = torch.cuda.current_stream(side.device)
        main.wait_stream(side)
        for key in written:
            tensordict.get(key).record_stream(main)  # its memory is the other stream's
        return tensordict

    def _num_classes(self) -> dict[str, int]:
        """Classes of each latent's categoricals, by the prefix of its keys."""
        classes = {"": self.config.num_classes}
        if self.background_rollout is not None:
            classes["background_"] = self.config.background_num_classes
        return classes

    def _unpack_initial(self, tensordict: TensorDictBase) -> None:
        """Write the latents before the first step where the recurrences read them."""
        initial = tensordict.get(INITIAL, None)
        if initial is None:
            return
        shape = tensordict.batch_size
        for prefix, classes in self._num_classes().items():
            state = unpack_state(initial.get(f"{prefix}state")[:, :1], classes)
            belief = unpack_belief(initial.get(f"{prefix}belief")[:, :1])
            tensordict.set(f"{prefix}state", state.expand(*shape, -1))
            tensordict.set(f"{prefix}belief", belief.expand(*shape, -1))

    def pack_latents(self, tensordict: TensorDictBase) -> TensorDict:
        """Pack the posterior latents ``[B, T]`` that the world model wrote, without gradients."""
        packed = {}
        for prefix, classes in self._num_classes().items():
            state = tensordict.get(("next", f"{prefix}state"))
            packed[f"{prefix}state"] = pack_state(state, classes)
            packed[f"{prefix}belief"] = pack_belief(tensordict.get(("next", f"{prefix}belief")))
        return TensorDict(packed, tensordict.batch_size)

    def _infer_background(self, tensordict: TensorDictBase) -> list[NestedKey]:
        """Write the background's latent, if there is one; the keys that were written."""
        if self.background_rollout is None:
            return []
        written: list[NestedKey] = list(self.background_rollout.out_keys)
        if self.background_encoder is not None:
            encode = self.compiled.get("background_encoder", self.background_encoder)
            key = ("next", "background_encoded_latents")
            tensordict.set(key, encode(tensordict.get(("next", "pixels"))))
            written.append(key)
        self.background_rollout(tensordict)
        return written

    def predict(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Expected reward and probability of going on, both ``[...]``.

        Args:
            features: Belief and state side by side ``[..., D + S]``.
        """
        reward = self.two_hot.decode(self.reward(features).float())
        continuation = torch.sigmoid(self.continuation(features).float()).squeeze(-1)
        return reward, continuation

    @property
    def prior(self) -> RSSMPriorV3:
        """The foreground's prior, used by imagination and by the acting policy."""
        return self.rollout.rssm_prior.module


def build_world_model(
    config: ModelConfig | str,
    *,
    action_size: int,
    image_size: int = 64,
    latent: Latent = "split",
) -> WorldModel:
    """Build a world model.

    Args:
        config: Sizes, or the name of a preset (``"size1m"`` to ``"size400m"``).
        action_size: A, features of the action.
        image_size: Side of the square picture, pixels; a multiple of 16.
        latent: ``"split"``, ``"shared"``, ``"foreground"``, or ``"whole"`` for DreamerV3.

    Raises:
        ValueError: Naming the setting, its value and what is allowed.
    """
    if isinstance(config, str):
        if config not in PRESETS:
            raise ValueError(f"model={config!r} is unknown; presets: {', '.join(PRESETS)}.")
        config = PRESETS[config]
    if latent not in ("whole", *LATENTS):
        raise ValueError(f"latent={latent!r} is unknown; allowed: whole, {', '.join(LATENTS)}.")
    config.validate(image_size)
    check_number("action_size", action_size, integer=True, minimum=1)
    return WorldModel(config, action_size, image_size, latent)


def _background(config: ModelConfig) -> ModelConfig:
    """The background's sizes in the place of the foreground's."""
    values = vars(config) | {
        "belief_size": config.background_belief_size,
        "hidden_size": config.background_hidden_size,
        "num_classes": config.background_num_classes,
        "cnn_depth": config.background_cnn_depth,
    }
    return ModelConfig(**values)


def _build_encoder(config: ModelConfig) -> ImageEncoder:
    return ImageEncoder(
        depth=config.cnn_depth,
        mults=config.cnn_multipliers,
        kernel_size=config.kernel_size,
        pooled=config.resample == "reference",
    )


def _build_rollout(
    config: ModelConfig,
    embedding: int,
    action_size: int | None,
    embedding_key: str = "encoded_latents",
) -> RSSMRollout:
    # Every value that TorchRL's constructors default to otherwise is passed.
    prior = RSSMPriorV3(
        action_shape=(action_size or 1,),
        action_dim=action_size or 1,
        hidden_dim=config.hidden_size,
        rnn_hidden_dim=config.belief_size,
        num_categoricals=config.num_categoricals,
        num_classes=config.num_classes,
        recurrent_model="block_gru",
        num_blocks=config.num_blocks,
        num_layers=config.dynamics_layers,
        prior_num_layers=config.prior_layers,
        unimix=config.unimix,
    )
    posterior = RSSMPosteriorV3(
        hidden_dim=config.hidden_size,
        rnn_hidden_dim=config.belief_size,
        obs_embed_dim=embedding,
        num_categoricals=config.num_categoricals,
        num_classes=config.num_classes,
        use_rms_norm=True,
        num_layers=config.posterior_layers,
        unimix=config.unimix,
    )
    action_key = None if action_size is None else "action"
    prefix = "background_" if action_size is None else ""
    state, belief = f"{prefix}state", f"{prefix}belief"
    return RSSMRollout(
        TensorDictModule(
            prior,
            [state, belief, "action"],
            [("next", f"{prefix}prior_logits"), ("next", state), ("next", belief)],
        ),
        TensorDictModule(
            posterior,
            [("next", belief), ("next", embedding_key)],
            [("next", f"{prefix}posterior_logits"), ("next", state)],
        ),
        action_key=action_key,
    )


def _build_decoder(
    config: ModelConfig, image_size: int, latent: Latent
) -> TensorDictModule | DualImageDecoder:
    image_shape = (3, image_size, image_size)
    features = (config.state_size, config.belief_size)
    settings: dict[str, Any] = {
        "decoder": config.decoder,
        "mults": config.cnn_multipliers,
        "kernel_size": config.kernel_size,
        "num_blocks": config.num_blocks,
        "nearest": config.resample != "stride",
    }
    if latent == "whole":
        decoder = build_image_decoder(
            features=features,
            image_shape=image_shape,
            depth=config.cnn_depth,
            units=config.units,
            **settings,
        )
        keys = [("next", "state"), ("next", "belief")]
        return TensorDictModule(_Float32(decoder), keys, [("next", "reconstructed_pixels")])
    background_keys = ("background_state", "background_belief")
    background_features: tuple[int, int] | None = features
    if latent == "split":
        background_features = (config.background_state_size, config.background_belief_size)
    elif latent == "shared":
        background_keys = ("state", "belief")
    else:
        background_features = None
    return DualImageDecoder(
        features,
        background_features,
        image_shape,
        depth=config.cnn_depth,
        units=config.units,
        background_depth=config.background_cnn_depth,
        background_units=config.background_hidden_size,
        background_keys=background_keys,
        **settings,
    )


class _Float32(nn.Module):
    """Give the wrapped module's output in float32, also under autocast."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        output: Tensor = self.module(*inputs)
        return output.float()

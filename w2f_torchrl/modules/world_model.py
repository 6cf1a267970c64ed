"""The world model: encoder, recurrent latents, decoders, reward and continuation.

DreamerV3's eq. 1, with its latent doubled for a foreground and a background.

Shape letters: B batch, T time, S state, D belief, A action, E embedding, C, H, W channels, height,
width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.modules import RSSMPriorV3

from w2f_torchrl.config.model import LATENTS, ModelConfig
from w2f_torchrl.config.presets import PRESETS
from w2f_torchrl.kernels.categoricals import TwoHot
from w2f_torchrl.kernels.side_stream import SideStream
from w2f_torchrl.modules.by_env.observations import ObservationDecoder
from w2f_torchrl.modules.components import (
    Latent,
    background_sizes,
    build_decoder,
    build_encoder,
    build_rollout,
    encoder_keys,
)
from w2f_torchrl.modules.networks import MLP, ImageEncoder
from w2f_torchrl.modules.packed_latents import (
    INITIAL,
    pack_belief,
    pack_state,
    unpack_belief,
    unpack_state,
)
from w2f_torchrl.modules.rssm import RSSMRollout
from w2f_torchrl.utils.checks import check_number
from w2f_torchrl.utils.tensors import FLOATING, check_tensor


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
        self.encoder = build_encoder(config, image_size)
        embedding = self.encoder.output_features((3, image_size, image_size))
        self.rollout = build_rollout(config, embedding, action_size)
        self.background_rollout = None
        self.background_encoder: ImageEncoder | None = None
        if latent == "split":
            background, embedding_key = background_sizes(config), "encoded_latents"
            if config.background_encoder == "own":
                self.background_encoder = build_encoder(background, image_size)
                embedding = self.background_encoder.output_features((3, image_size, image_size))
                embedding_key = "background_encoded_latents"
            self.background_rollout = build_rollout(background, embedding, None, embedding_key)
        build = partial(build_decoder, config, image_size, latent)
        self.decoder = build()
        more = ObservationDecoder(config, build) if config.observes_more else None
        self.observation_decoder = more
        features = config.state_size + config.belief_size
        self.reward = MLP(features, config.num_bins, config.head_layers, config.units, outscale=0.0)
        self.continuation = MLP(features, 1, config.head_layers, config.units)
        self.two_hot = TwoHot(config.num_bins)
        self.compiled: dict[str, Callable[..., Tensor]] = {}
        """Compiled forms of submodules, which the acting policy shares and calls uncompiled."""
        self.side_stream: torch.cuda.Stream | None = None
        """Stream for the background's encoder and recurrence, in parallel to the foreground's: each
        step of a recurrence leaves most of a GPU idle. None: they run after the foreground's."""
        observed = dict.fromkeys(["pixels", *encoder_keys(self.encoder, self.background_encoder)])
        self.in_keys = ["action", "is_init", *(("next", key) for key in observed)]
        self.out_keys = self._out_keys()

    def _out_keys(self) -> list[tuple[str, str]]:
        names = ["state", "belief", "prior_logits", "posterior_logits"]
        if self.background_rollout is not None:
            names += [f"background_{name}" for name in names]
        written = [("next", name) for name in (*names, "reward_logits", "continue_logits")]
        return [*written, *self.decoder.out_keys]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write latents, reconstructions and predictions into ``tensordict``."""
        tensordict = self.infer(tensordict)
        self.decoder(tensordict)
        following = tensordict.get("next")
        features = torch.cat((following.get("belief"), following.get("state")), -1)  # [B, T, D + S]
        following.set("reward_logits", self.reward(features).float())  # [B, T, bins]
        following.set("continue_logits", self.continuation(features).float())  # [B, T, 1]
        return tensordict

    def check_records(self, records: TensorDictBase) -> None:
        """Check the entries of records ``[B, T]`` that the model reads.

        Args:
            records: ``action``, ``is_init`` and ``("next", "pixels")``.

        Raises:
            TypeError: If an entry has another dtype; the range of a picture is never guessed.
            ValueError: If an entry has another shape, or the batch is empty.
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
        side = SideStream(self.side_stream)
        if self.background_encoder is not None:
            side.mark()  # the background needs nothing of the foreground
        self._encode(tensordict, "encoder")
        if self.background_encoder is None:
            side.mark()  # the background reads the same embedding
        self.rollout(tensordict)
        if self.background_rollout is not None:
            side.run(partial(self._infer_background, tensordict, self.background_rollout))
        return tensordict

    def _encode(self, tensordict: TensorDictBase, name: str, prefix: str = "") -> None:
        encoder: ImageEncoder = getattr(self, name)
        observation = [tensordict.get(("next", key)) for key in encoder_keys(encoder)]
        embedding = self.compiled.get(name, encoder)(*observation)  # [B, T, E]
        tensordict.set(("next", f"{prefix}encoded_latents"), embedding)

    def _num_classes(self) -> dict[str, int]:
        """Return the number of classes of each latent's categoricals, by the prefix of its keys."""
        classes = {"": self.config.num_classes}
        if self.background_rollout is not None:
            classes["background_"] = self.config.background_num_classes
        return classes

    def _unpack_initial(self, tensordict: TensorDictBase) -> None:
        """Write the latents before the first step under the keys that the recurrences read."""
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

    def _infer_background(self, tensordict: TensorDictBase, rollout: RSSMRollout) -> list[Tensor]:
        """Write the background's latent, and return all tensors written ``[B, T, ...]``."""
        written: list[NestedKey] = list(rollout.out_keys)
        if self.background_encoder is not None:
            self._encode(tensordict, "background_encoder", "background_")
            written.append(("next", "background_encoded_latents"))
        rollout(tensordict)
        return [tensordict.get(key) for key in written]

    def predict(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the expected reward and the probability of continuing, both ``[...]``.

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

"""Observations besides ``pixels``: vectors, such as joint positions, and pictures of other cameras.

As in the reference, every observation is encoded, the embeddings are concatenated, and the latent
that the actor reads reconstructs all of them. The reference stacks pictures of one size as
channels; here each has an encoder and a decoder.

Shape letters: B batch, T time, S state, D belief, E embedding, V features of all vectors, H, W
height, width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from w2f_torchrl.config.model import ModelConfig
from w2f_torchrl.keys import MASK, PIXELS, mask_of
from w2f_torchrl.modules.dual_decoder import DualImageDecoder
from w2f_torchrl.modules.networks import MLP
from w2f_torchrl.utils.tensors import check_tensor

_LAYERS = 3
"""Layers of the vectors' encoder and decoder: those of the reference."""


def symlog(vector: Tensor) -> Tensor:
    """Return ``sign(x) ln(1 + |x|)`` in float32 (DreamerV3, "Robust predictions")."""
    vector = vector.float()
    return torch.sign(vector) * torch.log1p(vector.abs())


def join_vectors(vectors: list[Tensor], sizes: dict[str, int]) -> Tensor:
    """Return the symlog of vectors of any numbers, ``[..., size]`` each, side by side ``[..., V]``.

    Raises:
        ValueError: If a vector has another size; names its key.
    """
    for vector, (key, size) in zip(vectors, sizes.items(), strict=True):
        check_tensor(key, vector, vector.dtype, ("...", size))
    return torch.cat([symlog(vector) for vector in vectors], -1)


class ObservationEncoder(nn.Module):
    """Encode pictures and vectors; the embedding has those of the pictures first.

    Args:
        config: Names of the further pictures, names and sizes of the vectors.
        build: Makes the encoder of a picture.
    """

    def __init__(self, config: ModelConfig, build: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.sizes = dict(config.vectors)
        pictures = (PIXELS, *config.pictures)
        self.pictures = nn.ModuleList(build() for _ in pictures)
        self.in_keys = [*pictures, *self.sizes]
        self.vectors: MLP | None = None
        if self.sizes:
            features = sum(self.sizes.values())  # V
            self.vectors = MLP(features, None, depth=_LAYERS, num_cells=config.units)
        self.units = config.units if self.sizes else 0

    def output_features(self, image_shape: tuple[int, int, int]) -> int:
        """Return E, the features of the embedding."""
        sizes: list[int] = [each.output_features(image_shape) for each in self.pictures]  # type: ignore[operator]
        return self.units + sum(sizes)

    def forward(self, *observation: Tensor) -> Tensor:
        """Encode the entries of ``in_keys`` to ``[..., E]``."""
        count = len(self.pictures)
        embeddings = [
            encode(picture)  # [..., E of a picture]
            for encode, picture in zip(self.pictures, observation[:count], strict=True)
        ]
        if self.vectors is not None:
            joined = join_vectors(list(observation[count:]), self.sizes)  # [..., V]
            embeddings.append(self.vectors(joined))
        return torch.cat(embeddings, -1)


class ObservationDecoder(nn.Module):
    """Reconstruct vectors and further pictures from the latents.

    The vectors are read from the latent of the agent. A further picture has the same decoders as
    ``pixels``: of the whole picture, or of foreground and background with its own mask.

    Args:
        config: Names of the further pictures, names and sizes of the vectors.
        build: Makes the decoder of a picture.
    """

    def __init__(
        self, config: ModelConfig, build: Callable[[], TensorDictModule | DualImageDecoder]
    ) -> None:
        super().__init__()
        self.sizes, self.names = dict(config.vectors), tuple(config.pictures)
        self.pictures = nn.ModuleList(build() for _ in self.names)
        self.vectors: MLP | None = None
        if self.sizes:
            features, outputs = config.state_size + config.belief_size, sum(self.sizes.values())
            self.vectors = MLP(features, outputs, depth=_LAYERS, num_cells=config.units)

    def views(self, td: TensorDictBase) -> Iterator[TensorDictBase]:
        """Decode the further pictures, each into entries with the names of those of ``pixels``.

        Args:
            td: The entries under ``next``, with the latents and the pictures, ``[B, T]``.
        """
        latents = ("state", "belief", "background_state", "background_belief")
        kept = [key for key in latents if key in td.keys()]
        for name, decode in zip(self.names, self.pictures, strict=True):
            view = TensorDict({"next": td.select(*kept)}, td.batch_size)
            decode(view)
            following: TensorDictBase = view.get("next")
            following.set(PIXELS, td.get(name))
            if mask_of(name) in td.keys():
                following.set(MASK, td.get(mask_of(name)))
            yield following

    def add_losses(
        self,
        losses: dict[str, Tensor],
        td: TensorDictBase,
        reconstruct: Callable[[TensorDictBase], tuple[dict[str, Tensor], object]],
    ) -> None:
        """Add the further pictures' losses to those of ``pixels``, and the vectors' own.

        Args:
            losses: Unweighted losses by name, with those of ``pixels``; changed.
            td: The entries under ``next``, ``[B, T]``.
            reconstruct: Computes the reconstruction losses of a picture from a view.
        """
        for view in self.views(td):
            for name, loss in reconstruct(view)[0].items():
                losses[name] = losses[name] + loss
        if self.vectors is not None:
            losses["vectors"] = self.vector_loss(td, self.vectors)

    def vector_loss(self, td: TensorDictBase, decode: MLP) -> Tensor:
        """Return the squared error of the vectors' symlog, summed over V and averaged.

        Args:
            td: The entries under ``next``, with the latents and the vectors, ``[B, T]``.
            decode: Maps belief and state to the symlog of all vectors.
        """
        predicted = decode(td.get("belief"), td.get("state")).float()  # [B, T, V]
        target = join_vectors([td.get(key) for key in self.sizes], self.sizes)
        loss: Tensor = (predicted - target).square().sum(-1).mean()
        return loss

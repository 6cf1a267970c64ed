"""World models that reconstruct nothing."""

from __future__ import annotations

from typing import ClassVar

from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase

from w2f_torchrl.modules import WorldModel
from w2f_torchrl.objectives.terms import TERMS, LossTerm

TERMS_WITHOUT_IMAGE: dict[str, LossTerm] = {
    name: term for name, term in TERMS.items() if name != "image"
}


class NoDecoder(TensorDictModuleBase):
    """Takes a decoder's place and decodes nothing: ``out_keys`` is empty."""

    in_keys: ClassVar[list[NestedKey]] = [("next", "state"), ("next", "belief")]
    out_keys: ClassVar[list[NestedKey]] = []

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return the tensordict as it is."""
        return tensordict


def without_decoder(world_model: WorldModel) -> WorldModel:
    """Return the world model without its decoder."""
    gone = set(world_model.decoder.out_keys)
    world_model.decoder = NoDecoder()
    world_model.out_keys = [key for key in world_model.out_keys if key not in gone]
    return world_model

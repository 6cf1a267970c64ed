"""Decoders of the foreground and the background of a picture.

Shape letters: S state, D belief, H, W height, width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn

from w2f_torchrl.modules.image_decoder import build_image_decoder
from w2f_torchrl.utils.tensors import FLOATING, check_tensor

#: Share of a picture that the agent typically covers (1 to 10 % in the Control Suite). The mask
#: head starts there, so that no update is spent on unlearning an even grey mask.
FOREGROUND_SHARE = 0.03


class DualImageDecoder(TensorDictModuleBase):
    """Reconstruct the foreground (colours and mask) and the background (colours) separately.

    The foreground's decoder makes colours, which start at about 0.5, and the logit of the mask,
    which starts at :data:`FOREGROUND_SHARE`. The background's makes colours. With
    ``background_features=None`` it has no background.

    Args:
        foreground_features: S and D, the features of the foreground's state and belief.
        background_features: S and D of the latent that the background's decoder reads, or ``None``.
        image_shape: ``(3, H, W)``.
        decoder: ``reference`` or ``torchrl``.
        depth: Base channels of the foreground decoder.
        units: Half the width of the foreground state's layer (``reference`` only).
        background_depth: Base channels of the background decoder; ``depth`` if ``None``.
        background_units: The same of the background; ``units`` if ``None``.
        background_keys: Keys of the background's state and belief, under ``next``.
        **settings: Of both image decoders:
            :class:`~w2f_torchrl.modules.image_decoder.ImageDecoder`.

    Writes ``("next", "foreground_pixels")`` ``[..., 3, H, W]``, ``("next", "mask_logits")``
    ``[..., 1, H, W]`` and ``("next", "background_pixels")`` ``[..., 3, H, W]``. Colours approximate
    pixels / 255; those of decoder ``torchrl`` are unbounded.
    """

    def __init__(
        self,
        foreground_features: tuple[int, int],
        background_features: tuple[int, int] | None,
        image_shape: tuple[int, int, int] = (3, 64, 64),
        *,
        decoder: str = "reference",
        depth: int = 64,
        units: int = 1024,
        background_depth: int | None = None,
        background_units: int | None = None,
        background_keys: tuple[str, str] = ("background_state", "background_belief"),
        **settings: Any,
    ):
        super().__init__()
        settings |= {"depth": depth, "units": units}
        self.foreground = build_image_decoder(
            decoder, foreground_features, image_shape, mask=True, **settings
        )
        self.background = None
        self.in_keys: list[NestedKey] = [("next", "state"), ("next", "belief")]
        self.out_keys: list[NestedKey] = [("next", "foreground_pixels"), ("next", "mask_logits")]
        if background_features is not None:
            settings |= {"depth": background_depth or depth, "units": background_units or units}
            self.background = build_image_decoder(
                decoder, background_features, image_shape, **settings
            )
            self.background_keys = [("next", key) for key in background_keys]
            self.in_keys += [key for key in self.background_keys if key not in self.in_keys]
            self.out_keys.append(("next", "background_pixels"))
        start = float(torch.logit(torch.tensor(FOREGROUND_SHARE)))
        head = cast(nn.ConvTranspose2d, self.foreground.mask_head)
        nn.init.constant_(cast(Tensor, head.bias), start - self.foreground.shift)

    def decode_foreground(self, state: Tensor, belief: Tensor) -> tuple[Tensor, Tensor]:
        """Decode colours ``[..., 3, H, W]`` and mask logits ``[..., 1, H, W]`` in float32."""
        colours, logits = self.foreground(state, belief)  # [..., 3, H, W], [..., 1, H, W]
        return colours.float(), logits.float()

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the reconstructions into ``tensordict``."""
        state, belief = tensordict.get(("next", "state")), tensordict.get(("next", "belief"))
        colours, mask_logits = self.decode_foreground(state, belief)
        tensordict.set(("next", "foreground_pixels"), colours)
        tensordict.set(("next", "mask_logits"), mask_logits)
        if self.background is not None:
            latent = [tensordict.get(key) for key in self.background_keys]
            colours = self.background(*latent).float()  # [..., 3, H, W]
            tensordict.set(("next", "background_pixels"), colours)
        return tensordict


def compose(foreground: Tensor, mask_logits: Tensor, background: Tensor) -> Tensor:
    """Lay the foreground over the background by the predicted mask.

    Args:
        foreground: Colours ``[..., 3, H, W]``.
        mask_logits: ``[..., 1, H, W]``.
        background: Colours ``[..., 3, H, W]``.

    Returns:
        The composed picture ``[..., 3, H, W]``.

    Examples:
        >>> foreground, background = torch.ones(3, 1, 2), torch.zeros(3, 1, 2)
        >>> compose(foreground, torch.tensor([[[-9.0, 9.0]]]), background)[0].round()
        tensor([[0., 1.]])
    """
    check_tensor("foreground", foreground, FLOATING, ("...", 3, "H", "W"), empty=True)
    check_tensor("background", background, foreground.dtype, tuple(foreground.shape), empty=True)
    mask_shape = (*foreground.shape[:-3], 1, *foreground.shape[-2:])
    check_tensor("mask_logits", mask_logits, foreground.dtype, mask_shape, empty=True)
    return torch.lerp(background, foreground, torch.sigmoid(mask_logits))

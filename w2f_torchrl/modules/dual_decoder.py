"""Decoders of the foreground and the background of a picture."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor

from w2f_torchrl.modules.convolution import ImageDecoder
from w2f_torchrl.utils.tensors import FLOATING, check_tensor

#: Share of a picture that the agent typically covers (1 to 10 % over the Control Suite). The mask
#: head starts at it, so that no update is spent on unlearning an even grey mask.
FOREGROUND_SHARE = 0.03


class DualImageDecoder(TensorDictModuleBase):
    """Reconstruct the foreground (colours and mask) and the background (colours) separately.

    Two of TorchRL's image decoders. The foreground's makes four channels: colours, as TorchRL's
    about 0.5 at the start, and the logit of the mask, which starts at the share that an agent
    typically covers. With ``background_features=None`` only the foreground is made.

    Args:
        foreground_features: Features of the foreground latent, S + D.
        background_features: Features of the latent that the background head reads, or ``None``.
        image_shape: ``(3, H, W)``.
        depth: Base channels of the foreground decoder.
        background_depth: Base channels of the background decoder; ``depth`` if ``None``.
        multipliers: Channel multipliers of the stages.
        kernel_size: Odd kernel size.
        num_blocks: Blocks of the decoders' first layer.
        background_keys: Where the background's state and belief are read.

    Writes ``("next", "foreground_pixels")`` ``[..., 3, H, W]``, ``("next", "mask_logits")``
    ``[..., 1, H, W]`` and ``("next", "background_pixels")`` ``[..., 3, H, W]``. Colours are
    unbounded and aim at pixels / 255.
    """

    def __init__(
        self,
        foreground_features: int,
        background_features: int | None,
        image_shape: tuple[int, int, int] = (3, 64, 64),
        *,
        depth: int = 64,
        background_depth: int | None = None,
        multipliers: tuple[int, ...] = (2, 3, 4, 4),
        kernel_size: int = 5,
        num_blocks: int = 8,
        background_keys: tuple[str, str] = ("background_state", "background_belief"),
    ):
        super().__init__()
        colours, height, width = image_shape
        kwargs = {"mults": multipliers, "kernel_size": kernel_size, "num_blocks": num_blocks}
        self.foreground = ImageDecoder(
            foreground_features, (colours + 1, height, width), depth=depth, **kwargs
        )
        self.background = None
        self.in_keys: list[NestedKey] = [("next", "state"), ("next", "belief")]
        self.out_keys: list[NestedKey] = [("next", "foreground_pixels"), ("next", "mask_logits")]
        if background_features is not None:
            self.background = ImageDecoder(
                background_features,
                (colours, height, width),
                depth=background_depth or depth,
                **kwargs,
            )
            self.background_keys = [("next", key) for key in background_keys]
            self.in_keys += [key for key in self.background_keys if key not in self.in_keys]
            self.out_keys.append(("next", "background_pixels"))
        with torch.no_grad():
            share = torch.tensor(FOREGROUND_SHARE)
            # TorchRL's decoder adds 0.5 to every channel.
            self.foreground.layers[-1].bias[-1] = torch.logit(share) - 0.5

    def decode_foreground(self, state: Tensor, belief: Tensor) -> tuple[Tensor, Tensor]:
        """Decode colours ``[..., 3, H, W]`` and mask logits ``[..., 1, H, W]`` in float32."""
        decoded = self.foreground(state, belief).float()
        return decoded[..., :-1, :, :], decoded[..., -1:, :, :]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the reconstructions into ``tensordict``."""
        state, belief = tensordict.get(("next", "state")), tensordict.get(("next", "belief"))
        colours, mask_logits = self.decode_foreground(state, belief)
        tensordict.set(("next", "foreground_pixels"), colours)
        tensordict.set(("next", "mask_logits"), mask_logits)
        if self.background is not None:
            latent = [tensordict.get(key) for key in self.background_keys]
            tensordict.set(("next", "background_pixels"), self.background(*latent).float())
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

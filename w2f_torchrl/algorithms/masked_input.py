"""DreamerV3 that sees the foreground only: pixels x mask, in training and in acting.

The idea of SAM-G (Wang et al. 2023, "Generalizable Visual Reinforcement Learning with Segment
Anything Model", arXiv:2312.17116), which gives the agent masked images, with DreamerV3 as the
learner. Nothing of the scenery reaches the networks but through errors of the
mask. The price: every observation that is acted on needs a mask, from the simulator or a student.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn

from w2f_torchrl.algorithms.base import Algorithm, AlgorithmSettings, build_around, world_model_of
from w2f_torchrl.keys import MASK, NEXT_MASK, NEXT_PIXELS, PIXELS
from w2f_torchrl.modules import WorldModel
from w2f_torchrl.modules.components import encoder_keys
from w2f_torchrl.objectives import World2FilterLoss, image_loss
from w2f_torchrl.segmenters import StudentNetwork, StudentSegmenter
from w2f_torchrl.utils.tensors import check_tensor

ACTING_MASK = "acting_mask"
"""Key of a student's mask while acting; ``foreground_mask`` stays the simulator's, if any."""


def masked(pixels: Tensor, mask: Tensor) -> Tensor:
    """Return pixels x mask: black wherever the mask says background.

    Args:
        pixels: uint8 ``[..., 3, H, W]``.
        mask: bool ``[..., 1, H, W]``.

    Returns:
        uint8 ``[..., 3, H, W]``.
    """
    check_tensor(MASK, mask, torch.bool, (*pixels.shape[:-3], 1, *pixels.shape[-2:]))
    return pixels * mask


class MaskedEncoder(nn.Module):
    """An encoder that reads ``foreground_mask`` too, and encodes pixels x mask.

    Args:
        encoder: The run's encoder.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        keys = encoder_keys(encoder)
        self.place = keys.index(PIXELS)
        self.in_keys = [*keys, MASK]

    def forward(self, *observation: Tensor) -> Tensor:
        """Encode the entries of ``in_keys``, the mask last, to embeddings ``[..., E]``."""
        *read, mask = observation
        read[self.place] = masked(read[self.place], mask)
        embedding: Tensor = self.encoder(*read)
        return embedding


class MaskedInputLoss(World2FilterLoss):
    """DreamerV3's losses, with pixels x mask as the picture to reconstruct."""

    def reconstruction_losses(
        self, td: TensorDictBase
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the squared error to pixels x mask, summed over pixels and channels.

        Args:
            td: The entries under ``next``, ``[B, T]``.
        """
        target = masked(td.get(PIXELS), td.get(MASK))
        return {"image": image_loss(td.get("reconstructed_pixels"), target)}, {}


def build_masked_input(settings: AlgorithmSettings) -> Algorithm:
    """Build DreamerV3 on pixels x mask."""
    world_model = world_model_of(settings)
    world_model.encoder = MaskedEncoder(world_model.encoder)  # type: ignore[assignment]
    world_model.in_keys = [*world_model.in_keys, NEXT_MASK]
    return build_around(world_model, settings, MaskedInputLoss)


def target_pixels(world_model: WorldModel, records: TensorDictBase) -> Tensor:
    """Return what the world model takes for the pictures of records: uint8 ``[..., 3, H, W]``."""
    pixels: Tensor = records[NEXT_PIXELS]
    if isinstance(world_model.encoder, MaskedEncoder):
        return masked(pixels, records[NEXT_MASK])
    return pixels


class StudentMask(nn.Module):
    """A student's masks, from weights that are sent to workers like the policy's.

    Args:
        network: The student's network, shared, not copied.
        threshold: Confidence above which a pixel is foreground.
    """

    def __init__(self, network: StudentNetwork, threshold: float) -> None:
        super().__init__()
        self.network, self.threshold = network, threshold

    def forward(self, pixels: Tensor) -> Tensor:
        """Segment uint8 ``[..., 3, H, W]``: bool ``[..., 1, H, W]``, those of the replay."""
        # A segmenter keeps a fused copy of the weights, which would not follow them: a new one.
        device = next(self.network.parameters()).device
        segment = StudentSegmenter(self.network, threshold=self.threshold, device=device)
        masks = segment(pixels.reshape(-1, *pixels.shape[-3:]))  # [N, 1, H, W]
        return masks.reshape(*pixels.shape[:-3], *masks.shape[-3:])


def act_on_student(policy: TensorDictModuleBase, student: StudentSegmenter) -> TensorDictSequential:
    """Return a policy whose masks come from a student, so that it reads pixels only.

    Args:
        policy: The policy of :func:`build_masked_input`.
        student: The student, whose network is shared, not copied.
    """
    encode, *rest = policy.module
    keys: Sequence[str] = [ACTING_MASK if key == MASK else key for key in encode.in_keys]
    return TensorDictSequential(
        TensorDictModule(StudentMask(student.network, student.threshold), [PIXELS], [ACTING_MASK]),
        TensorDictModule(encode.module, keys, encode.out_keys),
        *rest,
    )


def student_of(policy: TensorDictModuleBase) -> StudentMask | None:
    """Return what makes the masks that a policy acts on; None if it is not a student."""
    found = [each for each in policy.modules() if isinstance(each, StudentMask)]
    return found[0] if found else None


def act_on_saved_student(
    policy: TensorDictModuleBase, masks: dict[str, Any], device: torch.device | str
) -> TensorDictSequential:
    """Do the same with the student that a checkpoint's source of masks holds."""
    network = StudentNetwork(masks["widths"])
    network.load_state_dict(masks["network"])
    student = StudentSegmenter(network, threshold=masks["threshold"], device=device)
    return act_on_student(policy, student)

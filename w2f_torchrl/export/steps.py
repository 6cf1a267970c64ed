"""What is exported: one call of a policy or of a segmenter, from tensors to tensors.

Everything is in the call: scaling of the pixels, the reset of the carried state, the choice of the
action and its range. Random numbers are inputs, so that a file computes the same wherever it runs.

Shape letters: N envs, or images; S state = K categoricals x C classes; D belief; A action; H, W
height, width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from tensordict.nn import (
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictSequential,
)
from torch import Tensor, nn
from torchrl.modules import RSSMStateEstimatorV3

from w2f_torchrl.algorithms.masked_input import ACTING_MASK, StudentMask
from w2f_torchrl.export.formats import SMALLEST, Entry, ExportError
from w2f_torchrl.keys import MASK, PIXELS
from w2f_torchrl.modules import CategoricalActor, GaussianActor
from w2f_torchrl.modules.by_env.observations import ObservationEncoder
from w2f_torchrl.segmenters.student import StudentNetwork

NEXT = "next_"
"""Prefix of an output that is the input of the next call."""
PREVIOUS = "previous_action"


class PolicyParts(NamedTuple):
    """The parts of an acting policy."""

    student: StudentMask | None
    """Makes the masks that ``algo=masked_input`` acts on; None if it needs none, or reads them."""
    encoder: TensorDictModule
    estimator: RSSMStateEstimatorV3
    actor: GaussianActor | CategoricalActor


def parts_of(policy: TensorDictModuleBase) -> PolicyParts:
    """Return the parts of a policy that :func:`~w2f_torchrl.modules.build_policy` composed.

    Raises:
        ExportError: If it has others, as that of a registered algorithm may have.
    """
    found = list(policy.module) if isinstance(policy, TensorDictSequential) else []
    first = getattr(found[0], "module", None) if found else None
    student = first if isinstance(first, StudentMask) else None
    composed = found if student is None else found[1:]
    kinds = (
        TensorDictModule,
        RSSMStateEstimatorV3,
        ProbabilisticTensorDictSequential,
        TensorDictModule,
    )
    if len(composed) != len(kinds) or not all(map(isinstance, composed, kinds)):
        raise ExportError("its policy was not composed by w2f_torchrl.modules.build_policy")
    encoder, estimator, actor, _ = composed
    if not isinstance(actor[0].module, GaussianActor | CategoricalActor):
        kind = type(actor[0].module).__name__
        raise ExportError(f"its actor is a {kind}; allowed: GaussianActor, CategoricalActor")
    known: tuple[str, ...] = (PIXELS, MASK, ACTING_MASK)
    if isinstance(encoder.module, ObservationEncoder):
        known += tuple(encoder.module.in_keys)
    unknown = [key for key in encoder.in_keys if key not in known]
    if unknown:
        raise ExportError(
            f"its encoder reads {', '.join(unknown)} of unknown shape; allowed: {PIXELS}, {MASK}, "
            "and what model.vectors and model.pictures name"
        )
    return PolicyParts(student, encoder, estimator, actor[0].module)


class PolicyStep(nn.Module):
    """One step of a policy, as :class:`~w2f_torchrl.trainers.LoadedPolicy` acts.

    It shares the policy's networks. ``state`` is drawn from the posterior, as in training and in
    evaluations, by inverting the distribution function of ``state_noise``.

    Args:
        policy: A learner's policy.
        action: ``mode``, or ``sample`` with the further input ``action_noise``.

    Raises:
        ExportError: If the policy was not composed by ``build_policy``.
    """

    def __init__(self, policy: TensorDictModuleBase, action: str) -> None:
        super().__init__()
        student, encoder, estimator, self.actor = parts_of(policy)
        self.encoder, self.encoder_keys = encoder.module, list(encoder.in_keys)
        self.prior, self.posterior = estimator.prior, estimator.posterior
        self.student = None if student is None else student.network
        self.threshold = 0.5 if student is None else student.threshold
        self.samples = action == "sample"
        self.is_discrete = isinstance(self.actor, CategoricalActor)

    def forward(
        self,
        pixels: Tensor,
        is_init: Tensor,
        state: Tensor,
        belief: Tensor,
        previous_action: Tensor,
        state_noise: Tensor,
        foreground_mask: Tensor | None = None,
        action_noise: Tensor | None = None,
        **further: Tensor,
    ) -> dict[str, Tensor]:
        """Act on one observation of each of N envs; :meth:`inputs` describes the arguments.

        Returns:
            ``action`` ``[N, A]`` and the entries to carry, ``next_state`` ``[N, S]``,
            ``next_belief`` ``[N, D]`` and ``next_previous_action`` ``[N, A]``.
        """
        seen = {PIXELS: pixels, MASK: foreground_mask, **further}
        if self.student is not None:
            seen[ACTING_MASK] = segment(self.student, pixels) > self.threshold
        embedding = self.encoder(*(seen[key] for key in self.encoder_keys))  # [N, E]
        state = torch.where(is_init, 0, state)
        belief = torch.where(is_init, 0, belief)
        previous_action = torch.where(is_init, 0, previous_action)
        belief = self.prior.rnn(state, belief, previous_action)
        _, state = self.posterior(belief, embedding, _uniform=state_noise)
        chosen = self._choose(self.actor(state, belief), action_noise)
        return {
            "action": chosen if self.is_discrete else chosen.clamp(-1, 1),
            f"{NEXT}state": state,
            f"{NEXT}belief": belief,
            # Unclipped: the recurrence reads the actor's proposal, and scales it itself.
            f"{NEXT}{PREVIOUS}": chosen,
        }

    def _choose(self, parameters: tuple[Tensor, ...], noise: Tensor | None) -> Tensor:
        if noise is not None:
            draw: Callable[..., Tensor] = self.actor.draw
            return draw(*parameters, noise)
        chosen: Tensor = self.actor.distribution(*parameters).mode
        return chosen

    def inputs(self, image_size: int) -> list[Entry]:
        """Describe the arguments of :meth:`forward`, in the order of a file's inputs."""
        size, sizes = image_size, self._sizes()
        shape: tuple[int | str, ...]
        given = [Entry(PIXELS, "uint8", ("N", 3, size, size), "observation", "the image, 0 to 255")]
        if MASK in self.encoder_keys:
            shape = ("N", 1, size, size)
            given.append(Entry(MASK, "bool", shape, "observation", "true where the agent is"))
        given += self._further(size)
        meaning = "true at the first observation of an episode"
        given.append(Entry("is_init", "bool", ("N", 1), "observation", meaning))
        for name, count in sizes.items():
            meaning = f"{NEXT}{name} of the previous step"
            given.append(Entry(name, "float32", ("N", count), "carried", meaning))
        shape = ("N", self.prior.num_categoricals)
        given.append(Entry("state_noise", "float32", shape, "uniform", "draws the state"))
        if self.samples:
            kind, count = ("uniform", 1) if self.is_discrete else ("normal", sizes[PREVIOUS])
            given.append(Entry("action_noise", "float32", ("N", count), kind, "draws the action"))
        return given

    def _further(self, size: int) -> list[Entry]:
        """Describe the vectors and further pictures that the encoder reads."""
        if not isinstance(self.encoder, ObservationEncoder):
            return []
        sizes = self.encoder.sizes
        return [
            Entry(key, "float32", ("N", sizes[key]), "observation", "a vector")
            if key in sizes
            else Entry(key, "uint8", ("N", 3, size, size), "observation", "an image, 0 to 255")
            for key in self.encoder_keys
            if key != PIXELS
        ]

    def outputs(self) -> list[Entry]:
        """Describe what :meth:`forward` returns, in order."""
        sizes = self._sizes()
        meaning = "one-hot" if self.is_discrete else "in [-1, 1]: scale it to the env's box"
        return [
            Entry("action", "float32", ("N", sizes[PREVIOUS]), "result", meaning),
            *(
                Entry(f"{NEXT}{name}", "float32", ("N", count), "carried", f"the next {name}")
                for name, count in sizes.items()
            ),
        ]

    def _sizes(self) -> dict[str, int]:
        """Return the sizes of what is carried from step to step."""
        return {
            "state": self.prior.num_categoricals * self.prior.num_classes,
            "belief": self.prior.rnn_hidden_dim,
            PREVIOUS: int(self.prior.rnn.action_projection[0].in_features),
        }


CELL = 8
"""The student's network halves an image three times."""


class SegmenterStep(nn.Module):
    """One call of a student, in float32, for images of any size.

    Args:
        network: The student's network, shared.
        threshold: Confidence above which a pixel is foreground.
    """

    def __init__(self, network: StudentNetwork, threshold: float) -> None:
        super().__init__()
        self.network, self.threshold = network, threshold

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Segment uint8 ``[N, 3, H, W]``.

        Returns:
            ``foreground_mask``, bool, and ``confidence``, float32 in [0, 1], both ``[N, 1, H, W]``.
        """
        height, width = pixels.shape[-2:]
        # Repeat the last row and column, as the network does for sizes that are known beforehand.
        rows, columns = (
            torch.arange((side + CELL - 1) // CELL * CELL, device=pixels.device).clamp(max=side - 1)
            for side in (height, width)
        )
        padded = pixels.index_select(-2, rows).index_select(-1, columns)
        confidence = segment(self.network, padded)
        confidence = confidence.index_select(-2, torch.arange(height, device=pixels.device))
        confidence = confidence.index_select(-1, torch.arange(width, device=pixels.device))
        return {MASK: confidence > self.threshold, "confidence": confidence}

    def inputs(self) -> list[Entry]:
        """Describe the argument of :meth:`forward`."""
        meaning = f"images, 0 to 255, sides of at least {SMALLEST} pixels"
        return [Entry(PIXELS, "uint8", ("N", 3, "H", "W"), "observation", meaning)]

    def outputs(self) -> list[Entry]:
        """Describe what :meth:`forward` returns, in order."""
        above = f"confidence above {self.threshold}"
        shape = ("N", 1, "H", "W")
        return [
            Entry(MASK, "bool", shape, "result", above),
            Entry("confidence", "float32", shape, "result", "probability of foreground"),
        ]


def segment(network: StudentNetwork, pixels: Tensor) -> Tensor:
    """Return the probability of foreground in float32: uint8 ``[N, 3, H, W]`` to ``[N, 1, H, W]``.

    A :class:`~w2f_torchrl.segmenters.StudentSegmenter` computes in bfloat16 on some processors.
    """
    # As to_images, but in any layout of memory: a layout cannot depend on an unknown size.
    logits: Tensor = network(pixels.float().div(255).sub(0.5))
    return logits.sigmoid()

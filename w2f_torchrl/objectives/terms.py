"""The table of all losses: their metrics, latents and weights."""

from __future__ import annotations

from typing import NamedTuple

ALL_LATENTS = ("whole", "shared", "foreground", "split")
TOTAL = "wm/total_loss"


class LossTerm(NamedTuple):
    """The metrics, latents and weight of a loss."""

    metrics: tuple[str, ...]
    """Names in ``metrics.jsonl`` whose sums include it."""
    latents: tuple[str, ...] = ALL_LATENTS
    """Latents of the world model for which the loss exists."""
    weight: str | None = None
    """Field of :class:`LossConfig`, or entry of ``extra``, with its weight; None uses the loss's
    name."""


_KL = (TOTAL, "wm/kl_loss")
_IMAGE = (TOTAL, "wm/image_loss")
_MASKED = ("shared", "foreground", "split")

TERMS: dict[str, LossTerm] = {
    "dynamics": LossTerm(_KL),
    "representation": LossTerm(_KL),
    "background_dynamics": LossTerm(_KL, ("split",), "dynamics"),
    "background_representation": LossTerm(_KL, ("split",), "representation"),
    "image": LossTerm(_IMAGE, ("whole",)),
    "foreground": LossTerm((*_IMAGE, "wm/fg_loss"), _MASKED),
    "mask": LossTerm((*_IMAGE, "wm/fg_loss", "wm/mask_loss"), _MASKED),
    "background": LossTerm((*_IMAGE, "wm/bg_loss"), ("shared", "split")),
    "vectors": LossTerm((TOTAL, "wm/vector_loss")),
    "reward": LossTerm((TOTAL, "wm/reward_loss")),
    "continuation": LossTerm((TOTAL, "wm/continue_loss")),
    "actor": LossTerm(("ac/actor_loss",)),
    "critic": LossTerm(("ac/critic_loss",)),
    "replay_critic": LossTerm(("ac/critic_loss",)),
}
"""Every loss by name; metrics sum them in this order."""

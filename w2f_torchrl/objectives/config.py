"""Scales and constants of the losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from w2f_torchrl.utils.checks import check_fields

ForegroundTarget = Literal["inside", "zero_outside"]
FOREGROUND_TARGETS: tuple[str, ...] = get_args(ForegroundTarget)
ForegroundScale = Literal["none", "area"]
FOREGROUND_SCALES: tuple[str, ...] = get_args(ForegroundScale)


@dataclass
class LossConfig:
    """Scales and constants of the losses.

    The defaults are the paper's (hyperparameter table), beside ``mask``, which it has not.
    """

    image: float = 1.0
    """Weight of the picture's reconstruction (`algo=dreamer_v3` only)."""
    foreground: float = 1.0
    """Weight of the foreground's colours."""
    mask: float = 0.3
    """Weight of the predicted mask's cross-entropy. A wrong pixel costs 3 nats and more, a wrong
    colour about 0.3: at 0.1 both weigh alike; the more, the sooner the mask is found, and the more
    of the latent goes into its edge."""
    background: float = 1.0
    """Weight of the background's colours."""
    reward: float = 1.0
    """Weight of the reward's prediction."""
    continuation: float = 1.0
    """Weight of the continuation's prediction."""
    dynamics: float = 1.0
    """Weight of the KL that trains the prior; of both latents."""
    representation: float = 0.1
    """Weight of the KL that trains the posterior and the encoder; of both latents."""
    actor: float = 1.0
    """Weight of the actor's loss."""
    critic: float = 1.0
    """Weight of the critic's loss in imagination."""
    replay_critic: float = 0.3
    """Weight of the critic's loss on replayed rewards."""
    foreground_target: str = "inside"
    """inside: colours are compared inside the mask; zero_outside: with picture x mask over all."""
    foreground_scale: str = "none"
    """none: the foreground's colour error is a sum over the mask's pixels; area: divided by the
    share of the pictures that the batch's masks cover, so that it weighs as a whole picture's."""
    selective: float | None = None
    """For imperfect masks: where the mask head is surer of foreground than this, a probability in
    [0.5, 1), and the mask says background, colour errors are dropped. null: masks are right. With
    foreground_target=inside, which asks for no colours there, only the background's loss
    changes."""
    free_nats: float = 1.0
    """Nats of KL, summed over a state's categoricals, below which there is no gradient."""
    entropy: float = 3e-4
    """Weight of the policy's entropy in the actor's loss."""
    imagination_horizon: int = 15
    """H, imagined agent steps."""
    discount_horizon: float = 333.0
    """Agent steps; the discount is 1 - 1 / this, carried by the continuation."""
    lmbda: float = 0.95
    """Weight of the longer return in the lambda-returns, in [0, 1]."""
    slow_critic_rate: float = 0.02
    """Share of the critic that the slow critic takes in at each update."""
    slow_critic_regularization: float = 1.0
    """Weight of the pull of the critic towards the slow critic."""
    return_rate: float = 0.01
    """Rate of the running 5 % and 95 % quantiles of the returns."""

    def validate(self) -> None:
        """Raise ``ValueError`` naming the first setting out of range."""
        check_fields("loss", self)
        if self.foreground_target not in FOREGROUND_TARGETS:
            raise ValueError(
                f"loss.foreground_target={self.foreground_target!r} is unknown; allowed: "
                f"{', '.join(FOREGROUND_TARGETS)}."
            )
        if self.foreground_target == "inside" and self.mask <= 0:
            raise ValueError(
                f"loss.mask={self.mask} must be above 0 with loss.foreground_target='inside': "
                "colours inside the mask alone teach no pose."
            )
        if self.foreground_scale not in FOREGROUND_SCALES:
            raise ValueError(
                f"loss.foreground_scale={self.foreground_scale!r} is unknown; allowed: "
                f"{', '.join(FOREGROUND_SCALES)}."
            )
        if self.selective is not None and not 0.5 <= self.selective < 1:
            raise ValueError(f"loss.selective={self.selective} must be in [0.5, 1), or null.")
        if self.selective is not None and self.mask <= 0:
            raise ValueError(
                f"loss.mask={self.mask} must be above 0 with loss.selective={self.selective}: a "
                "mask head that learns nothing can't correct masks."
            )
        for name, value in vars(self).items():
            if isinstance(value, int | float) and value < 0:
                raise ValueError(f"loss.{name}={value} must not be negative.")
        for name in ("lmbda", "slow_critic_rate", "return_rate"):
            if getattr(self, name) > 1:
                raise ValueError(f"loss.{name}={getattr(self, name)} must be in [0, 1].")
        for name in ("imagination_horizon", "discount_horizon"):
            if getattr(self, name) < 1:
                raise ValueError(f"loss.{name}={getattr(self, name)} must be at least 1.")

"""Scales and constants of the losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from w2f_torchrl.utils.settings import Settings, check_fields, setting

ForegroundTarget = Literal["inside", "zero_outside"]
FOREGROUND_TARGETS: tuple[str, ...] = get_args(ForegroundTarget)
ForegroundScale = Literal["none", "area"]
FOREGROUND_SCALES: tuple[str, ...] = get_args(ForegroundScale)


@dataclass
class LossConfig(Settings):
    """Scales and constants of the losses.

    The defaults are the paper's (hyperparameter table), except ``mask``, which the paper does not
    have.
    """

    image: float = setting(
        1.0,
        "Weight of the image reconstruction (`algo=dreamer_v3` only).",
        unit="weight",
        minimum=0,
    )
    foreground: float = setting(
        1.0, "Weight of the foreground's colours.", unit="weight", minimum=0
    )
    mask: float = setting(
        0.3,
        "Weight of the predicted mask's cross-entropy. A wrong pixel costs at least 3 nats, a "
        "wrong colour about 0.3: at 0.1 both weigh the same. A larger weight finds the mask "
        "sooner, and spends more of the latent on its edge.",
        unit="weight",
        minimum=0,
    )
    background: float = setting(
        1.0, "Weight of the background's colours.", unit="weight", minimum=0
    )
    vectors: float = setting(
        1.0, "Weight of the reconstruction of `model.vectors`.", unit="weight", minimum=0
    )
    reward: float = setting(1.0, "Weight of the reward prediction.", unit="weight", minimum=0)
    continuation: float = setting(
        1.0, "Weight of the continuation prediction.", unit="weight", minimum=0
    )
    dynamics: float = setting(
        1.0, "Weight of the KL that trains the prior, for both latents.", unit="weight", minimum=0
    )
    representation: float = setting(
        0.1,
        "Weight of the KL that trains the posterior and the encoder, for both latents.",
        unit="weight",
        minimum=0,
    )
    actor: float = setting(1.0, "Weight of the actor's loss.", unit="weight", minimum=0)
    critic: float = setting(
        1.0, "Weight of the critic's loss in imagination.", unit="weight", minimum=0
    )
    replay_critic: float = setting(
        0.3, "Weight of the critic's loss on replayed rewards.", unit="weight", minimum=0
    )
    extra: dict[str, float] = setting(
        {}, "Weights of a registered loss's entries, by name.", unit="weight", minimum=0
    )
    foreground_target: str = setting(
        "inside",
        "inside: compare colours inside the mask only; zero_outside: compare the whole image with "
        "image x mask.",
        choices=FOREGROUND_TARGETS,
    )
    foreground_scale: str = setting(
        "none",
        "none: sum the foreground's colour error over the mask's pixels; area: divide it by the "
        "share of the images that the batch's masks cover, so that it weighs as much as that of a "
        "whole image.",
        choices=FOREGROUND_SCALES,
    )
    selective: float | None = setting(
        None,
        "For imperfect masks: drop colour errors at pixels that the mask calls background but "
        "the mask head calls foreground with more than this probability. null trusts the masks. "
        "With foreground_target=inside only the background's loss changes, since the foreground's "
        "does not compare colours there.",
        unit="probability",
        minimum=0.5,
        below=1,
    )
    free_nats: float = setting(
        1.0,
        "KL, summed over a state's categoricals, below which the gradient is zero.",
        unit="nats",
        minimum=0,
    )
    entropy: float = setting(
        3e-4, "Weight of the policy's entropy in the actor's loss.", unit="weight", minimum=0
    )
    imagination_horizon: int = setting(
        15, "H, imagined agent steps.", unit="agent steps", minimum=1
    )
    discount_horizon: float = setting(
        333.0,
        "The discount is 1 - 1 / discount_horizon. The continuation head predicts it where an "
        "episode "
        "does not terminate, and 0 where it does.",
        unit="agent steps",
        minimum=1,
    )
    lmbda: float = setting(
        0.95,
        "Weight of the longer return in the lambda-returns.",
        unit="weight",
        minimum=0,
        maximum=1,
    )
    slow_critic_rate: float = setting(
        0.02,
        "Share of the critic that is mixed into the slow critic at each update.",
        unit="share",
        minimum=0,
        maximum=1,
    )
    slow_critic_regularization: float = setting(
        1.0,
        "Weight of the loss that pulls the critic towards the slow critic.",
        unit="weight",
        minimum=0,
    )
    return_rate: float = setting(
        0.01,
        "Update rate of the running 5 % and 95 % quantiles of the returns.",
        unit="rate",
        minimum=0,
        maximum=1,
    )

    def weight(self, name: str) -> float | None:
        """Return the weight of that name, a field or an entry of ``extra``; None without one."""
        return getattr(self, name, self.extra.get(name))

    def validate(self) -> None:
        """Raise ``ValueError`` naming the first setting out of range."""
        check_fields("loss", self)
        if self.foreground_target == "inside" and self.mask <= 0:
            raise ValueError(
                f"loss.mask={self.mask} must be above 0 with loss.foreground_target='inside': "
                "colours inside the mask alone teach no pose."
            )
        if self.selective is not None and self.mask <= 0:
            raise ValueError(
                f"loss.mask={self.mask} must be above 0 with loss.selective={self.selective}: a "
                "mask head that learns nothing cannot correct masks."
            )

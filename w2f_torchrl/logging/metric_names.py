"""The meaning of each metric of a run, for the report and for docs/logging.md."""

from __future__ import annotations

from typing import NamedTuple


class Meaning(NamedTuple):
    """Unit and meaning of a metric."""

    unit: str
    text: str


METRICS: dict[str, Meaning] = {
    "eval/return_mean": Meaning("reward", "mean return of the evaluation episodes"),
    "eval/return_std": Meaning("reward", "standard deviation of the return over those episodes"),
    "eval/length_mean": Meaning("agent steps", "mean length of the evaluation episodes"),
    "episode/return": Meaning("reward", "return of a training episode, at the frame it ended"),
    "episode/length": Meaning("agent steps", "length of a training episode"),
    "wm/total_loss": Meaning("nats", "sum of the world model's weighted losses"),
    "wm/image_loss": Meaning("squared colour", "image losses, summed over pixels and channels"),
    "wm/fg_loss": Meaning("squared colour + nats", "foreground colours and mask"),
    "wm/bg_loss": Meaning("squared colour", "background colours, outside the mask"),
    "wm/mask_loss": Meaning("nats", "weighted cross-entropy of the mask, summed over pixels"),
    "wm/vector_loss": Meaning(
        "squared symlog", "reconstruction of the vectors, summed over features"
    ),
    "wm/mask_iou": Meaning("0 to 1", "IoU of predicted and true mask, evaluation episodes"),
    "wm/kl_loss": Meaning("nats", "dynamics and representation loss, free nats included"),
    "wm/kl_value": Meaning("nats", "KL of posterior and prior, without free nats"),
    "wm/background_kl_value": Meaning("nats", "the same for the background's latent"),
    "wm/reward_loss": Meaning("nats", "two-hot cross-entropy of the reward"),
    "wm/continue_loss": Meaning("nats", "cross-entropy of the continuation"),
    "wm/dual": Meaning("", "weight of the KL in algo=repo, its dual variable"),
    "wm/dual_loss": Meaning("", "the dual variable's loss in algo=repo"),
    "wm/dissociation_loss": Meaning("nats", "reward predicted from algo=tia's distractor"),
    "wm/grad_norm": Meaning("", "norm of all gradients, before clipping"),
    "ac/actor_loss": Meaning("", "policy-gradient loss of the actor"),
    "ac/critic_loss": Meaning("nats", "critic's loss, imagined and replayed"),
    "ac/entropy": Meaning("nats", "entropy of the policy"),
    "ac/value_mean": Meaning("reward", "mean value in imagination"),
    "ac/advantage_mean": Meaning("scaled reward", "mean normalised advantage in imagination"),
    "ac/return_mean": Meaning("reward", "mean lambda-return in imagination"),
    "ac/return_scale": Meaning("reward", "95 % minus 5 % quantile of the returns, at least 1"),
    "ac/imagined_reward_mean": Meaning("reward", "mean reward in imagination"),
    "train/mask_iou": Meaning("0 to 1", "IoU of predicted and given mask, training batches"),
    "train/worker_restarts": Meaning("", "how often lost worker processes were replaced so far"),
    "train/imagination/context_error": Meaning("colour", "mean error of the observed frames"),
    "train/imagination/error": Meaning("colour", "mean error of the imagined frames"),
    "train/imagination/last_error": Meaning("colour", "mean error of the last imagined frame"),
    "train/imagination/mask_iou": Meaning("0 to 1", "IoU of the imagined mask with the true one"),
    "recorded/error": Meaning("colour", "mean error of predicted frames, recorded episodes"),
    "recorded/context_error": Meaning("colour", "mean error of the observed frames before them"),
    "recorded/last_error": Meaning("colour", "mean error of the last predicted frame"),
    "recorded/still_error": Meaning("colour", "error of repeating the last observed frame instead"),
    "recorded/mask_iou": Meaning("0 to 1", "IoU of predicted and true mask, recorded episodes"),
    "recorded/reward_error": Meaning("reward", "mean error of predicted rewards"),
    "segmentation/iou": Meaning("0 to 1", "IoU of the segmenter's mask with the simulator's"),
    "segmentation/milliseconds": Meaning("ms", "time per mask"),
    "segmentation/frames": Meaning("frames", "frames segmented so far"),
    "speed/frames_per_second": Meaning("1/s", "environment frames per second, since the last row"),
    "speed/updates_per_second": Meaning("1/s", "updates per second, since the last row"),
    "speed/seconds": Meaning("s", "time of the run so far, over all its processes"),
}

PATTERNS: dict[str, Meaning] = {
    "weights": Meaning("", "weights of a module"),
    "gradients": Meaning("", "gradients of a module at the last update, before clipping"),
    "latents": Meaning("nats for an entropy", "latents of a training batch"),
}
"""Meaning of all metrics of a group, by the group's name."""

SUFFIXES = {
    "q05": "5 % quantile",
    "q50": "median",
    "q95": "95 % quantile",
    "rms": "root mean square",
    "max_abs": "largest absolute value",
}


def meaning_of(name: str) -> Meaning:
    """Look up a metric; an unknown one has an empty meaning.

    Args:
        name: The metric.
    """
    if name in METRICS:
        return METRICS[name]
    group, *rest = name.split("/")
    if group in PATTERNS:
        unit, text = PATTERNS[group]
        return Meaning(unit, f"{SUFFIXES.get(rest[-1], rest[-1])}, {text}")
    if group == "eval" and len(rest) == 2:
        unit, text = METRICS.get(f"eval/{rest[1]}", METRICS["wm/mask_iou"])
        return Meaning(unit, f"{text}, set {rest[0]}")
    if is_own_loss(name):
        return Meaning("", "a loss added by a subclass, weighted")
    return Meaning("", "")


def is_own_loss(name: str) -> bool:
    """Return whether a metric is a loss that a subclass of ``World2FilterLoss`` added.

    Args:
        name: The metric.
    """
    return name.startswith("wm/") and name.endswith("_loss") and name not in METRICS

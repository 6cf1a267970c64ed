"""Log images and videos, and the spread of weights, gradients and latents.

Nothing here changes torch's random state, so the results of a run do not depend on how often it is
logged.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from w2f_torchrl.config import LoggingConfig
from w2f_torchrl.evaluation.evaluator import Evaluation
from w2f_torchrl.evaluation.imagination import decode, imagine_windows
from w2f_torchrl.keys import MASK
from w2f_torchrl.learner.learner import Learner
from w2f_torchrl.logging.metrics import MetricsLogger
from w2f_torchrl.logging.pictures.contact_sheet import overlay
from w2f_torchrl.logging.pictures.film import film
from w2f_torchrl.logging.pictures.plotting import plot_curves
from w2f_torchrl.logging.pictures.video import panel, to_uint8
from w2f_torchrl.modules.packed_latents import initial_keys
from w2f_torchrl.utils.seeding import derive_seed

logger = logging.getLogger(__name__)

FILM_FPS = 5.0
OBSERVATION_HEIGHT, RECONSTRUCTION_HEIGHT = 192, 128
"""Minimum heights of the videos' images, pixels. With 256 for both they take three times as
long to encode (``benchmarks/speed/logging_cost.py``)."""
GRID = (4, 8)
"""Sequences and time steps in an image of a training batch."""
SAMPLED = 100_000
"""Approximate maximum number of values for the quantiles and histogram of a module."""


class Diagnostics:
    """Log images, videos and histograms when they are due.

    Args:
        settings: When they are due.
        learner: The learner.
        metrics_logger: The logger that receives them.
        seed: The run's seed.
        videos: Whether evaluations make videos.
    """

    def __init__(
        self,
        settings: LoggingConfig,
        learner: Learner,
        metrics_logger: MetricsLogger,
        *,
        seed: int = 0,
        videos: bool = True,
    ) -> None:
        self.settings, self.seed, self.videos = settings, seed, videos
        self.learner, self.logger = learner, metrics_logger
        self.videos_at: int | None = None
        """Frames of the last evaluation that made videos."""

    def state_dict(self) -> dict[str, int | None]:
        """Return the frames of the last evaluation that made videos."""
        return {"videos_at": self.videos_at}

    def load_state_dict(self, state: dict[str, int | None]) -> None:
        """Load a state from :meth:`state_dict`."""
        self.videos_at = state["videos_at"]

    # ---------------------------------------------------------------- after an update

    def after_update(self, sample: TensorDictBase, *, frames: int, updates: int) -> None:
        """Log the images and histograms that are due after an update.

        Args:
            sample: The update's records ``[B, T]``.
            frames: Environment frames so far.
            updates: Updates so far, including this one.
        """
        histograms = _is_due(updates, self.settings.histograms_every_updates)
        images = _is_due(updates, self.settings.images_every_updates)
        if not histograms and not images:
            return
        with torch.no_grad(), _untouched_randomness(sample.device):
            world_model = self.learner.world_model
            keys = (*world_model.in_keys, *initial_keys(sample))
            inferred = world_model.infer(sample.select(*keys)).get("next")
            if histograms:
                self._log_histograms(inferred, frames, updates)
            if images:
                self._log_images(sample, inferred, frames)

    def _log_histograms(self, inferred: TensorDictBase, frames: int, updates: int) -> None:
        row: dict[str, Tensor] = {}
        groups = {f"latents/{name}": values for name, values in _latents(inferred).items()}
        for name, module in parts(self.learner).items():
            weights = list(module.parameters())
            groups[f"weights/{name}"] = _gather(weights)
            gradients = [p.grad for p in weights if p.grad is not None]
            if gradients:
                groups[f"gradients/{name}"] = _gather(gradients)
        for name, values in groups.items():
            row |= {f"{name}/{key}": value for key, value in summarize_values(values).items()}
            self.logger.log_histogram(name, values, frames=frames)
        self.logger.log(row, frames=frames, updates=updates)

    def _log_images(self, sample: TensorDictBase, inferred: TensorDictBase, frames: int) -> None:
        rows = slice(min(GRID[0], sample.shape[0]))
        count = min(GRID[1], sample.shape[1])
        columns = torch.linspace(0, sample.shape[1] - 1, count).long().to(inferred.device)
        keys = [f"{p}{key}" for p in ("", "background_") for key in ("state", "belief")]
        keys = [key for key in keys if key in inferred.keys()]
        # Slices of a batch share memory with buffers that the next update may overwrite.
        shown = sample[rows][:, columns].select("next").clone().cpu()["next"]
        made = decode(self.learner.world_model, inferred.select(*keys)[rows][:, columns])
        pixels = shown["pixels"]
        images = {"train/original": pixels}
        if "imagined" in made:  # the model has a decoder
            images["train/reconstructed"] = made["imagined"]
        if MASK in shown.keys():
            mask = shown[MASK]
            mask = mask if mask.dtype is torch.bool else mask > 0.5
            images["segmentation/mask"] = overlay(pixels, mask)
        if "mask" in made:
            images["segmentation/predicted_mask"] = overlay(pixels, made["mask"] > 0.5)
        scale = max(1, -(-96 // pixels.shape[-1]))
        for name, pictures in images.items():
            self.logger.log_image(name, partial(_grid, pictures), frames=frames, scale=scale)

    # ---------------------------------------------------------------- after an evaluation

    def after_evaluation(self, evaluation: Evaluation, *, frames: int, updates: int) -> None:
        """Log the videos of an evaluation, and the model's imagination in it.

        Args:
            evaluation: The evaluation.
            frames: Environment frames so far.
            updates: Updates so far.
        """
        every = self.settings.videos_every_frames
        _log_result(evaluation.metrics, frames)
        first = self.videos_at is None
        if first or every == 0 or frames // every > (self.videos_at or 0) // every:
            self.videos_at = frames
            if self.videos:
                self._log_episode(evaluation, frames)
            if self.settings.imagination_windows and self.learner.world_model.decoder.out_keys:
                self._log_imagination(evaluation, frames, updates)

    def draw_curves(self) -> None:
        """Draw ``curves.png`` in the background."""
        self.logger.background.submit("curves.png", partial(plot_curves, self.logger.run_dir))

    def _log_episode(self, evaluation: Evaluation, frames: int) -> None:
        height = evaluation.pixels.shape[-2]
        self.logger.log_video(
            "train/observation_video",
            evaluation.pixels,
            frames=frames,
            scale=_enlargement(height, OBSERVATION_HEIGHT),
        )
        if len(evaluation.columns) == 1:  # the frame: the model has no decoder
            return
        enlarged = partial(
            panel, evaluation.columns, scale=_enlargement(height, RECONSTRUCTION_HEIGHT)
        )
        self.logger.log_video("train/reconstruction_video", enlarged, frames=frames, scale=1)

    def _log_imagination(self, evaluation: Evaluation, frames: int, updates: int) -> None:
        made = imagine_windows(
            self.learner.world_model,
            self.learner.loss.actor,
            evaluation.records,
            count=self.settings.imagination_windows,
            seed=derive_seed(self.seed, "imagination", 0),
        )
        if made is None:
            logger.warning(
                "logging.imagination_windows=%d: an evaluation episode of %d frames is too short "
                "for a video of imagination.",
                self.settings.imagination_windows,
                evaluation.records.shape[1],
            )
            return
        self.logger.log(made.metrics, frames=frames, updates=updates)
        for name, rows in (("comparison", made.comparison), ("imagined", made.imagined)):
            self.logger.log_video(
                f"train/imagination/{name}",
                partial(film, rows, made.context),
                frames=frames,
                fps=FILM_FPS,
                scale=1,
            )


def parts(learner: Learner) -> dict[str, nn.Module]:
    """Return the modules whose weights and gradients are logged, by name."""
    model, loss = learner.world_model, learner.loss
    found: dict[str, nn.Module | None] = {
        "encoder": model.encoder,
        "dynamics": model.rollout,
        "background_encoder": model.background_encoder,
        "background_dynamics": model.background_rollout,
        "decoder": model.decoder,
        "reward": model.reward,
        "continuation": model.continuation,
        "actor": loss.actor,
        "critic": loss.critic,
    }
    return {name: module for name, module in found.items() if module is not None}


def summarize_values(values: Tensor) -> dict[str, Tensor]:
    """Return 5 %, 50 % and 95 % quantile, root mean square and largest absolute value.

    Args:
        values: Floating point ``[N]``.

    Returns:
        Scalars on the values' device.
    """
    values = values.float()
    low, middle, high = values.quantile(values.new_tensor([0.05, 0.5, 0.95])).unbind()
    return {
        "q05": low,
        "q50": middle,
        "q95": high,
        "rms": values.square().mean().sqrt(),
        "max_abs": values.abs().max(),
    }


def _latents(inferred: TensorDictBase) -> dict[str, Tensor]:
    """Return beliefs, and the entropy in nats of every categorical of posterior and prior."""
    out = {}
    for prefix in ("", "background_"):
        if f"{prefix}belief" not in inferred.keys():
            continue
        out[f"{prefix}belief"] = _thin(inferred[f"{prefix}belief"].reshape(-1))
        for kind in ("posterior", "prior"):
            logs = inferred[f"{prefix}{kind}_logits"].float().log_softmax(-1)
            entropy = -(logs.exp() * logs).sum(-1)
            out[f"{prefix}{kind}_entropy"] = _thin(entropy.reshape(-1))
    return out


def _gather(tensors: Sequence[Tensor]) -> Tensor:
    total = sum(tensor.numel() for tensor in tensors)
    every = max(1, total // SAMPLED)
    return torch.cat([tensor.detach().reshape(-1)[::every] for tensor in tensors])


def _thin(values: Tensor) -> Tensor:
    return values[:: max(1, len(values) // SAMPLED)]


def _grid(pictures: Tensor) -> Tensor:
    """Arrange ``[R, K, C, H, W]`` in one image, uint8 ``[3, R x H, K x W]``."""
    rows = to_uint8(pictures.flatten(0, 1)).unflatten(0, pictures.shape[:2])
    picture: Tensor = rows.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    return picture


def _enlargement(height: int, minimum: int) -> int:
    """Return the side of the square that a pixel becomes, so that images have a minimum height."""
    return max(1, -(-minimum // height))


def _log_result(metrics: Mapping[str, float], frames: int) -> None:
    parts = []
    if "eval/return_mean" in metrics:
        mean, deviation = metrics["eval/return_mean"], metrics["eval/return_std"]
        parts.append(f"return {mean:.1f} +- {deviation:.1f}")
    if "recorded/error" in metrics:
        error, still = metrics["recorded/error"], metrics["recorded/still_error"]
        parts.append(f"open-loop error {error:.4f} (of a still picture {still:.4f})")
    elif "recorded/reward_error" in metrics:  # the model has no decoder
        parts.append(f"open-loop error of the reward {metrics['recorded/reward_error']:.4f}")
    if "wm/mask_iou" in metrics:
        parts.append(f"mask IoU {metrics['wm/mask_iou']:.2f}")
    logger.info("evaluation at %s frames: %s", f"{frames:,}", ", ".join(parts))


def _is_due(count: int, every: int) -> bool:
    return every > 0 and count % every == 0


@contextmanager
def _untouched_randomness(device: torch.device | None) -> Iterator[None]:
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield

"""Leakage, content, reconstruction, and the effect of another background."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tensordict import TensorDict
from torch import Tensor

from w2f_torchrl.algorithms.masked_input import MaskedEncoder
from w2f_torchrl.evaluation.divergence import CONTEXT, latent_divergence
from w2f_torchrl.evaluation.episodes import Episode
from w2f_torchrl.evaluation.imagination import HORIZON
from w2f_torchrl.evaluation.probes import PROBES, Score, probe_class, probe_values
from w2f_torchrl.modules import WorldModel
from w2f_torchrl.objectives import World2FilterLoss
from w2f_torchrl.segmenters import mask_iou
from w2f_torchrl.utils.stopping import check_stop

Array = npt.NDArray[np.float64]

FRAMES = 2000
"""Maximum number of rows for the probes, evenly from every episode."""
CHUNK = 64
"""Images decoded at a time, to bound memory."""


def measure_filtering(
    model: World2FilterLoss,
    episodes: Sequence[Episode],
    *,
    replaced: Sequence[Episode] = (),
    clean: Sequence[Episode] = (),
    untrained: WorldModel | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    probes: Sequence[str] = PROBES,
) -> dict[str, Any]:
    """Measure what the latents contain of the agent and of the scenery.

    Args:
        model: World model, actor and critic.
        episodes: From :func:`~w2f_torchrl.evaluation.record_episodes`; for the clip's identity at
            least 4 per clip.
        replaced: The first of them with other backgrounds, from
            :func:`~w2f_torchrl.evaluation.replace_backgrounds`.
        clean: The first of them without scenery, from
            :func:`~w2f_torchrl.evaluation.replay_in`.
        untrained: A control: a world model of the same sizes with its initial weights.
        seeds: Seeds of the probes' splits.
        probes: Probes of the clip's identity, see :func:`~w2f_torchrl.evaluation.probe_class`.

    Returns:
        ``leakage`` and ``content``: scores of the probes for the latent ``foreground`` (which the
        actor reads; the only one in a model with one latent), for ``background`` if it exists, and
        for ``untrained``: the accuracy for ``clip``; R2 for ``camera``, ``color``, ``grid``,
        ``pose``, ``velocity``. ``reconstruction``: ``foreground_psnr`` inside the simulator's mask
        and ``background_psnr`` outside, in dB, and ``mask_iou``; None for what the model does not
        decode. ``replacement``: the change of the
        mean action and of the value with another background, as a mean absolute difference
        (``action_change`` in [0, 2], ``value_change``), and relative to the difference between two
        random frames (``..._relative``: 0 is no influence, 1 equals that difference). ``removal``:
        the same without any scenery. ``divergence``: how far latents from histories with and
        without scenery part (:func:`~w2f_torchrl.evaluation.latent_divergence`).
    """
    latents, pictures = _encode_all(model.world_model, episodes)
    if untrained is not None:
        latents["untrained"] = _encode_all(untrained, episodes)[0]["foreground"]
    rows = _choose(episodes)
    owner = np.concatenate([np.full(len(e), index) for index, e in enumerate(episodes)])[rows]
    result: dict[str, Any] = {"leakage": {}, "content": {}, "reconstruction": pictures}
    for name, features in latents.items():
        chosen = features[rows]
        result["leakage"][name] = _leakage(chosen, episodes, rows, owner, seeds, probes)
        result["content"][name] = {
            key: probe_values(chosen, _joined(episodes, "agent", key)[rows], owner, seeds=seeds)
            for key in episodes[0].agent
        }
    if replaced:
        result["replacement"] = _replacement(model, episodes[: len(replaced)], replaced)
    if clean:
        disturbed = episodes[: len(clean)]
        result["removal"] = _replacement(model, disturbed, clean)
        if max(map(len, clean)) >= CONTEXT + HORIZON:
            result["divergence"] = latent_divergence(model.world_model, clean, disturbed)
    return result


def flat_metrics(result: Mapping[str, Any], prefix: str = "filtering") -> dict[str, float]:
    """Return the measures by name for a log: ``filtering/leakage/foreground/clip/linear``."""
    flat: dict[str, float] = {}
    for key, value in result.items():
        name = f"{prefix}/{key}"
        if isinstance(value, Score):
            flat[name] = value.mean
        elif isinstance(value, Mapping):
            flat |= flat_metrics(value, name)
        elif isinstance(value, list):  # over the horizon
            flat[f"{name}/first"], flat[f"{name}/last"] = value[0], value[-1]
            flat[f"{name}/mean"] = sum(value) / len(value)
        elif value is not None:
            flat[name] = float(value)
    return flat


def _choose(episodes: Sequence[Episode]) -> npt.NDArray[np.int64]:
    """Return the rows of all episodes' frames that the probes use."""
    total = sum(map(len, episodes))
    step = -(-total // FRAMES)
    starts = np.cumsum([0, *map(len, episodes)])
    return np.concatenate(
        [start + np.arange(0, len(e), step) for start, e in zip(starts, episodes, strict=False)]
    )


def _joined(episodes: Sequence[Episode], group: str, key: str) -> Array:
    return np.concatenate([getattr(episode, group)[key] for episode in episodes])


def _leakage(
    features: Array,
    episodes: Sequence[Episode],
    rows: npt.NDArray[np.int64],
    owner: npt.NDArray[np.int64],
    seeds: Sequence[int],
    probes: Sequence[str],
) -> dict[str, dict[str, Score]]:
    found: dict[str, dict[str, Score]] = {}
    if "clip" in episodes[0].scenery and len({e.scenery["clip"][0, 0] for e in episodes}) > 1:
        clips = _joined(episodes, "scenery", "clip")[rows, 0].astype(np.int64)
        found["clip"] = probe_class(features, clips, owner, seeds=seeds, probes=probes)
    for key in ("camera", "color", "grid"):
        if key in episodes[0].scenery:
            values = _joined(episodes, "scenery", key)[rows]
            if key == "grid" and (values == values[0]).all():
                continue  # the reward has stayed in one bin
            found[key] = probe_values(features, values, owner, seeds=seeds)
    return found


@torch.no_grad()
def _encode_all(
    world_model: WorldModel, episodes: Sequence[Episode]
) -> tuple[dict[str, Array], dict[str, float | None]]:
    """Return features of every frame by latent ``[N, D + S]``, and reconstruction measures."""
    features: dict[str, list[Tensor]] = {}
    sums = _PictureSums()
    for episode in episodes:
        check_stop()
        inferred = _infer(world_model, episode)
        for name, prefix in (("foreground", ""), ("background", "background_")):
            if f"{prefix}state" in inferred.keys():
                features.setdefault(name, []).append(_features(inferred, prefix).cpu())
        sums.add(world_model, inferred, episode)
    joined = {key: torch.cat(parts).double().numpy() for key, parts in features.items()}
    return joined, sums.result()


def _infer(world_model: WorldModel, episode: Episode) -> TensorDict:
    """Return the posterior latents of an episode ``[T]``; every call draws the same states."""
    device = next(world_model.parameters()).device
    records = episode.records().select(*world_model.in_keys).to(device)
    with torch.random.fork_rng():
        torch.manual_seed(episode.seed)
        inferred: TensorDict = world_model.infer(records)["next"][0]
    return inferred


def _features(inferred: TensorDict, prefix: str = "") -> Tensor:
    return torch.cat((inferred[f"{prefix}belief"], inferred[f"{prefix}state"]), -1).float()


class _PictureSums:
    """Squared errors inside and outside of masks, and overlaps, summed over episodes."""

    def __init__(self) -> None:
        self.error = {"foreground": 0.0, "background": 0.0}
        self.count = {"foreground": 0, "background": 0}
        self.ious: list[Tensor] = []

    def add(self, world_model: WorldModel, inferred: TensorDict, episode: Episode) -> None:
        if not world_model.decoder.out_keys:
            return
        sides = [("foreground", True), ("background", False)]
        if isinstance(world_model.encoder, MaskedEncoder):  # it is to be black there
            sides = sides[:1]
        for start in range(0, len(episode), CHUNK):
            part = slice(start, start + CHUNK)
            td = TensorDict({"next": inferred[part]}, [len(inferred[part])])
            out = world_model.decoder(td)["next"].cpu()
            pixels, mask = episode.pixels[part] / 255, episode.masks[part]
            whole = out.get("reconstructed_pixels", None)
            for side, inside in sides:
                where = mask if inside else ~mask
                picture = out.get(f"{side}_pixels", whole)
                if picture is None:
                    continue
                squared = (picture.clamp(0, 1) - pixels).square() * where
                self.error[side] += float(squared.double().sum())
                self.count[side] += 3 * int(where.sum())
            if "mask_logits" in out.keys():
                self.ious.append(mask_iou(out["mask_logits"] > 0, mask))

    def result(self) -> dict[str, float | None]:
        """Return each side's peak signal-to-noise ratio in dB, None without pixels, and the IoU."""
        found: dict[str, float | None] = {
            f"{side}_psnr": _psnr(self.error[side] / count) if (count := self.count[side]) else None
            for side in self.error
        }
        found["mask_iou"] = float(torch.cat(self.ious).mean()) if self.ious else None
        return found


def _psnr(mean_squared_error: float) -> float:
    return float(-10 * np.log10(max(mean_squared_error, 1e-12)))


@torch.no_grad()
def _replacement(
    model: World2FilterLoss, episodes: Sequence[Episode], replaced: Sequence[Episode]
) -> dict[str, float]:
    """Return the change of action and value, absolute and relative to random pairs of frames."""

    def act(features: Tensor) -> Tensor:
        mode: Tensor = model.actor.distribution(*model.actor.from_features(features)).mode
        return mode

    def value(features: Tensor) -> Tensor:
        return model.world_model.two_hot.decode(model.critic(features).float()).unsqueeze(-1)

    before = torch.cat([_features(_infer(model.world_model, each)) for each in episodes])
    after = torch.cat([_features(_infer(model.world_model, each)) for each in replaced])
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(before), generator=generator)
    result: dict[str, float] = {}
    head: Callable[[Tensor], Tensor]
    for name, head in (("action", act), ("value", value)):
        old, new = head(before), head(after)
        change, spread = (new - old).abs().mean(), (old - old[order]).abs().mean()
        result[f"{name}_change"] = float(change)
        result[f"{name}_change_relative"] = float(change / spread.clamp(min=1e-8))
    return result

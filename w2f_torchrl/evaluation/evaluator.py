"""Evaluation episodes, and the model's reconstruction of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.data import Unbounded
from torchrl.envs import EnvBase, TensorDictPrimer, TransformedEnv
from torchrl.envs.utils import set_exploration_type, step_mdp

from w2f_torchrl.algorithms.masked_input import student_of, target_pixels
from w2f_torchrl.config import EvaluationConfig
from w2f_torchrl.data.environments import control_steps
from w2f_torchrl.data.records import keys_of_observations, records_from_rollout
from w2f_torchrl.envs import EvaluationSet, evaluation_sets
from w2f_torchrl.evaluation.policy import exploration_type
from w2f_torchrl.keys import MASK, NEXT_MASK
from w2f_torchrl.modules import WorldModel, compose
from w2f_torchrl.segmenters import mask_iou
from w2f_torchrl.utils.closing import end_all
from w2f_torchrl.utils.seeding import derive_seed
from w2f_torchrl.utils.stopping import check_stop

CONTROL_STEPS = 1000
"""Length of an episode if its env has no limit."""
KEPT_STEPS = 1000
"""Maximum agent steps of an episode to keep, reconstruct and show; later ones are only counted."""
PART = 64
"""Agent steps per call once only counting."""


MakeEnv: TypeAlias = Callable[[int, EvaluationSet | None], TransformedEnv]
"""Makes an env from a seed, with the scenery of an evaluation set in place of the run's."""


@dataclass
class Evaluation:
    """Results of evaluation episodes."""

    metrics: dict[str, float]
    """``eval/return_mean`` and ``_std``, ``eval/length_mean``, and ``wm/mask_iou`` with masks; for
    each evaluation set ``eval/<set>/return_mean``, ``return_std``, ``length_mean``, ``mask_iou``.
    """
    pixels: Tensor
    """The first episode, uint8 ``[T, 3, H, W]``."""
    columns: dict[str, Tensor]
    """Labelled images of the first episode's reconstruction, ``[T, C, H, W]`` each."""
    records: TensorDictBase
    """Records ``[1, T]`` of the first episode, with masks if the run has them."""


class Evaluator:
    """Play episodes in a separate env and one per evaluation set; ``evaluation.action`` says how.

    Args:
        settings: Evaluation sets, and the length of an episode.
        make_env: Makes the envs.
        policy: The acting policy, shared with the learner.
        latents: Sizes of the latents that the policy carries, by key.
        seed: Seed of the envs.
        action_repeat: Control steps of an agent step.
        device: Where the policy acts.
        segment: Adds masks to records if the env does not render them.
        observations: Entries of the env's observations, in addition to images and masks, that
            records keep.
    """

    def __init__(
        self,
        settings: EvaluationConfig,
        make_env: MakeEnv,
        policy: TensorDictModuleBase,
        latents: Mapping[str, int],
        *,
        seed: int,
        action_repeat: int = 1,
        device: torch.device | str = "cpu",
        segment: Callable[[TensorDictBase], TensorDictBase] | None = None,
        observations: Sequence[str] = (),
    ):
        self.settings, self.make_env, self.policy = settings, make_env, policy
        self.action_repeat, self.device = action_repeat, torch.device(device)
        self.segment, self.observations = segment, observations
        self._primers = {key: Unbounded((size,)) for key, size in latents.items()}
        self._seed = seed
        self._envs: dict[str, EnvBase] = {}

    @property
    def envs(self) -> dict[str, EnvBase]:
        """The env with the run's settings, ``run``, and those of evaluation sets; made lazily."""
        if not self._envs:
            self.start()
        return self._envs

    def start(self) -> None:
        """Make the envs, and close earlier ones."""
        end_all([env.close for env in self._envs.values()])
        sets = evaluation_sets()
        self._envs = {"run": self._make_env(self._seed)} | {
            name: self._make_env(derive_seed(self._seed, "set", name), sets[name])
            for name in self.settings.sets
        }

    def _make_env(self, seed: int, evaluation_set: EvaluationSet | None = None) -> EnvBase:
        env = self.make_env(seed, evaluation_set)
        return env.append_transform(TensorDictPrimer(self._primers))

    def seed(self, frames: int) -> None:
        """Seed the envs by the run's frames, so that no evaluation depends on earlier ones."""
        for name, env in self.envs.items():
            env.set_seed(derive_seed(self._seed, name, frames), static_seed=True)

    def evaluate(self, world_model: WorldModel, episodes: int) -> Evaluation:
        """Play episodes in the run's environment, then in those of the evaluation sets.

        Args:
            world_model: The world model of the policy.
            episodes: Number of episodes per env.
        """
        own, *sets = self.envs
        metrics, pixels, columns, records = self._evaluate(self.envs[own], world_model, episodes)
        metrics = {f"eval/{name}": value for name, value in metrics.items()}
        if "eval/mask_iou" in metrics:
            metrics["wm/mask_iou"] = metrics.pop("eval/mask_iou")
        for name in sets:
            of_set = self._evaluate(self.envs[name], world_model, episodes)[0]
            metrics |= {f"eval/{name}/{key}": value for key, value in of_set.items()}
        return Evaluation(metrics, pixels, columns, records)

    def _evaluate(
        self, env: EnvBase, world_model: WorldModel, episodes: int
    ) -> tuple[dict[str, float], Tensor, dict[str, Tensor], TensorDictBase]:
        """Return metrics by short name; pixels, reconstruction and records of the first episode."""
        returns, lengths, ious = [], [], []
        first: tuple[Tensor, dict[str, Tensor], TensorDictBase] | None = None
        for _ in range(episodes):
            episode, total, length = self._play(env)
            returns.append(total)
            lengths.append(float(length))
            keys = keys_of_observations(episode, self.observations)
            made = records_from_rollout(episode.unsqueeze(0), keys)
            # A policy that acts on a student's masks has seen those, whatever the simulator's are.
            if self.segment is not None and (
                MASK not in made["next"].keys() or student_of(self.policy) is not None
            ):
                made = self.segment(made)
            records = made.unsqueeze(0).to(self.device)
            columns, iou = reconstruct(world_model, records)
            if iou is not None:
                ious.append(iou)
            first = first or (records["next", "pixels"][0].cpu(), columns, records)
        assert first is not None, "episodes is at least 1 (validated)"
        scores = torch.tensor(returns)
        metrics = {
            "return_mean": float(scores.mean()),
            "return_std": float(scores.std(unbiased=False)),
            "length_mean": sum(lengths) / len(lengths),
        }
        if ious:
            metrics["mask_iou"] = sum(ious) / len(ious)
        return metrics, *first

    def _play(self, env: EnvBase) -> tuple[TensorDictBase, float, int]:
        """Play an episode; return its kept steps ``[T]``, its return, its length in agent steps."""
        repeat = self.action_repeat
        limit = self.settings.max_control_steps or control_steps(env, repeat) or CONTROL_STEPS
        steps = -(-limit // repeat)
        with torch.no_grad(), set_exploration_type(exploration_type(self.settings)):
            episode: TensorDictBase = env.rollout(min(steps, KEPT_STEPS), self._act)
            total, length, last = float(episode["next", "reward"].sum()), len(episode), episode[-1]
            while length < steps and not last["next", "done"].any():
                part = env.rollout(
                    min(steps - length, PART),
                    self._act,
                    auto_reset=False,
                    tensordict=step_mdp(last),
                )
                total, last = total + float(part["next", "reward"].sum()), part[-1]
                length += len(part)
        return episode, total, length

    def _act(self, tensordict: TensorDictBase) -> TensorDictBase:
        check_stop()
        acted: TensorDictBase = self.policy(tensordict.to(self.device))
        return tensordict.update(acted.to("cpu"))

    def close(self) -> None:
        """Close the envs."""
        for env in self._envs.values():
            env.close()


@torch.no_grad()
def reconstruct(
    world_model: WorldModel, records: TensorDictBase, chunk: int = 64
) -> tuple[dict[str, Tensor], float | None]:
    """Reconstruct an episode from the posterior latents.

    Args:
        world_model: The world model.
        records: One episode ``[1, T]``.
        chunk: Images decoded at a time, to bound memory.

    Returns:
        Labelled images ``[T, C, H, W]`` on the CPU, colours in [0, 1], only the frame itself for a
        model without a decoder; and the mean IoU of predicted and true mask (``None`` without
        one of them).
    """
    frame = target_pixels(world_model, records)[0].cpu()
    if not world_model.decoder.out_keys:
        return {"frame": frame}, None
    inferred = world_model.infer(records.select(*world_model.in_keys)).get("next")
    decoded = []
    for part in inferred[0].split(chunk, 0):
        check_stop()
        td = TensorDict({"next": part}, part.batch_size)
        decoded.append(
            world_model.decoder(td)
            .get("next")
            .select(*(key[1] for key in world_model.decoder.out_keys))
            .cpu()
        )
    out: TensorDict = torch.cat(decoded)
    if "mask_logits" not in out.keys():
        return {"frame": frame, "reconstruction": out["reconstructed_pixels"].clamp(0, 1)}, None
    predicted, columns = out["mask_logits"] > 0, {"frame": frame}
    iou = None
    if NEXT_MASK in records.keys(include_nested=True):
        columns["true mask"] = records[NEXT_MASK][0].cpu()
        iou = float(mask_iou(predicted, columns["true mask"]).mean())
    columns["mask"] = predicted
    foreground, soft = out["foreground_pixels"].clamp(0, 1), out["mask_logits"].sigmoid()
    columns["foreground"] = foreground * soft
    if "background_pixels" in out.keys():
        columns["background"] = out["background_pixels"].clamp(0, 1)
        composed = compose(foreground, out["mask_logits"], columns["background"])
        columns["composed"] = composed.clamp(0, 1)
    return columns, iou

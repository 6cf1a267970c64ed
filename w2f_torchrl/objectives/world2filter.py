"""DreamerV3's losses, for one latent or for a foreground and a background latent.

Shape letters: B batch, T time, N = B x T imagined trajectories, H horizon, S state, D belief.
"""

from __future__ import annotations

import copy
from typing import ClassVar

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.nn import functional as F
from torchrl.modules import DreamerV3MLP
from torchrl.objectives import LossModule, categorical_kl_terms

from w2f_torchrl.config.loss import ForegroundScale, ForegroundTarget, LossConfig
from w2f_torchrl.keys import MASK, PIXELS, mask_of
from w2f_torchrl.modules import Actor, WorldModel, imagine, imagine_step
from w2f_torchrl.modules.packed_latents import LATENTS, initial_keys
from w2f_torchrl.objectives import reconstruction
from w2f_torchrl.objectives.returns import ReturnNorm, lambda_return
from w2f_torchrl.objectives.terms import TERMS, TOTAL, LossTerm
from w2f_torchrl.segmenters import mask_iou
from w2f_torchrl.utils.tensors import FLOATING, check_tensor


class World2FilterLoss(LossModule):
    """All losses of one update as one module: world model, actor, critic and replayed critic.

    The sum of the ``loss_*`` entries is minimised. Actor and critic learn in imagination
    from every posterior state of the batch; their gradients stop at the latents. The replayed
    critic loss does reach the foreground latent, as in the reference. With latent ``split`` the
    background latent gets gradients from its own KL and reconstruction only.

    Args:
        world_model: The world model.
        actor: Maps belief and state to the parameters of its distribution: a
            :class:`~w2f_torchrl.modules.GaussianActor`, or one for discrete actions.
        critic: Maps ``belief, state`` to logits over the world model's bins.
        config: Scales and constants.

    Input, records ``[B, T]``: ``action``, ``is_init``, and under ``next`` ``pixels``, ``reward``,
    ``terminated``, ``done`` and, unless the latent is ``whole``, ``foreground_mask``. With packed
    latents under ``initial``, slices start from those, otherwise from zero.

    Output: scalars. ``loss_*`` as listed by :meth:`loss_names`, already weighted, and detached
    metrics under their names in ``metrics.jsonl``. If slices start from given latents, also the
    packed posterior latents ``[B, T]`` under ``latents``.

    A subclass that returns another loss from :meth:`world_model_losses` lists it in
    :meth:`loss_names`. By default its weight is the field of its name in ``config``, or the entry
    of that name in ``config.extra``, and it is
    logged as ``wm/<name>_loss`` and included in ``wm/total_loss``; :attr:`terms` can change both.

    Raises:
        ValueError: If a setting is out of range, or a loss has no weight.
    """

    terms: ClassVar[dict[str, LossTerm]] = TERMS
    """Metrics, latents and weight of each loss; a subclass adds rows for losses of the actor or the
    critic, and for losses that share a weight or a metric with another."""

    def __init__(
        self,
        world_model: WorldModel,
        actor: Actor,
        critic: DreamerV3MLP,
        config: LossConfig | None = None,
    ):
        super().__init__()
        self.config = config or LossConfig()
        self.config.validate()
        self.world_model = world_model
        self.actor = actor
        self.critic = critic
        self.slow_critic = copy.deepcopy(critic).requires_grad_(False)
        self.return_norm = ReturnNorm(rate=self.config.return_rate)
        pictures = (PIXELS, *world_model.config.pictures)
        masks = [] if world_model.latent == "whole" else [("next", mask_of(p)) for p in pictures]
        names = ("reward", "terminated", "done")
        self.in_keys = [*world_model.in_keys, *(("next", name) for name in names), *masks]
        self.out_keys = self.loss_names()
        self._check_terms()
        self.imagine_step = imagine_step
        """Computes one imagined step; the learner may compile it."""

    def _forward_value_estimator_keys(self, **kwargs: object) -> None:
        """Do nothing: the returns are computed here."""

    def loss_names(self) -> list[str]:
        """Return the names of the summed entries; :meth:`forward` returns exactly these."""
        model = self.world_model
        names = [name for name, term in self.terms.items() if model.latent in term.latents]
        return [f"loss_{name}" for name in names if name != "vectors" or model.config.vectors]

    def term(self, name: str) -> LossTerm:
        """Return the metrics, latents and weight of a loss; unlisted ones are the world model's."""
        return self.terms.get(name) or LossTerm((TOTAL, f"wm/{name}_loss"))

    def _check_terms(self) -> None:
        weights = {self.term(name).weight or name: name for name in map(_plain, self.out_keys)}
        for weight, name in weights.items():
            if self.config.weight(weight) is None:
                raise ValueError(
                    f"loss_{name} has no weight: set loss.extra.{weight}, or let "
                    f"{type(self.config).__name__} have a field {weight!r}."
                )
        for weight in self.config.extra:
            if weight not in weights or hasattr(self.config, weight):
                without = [name for name in weights if not hasattr(self.config, name)]
                raise ValueError(
                    f"loss.extra.{weight} is not the weight of a loss that {type(self).__name__} "
                    f"adds; allowed: {', '.join(without) or 'none'}."
                )

    def forward(self, sample: TensorDictBase) -> TensorDict:
        """Compute every loss on a batch of replayed sequences ``[B, T]``.

        Raises:
            TypeError: If an entry has a wrong dtype.
            ValueError: If an entry has a wrong shape, or T is below 2.
        """
        self._check_sample(sample)
        out = self.compute(sample)
        losses = {name: out.get(name).detach() for name in self.out_keys}
        return out.update(self._loss_metrics(losses))

    def _check_sample(self, sample: TensorDictBase) -> None:
        if sample.ndim != 2 or sample.shape[0] < 1 or sample.shape[1] < 2:
            raise ValueError(
                f"a sample must be records [B, T] with B at least 1 and T at least 2, got "
                f"{list(sample.shape)}."
            )
        following = sample.get("next")
        check_tensor("reward", following.get("reward"), FLOATING, (*sample.shape, 1))
        for name in ("terminated", "done"):
            check_tensor(name, following.get(name), torch.bool, (*sample.shape, 1))

    def compute(self, sample: TensorDictBase) -> TensorDict:
        """Return the losses, and the metrics that are not copies of losses.

        ``training.execution=compile_all`` compiles this method. It returns no detached copies of
        losses, since Inductor would merge a loss and its copy into one output without gradient.

        Args:
            sample: Records ``[B, T]``.

        Returns:
            Scalars: every ``loss_*``, and detached metrics.
        """
        starts = initial_keys(sample)
        model_td = self.world_model(sample.select(*self.in_keys, *starts))
        losses, metrics = self.world_model_losses(model_td)
        following = model_td.get("next")
        state, belief = following.get("state"), following.get("belief")
        actor_critic, more, returns = self.actor_critic_losses(
            state.detach().flatten(0, 1), belief.detach().flatten(0, 1)
        )
        bootstrap = returns[:, 0].reshape(state.shape[:2])
        losses |= actor_critic
        reward, terminated, done = (
            following.get(key).squeeze(-1) for key in ("reward", "terminated", "done")
        )
        losses["replay_critic"] = self.replay_critic_loss(
            state, belief, reward, terminated, done, bootstrap
        )
        self._check_owners(actor_critic)
        losses = {f"loss_{k}": self._weight(k) * v for k, v in losses.items()}
        if set(losses) != set(self.out_keys):
            raise RuntimeError(f"losses {sorted(losses)} differ from {sorted(self.out_keys)}.")
        out = TensorDict({**losses, **metrics, **more}, [])
        return out.set(LATENTS, self.world_model.pack_latents(model_td)) if starts else out

    # ---------------------------------------------------------------- world model

    def world_model_losses(
        self, model_td: TensorDictBase
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return unweighted KL, reconstruction, reward and continuation losses, and metrics.

        Args:
            model_td: Output of the world model, ``[B, T]``.
        """
        td, unimix = model_td.get("next"), self.world_model.config.unimix
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        for prefix in ("", "background_") if "background_state" in td.keys() else ("",):
            logits = [td.get(f"{prefix}{name}_logits").float() for name in ("posterior", "prior")]
            losses[f"{prefix}dynamics"], losses[f"{prefix}representation"] = categorical_kl_terms(
                *logits, self.config.free_nats, unimix
            )
            with torch.no_grad():
                kl, _ = categorical_kl_terms(*logits, 0.0, unimix)
            metrics[f"wm/{prefix}kl_value"] = kl
        more, extra = self.reconstruction_losses(td)
        losses |= more
        metrics |= extra
        if (further := self.world_model.observation_decoder) is not None:
            further.add_losses(losses, td, self.reconstruction_losses)
        two_hot = self.world_model.two_hot
        losses["reward"] = two_hot.loss(td.get("reward_logits"), td.get("reward")).mean()
        target = (~td.get("terminated")).float() * (1 - 1 / self.config.discount_horizon)
        losses["continuation"] = F.binary_cross_entropy_with_logits(
            td.get("continue_logits"), target
        )
        return losses, metrics

    def reconstruction_losses(
        self, td: TensorDictBase
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return unweighted losses of what the decoder made, and metrics.

        Args:
            td: The entries under ``next``, ``[B, T]``.
        """
        pixels = td.get("pixels")
        if self.world_model.latent == "whole":
            return {"image": reconstruction.image_loss(td.get("reconstructed_pixels"), pixels)}, {}
        mask, logits = td.get(MASK), td.get("mask_logits")
        kind: ForegroundTarget = self.config.foreground_target  # type: ignore[assignment]
        scale: ForegroundScale = self.config.foreground_scale  # type: ignore[assignment]
        threshold = self.config.selective
        dropped = None
        if threshold is not None:
            dropped = reconstruction.confident_foreground(logits, mask, threshold)
        losses = {
            "foreground": reconstruction.foreground_loss(
                td.get("foreground_pixels"), pixels, mask, kind, scale=scale, dropped=dropped
            ),
            "mask": reconstruction.mask_loss(logits, mask),
        }
        if "background_pixels" in td.keys():
            losses["background"] = reconstruction.background_loss(
                td.get("background_pixels"), pixels, mask, dropped=dropped
            )
        true_mask = mask if mask.dtype is torch.bool else mask > 0.5
        metrics = {"wm/mask_iou": mask_iou(logits.detach() > 0, true_mask).mean()}
        if dropped is not None:
            metrics["wm/doubted_share"] = dropped.float().mean()
        return losses, metrics

    # ---------------------------------------------------------------- actor and critic

    def actor_critic_losses(
        self, state: Tensor, belief: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Return actor and critic losses in imagination from the given latents.

        Args:
            state: Start states, detached ``[N, S]``.
            belief: Start beliefs, detached ``[N, D]``.

        Returns:
            Unweighted losses, metrics, and the returns of the first H states ``[N, H]``.
        """
        horizon = self.config.imagination_horizon
        # Time first: [H + 1, N, D + S] and [H, N, A].
        features, actions = imagine(
            self.world_model.prior, self.actor, state, belief, horizon, self.imagine_step
        )
        decode = self.world_model.two_hot.decode
        before = features[:-1]
        logits = self.critic(before).float()
        with torch.no_grad():
            reward, continuation = self.world_model.predict(features)
            last = decode(self.critic(features[-1:]).float())
            value = torch.cat((decode(logits), last))
            # The continuation includes the discount, that of the start too.
            weight = continuation.cumprod(0)[:-1]
            returns = lambda_return(reward.T, continuation.T, value.T, self.config.lmbda).T
            if self.training:
                self.return_norm.update(returns.unsqueeze(-1))
            advantage = (returns - value[:-1]) / self.return_norm.scale()
            slow_value = decode(self.slow_critic(before).float())
        policy = self.actor.distribution(*self.actor.from_features(before))
        entropy = policy.entropy()
        actor_loss = -(
            weight * (policy.log_prob(actions) * advantage + self.config.entropy * entropy)
        ).mean()
        critic_loss = (weight * self._critic_error(logits, returns, slow_value)).mean()
        metrics = {
            "ac/entropy": entropy.detach().mean(),
            "ac/value_mean": value.mean(),
            "ac/advantage_mean": advantage.mean(),
            "ac/return_mean": returns.mean(),
            "ac/return_scale": self.return_norm.scale().squeeze().clone(),
            "ac/imagined_reward_mean": reward[1:].mean(),
        }
        return {"actor": actor_loss, "critic": critic_loss}, metrics, returns.T

    def replay_critic_loss(
        self,
        state: Tensor,
        belief: Tensor,
        reward: Tensor,
        terminated: Tensor,
        done: Tensor,
        bootstrap: Tensor,
    ) -> Tensor:
        """Return the critic loss on the replayed rewards (DreamerV3, "Critic learning").

        Args:
            state: Posterior states ``[B, T, S]``, with gradient.
            belief: Posterior beliefs ``[B, T, D]``, with gradient.
            reward: ``[B, T]``.
            terminated: bool ``[B, T]``.
            done: bool ``[B, T]``, the last observation of an episode.
            bootstrap: Imagined return of each state ``[B, T]``.
        """
        discount = 1 - 1 / self.config.discount_horizon
        two_hot = self.world_model.two_hot
        features = torch.cat((belief[:, :-1], state[:, :-1]), -1)
        with torch.no_grad():
            continuation = (~terminated).float() * discount
            returns = lambda_return(reward, continuation, bootstrap, self.config.lmbda, done)
            slow_value = two_hot.decode(self.slow_critic(features).float())
        logits = self.critic(features).float()
        # An episode's last state has no return: the next record belongs to another episode.
        weight = (~done[:, :-1]).float()
        return (weight * self._critic_error(logits, returns, slow_value)).mean()

    def _critic_error(self, logits: Tensor, returns: Tensor, slow_value: Tensor) -> Tensor:
        """Return the cross-entropy to the returns, plus that to the slow critic's values."""
        targets = torch.stack((returns, slow_value), -1)
        to_returns, to_slow = self.world_model.two_hot.losses(logits, targets).unbind(-1)
        return to_returns + self.config.slow_critic_regularization * to_slow

    @torch.no_grad()
    def update_slow_critic(self, applied: Tensor | None = None) -> None:
        """Move the slow critic towards the critic by ``slow_critic_rate``.

        Args:
            applied: A bool scalar on the device; False leaves the slow critic unchanged. None
                always moves it.
        """
        slow, critic = list(self.slow_critic.parameters()), list(self.critic.parameters())
        rate = self.config.slow_critic_rate
        if applied is None:
            torch._foreach_lerp_(slow, critic, rate)
            return
        change = torch._foreach_sub(critic, slow)
        torch._foreach_mul_(change, applied * rate)
        torch._foreach_add_(slow, change)

    def _weight(self, name: str) -> float:
        weight = self.config.weight(self.term(name).weight or name)
        assert weight is not None, "checked"
        return weight

    def _check_owners(self, actor_critic: dict[str, Tensor]) -> None:
        for name in actor_critic:
            if TOTAL in self.term(name).metrics:
                raise RuntimeError(
                    f"loss_{name} comes from actor_critic_losses and would be logged as the world "
                    f"model's: add a row {name!r} to {type(self).__name__}.terms, with a metric "
                    f"such as 'ac/{name}_loss'."
                )

    def _loss_metrics(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        zero = losses["loss_reward"].new_zeros(())
        for key in self.out_keys:
            for metric in self.term(_plain(key)).metrics:
                sums[metric] = sums.get(metric, zero) + losses[key]
        return sums


def _plain(key: str) -> str:
    return key.removeprefix("loss_")

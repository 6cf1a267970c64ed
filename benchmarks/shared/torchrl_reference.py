"""TorchRL's own DreamerV3 loss around this project's modules: the peer of benchmarks and tests."""

from __future__ import annotations

from dataclasses import replace

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torch import Tensor
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase, TensorDictPrimer, TransformedEnv
from torchrl.envs.model_based.dreamer import DreamerEnv
from torchrl.modules import (
    DreamerV3ImageDecoder,
    DreamerV3ImageEncoder,
    DreamerV3MLP,
    RSSMRolloutV3,
    SymExpTwoHot,
    WorldModelWrapper,
)
from torchrl.objectives import (
    DreamerV3ActorLoss,
    DreamerV3Loss,
    DreamerV3ModelLoss,
    DreamerV3ValueLoss,
)
from torchrl.objectives.utils import ValueEstimators

from w2f_torchrl.modules import GaussianActor, ModelConfig, WorldModel
from w2f_torchrl.objectives import World2FilterLoss


class _Specs(EnvBase):
    """An env that only has specs: DreamerEnv copies its own from it."""

    def __init__(self, action_size: int, image_size: int):
        super().__init__()
        self.shape_of_pixels = (3, image_size, image_size)
        self.observation_spec = Composite(pixels=Unbounded(self.shape_of_pixels))
        self.action_spec = Bounded(-1, 1, (action_size,))
        self.reward_spec = Unbounded((1,))

    def _reset(self, tensordict: TensorDictBase | None = None) -> TensorDict:
        return TensorDict({"pixels": torch.zeros(self.shape_of_pixels)})

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        done = torch.zeros(1, dtype=torch.bool)
        pixels = torch.zeros(self.shape_of_pixels)
        return TensorDict({"pixels": pixels, "reward": torch.zeros(1), "done": done})

    def _set_seed(self, seed: int | None) -> None:
        return None


class _TorchRLMLP(torch.nn.Module):
    """TorchRL's own forward pass on the parameters of ours."""

    def __init__(self, mlp: DreamerV3MLP):
        super().__init__()
        self.mlp = mlp

    def forward(self, *inputs: Tensor) -> Tensor:
        return DreamerV3MLP.forward(self.mlp, *inputs)


class _TorchRLActor(torch.nn.Module):
    """The actor's network on TorchRL's own forward passes."""

    def __init__(self, actor: GaussianActor):
        super().__init__()
        self.actor = actor

    def forward(self, state: Tensor, belief: Tensor) -> tuple[Tensor, Tensor]:
        actor = self.actor
        hidden = DreamerV3MLP.forward(actor.backbone, belief, state)
        mean, std = (DreamerV3MLP.forward(layer, hidden) for layer in (actor.mean, actor.std))
        return actor.squash(mean, std)


class _TorchRLWorldModel(torch.nn.Module):
    """The same modules, rolled out by TorchRL's RSSMRolloutV3."""

    def __init__(self, world_model: WorldModel):
        super().__init__()
        self.world_model = world_model
        ours = world_model.rollout
        self.rollout = RSSMRolloutV3(ours.rssm_prior, ours.rssm_posterior, action_key="action")
        self.in_keys = world_model.in_keys
        self.out_keys = world_model.out_keys

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        model, config = self.world_model, self.world_model.config
        # TorchRL's own forward passes on the parameters of ours.
        encoded = DreamerV3ImageEncoder.forward(model.encoder, td.get(("next", "pixels")))
        td.set(("next", "encoded_latents"), encoded)
        td.set("state", torch.zeros(*td.shape, config.state_size))
        td.set("belief", torch.zeros(*td.shape, config.belief_size))
        td = self.rollout(td)
        state, belief = td.get(("next", "state")), td.get(("next", "belief"))
        decoded = DreamerV3ImageDecoder.forward(model.decoder.module.module, state, belief)
        td.set(("next", "reconstructed_pixels"), decoded)
        td.set(("next", "reward_logits"), _TorchRLMLP(model.reward)(belief, state))
        td.set(("next", "continue_logits"), _TorchRLMLP(model.continuation)(belief, state))
        return td


def with_torchrls_pictures(config: ModelConfig) -> ModelConfig:
    """Return the sizes with TorchRL's encoder and decoder, which its forward passes need."""
    return replace(config, decoder="torchrl", resample="stride")


def torchrl_loss(loss: World2FilterLoss, actor: ProbabilisticTensorDictSequential) -> DreamerV3Loss:
    """Build TorchRL's loss on the modules of ours, with the paper's values.

    Args:
        loss: Ours, with a ``whole`` latent and TorchRL's encoder and decoder
            (:func:`with_torchrls_pictures`).
        actor: An actor, whose network is replaced with the one that ``loss`` holds.
    """
    actor[0].module = _TorchRLActor(loss.actor)
    world_model, critic, settings = loss.world_model, loss.critic, loss.config
    config, two_hot = world_model.config, SymExpTwoHot(world_model.config.num_bins)
    model_loss = DreamerV3ModelLoss(
        _TorchRLWorldModel(world_model),
        kl_mode="separate",
        unimix=config.unimix,
        lambda_continue=1.0,
        continue_target_scale=1 - 1 / settings.discount_horizon,
        reco_symlog=False,
        num_reward_bins=config.num_bins,
        detach_output=False,
    )
    model_loss.set_keys(reco_pixels="reconstructed_pixels", continue_pred="continue_logits")
    value = TensorDictSequential(
        TensorDictModule(_TorchRLMLP(critic), ["belief", "state"], ["state_value_logits"]),
        TensorDictModule(two_hot, ["state_value_logits"], ["state_value"]),
    )
    actor_loss = DreamerV3ActorLoss(
        actor,
        value,
        _imagination_env(world_model),
        continuation_model=TensorDictSequential(
            TensorDictModule(
                _TorchRLMLP(world_model.continuation), ["belief", "state"], ["continue_logits"]
            ),
            TensorDictModule(torch.sigmoid, ["continue_logits"], ["continuation"]),
        ),
        use_reinforce=True,
        imagination_horizon=settings.imagination_horizon,
    )
    actor_loss.make_value_estimator(ValueEstimators.TDLambda, gamma=1.0, lmbda=settings.lmbda)
    value_loss = DreamerV3ValueLoss(
        value,
        "two_hot",
        num_value_bins=config.num_bins,
        actor_loss=actor_loss,
        slow_critic_regularization=1.0,
    )
    return DreamerV3Loss(model_loss, actor_loss, value_loss)


def _imagination_env(world_model: WorldModel) -> DreamerEnv:
    config, prior = world_model.config, world_model.prior
    reward = TensorDictSequential(
        TensorDictModule(_TorchRLMLP(world_model.reward), ["belief", "state"], ["reward_logits"]),
        TensorDictModule(SymExpTwoHot(config.num_bins), ["reward_logits"], ["reward"]),
    )
    transition = TensorDictModule(prior, ["state", "belief", "action"], ["_", "state", "belief"])
    env = DreamerEnv(
        world_model=WorldModelWrapper(TensorDictSequential(transition), reward),
        prior_shape=torch.Size([config.state_size]),
        belief_shape=torch.Size([config.belief_size]),
    )
    sizes = {"state": config.state_size, "belief": config.belief_size}
    primer = TensorDictPrimer({key: Unbounded((size,)) for key, size in sizes.items()})
    env.set_specs_from_env(TransformedEnv(_Specs(prior.action_shape[0], 64), primer))
    env.observation_spec = env.state_spec.clone()
    return env

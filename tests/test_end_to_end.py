"""From env to world model: what acted is what is trained on."""

from __future__ import annotations

import torch
from helpers.counting_env import SIZE, CountingEnv
from helpers.models import TINY
from torchrl.envs import Compose, InitTracker, RewardSum, StepCounter, TransformedEnv

from w2f_torchrl.data import make_collector, make_replay, records_from_rollout
from w2f_torchrl.modules import (
    GaussianActor,
    ModelConfig,
    build_actor,
    build_policy,
    build_world_model,
    latent_sizes,
)

CONFIG = ModelConfig(**vars(TINY) | {"cnn_multipliers": (2, 3)})
NUM_ENVS, STEPS = 2, 40


def constant_rand(*shape: int | torch.Size, device: torch.device | None = None) -> torch.Tensor:
    return torch.full(torch.Size(shape[0] if len(shape) == 1 else shape), 0.37, device=device)


def create_env(index: int, seed: int) -> TransformedEnv:
    transforms = Compose(InitTracker(), RewardSum(), StepCounter())
    return TransformedEnv(CountingEnv(index, seed), transforms)


def test_acted_beliefs_are_the_replayed_ones_through_collector_and_replay(monkeypatch):
    """Uneven episodes, several batches; the stream of each env is replayed from its start.

    The policy's beliefs depend on every earlier action and frame of the episode, so a shift of
    either by one step, a lost first observation or a missed reset changes them.
    """
    torch.manual_seed(0)
    world_model = build_world_model(CONFIG, action_size=1, image_size=SIZE, latent="split")
    actor = build_actor(CONFIG, 1)
    # The policy keeps its noise, so that actions differ; the latents' draws become a constant.
    monkeypatch.setattr(GaussianActor, "max_std", 0.3)
    monkeypatch.setattr(torch, "rand", constant_rand)
    collector = make_collector(
        create_env,
        build_policy(world_model, actor),
        primers=latent_sizes(CONFIG, 1),
        num_envs=NUM_ENVS,
        num_workers=0,
        frames_per_batch=NUM_ENVS * 10,
        total_frames=NUM_ENVS * STEPS,
        extra_keys=["belief", "state"],
    )
    batches = [batch.clone() for batch in collector]
    collector.shutdown()
    batch = torch.cat(batches, 1)  # [N, T]
    assert batch.shape == (NUM_ENVS, STEPS)
    assert batch["action"].std() > 0.1

    records = records_from_rollout(batch)
    for env in range(NUM_ENVS):
        mine = records[records["stream"] == env].exclude("stream")
        replay = make_replay(
            capacity=len(mine), num_streams=1, batch_size=1, batch_length=len(mine)
        )
        replay.extend(mine.set("stream", torch.zeros(len(mine), dtype=torch.int64)))
        sample = replay.sample()
        inferred = world_model.infer(sample.select(*world_model.in_keys))["next"]
        # The policy saw every observation but an episode's last one and the newest.
        acted = ~sample["next", "done"][0, :, 0]
        acted[-1] = False
        assert acted.sum() == STEPS
        assert sample["is_init"].sum() > 3
        for key in ("belief", "state"):
            torch.testing.assert_close(
                inferred[key][0][acted], batch[key][env], rtol=1e-4, atol=1e-5
            )
        shifted = sample.clone()
        shifted["action"] = shifted["action"].roll(1, dims=1)
        wrong = world_model.infer(shifted.select(*world_model.in_keys))["next"]
        assert (wrong["belief"][0][acted] - batch["belief"][env]).abs().max() > 1e-3

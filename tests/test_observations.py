"""Observations besides pixels: vectors and pictures of further cameras."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from fake_cuda import Watch, fake_cuda, fake_like, why_not
from helpers.models import LATENTS, SIZE, TINY, make_sample
from helpers.runs import tiny_run
from tensordict import TensorDict, TensorDictBase
from torch.nn import functional as F

from w2f_torchrl.checkpoint import latest_checkpoint
from w2f_torchrl.config import ConfigError, OptimizerConfig
from w2f_torchrl.envs import PixelDMControlEnv, make_env
from w2f_torchrl.evaluation.policy import load_policy
from w2f_torchrl.modules import build_world_model
from w2f_torchrl.modules.by_env.observations import ObservationEncoder, symlog
from w2f_torchrl.trainers import Learner, Trainer

SIZES = {"position": 3, "height": 1}
WRIST = "pixels_wrist"
MORE = dataclasses.replace(TINY, vectors=SIZES, pictures=[WRIST])


def sample_of_more(batch: int = 3, time: int = 6) -> TensorDict:
    """Random records with two vectors, one of them large, and a second picture with its mask."""
    sample = make_sample(batch, time)
    generator = torch.Generator().manual_seed(2)
    shape = (batch, time, 3, SIZE, SIZE)
    following = sample["next"]
    following["position"] = torch.randn(batch, time, 3, generator=generator, dtype=torch.float64)
    following["height"] = torch.randn(batch, time, 1, generator=generator) * 1000
    following[WRIST] = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
    mask = torch.rand(batch, time, 1, SIZE, SIZE, generator=generator)
    following[f"{WRIST}_mask"] = mask < 0.4
    return sample


def learner_of(config, latent: str, **settings) -> Learner:
    torch.manual_seed(0)
    return Learner(config, action_size=2, image_size=SIZE, latent=latent, **settings)


# ------------------------------------------------------------------ networks and losses


def test_an_embedding_is_every_observations_side_by_side():
    torch.manual_seed(0)
    encoder = build_world_model(MORE, action_size=2, image_size=SIZE, latent="whole").encoder
    assert isinstance(encoder, ObservationEncoder)
    assert encoder.in_keys == ["pixels", WRIST, "position", "height"]
    following = sample_of_more()["next"]
    embedding = encoder(*(following[key] for key in encoder.in_keys))
    vectors = torch.cat((following["position"].float(), following["height"]), -1)
    squashed = vectors.sign() * (1 + vectors.abs()).log()
    first, second = encoder.pictures
    expected = torch.cat(
        (first(following["pixels"]), second(following[WRIST]), encoder.vectors(squashed)), -1
    )
    torch.testing.assert_close(embedding, expected)
    assert embedding.shape[-1] == encoder.output_features((3, SIZE, SIZE))


def test_a_vector_of_another_size_is_named():
    encoder = build_world_model(MORE, action_size=2, image_size=SIZE, latent="whole").encoder
    following = sample_of_more()["next"]
    following["height"] = torch.zeros(3, 6, 2)
    with pytest.raises(ValueError, match="height"):
        encoder(*(following[key] for key in encoder.in_keys))


@pytest.mark.parametrize("latent", LATENTS)
def test_losses_add_both_pictures_and_the_squared_error_of_symlogs(latent):
    learner = learner_of(MORE, latent)
    sample = sample_of_more()
    torch.manual_seed(1)
    found = learner.loss(sample)
    torch.manual_seed(1)
    model_td = learner.world_model(sample.select(*learner.world_model.in_keys))
    following = model_td["next"]
    for key in (f"{WRIST}_mask", "foreground_mask", "reward", "terminated", "done"):
        following[key] = sample["next", key]

    decoder = learner.world_model.observation_decoder
    predicted = decoder.vectors(following["belief"], following["state"])
    target = torch.cat((symlog(following["position"]), symlog(following["height"])), -1)
    # The mean over records of the sum over features: PyTorch's own loss, scaled.
    error = F.mse_loss(predicted, target) * sum(SIZES.values())
    torch.testing.assert_close(found["loss_vectors"], error)
    torch.testing.assert_close(found["wm/vector_loss"], error)

    one, _ = learner.loss.reconstruction_losses(following)
    # The second picture's, with its decoder in the place of the first's.
    learner.world_model.decoder = decoder.pictures[0]
    other = model_td.clone()
    learner.world_model.decoder(other)
    other["next", "pixels"] = sample["next", WRIST]
    other["next", "foreground_mask"] = sample["next", f"{WRIST}_mask"]
    two, _ = learner.loss.reconstruction_losses(other["next"])
    for name, loss in one.items():
        weight = learner.loss.config.weight(name)
        torch.testing.assert_close(found[f"loss_{name}"], weight * (loss + two[name]))
        assert two[name] > 0


def test_the_loss_of_vectors_has_a_weight():
    sample = sample_of_more()
    found = []
    for weight in (1.0, 0.25):
        learner = learner_of(MORE, "whole")
        learner.loss.config = learner.loss.config.thawed(vectors=weight)
        torch.manual_seed(1)
        found.append(learner.loss(sample)["loss_vectors"])
    torch.testing.assert_close(found[1], found[0] / 4)


def test_the_background_neither_reads_nor_reconstructs_vectors():
    learner = learner_of(MORE, "split")
    model = learner.world_model
    learner.loss(sample_of_more())["loss_vectors"].backward()
    reached = {
        name.partition(".")[0]
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().sum() > 0
    }
    assert reached == {"encoder", "rollout", "observation_decoder"}
    assert not isinstance(model.background_encoder, ObservationEncoder)


@pytest.mark.parametrize("latent", ["split", "whole"])
def test_updates_fit_all_observations(latent):
    learner = learner_of(MORE, latent, optimizer=OptimizerConfig(lr=3e-3, warmup_updates=1))
    sample = sample_of_more(2, 4)
    first, *_, last = [learner.update(sample.clone()) for _ in range(60)]
    assert last["wm/vector_loss"] < 0.7 * first["wm/vector_loss"]
    assert last["wm/image_loss"] < first["wm/image_loss"]
    unused = [n for n, p in learner.loss.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused


def test_pixels_alone_build_what_they_did():
    for latent in LATENTS:
        model = build_world_model(TINY, action_size=2, image_size=SIZE, latent=latent)
        assert model.observation_decoder is None
        assert not any("observation" in name for name in model.state_dict())
        assert "loss_vectors" not in learner_of(TINY, latent).loss.loss_names()


@pytest.mark.skipif(why_not() is not None, reason=f"no fake CUDA tensors: {why_not()}")
@pytest.mark.parametrize("latent", ["split", "whole"])
def test_an_update_stays_on_a_gpu(latent):
    with fake_cuda():
        optimizer = OptimizerConfig(lr=1e-3, warmup_updates=3, precision="bfloat16")
        learner = learner_of(MORE, latent, optimizer=optimizer, device="cuda")
        sample = fake_like(sample_of_more(2, 4), "cuda")
        for group in learner.optimizer.param_groups:  # as a first update does
            group["step"] = torch.zeros((), device="cuda")
        with Watch() as watch:
            metrics = learner.update(sample)
        assert not watch.found
        assert {v.dtype for v in metrics.values()} == {torch.float32}
        assert all(p.grad is not None for p in learner.world_model.parameters())


# ------------------------------------------------------------------ environments


def test_a_further_camera_shows_what_an_env_of_that_camera_does():
    both = PixelDMControlEnv("cartpole", "balance", seed=3, further_cameras=[1])
    alone = PixelDMControlEnv("cartpole", "balance", seed=3, camera_id=1)
    one, other = both.reset(), alone.reset()
    for _ in range(3):
        assert torch.equal(one["pixels_camera_1"], other["pixels"])
        assert torch.equal(one["pixels_camera_1_mask"], other["foreground_mask"])
        assert not torch.equal(one["pixels"], one["pixels_camera_1"])
        action = torch.tensor([0.7])
        one = both.step(one.set("action", action))["next"]
        other = alone.step(other.set("action", action))["next"]
    both.close(), alone.close()


def test_a_batch_of_envs_has_vectors_that_lead_to_the_picture(request):
    env = make_env("cartpole", "balance", further_cameras=[1], state_observations=True)
    request.addfinalizer(env.close)
    rollout = env.rollout(4)
    assert rollout["position"].shape == (4, 3)
    assert rollout["pixels_camera_1"].shape == (4, 3, 64, 64)
    assert torch.equal(rollout["next", "position"][:-1], rollout["position"][1:])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"further_cameras": [7]}, "cartpole has cameras 0 to 1"),
        ({"further_cameras": [1, 1]}, "must be different cameras"),
        ({"further_cameras": [1], "distraction": "easy"}, "must be empty with distractions"),
    ],
)
def test_cameras_that_cannot_be_drawn_are_named(settings, said):
    with pytest.raises(ValueError, match=said):
        make_env("cartpole", "balance", **settings)


# ------------------------------------------------------------------ runs


def run_of_more(run_dir, model: dict, environment: dict | None = None, **settings):
    asked = {"further_cameras": [1], "state_observations": True} | (environment or {})
    values = vars(TINY) | {"vectors": {"position": 3, "velocity": 2}} | model
    return tiny_run(run_dir, environment=asked, model=values, **settings)


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize(
    "algo",
    [{"latent": "split"}, {"name": "dreamer_v3", "latent": None}],
    ids=["split", "dreamer_v3"],
)
def test_a_run_learns_from_them_resumes_and_its_policy_acts(tmp_path, algo):
    config = run_of_more(tmp_path / "run", {"pictures": ["pixels_camera_1"]}, algo=algo)
    trainer = Trainer(config)
    trainer.train()
    assert trainer.updates > 0
    record = trainer.replay.sample()
    assert record["next", "position"].dtype == torch.float32
    assert record["next", "pixels_camera_1"].shape[-3:] == (3, 16, 16)
    policy = load_policy(latest_checkpoint(tmp_path / "run" / "checkpoints"))
    assert {"position", "velocity", "pixels_camera_1"} <= set(policy.in_keys)
    env = policy.make_env()
    played: TensorDictBase = env.rollout(5, policy)
    assert played["action"].abs().sum() > 0
    env.close()
    longer = run_of_more(
        tmp_path / "run",
        {"pictures": ["pixels_camera_1"]},
        algo=algo,
        training={"total_frames": 320},
        resume="auto",
    )
    resumed = Trainer(longer)
    assert resumed.updates == trainer.updates
    resumed.train()
    assert resumed.updates > trainer.updates


@pytest.mark.parametrize(
    ("model", "environment", "said"),
    [
        ({"vectors": {"position": 2}}, {}, r"vectors={position: 2}.*position float32 \[3\]"),
        ({"vectors": {"speed": 2}}, {}, r"vectors={speed: 2} is not a vector that the env"),
        (
            {"vectors": {"position": 3}},
            {"state_observations": False},
            "environment.state_observations=true adds",
        ),
        ({"pictures": ["pixels_camera_1"]}, {"further_cameras": []}, r"further_cameras=\[1\] adds"),
    ],
)
def test_what_the_env_does_not_observe_is_named(tmp_path, model, environment, said):
    with pytest.raises(ConfigError, match=said):
        Trainer(run_of_more(tmp_path / "run", model, environment))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"algo": {"name": "repo", "latent": None}}, "must be empty with algo=repo"),
        ({"segmentation": {"source": "median"}}, "allowed: simulator"),
    ],
)
def test_what_cannot_use_them_is_named(tmp_path, settings, said):
    config = run_of_more(tmp_path / "run", {"pictures": ["pixels_camera_1"]}, **settings)
    with pytest.raises(ConfigError, match=said):
        config.validate()

"""Several ranks learn what one process learns on all their samples together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers.models import LATENTS, make_sample
from helpers.models import make_learner as tiny_learner
from helpers.ranks import run_ranks

from w2f_torchrl.config import OptimizerConfig
from w2f_torchrl.objectives import LossConfig
from w2f_torchrl.trainers import Learner

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

PER_RANK = 2
_rand, _randn_like = torch.rand, torch.randn_like


def make_learner(latent: str, gradients: str, execution: str = "eager", seed: int = 0) -> Learner:
    learner = tiny_learner(
        latent,
        seed=seed,
        loss=LossConfig(return_rate=1.0),  # so that the percentiles count at once
        optimizer=OptimizerConfig(lr=1e-3, warmup_updates=0),
        execution=execution,
        gradients=gradients,
    )
    # Reward and critic start at zero, which would leave most gradients zero, and with them the
    # range of the returns below 1, where the normaliser does nothing.
    torch.manual_seed(1)
    for head in (learner.world_model.reward, learner.loss.critic):
        torch.nn.init.normal_(head.model[-1].weight, std=3.0)
    return learner


def rows(tensor: torch.Tensor, dim: int, rank: int, size: int) -> torch.Tensor:
    return tensor.chunk(size, dim)[rank].contiguous()


@contextmanager
def rank_noise(rank: int, size: int) -> Iterator[None]:
    """A rank draws its rows of what one process would draw for all ranks.

    Posteriors draw [T, 2, B, K], imagination [H, B * T, K] and [H, B * T, A].
    """

    def rand(*shape: int, device: Any = None) -> torch.Tensor:
        dim = 2 if len(shape) == 4 else 1
        whole = [n * size if i == dim else n for i, n in enumerate(shape)]
        return rows(_rand(*whole, device=device), dim, rank, size)

    def randn_like(tensor: torch.Tensor) -> torch.Tensor:
        horizon, starts, actions = tensor.shape
        return rows(_randn_like(tensor.new_empty(horizon, starts * size, actions)), 1, rank, size)

    with mock.patch.object(torch, "rand", rand), mock.patch.object(torch, "randn_like", randn_like):
        torch.manual_seed(2)
        yield


def gradients_of(learner: Learner, sample: Any, rank: int, size: int) -> dict[str, torch.Tensor]:
    with rank_noise(rank, size):
        total, _ = learner._gradients.composed(sample)
    learner.optimizer.zero_grad()
    total.backward()
    learner._gradients.average()
    loss = learner.loss
    modules = {"world model": loss.world_model, "actor": loss.actor, "critic": loss.critic}
    return {
        name: torch.cat([p.grad.flatten() for p in module.parameters() if p.requires_grad])
        for name, module in modules.items()
    }


def relative_errors(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {k: float((got[k] - want[k]).norm() / want[k].norm()) for k in want}


def compare_gradients(rank: int, size: int, latents: list[str], execution: str) -> dict[Any, Any]:
    """Relative error of each part's gradient against one process on all ranks' samples."""
    whole = make_sample(batch=PER_RANK * size)
    own = whole[rank * PER_RANK : (rank + 1) * PER_RANK]
    errors = {}
    for latent in latents:
        want = gradients_of(make_learner(latent, "none"), whole, 0, 1)
        assert all(g.norm() > 1e-3 for g in want.values()), {k: g.norm() for k, g in want.items()}
        for kind in ("ddp", "flat"):
            # Another seed on each rank: all must start from rank 0's networks.
            learner = make_learner(latent, kind, execution, seed=rank)
            errors[latent, kind] = relative_errors(gradients_of(learner, own, rank, size), want)
        learner = make_learner(latent, "flat", seed=rank)
        learner.loss.return_norm.shared = False
        errors[latent, "own percentiles"] = relative_errors(
            gradients_of(learner, own, rank, size), want
        )
    return errors


def check_errors(results: list[dict[Any, Any]]) -> None:
    for errors in results:
        for (latent, kind), parts in errors.items():
            if kind == "own percentiles":  # what the test would see without the gathering
                assert parts["actor"] > 1e-3, (latent, parts)
                continue
            for part, error in parts.items():
                assert error < 1e-5, (latent, kind, part, error)


def bits(learner: Learner) -> torch.Tensor:
    state = [t.detach().float().flatten() for t in learner.loss.state_dict().values()]
    moments = [moment.flatten() for s in learner.optimizer.state.values() for moment in s.values()]
    return torch.cat(state + moments).view(torch.int32)


def compare_bits(rank: int, size: int, updates: int) -> None:
    """After updates on samples and noise of their own all ranks hold the same bits."""
    for kind, latent in (("ddp", "split"), ("flat", "whole")):
        learner = make_learner(latent, kind, seed=rank)
        torch.manual_seed(100 + rank)
        before = bits(learner)
        for _ in range(updates):
            sample = make_sample(batch=PER_RANK * size)[rank::size].clone()
            sample["next", "reward"] += torch.rand(())
            loss = learner.update(sample)["wm/total_loss"]
        losses = [torch.zeros_like(loss) for _ in range(size)]
        dist.all_gather(losses, loss)
        assert len({float(value) for value in losses}) == size, "the ranks saw equal samples"
        after = bits(learner)
        everyone = [torch.zeros_like(after) for _ in range(size)]
        dist.all_gather(everyone, after)
        assert all(torch.equal(after, other) for other in everyone), (kind, latent)
        assert not torch.equal(before, after[: len(before)])
        assert not any("module" in name.split(".")[:2] for name in learner.state_dict()["loss"])


def two_ranks(rank: int, size: int) -> dict[Any, Any]:
    compare_bits(rank, size, 50)
    return compare_gradients(rank, size, LATENTS, "eager")


def four_ranks(rank: int, size: int) -> dict[Any, Any]:
    compare_bits(rank, size, 5)
    return compare_gradients(rank, size, ["split"], "eager")


def test_two_ranks_learn_as_one_and_stay_equal_bit_for_bit():
    check_errors(run_ranks(2, two_ranks))


def test_four_ranks_learn_as_one_and_stay_equal_bit_for_bit():
    check_errors(run_ranks(4, four_ranks))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_compiled_ranks_have_the_gradients_of_one_process():
    check_errors(run_ranks(2, compare_gradients, LATENTS, "compile", timeout=1100))

"""The ways an update is run give the same update."""

from __future__ import annotations

import copy

import pytest
import torch
from test_objectives import SIZE, TINY, make_sample
from torchrl.trainers.algorithms import DreamerV3Optimizer

from w2f_torchrl.trainers import Learner
from w2f_torchrl.trainers.config import OptimizerConfig
from w2f_torchrl.trainers.device_copy import DeviceCopy
from w2f_torchrl.trainers.execution import CapturableOptimizer


def make_learner(execution: str, latent: str = "split", device: str = "cpu") -> Learner:
    torch.manual_seed(0)
    return Learner(
        TINY,
        action_size=2,
        image_size=SIZE,
        latent=latent,
        optimizer=OptimizerConfig(lr=1e-3, warmup_updates=3),
        execution=execution,
        device=device,
    )


def losses_over(learner: Learner, updates: int) -> torch.Tensor:
    """Every loss of every update, on one sample and one stream of noise."""
    sample = make_sample().to(next(learner.parameters()).device)
    torch.manual_seed(1)
    rows = []
    for _ in range(updates):
        metrics = learner.update(sample.clone())
        rows.append(torch.stack([metrics[name] for name in learner.loss.out_keys]))
    return torch.stack(rows).cpu()


def unique_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("latent", ["whole", pytest.param("split", marks=pytest.mark.slow)])
def test_compiled_core_learns_as_eager_does_and_compiles_once(latent):
    eager, compiled = make_learner("eager", latent), make_learner("compile", latent)
    names = list(eager.state_dict())
    assert list(compiled.state_dict()) == names  # a checkpoint has no trace of the mode
    want = losses_over(eager, 20)
    losses_over(compiled, 2)
    after_warmup = unique_graphs()
    assert after_warmup > 0
    compiled.restore(make_learner("eager", latent).checkpoint())
    got = losses_over(compiled, 20)
    assert unique_graphs() == after_warmup
    torch.testing.assert_close(got[:5], want[:5], rtol=1e-4, atol=1e-4)
    # Later, rounding may flip a draw.
    torch.testing.assert_close(got.mean(0), want.mean(0), rtol=5e-2, atol=3e-2)


@pytest.mark.slow
def test_compiling_everything_learns_as_eager_does(monkeypatch):
    # Draws inside the graph come from torch's own generator only if asked.
    monkeypatch.setattr(torch._inductor.config, "fallback_random", True)
    want = losses_over(make_learner("eager"), 5)
    got = losses_over(make_learner("compile_all"), 5)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_capturable_optimizer_equals_torchrls():
    torch.manual_seed(0)
    shapes = [(3, 4), (5,), (2, 2, 3)]
    start = [torch.randn(shape) for shape in shapes]
    gradients = [[torch.randn(shape) * 10**k for shape in shapes] for k in range(-3, 3)]
    results, optimizers = [], []
    for kind in (DreamerV3Optimizer, CapturableOptimizer):
        parameters = [torch.nn.Parameter(p.clone()) for p in start]
        optimizer = kind(parameters, lr=0.01, warmup_steps=4)
        for grads in gradients:
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad.clone()
            optimizer.step()
        results.append(parameters)
        optimizers.append(optimizer)
    assert not torch.equal(results[0][0], start[0])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    # Either loads the other's state.
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    optimizers[0].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    for optimizer, parameters in zip(optimizers, results, strict=True):
        for parameter, grad in zip(parameters, gradients[0], strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_update_learns_as_eager_does():
    want = losses_over(make_learner("eager", device="cuda"), 50)
    learner = make_learner("cuda_graph", device="cuda")
    got = losses_over(learner, 50)
    torch.testing.assert_close(got[:5], want[:5], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(got.mean(0), want.mean(0), rtol=5e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_samples_copied_beside_the_updates_are_whole_and_change_nothing():
    device = torch.device("cuda")
    samples = [make_sample(64, 32 + number).pin_memory() for number in range(8)]
    copy_beside, sums = DeviceCopy(device), []
    for sample in samples:
        torch.cuda._sleep(10_000_000)  # an update that still runs while the next is copied
        copied = copy_beside(sample)
        sums.append(copied["next", "pixels"].double().sum())
        del copied  # its memory must not be given to the next copy before the sum is made
    for total, sample in zip(sums, samples, strict=True):
        assert total.item() == sample["next", "pixels"].double().sum()
    learner, other = make_learner("eager", device="cuda"), make_learner("eager", device="cuda")
    for number, sample in enumerate(samples[:3]):
        results = []
        for each, send in ((learner, copy_beside), (other, lambda sample: sample.to(device))):
            torch.manual_seed(number)
            results.append(each.update(send(sample)))
        assert (results[0] == results[1]).all()


def test_a_copy_to_the_same_device_is_the_sample():
    sample = make_sample()
    assert (DeviceCopy(torch.device("cpu"))(sample) == sample).all()

"""The ways an update is run give the same update."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from execution_equality import TOLERANCES, compare, nudge, run, unique_graphs
from helpers.models import make_learner as tiny_learner
from helpers.models import make_sample
from helpers.runs import tiny_run
from torch import Tensor
from torchrl.trainers.algorithms import DreamerV3Optimizer

from w2f_torchrl.data.device_copy import DeviceCopy
from w2f_torchrl.kernels import products
from w2f_torchrl.learner.execution import PIECES, compile_core
from w2f_torchrl.learner.optimizer import CapturableOptimizer
from w2f_torchrl.objectives import LossConfig
from w2f_torchrl.trainers import ConfigError, Learner, execution


def make_learner(
    execution: str, latent: str = "split", lr: float = 1e-3, **settings: Any
) -> Learner:
    return tiny_learner(latent, lr=lr, execution=execution, **settings)


@pytest.mark.parametrize("mode", ["compile", "compile_all"])
def test_a_checkpoint_has_no_trace_of_the_mode(mode):
    assert list(make_learner(mode).state_dict()) == list(make_learner("eager").state_dict())


def test_a_cpu_compiles_what_gains_there(monkeypatch):
    compiled: list[str] = []

    def note(function, **settings):
        compiled.append(function.__qualname__)
        return function

    monkeypatch.setattr(torch, "compile", note)
    # Of the foreground's recurrence, and of the background's.
    steps = [*["step_forward", "step_backward"] * 2, "imagine_step"]
    make_learner("compile")
    assert compiled == steps
    assert execution.pieces_worth_compiling(torch.device("cuda")) == PIECES
    compiled.clear()
    compile_core(make_learner("eager").loss, PIECES)
    encoders, decoders = ["ImageEncoder.forward"] * 2, ["Module._call_impl"] * 2
    assert compiled == [*encoders, *decoders, *steps]


@pytest.mark.parametrize(
    ("mode", "latent"),
    [
        ("eager", "split"),
        ("compile", "whole"),
        pytest.param("compile", "split", marks=pytest.mark.slow),
        pytest.param("compile_all", "whole", marks=pytest.mark.slow),
        pytest.param("compile_all", "split", marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(1800)
def test_every_update_of_50_is_eagers_and_nothing_compiles_twice(mode, latent):
    before = unique_graphs()
    (row,) = run([mode], latents=[latent], updates=50).values()
    assert row["updates"] == 50
    assert row["passed"], row
    assert (unique_graphs() > before) == (mode != "eager")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(products._onednn is None, reason="oneDNN multiplies on AVX-512 only")
@pytest.mark.parametrize("mode", ["compile", "compile_all"])
def test_updates_whose_every_product_is_an_operator_are_eagers(monkeypatch, mode):
    """As large models' are: those of a tiny one are too small."""
    monkeypatch.setattr(products, "ONEDNN_MULTIPLICATIONS", 1)
    (row,) = run([mode], latents=["split"], updates=6).values()
    assert row["passed"], row


def test_an_update_of_another_size_or_noise_is_noticed():
    def make(changes):
        """The first learner as the others but for its settings."""
        waiting = [changes]
        return lambda mode: make_learner(mode, **(waiting.pop() if waiting else {}))

    def batch(number):
        return make_sample(3 + number)

    same, faster, heavier = (
        compare(make(changes), "eager", batch, 4)
        for changes in ({}, {"lr": 1.02e-3}, {"loss": LossConfig(reward=1.001)})
    )
    assert same["passed"]
    assert all(same["one_by_one"][name]["largest"] == 0 for name in TOLERANCES)
    # Rounding is there to be seen, so that a comparison with it means something.
    assert 0 < same["one_by_one"]["world_model"]["nudged_median"] < 1e-4
    one_by_one = faster["one_by_one"]
    assert not faster["passed"]
    for name in ("world_model", "returns", "gradients"):
        assert one_by_one[name]["largest"] == 0
    # The first update has a rate of zero.
    assert one_by_one["change"]["largest"] == pytest.approx(0.02, rel=0.1)
    assert one_by_one["change"]["updates_within_tolerance"] == 1
    assert not heavier["passed"]
    assert heavier["one_by_one"]["world_model"]["median"] == pytest.approx(0.001, rel=0.01)
    # A learner that draws one number more in each update.
    noisy = make_learner("eager")
    update = noisy._update
    noisy._update = lambda sample: (torch.rand(()), update(sample))[1]
    waiting = [noisy]
    row = compare(lambda mode: waiting.pop() if waiting else make_learner(mode), "eager", batch, 3)
    assert not row["passed"]
    assert row["one_by_one"]["world_model"]["updates_within_tolerance"] == 0


def test_nudged_parameters_are_those_next_to_them():
    learner, plain = make_learner("eager"), make_learner("eager")
    nudge(learner, 0)
    moves = []
    for moved, was in zip(learner.parameters_trained, plain.parameters_trained, strict=True):
        assert (moved != was).all()
        moves.append((moved > was).float().mean())
        assert torch.equal(torch.nextafter(moved, was), was)
    assert 0.4 < torch.stack(moves).mean() < 0.6


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


def in_two_groups(kind):
    """An optimizer of two groups, and their parameters."""
    generator = torch.Generator().manual_seed(3)
    parameters = [torch.nn.Parameter(torch.randn(4, 5, generator=generator)) for _ in range(2)]
    return kind([{"params": [p]} for p in parameters], lr=0.01, warmup_steps=0), parameters


def test_the_capturable_optimizers_bias_corrections_are_exact_to_the_last_digits():
    results = []
    for kind in (DreamerV3Optimizer, CapturableOptimizer):
        parameter = torch.nn.Parameter(torch.zeros(50))
        optimizer = kind([parameter], lr=1.0, agc=0.0, warmup_steps=0)
        generator = torch.Generator().manual_seed(4)
        after = []
        for _ in range(20):
            parameter.grad = torch.randn(50, generator=generator)
            optimizer.step()
            after.append(parameter.detach().clone())
        results.append(torch.stack(after))
    # Corrected in float32, the first step is off by 3e-5.
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)


def test_a_group_without_gradients_counts_as_in_torchrl():
    results, optimizers = [], []
    for kind in (DreamerV3Optimizer, CapturableOptimizer):
        optimizer, (first, second) = in_two_groups(kind)
        for step in range(4):
            first.grad = torch.full_like(first, 0.1)
            second.grad = None if step in (0, 2) else torch.full_like(second, 0.2)
            optimizer.step()
        results.append([first, second])
        optimizers.append(optimizer)
    assert [float(group["step"]) for group in optimizers[1].param_groups] == [4.0, 4.0]
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [DreamerV3Optimizer, CapturableOptimizer])
def test_a_step_without_any_gradient_is_an_error(kind):
    optimizer, _ = in_two_groups(kind)
    with pytest.raises(RuntimeError, match="no parameter"):
        optimizer.step()
    assert [float(group["step"]) for group in optimizer.param_groups] == [0.0, 0.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("mode", "latent"),
    [("cuda_graph", "whole"), ("cuda_graph", "split"), ("cuda_graph_parallel", "split")],
)
@pytest.mark.timeout(900)
def test_every_captured_update_of_50_is_eagers(mode, latent):
    (row,) = run([mode], latents=[latent], updates=50, device="cuda").values()
    assert row["passed"], row


class Streams:
    """Stands in for CUDA's streams on a machine without them, and notes what is asked of them."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, *words: str) -> None:
        self.said.append(" ".join(words))

    def record_event(self) -> str:
        self.note("main marks the start")
        return "the start"

    def wait_event(self, event: str) -> None:
        self.note("side waits for", event)

    def wait_stream(self, stream: object) -> None:
        self.note("main waits for the side")

    @contextmanager
    def on_side(self, stream: object) -> Iterator[None]:
        self.note("side begins")
        yield
        self.note("side ends")


@pytest.mark.parametrize(
    ("execution", "algo", "match"),
    [
        ("cuda_graph", {"latent": "split"}, "'cuda_graph' needs device=cuda, got device='cpu'"),
        ("cuda_graph_parallel", {"latent": "split"}, "'cuda_graph_parallel' needs device=cuda"),
        ("cuda_graph_parallel", {"latent": "shared"}, "algo.latent=split, but this run has latent"),
        ("cuda_graph_parallel", {"name": "dreamer_v3", "latent": None}, "has latent 'whole'"),
    ],
)
def test_graphs_that_can_not_be_are_named(tmp_path, execution, algo, match):
    config = tiny_run(tmp_path, algo=algo)
    config.training.execution = execution
    with pytest.raises(ConfigError, match=match):
        config.validate()


def test_the_backgrounds_latent_is_made_on_the_side_and_waited_for(monkeypatch):
    """The order in which streams are told what to wait for; that it is right a GPU has to show."""
    learner, sample, streams = make_learner("eager"), make_sample(), Streams()
    model = learner.world_model
    torch.manual_seed(0)
    plain = model.infer(sample.clone())

    for name in ("encoder", "rollout", "background_encoder", "background_rollout"):
        part = getattr(model, name)
        part.register_forward_hook(lambda *_, name=name: streams.note(name))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams)
    monkeypatch.setattr(torch.cuda, "stream", streams.on_side)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: streams.note("kept"))
    model.side_stream = streams
    torch.manual_seed(0)
    beside = model.infer(sample.clone())
    assert streams.said == [
        "main marks the start",
        "encoder",
        "rollout",
        "side waits for the start",
        "side begins",
        "background_encoder",
        "background_rollout",
        "side ends",
        "main waits for the side",
        *["kept"] * 5,
    ]
    assert set(beside.keys(True, True)) == set(plain.keys(True, True))
    for key, value in plain.items(True, True):
        assert torch.equal(beside[key], value)


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
        torch.manual_seed(number)
        beside = learner.update(copy_beside(sample))
        torch.manual_seed(number)
        plain = other.update(sample.to(device))
        for name, value in plain.items():
            torch.testing.assert_close(beside[name], value, rtol=1e-4, atol=1e-5)


def test_a_copy_to_the_same_device_is_the_sample():
    sample = make_sample()
    assert (DeviceCopy(torch.device("cpu"))(sample) == sample).all()

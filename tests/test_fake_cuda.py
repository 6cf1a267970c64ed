"""What a GPU would mind, found without one: on fake CUDA tensors, and with stand-ins for streams.

An update, acting, films, probes and a resume run on tensors that only say they are on a GPU
(benchmarks/shared/fake_cuda.py): none may mix devices, and nothing that a CUDA graph would capture
may be read by the host.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from fake_cuda import Watch, fake_cuda, fake_like, why_not
from helpers.models import LATENTS, SIZE, TINY, make_sample
from helpers.models import make_learner as tiny_learner
from helpers.streams import Streams
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torchrl.envs.utils import ExplorationType, set_exploration_type

from w2f_torchrl.config import OptimizerConfig
from w2f_torchrl.config.model import BACKGROUND_ENCODERS
from w2f_torchrl.data.device_copy import DeviceCopy
from w2f_torchrl.evaluation.evaluator import reconstruct
from w2f_torchrl.evaluation.imagination import imagine_windows
from w2f_torchrl.learner.graphed_update import CAPTURE_WARMUP
from w2f_torchrl.learner.optimizer import CapturableOptimizer
from w2f_torchrl.learner.update_metrics import UpdateMetrics
from w2f_torchrl.modules import build_world_model, latent_sizes
from w2f_torchrl.objectives import LossConfig
from w2f_torchrl.trainers import Learner
from w2f_torchrl.transforms import ReplacedSceneryTransform
from w2f_torchrl.transforms.replaced_scenery import without_scenery

fake = pytest.mark.skipif(why_not() is not None, reason=f"no fake CUDA tensors: {why_not()}")
PRECISIONS = ["float32", "bfloat16"]
HORIZON = 3
"""Imagined steps: each is as the others."""


def make_learner(
    latent: str = "split",
    precision: str = "bfloat16",
    device: str = "cuda",
    on_nan: str = "stop",
    loss: LossConfig | None = None,
    actions: int | None = None,
) -> Learner:
    return tiny_learner(
        latent,
        loss=loss or LossConfig(imagination_horizon=HORIZON),
        optimizer=OptimizerConfig(lr=1e-3, warmup_updates=3, precision=precision),
        device=device,
        on_nan=on_nan,
        actions=actions,
    )


def fake_sample(device: str = "cuda", actions: int | None = None) -> TensorDictBase:
    return fake_like(make_sample(2, 4, actions=actions), device)


@pytest.fixture
def cuda() -> Iterator[None]:
    with fake_cuda():
        yield


# ------------------------------------------------------------------ the harness itself


@fake
def test_the_watch_finds_what_a_gpu_would_mind(cuda):
    device = torch.zeros(3, device="cuda")
    host = torch.zeros(())
    for act, message in (
        (lambda: device * host, "mixed devices: aten.mul"),
        (lambda: device.cpu(), "mixed devices: aten._to_copy"),
        (lambda: torch.tensor(1.0, device="cuda"), "mixed devices: aten._to_copy"),
        (lambda: float(device.sum()), "read by the host: aten._local_scalar_dense"),
        (lambda: bool((device > 0).all()), "read by the host: aten._local_scalar_dense"),
        (lambda: device[device > 0], "read by the host: aten.index"),
        (lambda: device.nonzero(), "read by the host: aten.nonzero"),
    ):
        # A shape may depend on values, which fake tensors lack.
        with Watch() as watch, contextlib.suppress(RuntimeError):
            act()
        assert any(found.startswith(message) for found in watch.found), (message, watch.found)
    with Watch() as watch:
        device[torch.arange(2, device="cuda")].add_(1).sum().backward  # noqa: B018
    assert not watch.found
    assert watch.operations["aten.sum.default"] == 1


@fake
def test_fake_tensors_are_multiplied_and_differentiated_as_on_a_gpu(cuda):
    layer = torch.nn.Linear(4, 3).to("cuda")
    x = torch.randn(2, 4, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(x)
    assert (y.device, y.dtype) == (torch.device("cuda", 0), torch.bfloat16)
    y.float().sum().backward()
    assert layer.weight.grad.device.type == "cuda"
    assert layer.weight.grad.dtype is torch.float32


def test_nothing_is_left_of_fake_devices():
    if why_not() is None:
        with fake_cuda():
            torch.zeros(1, device="cuda")
    x = torch.ones(2, requires_grad=True)
    (x * 3).sum().backward()
    assert x.grad.tolist() == [3, 3]
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda" if not torch.cuda.is_available() else "cuda:99")


# ------------------------------------------------------------------ the update


def set_counter(learner: Learner) -> None:
    """Put the optimizer's step counter on the device, as a first update does."""
    for group in learner.optimizer.param_groups:
        group["step"] = torch.zeros((), device=learner.parameters_trained[0].device)


@fake
@pytest.mark.parametrize("on_nan", ["stop", "skip"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("latent", LATENTS)
def test_an_update_stays_on_the_device_in_the_right_precision(cuda, latent, precision, on_nan):
    learner = make_learner(latent, precision, on_nan=on_nan)
    sample = fake_sample()
    set_counter(learner)
    dtypes: dict[str, set[torch.dtype]] = {}

    def note(func: Any, args: tuple[Any, ...], out: Any) -> None:
        if isinstance(out, Tensor):
            dtypes.setdefault(str(func), set()).add(out.dtype)

    with Watch(note=note) as watch:
        metrics = learner.update(sample)
    assert not watch.found
    wrong = {k: v.dtype for k, v in metrics.items() if v.dtype is not torch.float32}
    assert not wrong
    assert {v.device for v in metrics.values()} == {torch.device("cuda", 0)}
    for name, parameter in learner.loss.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} got no gradient"
            assert (parameter.grad.device.type, parameter.grad.dtype) == ("cuda", torch.float32)
    state = [v for each in learner.optimizer.state.values() for v in each.values()]
    assert {(v.device.type, v.dtype) for v in state} == {("cuda", torch.float32)}
    # Autocast switches itself off in silence where it finds no device.
    assert dtypes["aten.mm.default"] == {getattr(torch, precision)}
    sums = UpdateMetrics(torch.device("cuda"))
    with Watch() as watch:
        for _ in range(2):
            sums.add(metrics, sample["action"])
    assert not watch.found
    assert {v.dtype for v in sums._sums.values()} == {torch.float32}


@fake
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("latent", LATENTS)
def test_an_update_of_discrete_actions_stays_on_the_device_too(cuda, latent, precision):
    learner = make_learner(latent, precision, actions=4)
    sample = fake_sample(actions=4)
    set_counter(learner)
    with Watch() as watch:
        metrics = learner.update(sample)
    assert not watch.found
    assert {v.device for v in metrics.values()} == {torch.device("cuda", 0)}
    actor = learner.loss.actor
    assert all(p.grad is not None and p.grad.device.type == "cuda" for p in actor.parameters())


@fake
@pytest.mark.parametrize(
    "loss",
    [
        {"foreground_target": "zero_outside", "selective": 0.9},
        {"foreground_scale": "area", "selective": 0.6},
    ],
)
def test_so_do_the_other_losses(cuda, loss):
    learner = make_learner(loss=LossConfig(imagination_horizon=HORIZON, **loss))
    sample = fake_sample()
    # Masks as confidences, as a segmenter may give them.
    sample["next", "foreground_mask"] = sample["next", "foreground_mask"].float()
    set_counter(learner)
    with Watch() as watch:
        metrics = learner.update(sample)
    assert not watch.found
    assert {v.dtype for v in metrics.values()} == {torch.float32}


@fake
def test_the_first_update_copies_no_more_to_the_device_than_the_step_counter(cuda):
    learner, sample = make_learner("whole"), fake_sample()
    with Watch() as watch:
        learner.update(sample)
    assert len(watch.found) <= 1
    assert all("aten._to_copy" in found and "float32 ()" in found for found in watch.found), (
        watch.found
    )
    with Watch() as watch:
        learner.update(sample)
    assert not watch.found


@fake
def test_values_are_decoded_in_float32_under_autocast(cuda):
    """The outermost bins are 4.8e8: bfloat16 leaves three digits of a sum that nearly cancels."""
    two_hot = build_world_model(TINY, action_size=2, image_size=SIZE).to("cuda").two_hot
    seen: set[torch.dtype] = set()

    def note(func: Any, args: tuple[Any, ...], out: Any) -> None:
        seen.update(x.dtype for x in (*args, out) if isinstance(x, Tensor))

    with Watch(note=note), torch.autocast("cuda", torch.bfloat16):
        value = two_hot.decode(torch.randn(5, TINY.num_bins, device="cuda"))
    assert value.dtype is torch.float32
    assert torch.bfloat16 not in seen


@fake
@pytest.mark.parametrize(("saved_on", "on_nan"), [("cpu", "stop"), ("cuda", "skip")])
def test_a_resumed_learner_stays_on_the_device(cuda, saved_on, on_nan):
    learner, sample = make_learner(on_nan=on_nan), fake_sample()
    learner.update(sample)
    # As torch.load gives it, wherever the file was written and whatever it is mapped to.
    payload = tree_map_only(Tensor, lambda x: x.detach().to(saved_on), learner.state_dict())
    resumed = make_learner(on_nan=on_nan)
    resumed.load_state_dict(payload)
    for group in resumed.optimizer.param_groups:
        step = group["step"]
        assert not isinstance(step, Tensor) or step.device.type == "cuda"
    with Watch() as watch:
        resumed.update(sample)
    assert not watch.found
    assert all(p.grad is not None for p in resumed.parameters_trained)


@fake
def test_a_learner_on_the_second_device_uses_no_other(cuda):
    """Fake tensors refuse to mix two devices, as real ones do."""
    learner = make_learner("whole", device="cuda:1")
    sample = fake_sample("cuda:1")
    devices: set[torch.device] = set()

    def note(func: Any, args: tuple[Any, ...], out: Any) -> None:
        devices.update(x.device for x in (*args, out) if isinstance(x, Tensor))

    learner.update(sample)
    with Watch(note=note):
        metrics = learner.update(sample)
    assert devices == {torch.device("cuda", 1)}
    assert metrics["finite"].device == torch.device("cuda", 1)


@fake
@pytest.mark.parametrize("colors", [False, True])
def test_replaced_scenery_is_composed_on_the_device(colors):
    clips = [np.zeros((3, SIZE, SIZE, 3), np.uint8)]
    transform = ReplacedSceneryTransform(clips, 1.0, colors=colors)
    drawn = transform.draw(2, 4)
    with fake_cuda():
        sample, drawn = fake_sample(), fake_like(drawn, "cuda")
        pixels = sample["next", "pixels"]
        with Watch() as watch:
            seen = transform.compose(sample, drawn)["next", "pixels"]
        assert not watch.found
        assert (seen.device.type, seen.dtype, seen.shape) == ("cuda", torch.uint8, pixels.shape)


@fake
@pytest.mark.parametrize("latent", ["split", "shared", "foreground"])
def test_scenery_is_taken_out_of_latents_on_the_device(latent):
    with fake_cuda():
        belief = torch.zeros(2, 1, 3, dtype=torch.float16, device="cuda").expand(2, 4, 3)
        state = torch.zeros(2, 4, 5, dtype=torch.uint8, device="cuda")
        latents = TensorDict({"belief": belief, "background_state": state}, [2, 4])
        rows = torch.zeros(1, dtype=torch.int64, device="cuda")
        with Watch() as watch:
            kept = without_scenery(latents, rows, latent)
        assert not watch.found
        assert {value.device.type for value in kept.values()} == {"cuda"}


# ------------------------------------------------------------------ acting, films, probes


@fake
@pytest.mark.parametrize("actions", [None, 2], ids=["continuous", "discrete"])
@pytest.mark.parametrize("kind", [ExplorationType.RANDOM, ExplorationType.MODE])
def test_acting_stays_on_the_device(cuda, kind, actions):
    learner = make_learner(actions=actions)
    td = TensorDict(
        {
            "pixels": torch.zeros(4, 3, SIZE, SIZE, dtype=torch.uint8, device="cuda"),
            "is_init": torch.zeros(4, 1, dtype=torch.bool, device="cuda"),
            **{k: torch.zeros(4, n, device="cuda") for k, n in latent_sizes(TINY, 2).items()},
        },
        [4],
    )
    with Watch() as watch, torch.no_grad(), set_exploration_type(kind):
        learner.policy(td)
    assert not watch.found
    assert (td["action"].device.type, td["action"].shape) == ("cuda", (4, 2))
    assert td["next", "belief"].device.type == "cuda"


def episode_like(time: int = 8, actions: int | None = None) -> TensorDictBase:
    """The shapes of an episode's records [1, T]."""
    return make_sample(3, 2 * time, actions=actions)[:1, :time]


@fake
@pytest.mark.parametrize(
    ("latent", "actions"), [*((latent, None) for latent in LATENTS), ("split", 4)]
)
def test_pictures_and_films_of_imagination_mix_no_devices(cuda, latent, actions):
    learner = make_learner(latent, actions=actions).eval()
    records = fake_like(episode_like(actions=actions))
    with Watch(reads_are_allowed=True) as watch:
        columns, _ = reconstruct(learner.world_model, records)
        made = imagine_windows(learner.world_model, learner.loss.actor, records)
    assert not watch.found
    assert made is not None
    shown = [*columns.values(), *made.comparison.values(), *made.imagined.values()]
    assert {x.device.type for x in shown} == {"cpu"}


@fake
@pytest.mark.parametrize("latent", ["split", "whole"])
def test_probes_mix_no_devices(cuda, latent):
    pytest.importorskip("sklearn", reason="the probes need it: make extras")
    from w2f_torchrl.evaluation import Episode, measure_filtering

    learner = make_learner(latent).eval()
    untrained = build_world_model(TINY, action_size=2, image_size=SIZE, latent=latent).to("cuda")
    random = np.random.default_rng(0)
    episodes = [
        Episode(
            seed,
            torch.zeros(3, 3, SIZE, SIZE, dtype=torch.uint8),
            torch.zeros(3, 1, SIZE, SIZE, dtype=torch.bool),
            torch.zeros(3, 2),
            {"pose": random.normal(size=(3, 2))},
            {},
            np.zeros((3, 1)),
        )
        for seed in range(5)
    ]

    def numbers(tensor: Tensor) -> Any:
        assert tensor.device.type == "cpu"
        return random.normal(size=tensor.shape)

    with Watch(reads_are_allowed=True) as watch, mock.patch.object(Tensor, "numpy", numbers):
        found = measure_filtering(
            learner.loss, episodes, replaced=episodes[:1], untrained=untrained, seeds=(0,)
        )
    assert not watch.found
    assert set(found["content"]) >= {"foreground", "untrained"}
    assert math.isfinite(found["replacement"]["action_change"])


# ------------------------------------------------------------------ autocast, with real numbers


@pytest.mark.parametrize("latent", ["split", "whole"])
def test_every_weight_learns_under_autocast(latent):
    """Autocast keeps the weights that it has cast.

    One that is first used without a gradient, as imagination uses actor and critic, must not keep
    the gradient from the use that has one. Heads start at zero, which lets no gradient through in
    the first update.
    """
    loss = LossConfig(imagination_horizon=HORIZON, free_nats=0)
    learner, sample = make_learner(latent, device="cpu", loss=loss), make_sample()
    before = [p.detach().clone() for p in learner.parameters_trained]
    names = [n for n, p in learner.loss.named_parameters() if p.requires_grad]
    for _ in range(6):
        learner.update(sample)
        assert all(p.grad is not None for p in learner.parameters_trained)
    rows = zip(names, learner.parameters_trained, before, strict=True)
    still = {n for n, p, old in rows if not p.grad.any() or torch.equal(p, old)}
    # The background sees no action: its cell's input is a constant zero.
    still -= {"world_model.background_rollout.rssm_prior.module.rnn.action_projection.0.weight"}
    assert not still


# ------------------------------------------------------------------ streams and graphs


@fake
@pytest.mark.parametrize("encoder", BACKGROUND_ENCODERS)
def test_no_tensor_is_read_before_its_stream_has_made_it(cuda, encoder):
    model = build_world_model(
        dataclasses.replace(TINY, background_encoder=encoder), action_size=2, image_size=SIZE
    ).to("cuda")
    sample = fake_sample()
    with Streams().installed() as streams, Watch(note=streams.note):
        streams.stream()
        model.side_stream = torch.cuda.Stream(torch.device("cuda"))
        model(sample.select(*model.in_keys))
    assert not streams.races
    assert not streams.not_kept()
    on_side = model.side_stream.knows[model.side_stream]
    assert on_side > 100, "the background's latent wasn't made beside the other"


@fake
def test_the_stand_ins_find_a_stream_that_does_not_wait(cuda):
    def run(*, wait_before: bool, wait_after: bool, keep: bool) -> Streams:
        with Streams().installed() as streams, Watch(note=streams.note):
            main, side = torch.cuda.current_stream(), torch.cuda.Stream()
            x = torch.zeros(3, device="cuda").add_(1)
            if wait_before:
                side.wait_stream(main)
            with torch.cuda.stream(side):
                y = x[1:] * 2
            if wait_after:
                main.wait_stream(side)
            if keep:
                y.record_stream(main)
            y + 1
        return streams

    right = run(wait_before=True, wait_after=True, keep=True)
    assert (right.races, right.not_kept()) == ([], [])
    assert len(run(wait_before=False, wait_after=True, keep=True).races) == 1
    assert len(run(wait_before=True, wait_after=False, keep=True).races) == 1
    assert len(run(wait_before=True, wait_after=True, keep=False).not_kept()) == 1


@fake
def test_a_copy_beside_the_updates_is_waited_for_and_kept(cuda):
    sample = fake_sample("cpu")
    with Streams().installed() as streams, Watch(reads_are_allowed=True, note=streams.note):
        streams.stream()
        copied = DeviceCopy(torch.device("cuda"))(sample)
        for leaf in copied.values(include_nested=True, leaves_only=True):
            assert leaf.device.type == "cuda"
            leaf.clone()
    assert len(streams.made) == 2
    assert streams.borrowed
    assert not streams.races
    assert not streams.not_kept()


def graphed_learner(on_nan: str = "stop", actions: int | None = None) -> tuple[Learner, Streams]:
    """A learner on the CPU, with real numbers, that believes it captures and replays a graph."""
    learner = make_learner(precision="float32", device="cpu", on_nan=on_nan, actions=actions)
    eager = learner._eager_update
    learner.optimizer = CapturableOptimizer(learner.parameters_trained, warmup_steps=3, lr=1e-3)
    learner._modes.optimizer = learner.optimizer
    graphed = learner._modes.graphed()
    learner._update = graphed

    def replay() -> None:
        graphed._metrics.update_(eager(graphed._sample))

    return learner, Streams(replay)


def numbers_of(learner: Learner) -> dict[str, Tensor]:
    state = {f"loss.{k}": v for k, v in learner.loss.state_dict().items()}
    state |= {f"guard.{k}": v for k, v in learner.guard.state_dict().items()}
    for i, parameter in enumerate(learner.parameters_trained):
        # Moments of zero are as good as none.
        moments = learner.optimizer.state.get(parameter, {})
        for name in ("rms", "momentum"):
            state[f"optimizer.{i}.{name}"] = moments.get(name, torch.zeros_like(parameter))
    state["step"] = torch.as_tensor(learner.optimizer.param_groups[0]["step"]).float()
    return {name: value.detach().clone() for name, value in state.items()}


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert list(one) == list(two)
    different = [name for name in one if not torch.equal(one[name], two[name])]
    assert not different


@pytest.mark.parametrize("actions", [None, 4], ids=["continuous", "discrete"])
def test_what_a_capture_did_is_undone_before_the_first_replay(actions):
    learner, streams = graphed_learner(actions=actions)
    eager, _ = graphed_learner(actions=actions)
    eager._update = eager._eager_update
    sample = make_sample(actions=actions)
    torch.manual_seed(3)
    with streams.installed():
        graphed = [learner.update(sample.clone()) for _ in range(3)]
    torch.manual_seed(3)
    plain = [eager.update(sample.clone()) for _ in range(3)]
    assert len(streams.captured) == 1
    for one, two in zip(graphed, plain, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in two.keys())
    assert_same(numbers_of(learner), numbers_of(eager))


def test_a_run_from_a_cpu_is_captured_with_its_count_of_updates():
    """On a CPU the optimizer counts in an int, on CUDA in a tensor, which the warm-up changes."""
    host = make_learner(precision="float32", device="cpu")
    for _ in range(5):
        host.update(make_sample())
    learner, streams = graphed_learner()
    learner.load_state_dict(copy.deepcopy(host.state_dict()))
    graphed = learner._update

    def replay() -> None:
        graphed._metrics.update_(learner._eager_update(graphed._sample))

    streams.on_replay = replay
    with streams.installed():
        learner.update(make_sample())
    assert learner.optimizer.param_groups[0]["step"] == 6


class Broken(RuntimeError):
    """A failure in the middle of a capture."""


@pytest.mark.parametrize("fails_in", [1, 2, CAPTURE_WARMUP + 1])
@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_a_capture_that_fails_leaves_the_learner_as_it_was(fails_in, on_nan):
    """In the warm-up's first or second update, or in the capture itself."""
    learner, streams = graphed_learner(on_nan)
    before, runs = numbers_of(learner), 0
    judge = learner.guard.judge

    def fail(*args: Any) -> Any:
        nonlocal runs
        runs += 1
        if runs == fails_in:
            raise Broken
        return judge(*args)

    torch.manual_seed(3)
    random = torch.get_rng_state()
    with streams.installed(), mock.patch.object(learner.guard, "judge", fail):
        with pytest.raises(Broken):
            learner.update(make_sample())
        assert_same(numbers_of(learner), before)
        assert torch.equal(torch.get_rng_state(), random)
        learner.update(make_sample())  # captures, and doesn't replay half a graph
    other, streams = graphed_learner(on_nan)
    with streams.installed():
        torch.manual_seed(3)
        other.update(make_sample())
    assert len(streams.captured) == 1
    assert_same(numbers_of(learner), numbers_of(other))


@fake
def test_a_capture_on_the_second_device_uses_no_other(cuda):
    learner = make_learner("whole", device="cuda:1")
    sample = fake_sample("cuda:1")
    learner._update = learner._modes.graphed()
    with Streams().installed() as streams:
        learner.update(sample)
        learner.update(sample)
        model = learner.world_model
        copied = DeviceCopy(torch.device("cuda", 1))(fake_sample("cpu"))
    assert {x.device_index for x in streams.made} == {1}
    assert [graph.device_index for graph in streams.captured] == [1]
    assert streams.seeded == {1}
    assert copied.device == torch.device("cuda", 1)
    assert model.side_stream is None

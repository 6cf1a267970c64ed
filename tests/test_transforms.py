"""The mask transform in the situations that TorchRL tests every transform in, and some more."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers.counting_env import SIZE, CountingEnv
from helpers.segmenters import BrightConfidence, BrightSegmenter, bright, random_pixels
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer, TensorDictReplayBuffer
from torchrl.envs import Compose, ParallelEnv, SerialEnv, TransformedEnv
from torchrl.envs.utils import check_env_specs

from w2f_torchrl.data import make_replay
from w2f_torchrl.envs import PixelDMControlEnv
from w2f_torchrl.transforms import ForegroundMaskTransform, foreground_mask

KINDS = pytest.mark.parametrize("segmenter", [BrightSegmenter, BrightConfidence])


def transformed(segmenter=BrightSegmenter, index: int = 0) -> TransformedEnv:
    return TransformedEnv(CountingEnv(index), ForegroundMaskTransform(segmenter()))


def masks_of(pixels, segmenter=BrightSegmenter):
    return segmenter()(pixels.reshape(-1, *pixels.shape[-3:])).view(
        *pixels.shape[:-3], 1, *pixels.shape[-2:]
    )


class TestForegroundMaskTransform:
    """TorchRL's eleven situations (its test/transforms/_transforms_common.py)."""

    @KINDS
    def test_single_trans_env_check(self, segmenter):
        check_env_specs(transformed(segmenter))
        other_key = ForegroundMaskTransform(segmenter(), out_keys=["seen"])
        check_env_specs(TransformedEnv(CountingEnv(0), other_key))

    @KINDS
    def test_serial_trans_env_check(self, segmenter):
        check_env_specs(SerialEnv(2, partial(transformed, segmenter)))

    def test_parallel_trans_env_check(self):
        env = ParallelEnv(2, transformed, mp_start_method="fork")
        check_env_specs(env)
        env.close()

    @KINDS
    def test_trans_serial_env_check(self, segmenter):
        env = SerialEnv(2, partial(CountingEnv, 0))
        check_env_specs(TransformedEnv(env, ForegroundMaskTransform(segmenter())))

    def test_trans_parallel_env_check(self):
        env = ParallelEnv(2, partial(CountingEnv, 0), mp_start_method="fork")
        env = TransformedEnv(env, ForegroundMaskTransform(BrightSegmenter()))
        check_env_specs(env)
        env.close()

    @KINDS
    @pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 0), (2, 1, 3)])
    def test_transform_no_env(self, segmenter, shape):
        transform = ForegroundMaskTransform(segmenter())
        pixels = random_pixels(*shape)
        out = transform(TensorDict({"pixels": pixels}, shape))
        assert torch.equal(out["foreground_mask"], masks_of(pixels, segmenter))
        assert len(transform.segmenter.calls) <= 1  # one call whatever the shape

    def test_transform_compose(self):
        transform = ForegroundMaskTransform(BrightSegmenter(), [("next", "pixels")])
        data = TensorDict({"next": {"pixels": random_pixels(4)}}, [4])
        out = Compose(transform, lambda td: td.set("copied", td["next", "foreground_mask"]))(data)
        assert torch.equal(out["copied"], bright(data["next", "pixels"]))

    @pytest.mark.render
    def test_transform_env(self):
        """A real env: its own exact mask is overwritten, at reset and at each step."""
        env = PixelDMControlEnv("cartpole", "balance", image_size=32, seed=1)
        env = TransformedEnv(env, ForegroundMaskTransform(BrightSegmenter()))
        first = env.reset()
        assert torch.equal(first["foreground_mask"], bright(first["pixels"]))
        rollout = env.rollout(3)
        for data in (rollout, rollout["next"]):
            assert torch.equal(data["foreground_mask"], bright(data["pixels"]))
        assert not torch.equal(
            rollout["foreground_mask"][0], env.base_env.rollout(1)["foreground_mask"][0]
        )
        env.close()

    def test_transform_model(self):
        transform = ForegroundMaskTransform(BrightSegmenter())
        area = TensorDictModule(lambda mask: mask.sum((-1, -2, -3)), ["foreground_mask"], ["area"])
        pixels = random_pixels(4)
        out = nn.Sequential(transform, area)(TensorDict({"pixels": pixels}, [4]))
        assert torch.equal(out["area"], bright(pixels).sum((-1, -2, -3)))

    @pytest.mark.parametrize("invert", [False, True])
    @pytest.mark.parametrize("buffer", [ReplayBuffer, TensorDictReplayBuffer])
    def test_transform_rb(self, buffer, invert):
        """Each frame is segmented once, when it is written, however often it is read."""
        replay = buffer(storage=LazyTensorStorage(40), batch_size=16)
        segmenter = BrightSegmenter()
        replay.append_transform(ForegroundMaskTransform(segmenter), invert=invert)
        for seed in range(2):
            stale = torch.zeros(20, 1, 8, 8, dtype=torch.bool)
            pixels = random_pixels(20, seed=seed)
            replay.extend(TensorDict({"pixels": pixels, "foreground_mask": stale}, [20]))
        for _ in range(5):
            sample = replay.sample()
            assert torch.equal(sample["foreground_mask"], bright(sample["pixels"]))
        assert segmenter.calls == [20, 20]

    def test_transform_inverse(self):
        """In an env the inverse, which sees what enters a step, does nothing."""
        env = transformed()
        data = env.rand_action(env.reset())
        calls = len(env.transform.segmenter.calls)
        data["foreground_mask"].logical_not_()
        kept = data["foreground_mask"].clone()
        assert torch.equal(env.transform.inv(data)["foreground_mask"], kept)
        assert len(env.transform.segmenter.calls) == calls


def test_a_batched_env_takes_one_call_a_step():
    segmenter = BrightSegmenter()
    env = TransformedEnv(SerialEnv(3, partial(CountingEnv, 0)), ForegroundMaskTransform(segmenter))
    env.reset()
    segmenter.calls.clear()  # the specs' own probing, if any
    env.rollout(4, auto_reset=True)
    assert set(segmenter.calls) == {3}
    assert len(segmenter.calls) <= 5


def test_a_collectors_postproc_segments_a_batch_at_once():
    segmenter = BrightSegmenter()
    keys = ["pixels", ("next", "pixels")]
    collector = Collector(
        partial(CountingEnv, 0),
        policy=None,
        frames_per_batch=12,
        total_frames=24,
        postproc=ForegroundMaskTransform(segmenter, keys),
    )
    frames = 0
    for batch in collector:
        frames += len(batch["pixels"].flatten(1).unique(dim=0))
        for data in (batch, batch["next"]):
            assert torch.equal(data["foreground_mask"], bright(data["pixels"]))
    collector.shutdown()
    # What a step leads to is what the next one starts from: such a frame is segmented once.
    assert len(segmenter.calls) == 2
    assert sum(segmenter.calls) < 2 * 24


def test_the_projects_replay_segments_what_enters_it():
    segmenter = BrightSegmenter()
    replay = make_replay(capacity=40, num_streams=2, batch_size=2, batch_length=4, seed=0)
    replay.append_transform(ForegroundMaskTransform(segmenter, [("next", "pixels")]))
    pixels = random_pixels(20)
    stream = torch.arange(20) % 2
    replay.extend(TensorDict({"stream": stream, "next": {"pixels": pixels}}, [20]))
    for _ in range(3):
        following = replay.sample()["next"]
        assert torch.equal(following["foreground_mask"], bright(following["pixels"]))
    assert segmenter.calls == [20]


def test_equal_frames_are_found_by_their_hash():
    frames = random_pixels(5)[[0, 1, 0, 2, 1, 3, 4]]
    frames[6] = frames[5]
    frames[6, 2, 7, 7] ^= 1  # one bit differs
    first, inverse = foreground_mask._distinct(frames)
    assert len(first) == 5
    assert torch.equal(frames[first][inverse], frames)


def test_keys_and_bad_input():
    transform = ForegroundMaskTransform(BrightSegmenter(), ["pixels", ("next", "pixels")])
    assert transform.out_keys == ["foreground_mask", ("next", "foreground_mask")]
    transform = ForegroundMaskTransform(BrightSegmenter())
    with pytest.raises(ValueError, match="one out-key for each in-key"):
        ForegroundMaskTransform(BrightSegmenter(), ["a", "b"], ["c"])
    with pytest.raises(KeyError, match="pixels"):
        transform(TensorDict({"image": random_pixels(2)}, [2]))
    with pytest.raises(TypeError, match="uint8"):
        ForegroundMaskTransform(BrightSegmenter())(
            TensorDict({"pixels": torch.rand(2, 3, 8, 8)}, [2])
        )
    with pytest.raises(ValueError, match=r"\[\.\.\., 3, H, W\]"):
        transform(TensorDict({"pixels": random_pixels(2)[:, :1]}, [2]))


@pytest.mark.parametrize(
    ("segmenter", "error", "match"),
    [
        (lambda p: p > 100, ValueError, r"\(2, 1, 8, 8\)"),
        (lambda p: (p[:, :1] > 100)[0], ValueError, r"\(2, 1, 8, 8\)"),
        (lambda p: p[:, :1], TypeError, "bool or confidences"),
        (lambda p: p[:, :1] / 255, TypeError, "confidence=True"),
    ],
)
def test_a_segmenter_that_breaks_its_promise_is_named(segmenter, error, match):
    with pytest.raises(error, match=match):
        ForegroundMaskTransform(segmenter)(TensorDict({"pixels": random_pixels(2)}, [2]))


def test_the_segmenter_is_no_submodule_and_gets_no_gradient():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 1, 1)

        def forward(self, pixels):
            assert not torch.is_grad_enabled()
            return self.layer(pixels.float()) > 0

    transform = ForegroundMaskTransform(Net())
    assert not list(transform.parameters())
    assert not transform.state_dict()
    out = transform(TensorDict({"pixels": random_pixels(2)}, [2]))
    assert out["foreground_mask"].dtype is torch.bool
    assert out["foreground_mask"].shape == (2, 1, SIZE, SIZE)

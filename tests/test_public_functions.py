"""Wrong input at a public function is one clear error, whatever its shape, dtype and values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.models import SIZE, TINY, make_learner, make_loss, make_sample
from helpers.runs import tiny_run
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor

from w2f_torchrl.data import (
    MaskStore,
    UpdateSchedule,
    make_replay,
    pack_mask,
    records_from_rollout,
    unpack_mask,
)
from w2f_torchrl.envs import register_env
from w2f_torchrl.evaluation.policy import LoadedPolicy
from w2f_torchrl.modules import build_actor, build_world_model, compose, imagine
from w2f_torchrl.objectives import (
    background_loss,
    foreground_loss,
    image_loss,
    lambda_return,
    mask_loss,
)
from w2f_torchrl.objectives.reconstruction import confident_foreground
from w2f_torchrl.segmenters import (
    MedianSegmenter,
    StudentSegmenter,
    boundary_error,
    choose_diverse,
    mask_iou,
    train_student,
)
from w2f_torchrl.transforms import ForegroundMaskTransform

DTYPES = [torch.bool, torch.uint8, torch.int64, torch.float32, torch.float64, torch.float16]
REFUSED = (TypeError, ValueError)


@st.composite
def tensors(draw: Any, near: tuple[int, ...] = (2, 3, 8, 8)) -> Tensor:
    """Any tensor; often one whose shape is almost right, and whose values are almost."""
    shape = list(near)
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, max(len(shape) - 1, 0)))
        change = draw(st.sampled_from(["drop", "zero", "one", "more"]))
        if change == "more":
            shape.insert(place, draw(st.integers(1, 3)))
        elif shape and change == "drop":
            shape.pop(place)
        elif shape:
            shape[place] = int(change == "one")
    dtype = draw(st.sampled_from(DTYPES))
    high = draw(st.sampled_from([1, 255]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    values = (torch.rand(shape, generator=generator) * high).round_()
    odd = draw(st.sampled_from([None, None, math.nan, math.inf, -1.0, 1.5]))
    if odd is not None and values.numel() and dtype.is_floating_point:
        values.view(-1)[-1] = odd
    return values.to(dtype)


PIXELS, MASKS = (2, 3, 8, 8), (2, 1, 8, 8)


def refused_or(call: Callable[[], Any]) -> Any:
    """What a call returns, None if it refused its input; any other error is a failure."""
    try:
        return call()
    except REFUSED as error:
        text = str(error)
        assert text, "an error that says nothing"
        assert "\n" not in text
        return None


def is_picture(x: Tensor, channels: int = 3) -> bool:
    right = x.ndim >= 3 and x.shape[-3] == channels and x.numel() > 0
    return right and (channels != 3 or x.dtype is torch.uint8)


def is_mask(x: Tensor) -> bool:
    if not is_picture(x, 1) or not (x.dtype is torch.bool or x.is_floating_point()):
        return False
    return bool(((x >= 0) & (x <= 1)).all())


# ------------------------------------------------------------------ losses


@settings(max_examples=150, deadline=None)
@given(pixels=tensors(PIXELS), mask=tensors(MASKS), same=st.booleans())
def test_losses_of_pictures(pixels, mask, same):
    if same and pixels.ndim >= 3:  # a mask that belongs to the pictures, but for dtype and values
        mask = mask.new_ones((*pixels.shape[:-3], 1, *pixels.shape[-2:])) * mask.flatten()[:1].sum()
    prediction = torch.full(pixels.shape, 0.25)
    legal = is_picture(pixels)
    whole = refused_or(lambda: image_loss(prediction, pixels))
    assert (whole is not None) == legal
    fits = legal and is_mask(mask) and mask.shape == (*pixels.shape[:-3], 1, *pixels.shape[-2:])
    inside = refused_or(lambda: foreground_loss(prediction, pixels, mask))
    outside = refused_or(lambda: background_loss(prediction, pixels, mask))
    assert (inside is not None) == (outside is not None) == fits
    if fits:  # what is inside and what is outside are the whole, and none of them is negative
        torch.testing.assert_close(inside + outside, whole, rtol=1e-3, atol=1e-2)
        assert inside >= 0
        assert outside >= -1e-3


@settings(max_examples=100, deadline=None)
@given(logits=tensors(MASKS), mask=tensors(MASKS))
def test_losses_of_masks(logits, mask):
    legal = (
        is_picture(logits, 1)
        and logits.is_floating_point()
        and is_mask(mask)
        and mask.shape == logits.shape
    )
    loss = refused_or(lambda: mask_loss(logits, mask))
    assert (loss is not None) == legal
    marked = refused_or(lambda: confident_foreground(logits, mask, 0.7))
    assert (marked is not None) == legal
    if legal and logits.isfinite().all() and logits.dtype is not torch.float16:
        chance, given_ = logits.double().sigmoid(), mask.double()
        entropy = -(given_ * chance.log() + (1 - given_) * (1 - chance).log())
        pictures = logits.shape[:-3].numel()
        if chance.max() < 1:  # the definition overflows where the loss doesn't
            torch.testing.assert_close(loss.double(), entropy.sum() / pictures, rtol=1e-4, atol=0)


def test_masks_of_0_and_255_are_refused_by_name_wherever_they_enter():
    pixels = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    prediction = torch.zeros(2, 3, 8, 8)
    for dtype in (torch.uint8, torch.float32):
        masks = torch.zeros(MASKS, dtype=dtype)
        masks[..., :4] = 255
        for call in (
            lambda m: background_loss(prediction, pixels, m),
            lambda m: foreground_loss(prediction, pixels, m),
            lambda m: mask_loss(torch.zeros(MASKS), m),
            lambda m: train_student(pixels, m, steps=1),
            lambda m: ForegroundMaskTransform(lambda _: m, confidence=True)(
                TensorDict({"pixels": pixels}, [2])
            ),
        ):
            with pytest.raises(REFUSED, match=r"masks?.*\[0, 1\]"):
                call(masks)


@settings(max_examples=60, deadline=None)
@given(
    entry=st.sampled_from(
        ["action", "is_init", "pixels", "foreground_mask", "reward", "terminated", "done"]
    ),
    wrong=tensors((2, 4, 3, SIZE, SIZE)),
)
def test_a_sample_with_one_wrong_entry(entry, wrong):
    loss, sample = make_loss("split"), make_sample(2, 4)
    key = entry if entry in ("action", "is_init") else ("next", entry)
    right = sample[key]
    if wrong.shape[:2] != (2, 4):
        return
    sample = sample.set(key, wrong)
    out = refused_or(lambda: loss(sample))
    same = wrong.shape == right.shape
    number = wrong.is_floating_point() and right.is_floating_point()
    legal = same and (wrong.dtype is right.dtype or number)
    if entry == "foreground_mask":
        legal = same and is_mask(wrong)
    assert (out is not None) == legal


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (2, 1), (4,), (2, 2, 2)])
def test_samples_too_short_for_a_return_or_of_other_dimensions(shape):
    loss, record = make_loss("whole"), make_sample(2, 4)[0, 0]
    sample = record.expand(*shape).contiguous()
    with pytest.raises(ValueError, match=r"records \[B, T\]"):
        loss(sample)


def test_a_world_model_infers_a_single_step():
    loss, sample = make_loss("split"), make_sample(2, 4)[:, :1]
    inferred = loss.world_model(sample.select(*loss.world_model.in_keys))
    assert inferred["next", "state"].shape[:2] == (2, 1)
    small = sample.clone()
    small["next", "pixels"] = small["next", "pixels"][..., :8, :8]
    with pytest.raises(ValueError, match=r"pixels must have the shape \[2, 1, 3, 16, 16\], got"):
        loss.world_model.infer(small)


@settings(max_examples=80, deadline=None)
@given(
    reward=tensors((2, 3)),
    value=tensors((2, 3)),
    lmbda=st.sampled_from([0.0, 0.95, 1.0, 1.5, -0.1, math.nan]),
)
def test_returns(reward, value, lmbda):
    found = refused_or(lambda: lambda_return(reward, torch.ones_like(value), value, lmbda))
    legal = (
        reward.shape == value.shape
        and reward.ndim == 2
        and min(reward.shape) > 0
        and reward.shape[1] > 1
        and reward.is_floating_point()
        and value.is_floating_point()
        and 0 <= lmbda <= 1
    )
    assert (found is not None) == legal
    if legal:
        assert found.shape == (reward.shape[0], reward.shape[1] - 1)


# ------------------------------------------------------------------ masks and segmenters


@settings(max_examples=100, deadline=None)
@given(a=tensors(MASKS), b=tensors(MASKS), same=st.booleans())
def test_masks_compared(a, b, same):
    b = a.clone() if same else b
    legal = a.shape == b.shape and a.dtype is torch.bool and b.dtype is torch.bool
    legal = legal and a.ndim >= 3 and a.shape[-3] == 1 and a.shape[-1] > 0 and a.shape[-2] > 0
    found = refused_or(lambda: mask_iou(a, b))
    assert (found is not None) == legal
    if legal:
        assert found.shape == a.shape[:-3]
        assert ((found >= 0) & (found <= 1)).all()
        assert not same or (found == 1).all()
    distance = refused_or(lambda: boundary_error(a, b))
    assert (distance is not None) == (legal and a.ndim == 4)
    if distance is not None:
        assert distance.shape == a.shape[:1]
        assert not same or (distance == 0).all()


@settings(max_examples=100, deadline=None)
@given(mask=tensors((2, 1, 4, 8)))
def test_packing(mask):
    packed = refused_or(lambda: pack_mask(mask))
    legal = mask.dtype is torch.bool and mask.ndim >= 3 and mask.shape[-3] == 1
    assert (packed is not None) == (legal and mask.shape[-1] % 8 == 0)
    if packed is not None:
        assert torch.equal(unpack_mask(packed), mask)
    unpacked = refused_or(lambda: unpack_mask(mask))
    right = mask.dtype is torch.uint8 and mask.ndim >= 3 and mask.shape[-3] == 1
    assert (unpacked is not None) == right


def bright(pixels: Tensor) -> Tensor:
    return pixels[:, :1] > 127


@settings(max_examples=80, deadline=None)
@given(pixels=tensors(PIXELS))
def test_segmenters_and_the_transform(pixels):
    legal = pixels.dtype is torch.uint8 and pixels.ndim == 4 and pixels.shape[1] == 3
    legal = legal and pixels.shape[2] > 0 and pixels.shape[3] > 0
    shape = (len(pixels), 1, *pixels.shape[2:]) if legal else ()
    masks = refused_or(lambda: StudentSegmenter()(pixels))
    assert (masks is not None) == legal
    assert not legal or masks.shape == shape
    median = refused_or(lambda: MedianSegmenter().fit(pixels)(pixels))
    assert (median is not None) == (legal and len(pixels) > 0)
    chosen = refused_or(lambda: choose_diverse(pixels, 2))
    assert (chosen is not None) == (legal and len(pixels) > 0)
    # The transform takes any leading dimensions.
    transform = ForegroundMaskTransform(bright)
    out = refused_or(lambda: transform(TensorDict({"pixels": pixels})))
    picture = pixels.dtype is torch.uint8 and pixels.ndim >= 3 and pixels.shape[-3] == 3
    picture = picture and pixels.shape[-1] > 0 and pixels.shape[-2] > 0
    assert (out is not None) == picture
    if picture:
        flat = pixels.reshape(-1 if pixels.numel() else 0, *pixels.shape[-3:])
        assert torch.equal(
            out["foreground_mask"].reshape(len(flat), 1, *flat.shape[2:]), bright(flat)
        )


def test_two_empty_keys_are_segmented():
    empty = torch.zeros(0, 3, 8, 8, dtype=torch.uint8)
    td = TensorDict({"pixels": empty, "next": {"pixels": empty}}, [0])
    out = ForegroundMaskTransform(bright, ["pixels", ("next", "pixels")])(td)
    assert out["next", "foreground_mask"].shape == (0, 1, 8, 8)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"batch_size": 2.5}, "batch_size=2.5 must be an integer"),
        ({"learning_rate": math.nan}, "learning_rate=nan must be a finite number"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
        ({"paste": math.nan}, "paste=nan"),
    ],
)
def test_a_students_lessons(changes, match):
    pixels = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=match):
        train_student(pixels, bright(pixels), **{"steps": 1} | changes)


@settings(max_examples=60, deadline=None)
@given(front=tensors(PIXELS), logits=tensors(MASKS))
def test_composing(front, logits):
    found = refused_or(lambda: compose(front, logits, torch.zeros_like(front)))
    legal = front.is_floating_point() and logits.dtype is front.dtype and front.ndim >= 3
    legal = legal and front.shape[-3] == 3 and min(front.shape[-2:]) > 0
    legal = legal and logits.shape == (*front.shape[:-3], 1, *front.shape[-2:])
    assert (found is not None) == legal


# ------------------------------------------------------------------ data


def transitions(shape: tuple[int, ...]) -> TensorDict:
    flag = torch.zeros(*shape, 1, dtype=torch.bool)
    following = {"reward": torch.zeros(*shape, 1), "terminated": flag, "done": flag}
    pixels = torch.zeros(*shape, 3, 8, 8, dtype=torch.uint8)
    values = {"action": torch.zeros(*shape, 2), "is_init": flag, "pixels": pixels}
    return TensorDict(values | {"next": following | {"pixels": pixels}}, shape)


@pytest.mark.parametrize("shape", [(), (3,), (0, 3), (3, 0), (1, 2, 3)])
def test_a_rollout_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"\[N, T\], got"):
        records_from_rollout(transitions(shape))
    assert len(records_from_rollout(transitions((1, 1)))) == 1


@pytest.mark.parametrize("key", ["is_init", ("next", "terminated"), ("next", "done")])
def test_flags_that_are_no_bools(key):
    batch = transitions((2, 3))
    with pytest.raises(TypeError, match="must be bool, got uint8"):
        records_from_rollout(batch.set(key, batch[key].byte()))


NUMBERS = st.one_of(st.integers(-2, 9), st.sampled_from([math.nan, math.inf, 2.5, True, "3", None]))


@settings(max_examples=80, deadline=None)
@given(ratio=NUMBERS, batch=NUMBERS, length=NUMBERS, start=NUMBERS)
def test_schedules_and_replays(ratio, batch, length, start):
    def integer(value: Any, least: int) -> bool:
        return type(value) is int and value >= least

    made = refused_or(lambda: UpdateSchedule(ratio, batch, length, start))
    right = type(ratio) is not bool and ratio is not None and Number(ratio)
    legal = right and integer(batch, 1) and integer(length, 1) and integer(start, 0)
    assert (made is not None) == legal
    sizes = {"capacity": batch, "num_streams": 1, "batch_size": ratio, "batch_length": length}
    made = refused_or(lambda: make_replay(**sizes))
    legal = integer(batch, 1) and integer(ratio, 1) and integer(length, 1) and length <= batch
    assert (made is not None) == legal


def Number(value: Any) -> bool:
    value = float(value)
    return math.isfinite(value) and value >= 0


def test_a_mask_store_takes_its_own_frames_only(tmp_path):
    with pytest.raises(ValueError, match="frames=0 must be at least 1"):
        MaskStore(tmp_path / "a", (0, 8, 8), {})
    store = MaskStore(tmp_path / "b", (3, 8, 8), {})
    store.append(torch.zeros(2, 1, 8, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="masks of 4 frames exceed the store's 3"):
        store.append(torch.zeros(2, 1, 8, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"masks must have the shape \[M, 1, 8, 8\]"):
        store.append(torch.zeros(1, 1, 16, 8, dtype=torch.bool))
    assert store.done == 2


# ------------------------------------------------------------------ networks and policies


@pytest.mark.parametrize("size", [0, -16, 8, 2.0, True, math.nan])
def test_networks_of_impossible_sizes(size):
    with pytest.raises(ValueError, match="image_size"):
        build_world_model(TINY, action_size=2, image_size=size)
    if size != 8:
        with pytest.raises(ValueError, match="action_size"):
            build_world_model(TINY, action_size=size, image_size=16)
        with pytest.raises(ValueError, match="action_size"):
            build_actor(TINY, size)


def test_an_imagination_of_no_steps():
    loss = make_loss("whole")
    state, belief = torch.zeros(2, TINY.state_size), torch.zeros(2, TINY.belief_size)
    with pytest.raises(ValueError, match="horizon=0 must be at least 1"):
        imagine(loss.world_model.prior, loss.actor, state, belief, 0)


@pytest.mark.parametrize(("domain", "factory"), [("", print), ("  ", print), (None, print)])
def test_a_registration_without_a_name(domain, factory):
    with pytest.raises(ValueError, match="must be a name"):
        register_env(domain, factory)


def test_a_registration_without_a_factory():
    with pytest.raises(TypeError, match="factory is None: must be callable"):
        register_env("nothing", None)


@settings(max_examples=50, deadline=None)
@given(pixels=tensors((2, 3, 16, 16)))
def test_a_loaded_policy_takes_pictures_as_it_was_trained_on(tmp_path_factory, pixels):
    config = tiny_run(tmp_path_factory.getbasetemp() / "unused")
    policy = LoadedPolicy(config, make_learner("whole"), 2)
    legal = pixels.dtype is torch.uint8 and pixels.shape[-3:] == (3, 16, 16)
    legal = legal and pixels.ndim >= 3 and pixels.numel() > 0
    batch = tuple(pixels.shape[:-3]) if legal else tuple(pixels.shape[:1])
    carried = {k: torch.zeros(*batch, n) for k, n in policy_sizes(config).items()}
    flags = torch.zeros(*batch, 1, dtype=torch.bool)
    td = TensorDict({"pixels": pixels, "is_init": flags, **carried}, batch)
    out = refused_or(lambda: policy(td))
    assert (out is not None) == legal
    if legal:
        assert out["action"].isfinite().all()


def policy_sizes(config: Any) -> dict[str, int]:
    from w2f_torchrl.modules import latent_sizes

    return latent_sizes(config.model, 2)

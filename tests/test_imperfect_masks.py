"""Losses for masks that are wrong in places, and the scale of a small foreground."""

from __future__ import annotations

import pytest
import torch
from helpers.models import SIZE, make_loss, make_sample
from helpers.runs import tiny_run
from torch import Tensor, nn

from w2f_torchrl.objectives import LossConfig, background_loss, foreground_loss, image_loss
from w2f_torchrl.objectives.reconstruction import confident_foreground, mask_loss
from w2f_torchrl.trainers import ConfigError

THRESHOLD = 0.9


def pictures(seed: int = 0, count: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prediction [N, 3, H, W], pixels, mask [N, 1, H, W] of about a quarter, and logits."""
    generator = torch.Generator().manual_seed(seed)
    prediction = torch.rand(count, 3, SIZE, SIZE, generator=generator)
    pixels = torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    mask = torch.rand(count, 1, SIZE, SIZE, generator=generator) < 0.25
    return prediction, pixels, mask, 4 * torch.randn(mask.shape, generator=generator)


def test_doubted_is_where_the_head_is_sure_and_the_mask_says_background():
    _, _, mask, logits = pictures()
    logits.requires_grad_(True)
    found = confident_foreground(logits, mask, THRESHOLD)
    expected = (torch.special.expit(logits.detach()) > THRESHOLD) & ~mask
    assert found.any()
    assert torch.equal(found, expected)
    assert not found.requires_grad
    assert torch.equal(confident_foreground(logits, mask.float(), THRESHOLD), expected)


def test_what_the_head_saves_from_a_wrong_mask_is_what_the_right_mask_gives():
    """The segmenter loses half of the agent; a head that is sure of all of it makes up for that."""
    prediction, pixels, mask, _ = pictures()
    wrong = mask & (torch.arange(SIZE) < SIZE // 2)
    dropped = confident_foreground(torch.where(mask, 10.0, -10.0), wrong, THRESHOLD)
    torch.testing.assert_close(
        background_loss(prediction, pixels, wrong, dropped=dropped),
        background_loss(prediction, pixels, mask),
        rtol=0,
        atol=0,
    )
    assert background_loss(prediction, pixels, wrong) > background_loss(prediction, pixels, mask)
    # Black is not asked for in the part that was lost, and nothing else changes.
    kind = "zero_outside"
    selective = foreground_loss(prediction, pixels, wrong, kind, dropped=dropped)
    black = (prediction.square() * (mask & ~wrong)).sum() / len(pixels)
    torch.testing.assert_close(
        selective + black, foreground_loss(prediction, pixels, wrong, kind), rtol=1e-5, atol=1e-3
    )
    # Inside a wrong mask colours are asked for as ever: the head doubts in one direction only.
    assert not confident_foreground(
        torch.full_like(mask, -10.0, dtype=torch.float32), mask, THRESHOLD
    ).any()


@pytest.mark.parametrize("target", ["inside", "zero_outside"])
def test_dropped_pixels_reach_no_loss_and_no_gradient(target):
    prediction, pixels, mask, logits = pictures()
    dropped = confident_foreground(logits, mask, THRESHOLD)
    other = torch.where(dropped, 255 - pixels, pixels)
    gradients = []
    for picture in (pixels, other):
        leaf = prediction.clone().requires_grad_(True)
        background_loss(leaf, picture, mask, dropped=dropped).backward()
        assert leaf.grad is not None
        assert leaf.grad.masked_select(dropped).eq(0).all()
        gradients.append(leaf.grad)
        leaf = prediction.clone().requires_grad_(True)
        foreground_loss(leaf, picture, mask, target, dropped=dropped).backward()
        assert leaf.grad is not None
        assert leaf.grad.masked_select(dropped).eq(0).all()
    assert torch.equal(*gradients)


@pytest.mark.parametrize("latent", ["split", "shared", "foreground"])
def test_selective_changes_only_the_colours_where_the_head_is_sure(latent):
    """The doubt itself passes no gradient, and the head still learns the mask it is given."""
    sample = make_sample()
    losses = {}
    for selective in (None, THRESHOLD):
        loss = make_loss(latent, selective=selective, foreground_target="zero_outside")
        # The head is sure of foreground everywhere.
        nn.init.constant_(loss.world_model.decoder.foreground.mask_head.bias, 8.0)
        losses[selective] = loss, loss(sample.clone())
    (plain_loss, plain), (selective_loss, selective) = losses.values()
    assert selective["wm/doubted_share"] > 0.5
    assert torch.equal(plain["loss_mask"], selective["loss_mask"])
    if latent != "foreground":
        # Sure of foreground everywhere: no background is left to learn.
        assert selective["loss_background"] < 0.05 * plain["loss_background"]
        selective["loss_background"].backward()
        head = selective_loss.world_model.decoder.foreground
        for final in (head.layers[-1], head.mask_head):
            assert final.weight.grad is None or final.weight.grad.eq(0).all()
    else:
        assert selective["loss_foreground"] < plain["loss_foreground"]
    assert plain_loss.config.selective is None


@pytest.mark.parametrize("target", ["inside", "zero_outside"])
def test_selective_reaches_the_agents_latent_with_zero_outside_only(target):
    """Inside the mask nothing is dropped, and the background has an encoder of its own."""
    sample, gradients = make_sample(), []
    for selective in (None, THRESHOLD):
        loss = make_loss("split", selective=selective, foreground_target=target)
        model = loss.world_model
        nn.init.constant_(model.decoder.foreground.mask_head.bias, 8.0)
        torch.manual_seed(0)
        losses = loss(sample.clone())
        (losses["loss_foreground"] + losses["loss_background"]).backward()
        both = (model.encoder, model.background_encoder)
        gradients.append([[p.grad for p in encoder.parameters()] for encoder in both])
    (plain, plain_behind), (selective, selective_behind) = gradients
    same = [torch.equal(a, b) for a, b in zip(plain, selective, strict=True)]
    assert all(same) if target == "inside" else not any(same)
    assert not torch.equal(plain_behind[0], selective_behind[0])


def test_selective_that_could_drop_nothing_is_refused(tmp_path):
    config = tiny_run(tmp_path, algo={"latent": "foreground"}, loss={"selective": 0.9})
    with pytest.raises(ConfigError, match=r"loss.selective=0.9 drops colour errors outside"):
        config.validate()
    config.loss.foreground_target = "zero_outside"
    config.validate()


def test_area_scale_is_its_definition_and_leaves_a_whole_picture_alone():
    prediction, pixels, mask, _ = pictures()
    leaf = prediction.clone().requires_grad_(True)
    scaled = foreground_loss(leaf, pixels, mask, scale="area")
    share = mask.float().mean()
    torch.testing.assert_close(scaled, foreground_loss(prediction, pixels, mask) / share)
    torch.testing.assert_close(
        foreground_loss(prediction, pixels, torch.ones_like(mask), scale="area"),
        image_loss(prediction, pixels),
    )
    # An error that is the same everywhere weighs as in a whole picture, however small the mask.
    target = pixels.float() / 255
    small = torch.zeros_like(mask)
    small[..., :2, :2] = True
    for chosen in (mask, small):
        even = foreground_loss(target + 0.1, pixels, chosen, scale="area")
        assert float(even) == pytest.approx(3 * SIZE * SIZE * 0.01, rel=1e-4)
    empty = foreground_loss(prediction, pixels, torch.zeros_like(mask), scale="area")
    assert float(empty) == 0
    # Black outside the mask, which covers the whole picture, keeps its scale.
    outside = (prediction.square() * ~mask).sum() / len(pixels)
    both = foreground_loss(prediction, pixels, mask, "zero_outside", scale="area")
    torch.testing.assert_close(both - scaled.detach(), outside, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("latent", ["split", "foreground"])
def test_area_scale_reaches_the_models_loss(latent):
    sample = make_sample()
    plain = make_loss(latent)(sample.clone())
    scaled = make_loss(latent, foreground_scale="area")(sample.clone())
    share = sample["next", "foreground_mask"].float().mean()
    torch.testing.assert_close(scaled["loss_foreground"], plain["loss_foreground"] / share)
    assert torch.equal(scaled["loss_mask"], plain["loss_mask"])


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"foreground_scale": "mean"}, "loss.foreground_scale='mean' is unknown; allowed: none"),
        ({"selective": 1.0}, r"loss.selective=1.0 must be in \[0.5, 1\)"),
        ({"selective": 0.2}, r"loss.selective=0.2 must be in \[0.5, 1\)"),
        (
            {"selective": 0.9, "mask": 0.0, "foreground_target": "zero_outside"},
            "loss.mask=0.0 must be above 0 with loss.selective",
        ),
    ],
)
def test_bad_settings_are_named(setting, match):
    with pytest.raises(ValueError, match=match):
        LossConfig(**setting).validate()


def learn(selective: float | None) -> float:
    """Train on masks that miss the agent in 4 frames of 10; the background's error behind it.

    The agent goes over 8 places. The mask head sees which; the background's head sees only in which
    half of the picture, so each of its pixels is at times behind the agent and at times not.
    """
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    scenery = torch.full((3, SIZE, SIZE), 60, dtype=torch.uint8)
    places = torch.eye(SIZE // 2)
    halves = places[:, : SIZE // 4].sum(1, keepdim=True)
    masks = torch.zeros(SIZE // 2, 1, SIZE, SIZE, dtype=torch.bool)
    for place in range(SIZE // 2):
        masks[place, 0, 4:12, 2 * place : 2 * place + 2] = True
    pixels = torch.where(masks, torch.tensor(220, dtype=torch.uint8), scenery)
    background = nn.Sequential(nn.Linear(1, 3 * SIZE * SIZE), nn.Unflatten(-1, (3, SIZE, SIZE)))
    head = nn.Sequential(nn.Linear(SIZE // 2, SIZE * SIZE), nn.Unflatten(-1, (1, SIZE, SIZE)))
    optimizer = torch.optim.Adam([*background.parameters(), *head.parameters()], 2e-2)
    for _ in range(400):
        given_masks = masks & (torch.rand(len(masks), 1, 1, 1, generator=generator) > 0.4)
        logits = head(places)
        dropped = (
            None if selective is None else confident_foreground(logits, given_masks, selective)
        )
        loss = background_loss(background(halves), pixels, given_masks, dropped=dropped)
        optimizer.zero_grad()
        (loss + mask_loss(logits, given_masks)).backward()
        optimizer.step()
    with torch.no_grad():
        error = (background(halves) - scenery / 255).abs()
    return float((error * masks).sum() / (3 * masks.sum()))


def test_wrong_masks_teach_the_background_less_of_the_agent():
    """With 4 masks of 10 lost the background paints a ghost of the agent; selective, hardly."""
    plain, selective = learn(None), learn(0.5)
    assert plain > 0.05
    assert selective < 0.3 * plain

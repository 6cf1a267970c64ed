"""The reference's encoder and decoder against its formulas; the mask's own last layer."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from helpers.models import SIZE, TINY, make_sample
from torch.nn import functional as F

from w2f_torchrl.config.model import DECODERS, RESAMPLINGS
from w2f_torchrl.kernels import convolution, switch
from w2f_torchrl.kernels.convolution import nearest_kernel
from w2f_torchrl.modules import LATENTS, DualImageDecoder, build_world_model
from w2f_torchrl.modules.dual_decoder import FOREGROUND_SHARE
from w2f_torchrl.modules.image_decoder import (
    ImageDecoder,
    ReferenceImageDecoder,
    build_image_decoder,
)
from w2f_torchrl.modules.networks import ImageEncoder

EPS = 1e-4
DOUBLE = {"dtype": torch.float64}
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


@pytest.fixture(params=["kernels", "plain"])
def passes(request, monkeypatch):
    """The passes for CPUs, and those for other devices and compiled graphs."""
    if request.param == "plain":
        monkeypatch.setattr(switch, "use_cpu_kernels", lambda x: False)
    return request.param


def with_gradients(function, *leaves):
    """A function's value, and the gradients of its inputs by a fixed weighting of the outputs."""
    out = function(*leaves)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).sin().view_as(out)
    return out, *torch.autograd.grad((out * weights).sum(), leaves)


def assert_same(ours, theirs, *leaves):
    for got, want in zip(
        with_gradients(ours, *leaves), with_gradients(theirs, *leaves), strict=True
    ):
        torch.testing.assert_close(got, want, **CLOSE)


# ------------------------------------------------------------------ resampling


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("channels", [(3, 2), (2, 30)])  # narrow ones use subpixels
@pytest.mark.parametrize("kernel", [1, 3, 5, 7, 9])
def test_one_transposed_convolution_doubles_by_nearest_neighbours(kernel, channels, channels_last):
    torch.manual_seed(0)
    inputs, outputs = channels
    x = torch.randn(2, inputs, 5, 4, **DOUBLE, requires_grad=True)
    weight = torch.randn(inputs, outputs, kernel, kernel, **DOUBLE, requires_grad=True)
    bias = torch.randn(outputs, **DOUBLE, requires_grad=True)

    def ours(x, weight, bias):
        return convolution.double(x, nearest_kernel(weight), bias, channels_last=channels_last)

    def reference(x, weight, bias):
        large = F.interpolate(x, scale_factor=2, mode="nearest")
        return F.conv2d(large, weight.transpose(0, 1).flip(2, 3), bias, padding=kernel // 2)

    assert_same(ours, reference, x, weight, bias)


def test_the_summed_taps_of_a_kernel_of_five():
    """By hand: even rows of the large picture see a + b, c + d, e, and odd ones a, b + c, d + e."""
    taps = torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0])
    weight = torch.zeros(1, 1, 5, 5)
    weight[0, 0, :, 2] = taps.flip(0)
    rows = torch.zeros(1, 1, 5, 1)
    for place, even, odd in ((1, 11, 1), (2, 1100, 110), (3, 10000, 11000)):
        picture = rows.clone()
        picture[0, 0, place] = 1
        out = convolution.double(picture, nearest_kernel(weight), torch.zeros(1))
        assert out[0, 0, 4:6, 0].tolist() == [even, odd]  # what row 2 makes of its neighbours


def reference_encoder(pixels, depths, weights):
    """Convolutions of stride 1, the maximum of 2 x 2 pixels, RMS norm over channels, SiLU."""
    x = pixels / 255 - 0.5
    for depth, (weight, bias, gain) in zip(depths, weights, strict=True):
        x = F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)
        n, _, h, w = x.shape
        x = x.view(n, depth, h // 2, 2, w // 2, 2).amax((3, 5))
        scale = (x.square().mean(1, keepdim=True) + EPS).sqrt()
        x = x / scale * gain.view(-1, 1, 1)
        x = x * torch.sigmoid(x)
    return x.flatten(1)


@pytest.mark.parametrize("kernel", [3, 5])
def test_pooled_encoder_equals_the_reference(kernel):
    torch.manual_seed(0)
    encoder = ImageEncoder(depth=4, mults=(1, 2), kernel_size=kernel, pooled=True).double()
    parameters = randomised(encoder)
    pixels = torch.randint(0, 256, (3, 3, 16, 16)).double()

    def ours(*_):
        return encoder(pixels / 255)

    def reference(*flat):
        return reference_encoder(pixels, (4, 8), [flat[:3], flat[3:]])

    assert_same(ours, reference, *parameters)
    assert encoder.output_features((3, 16, 16)) == 8 * 4 * 4


@pytest.mark.usefixtures("passes")
def test_pooling_a_convolution():
    torch.manual_seed(0)
    layer = ImageEncoder(depth=4, mults=(1,), pooled=True).double().layers[0]
    x = torch.randn(2, 3, 6, 8, **DOUBLE, requires_grad=True)

    def reference(x, *_):
        large = F.conv2d(x, layer.weight, layer.bias, padding=2)
        return large.unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2))

    assert_same(lambda x, *_: convolution.halve(x, layer), reference, x, layer.weight, layer.bias)


def randomised(module) -> list[torch.Tensor]:
    """A module's parameters, with values that hide no mistake: biases and gains too."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return list(module.parameters())


# ------------------------------------------------------------------ decoder


def reference_decoder(state, belief, named, shape, *, kernel, nearest, blocks):
    """DreamerV3's decoder from its formulas; parameters by our names."""
    channels, height, width = shape
    x0 = torch.einsum(
        "ngi,gio->ngo", belief.unflatten(-1, (blocks, -1)), named["projection.weight"]
    )
    x0 = x0.flatten(1) + named["projection.bias"]
    x1 = state @ named["state_projection.model.0.weight"].T + named["state_projection.model.0.bias"]
    x1 = x1 / (x1.square().mean(-1, keepdim=True) + EPS).sqrt()
    x1 = x1 * named["state_projection.model.1.weight"]
    x1 = x1 * torch.sigmoid(x1)
    x1 = x1 @ named["state_projection.model.3.weight"].T + named["state_projection.model.3.bias"]
    x = (x0 + x1).view(-1, channels, height, width)
    gains = [named["projection_norm.weight"], named["layers.1.weight"], None]
    for layer, (gain, following) in zip((0, 3), pairwise(gains), strict=True):
        x = x / (x.square().mean(1, keepdim=True) + EPS).sqrt() * gain.view(-1, 1, 1)
        x = x * torch.sigmoid(x)
        weight, bias = named[f"layers.{layer}.weight"], named[f"layers.{layer}.bias"]
        if nearest:
            x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
            x = F.conv2d(x, weight.transpose(0, 1).flip(2, 3), bias, padding=kernel // 2)
        else:
            x = F.conv_transpose2d(x, weight, bias, 2, kernel // 2, output_padding=1)
        assert (following is None) == (layer == 3)
    return torch.sigmoid(x)


@pytest.mark.parametrize("nearest", [False, True])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_reference_decoder_equals_the_formulas(kernel, nearest):
    torch.manual_seed(0)
    decoder = ReferenceImageDecoder(
        6, 8, (3, 16, 16), units=5, depth=2, mults=(1, 4), kernel_size=kernel, num_blocks=4,
        nearest=nearest,
    ).double()  # fmt: skip
    parameters = randomised(decoder)
    names = [name for name, _ in decoder.named_parameters()]
    state = torch.randn(2, 3, 6, **DOUBLE, requires_grad=True)
    belief = torch.randn(2, 3, 8, **DOUBLE, requires_grad=True)

    def reference(state, belief, *parameters):
        named = dict(zip(names, parameters, strict=True))
        flat = state.flatten(0, 1), belief.flatten(0, 1)
        out = reference_decoder(*flat, named, (8, 4, 4), kernel=kernel, nearest=nearest, blocks=4)
        return out.unflatten(0, (2, 3))

    assert_same(
        lambda state, belief, *_: decoder(state, belief), reference, state, belief, *parameters
    )


def test_each_block_of_the_belief_makes_channels_of_its_own_and_the_state_all():
    torch.manual_seed(0)
    decoder = ReferenceImageDecoder(
        6, 8, (3, 16, 16), units=5, depth=2, mults=(1, 4), num_blocks=4, nearest=True
    )
    state, belief = torch.randn(1, 6, requires_grad=True), torch.randn(1, 8, requires_grad=True)
    for channel in range(8):
        small = decoder._project(state, belief).view(8, 4, 4)[channel].square().sum()
        of_state, of_belief = torch.autograd.grad(small, [state, belief])
        reached = of_belief.view(4, 2).abs().sum(1).gt(0).tolist()
        assert reached == [channel // 2 == block for block in range(4)]
        assert of_state.ne(0).all()


def test_new_layers_start_as_the_references():
    """Of variance 1 / fan-in, a normal cut off at two of its standard deviations."""
    torch.manual_seed(0)
    decoder = ReferenceImageDecoder(128, 512, units=64, depth=16, nearest=True)
    first, norm, _, second = decoder.state_projection.model
    for weight, fan_in in (
        (first.weight, 128),
        (second.weight, 128),
        (decoder.projection.weight, 512),
        (decoder.layers[0].weight, 64 * 25),
        (decoder.layers[-1].weight, 32 * 25),
    ):
        assert float(weight.std()) == pytest.approx(fan_in**-0.5, rel=0.05)
        assert weight.abs().max() <= 2 * 1.1368 * fan_in**-0.5
    assert first.bias.eq(0).all()
    assert second.bias.eq(0).all()
    assert norm.weight.eq(1).all()


# ------------------------------------------------------------------ all settings


def combinations():
    return list(product(DECODERS, RESAMPLINGS))


@pytest.mark.parametrize("latent", ["whole", *LATENTS])
@pytest.mark.parametrize(("decoder", "resample"), combinations())
def test_first_pictures_are_grey_and_every_parameter_learns(decoder, resample, latent):
    torch.manual_seed(0)
    config = replace(TINY, decoder=decoder, resample=resample)
    model = build_world_model(config, action_size=2, image_size=SIZE, latent=latent)
    out = model(make_sample().select(*model.in_keys))["next"]
    pictures = ["reconstructed_pixels"] if latent == "whole" else ["foreground_pixels"]
    pictures += ["background_pixels"] if latent in ("split", "shared") else []
    # TorchRL's colours are unbounded: those of so small a decoder stray further.
    tolerance = 0.15 if decoder == "reference" else 0.4
    for name in pictures:
        assert out[name].dtype is torch.float32
        assert out[name].shape == (3, 6, 3, SIZE, SIZE)
        assert float(out[name].mean()) == pytest.approx(0.5, abs=tolerance)
        if decoder == "reference":
            assert out[name].min() > 0
            assert out[name].max() < 1
    total = sum(out[name].square().sum() for name in pictures)
    if latent != "whole":
        logit = torch.logit(torch.tensor(FOREGROUND_SHARE))
        torch.testing.assert_close(out["mask_logits"].mean(), logit, atol=0.5, rtol=0)
        assert out["mask_logits"].min() < -2  # a logit, not a probability
        total = total + out["mask_logits"].square().sum()
    total.backward()
    for name, parameter in model.decoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_settings_choose_the_classes():
    for decoder, resample in combinations():
        config = replace(TINY, decoder=decoder, resample=resample)
        model = build_world_model(config, action_size=2, image_size=SIZE)
        for head in (model.decoder.foreground, model.decoder.background):
            assert isinstance(head, ReferenceImageDecoder) == (decoder == "reference")
            assert isinstance(head, ImageDecoder)
            assert head.nearest == (resample != "stride")
        for encoder in (model.encoder, model.background_encoder):
            strides = {layer.stride for layer in encoder.layers[::3]}
            assert strides == {(1, 1) if resample == "reference" else (2, 2)}
        # The background's sizes are its own.
        if decoder == "reference":
            first = model.decoder.background.state_projection.model[0]
            assert first.in_features == config.background_state_size
            assert first.out_features == 2 * config.background_hidden_size


@pytest.mark.parametrize("mask", [False, True])
def test_colours_are_squashed_in_float32_under_autocast(mask):
    torch.manual_seed(0)
    settings = {"units": 8, "depth": 4, "mults": (1, 2), "num_blocks": 4, "nearest": True}
    decoder = build_image_decoder("reference", (6, 8), (3, 16, 16), mask=mask, **settings)
    state, belief = torch.randn(2, 6), torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = decoder(state, belief)
    colours = out[0] if mask else out
    want = decoder(state, belief)
    want = want[0] if mask else want
    assert colours.dtype is torch.float32
    assert not torch.equal(colours, colours.bfloat16().float())  # more than bfloat16's digits
    torch.testing.assert_close(colours, want, rtol=0.05, atol=0.02)
    colours.sum().backward()
    assert all(p.grad.dtype is torch.float32 for p in decoder.layers.parameters())


# ------------------------------------------------------------------ the mask's own head


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("nearest", [False, True])
def test_two_heads_are_one_layer(decoder, nearest):
    """Colours and mask from one product, as from a joint layer of four channels."""
    torch.manual_seed(0)
    settings = {"units": 8, "depth": 4, "mults": (1, 2), "num_blocks": 2, "nearest": nearest}
    ours = build_image_decoder(decoder, (6, 8), (3, 16, 16), mask=True, **settings).double()
    randomised(ours)
    joint = build_image_decoder(decoder, (6, 8), (4, 16, 16), **settings).double()
    ours.load_state_dict(joint.state_dict())  # as an older checkpoint has it
    assert len(list(ours.parameters())) == len(list(joint.parameters())) + 2
    latent = torch.randn(2, 6, **DOUBLE), torch.randn(2, 8, **DOUBLE)
    colours, logits = ours(*latent)
    want = joint(*latent)
    torch.testing.assert_close(colours, want[:, :3])
    torch.testing.assert_close(logits.sigmoid() if decoder == "reference" else logits, want[:, 3:])


def test_weights_without_the_masks_head_load_into_the_pair_of_decoders():
    settings = {"decoder": "torchrl", "depth": 4, "mults": (1, 2), "num_blocks": 2}
    torch.manual_seed(0)
    old = DualImageDecoder((2, 4), (2, 4), (3, 16, 16), **settings)
    state = old.state_dict()
    for name, dim in (("weight", 1), ("bias", 0)):
        parts = state[f"foreground.layers.3.{name}"], state.pop(f"foreground.mask_head.{name}")
        state[f"foreground.layers.3.{name}"] = torch.cat(parts, dim)
    torch.manual_seed(1)
    new = DualImageDecoder((2, 4), (2, 4), (3, 16, 16), **settings)
    new.load_state_dict(state)
    assert "foreground.mask_head.weight" not in state  # the caller's dictionary is left alone
    for name, value in old.state_dict().items():
        assert torch.equal(new.state_dict()[name], value), name

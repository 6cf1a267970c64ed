"""Parts rewritten for speed: parity with TorchRL's in values and in gradients."""

from __future__ import annotations

import platform

import pytest
import torch
from helpers.models import SIZE, TINY
from torch.nn import functional as F
from torchrl.modules import (
    DreamerV3ImageDecoder,
    DreamerV3ImageEncoder,
    DreamerV3MLP,
    SymExpTwoHot,
)

from w2f_torchrl.kernels import dense, products
from w2f_torchrl.kernels.categoricals import TwoHot, draw_classes_first
from w2f_torchrl.kernels.convolution import subpixel_convolution
from w2f_torchrl.kernels.imagination import PriorHead
from w2f_torchrl.modules import build_world_model, rssm, sample_one_hot
from w2f_torchrl.modules.image_decoder import ImageDecoder
from w2f_torchrl.modules.networks import MLP, ImageEncoder
from w2f_torchrl.utils.memory import keep_freed_memory


def same(ours, theirs, *inputs):
    """Values and gradients of two modules with the same weights, float64."""
    ours.load_state_dict(theirs.state_dict())
    for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.nn.init.normal_(other.data, std=0.3)  # biases and norms are constants at the start
        parameter.data.copy_(other.data)
    results = []
    for module in (ours, theirs):
        out = module(*inputs)
        grads = torch.autograd.grad(
            (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum(),
            [*module.parameters(), *(i for i in inputs if i.requires_grad)],
        )
        results.append((out, *grads))
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        # TorchRL's norm is taken in float32 whatever the input.
        torch.testing.assert_close(
            got, want, rtol=1e-4, atol=1e-5 * float(want.detach().abs().max())
        )


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_encoder_equals_torchrls(kernel, kind):
    torch.manual_seed(0)
    kwargs = {"depth": 3, "mults": (1, 2), "kernel_size": kernel}
    pixels = torch.randint(0, 256, (2, 3, 3, 16, 16), dtype=torch.uint8)
    if kind == "float":
        pixels = (pixels.double() / 255).requires_grad_()
        ours, theirs = ImageEncoder(**kwargs).double(), DreamerV3ImageEncoder(**kwargs).double()
    else:
        ours, theirs = ImageEncoder(**kwargs), DreamerV3ImageEncoder(**kwargs)
    same(ours, theirs, pixels)


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("depth", [2, 20])  # narrow stages use subpixels, wide ones do not
def test_decoder_equals_torchrls(kernel, depth):
    torch.manual_seed(0)
    kwargs = {"depth": depth, "mults": (1, 2), "kernel_size": kernel, "num_blocks": 2}
    shape = (4, 16, 16)
    ours = ImageDecoder(12, shape, **kwargs).double()
    theirs = DreamerV3ImageDecoder(12, shape, **kwargs).double()
    state = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    belief = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    same(ours, theirs, belief, state)


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_subpixel_convolution_is_the_transposed_convolution(kernel):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    weight = torch.randn(3, 2, kernel, kernel, dtype=torch.float64)
    bias = torch.randn(2, dtype=torch.float64)
    want = F.conv_transpose2d(x, weight, bias, stride=2, padding=kernel // 2, output_padding=1)
    torch.testing.assert_close(subpixel_convolution(x, weight, bias), want)
    planes = subpixel_convolution(x, weight, bias, channels_last=False)
    assert planes.is_contiguous()
    torch.testing.assert_close(planes, want)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e4])
def test_inverse_rms(scale):
    torch.manual_seed(0)
    x = scale * torch.randn(5, 7, 33, dtype=torch.float64)
    want = (x.pow(2).mean(-1, keepdim=True) + 1e-4).rsqrt()
    torch.testing.assert_close(dense.inverse_rms(x, 1e-4), want, rtol=1e-12, atol=0)
    with torch.autocast("cpu", torch.bfloat16):  # the plain formula
        torch.testing.assert_close(dense.inverse_rms(x, 1e-4), want, rtol=1e-12, atol=0)


def test_a_constant_of_inference_mode_serves_in_training():
    with torch.inference_mode():
        dense.constant(0.123, torch.float64)
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    (x * dense.constant(0.123, torch.float64)).sum().backward()
    assert x.grad.tolist() == [0.123] * 3


@pytest.fixture(params=["mkl", "onednn"])
def multiplication(request, monkeypatch):
    """What multiplies large matrices; by default the processor decides."""
    onednn = products._find_onednn() if request.param == "onednn" else None
    if request.param == "onednn" and onednn is None:
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(products, "_onednn", onednn)
    return request.param


@pytest.mark.usefixtures("multiplication")
@pytest.mark.parametrize("rows", [2, 300])  # few are multiplied by MKL, many by oneDNN
@pytest.mark.parametrize("outputs", [None, 1, 255])
def test_mlp_equals_torchrls(rows, outputs):
    torch.manual_seed(0)
    ours, theirs = (kind(200, outputs, depth=2, num_cells=64) for kind in (MLP, DreamerV3MLP))
    x = torch.randn(3, rows, 200, requires_grad=True)
    same(ours, theirs, x)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(products._find_onednn() is None, reason="torch was built without oneDNN")
@pytest.mark.parametrize("kind", ["whole", "transposed", "slice", "slice transposed"])
def test_onednns_product_reads_any_layout(kind, monkeypatch):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(300, 200), torch.randn(150, 200), torch.randn(150)
    if kind == "transposed":
        x, weight = x.t().contiguous().t(), weight.t().contiguous().t()
    if kind.startswith("slice"):
        x, weight = torch.randn(300, 260)[:, 30:230], torch.randn(150, 300)[:, 50:250]
    if kind == "slice transposed":
        x, weight = torch.randn(260, 300)[30:230].t(), torch.randn(300, 150)[50:250].t()
    calls, onednn = [], products._find_onednn()

    def counted(*args):
        calls.append(args)
        return onednn(*args)

    monkeypatch.setattr(products, "_onednn", counted)
    got = products.product(x, weight, bias)
    assert len(calls) == 1
    torch.testing.assert_close(got, x @ weight.t() + bias, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("multiplication")
@pytest.mark.parametrize("width", [8, 64])
def test_block_product_is_a_product_for_each_block(width):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(300, 4 * width), torch.randn(4, width, 192), torch.randn(4, 192)
    blocks = zip(x.split(width, -1), weight, bias, strict=True)
    want = torch.cat([part @ matrix + shift for part, matrix, shift in blocks], -1)
    torch.testing.assert_close(products.block_product(x, weight, bias), want, rtol=1e-4, atol=1e-4)


def test_autocast_leaves_the_layers_to_torch():
    encoder = ImageEncoder(depth=4, mults=(1, 2))
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        out = encoder(pixels)
    out.float().sum().backward()
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out.float(), encoder(pixels), rtol=0.05, atol=0.05)


def test_scan_under_autocast_keeps_states_in_float32_and_agrees_with_the_loop(monkeypatch):
    world_model = build_world_model(TINY, action_size=2, image_size=SIZE, latent="whole")
    rollout = world_model.rollout
    first = rollout.rssm_posterior.module.obs_rnn_to_post_projector[0]
    embedding = torch.randn(3, 6, first.in_features - TINY.belief_size)
    reset = torch.zeros(3, 6, 1, dtype=torch.bool)
    results = []
    for scans in (True, False):
        monkeypatch.setattr(rssm, "can_scan", lambda *_, scans=scans: scans)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            out = rollout.unroll(embedding, torch.ones(3, 6, 2), reset)
        loss = out.belief.float().square().sum() + out.posterior_logits.float().square().mean()
        grads = torch.autograd.grad(loss, list(rollout.parameters()), allow_unused=True)
        results.append((out, torch.cat([g.flatten() for g in grads if g is not None])))
    (out, grads), (want, want_grads) = results
    assert out.belief.dtype is out.state.dtype is torch.float32
    torch.testing.assert_close(out.belief[:, 0], want.belief.float()[:, 0], rtol=0.05, atol=0.02)
    assert torch.cosine_similarity(grads, want_grads, dim=0) > 0.98


def test_two_hot_equals_torchrls():
    torch.manual_seed(0)
    ours, theirs = TwoHot(255).double(), SymExpTwoHot(255).double()
    logits = torch.randn(64, 255, dtype=torch.float64, requires_grad=True)
    targets = torch.randn(64, 2, dtype=torch.float64).mul(4).sinh()
    targets[:3, 0] = torch.tensor([0.0, 1e12, -1e12])  # a bin itself, and beyond the support
    targets[3, 0] = theirs.bins[-1]
    want = torch.stack([theirs.loss(logits, targets[:, i]) for i in range(2)], -1)
    got = ours.losses(logits, targets)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(ours.loss(logits, targets[:, :1]), want[:, 0])
    for a, b in zip(*(torch.autograd.grad(v.sum(), logits) for v in (got, want)), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(ours.decode(logits), theirs.decode(logits))
    assert torch.equal(TwoHot(255).decode(torch.zeros(2, 3, 255)), torch.zeros(2, 3))


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_compiled_graph_calls_the_large_products(monkeypatch, with_bias):
    """The models of the other tests are too small for it."""
    if products._onednn is None:
        monkeypatch.setattr(
            products, "_onednn", lambda x, weight, bias, *_: F.linear(x, weight, bias)
        )
    torch.manual_seed(0)
    x, weight = torch.randn(256, 512), torch.randn(64, 512)
    block_weight = torch.randn(8, 64, 192)
    bias, block_bias = (torch.randn(64), torch.randn(8, 192)) if with_bias else (None, None)
    called: list[str] = []

    def backend(graph, inputs):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    def both(x):
        return (
            products.product(x, weight, bias),
            products.block_product(x, block_weight, block_bias),
        )

    blocks = (x.view(256, 8, 1, 64) @ block_weight).squeeze(2)
    blocks = blocks if block_bias is None else blocks + block_bias
    want = F.linear(x, weight, bias), blocks.flatten(1)
    compiled = torch.compile(both, backend=backend, dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(both(x), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(compiled(x), want, rtol=1e-4, atol=1e-4)
        for name, arguments in (
            ("product", (x, weight, bias)),
            ("block_product", (x, block_weight, block_bias)),
        ):
            assert any(f"w2f_torchrl.{name}" in target for target in called)
            operator = getattr(torch.ops.w2f_torchrl, name).default
            torch.library.opcheck(
                operator, arguments, test_utils=("test_schema", "test_faketensor")
            )
    called.clear()  # the operators have no gradient, so they are not for a graph that needs one
    compiled(x.requires_grad_())[0].sum().backward()
    assert called
    assert not any("w2f_torchrl" in target for target in called)
    torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("classes", [2, 4, 16])
def test_draws_without_gradient_are_those_with(classes):
    torch.manual_seed(0)
    logits, uniform = 2 * torch.randn(50, 8, classes), torch.rand(50, 8)
    want = sample_one_hot(logits, 0.01, uniform)
    classes_first = logits.transpose(1, 2)
    for formula in (draw_classes_first, torch.compile(draw_classes_first, backend="eager")):
        assert torch.equal(formula(classes_first, 0.01, uniform), want)
        assert formula(classes_first[:1], 0.01, torch.full((1, 8), 1 - 1e-8)).sum() == 8


@torch.no_grad()
def test_a_head_with_classes_first_draws_what_torchrls_gives():
    torch.manual_seed(0)
    prior = build_world_model("size1m", action_size=2).prior
    belief, uniform = torch.randn(50, 512), torch.rand(50, prior.num_categoricals)
    logits = prior.rnn_to_prior_projector(belief).view(50, prior.num_categoricals, -1)
    want = sample_one_hot(logits, prior.unimix, uniform).flatten(-2)
    assert want.unflatten(-1, (-1, prior.num_classes)).argmax(-1).unique().numel() > 1
    assert torch.equal(PriorHead(prior).draw(belief, uniform), want)


def test_the_allocator_is_set_where_it_can_be():
    glibc = platform.system() == "Linux" and platform.libc_ver()[0] == "glibc"
    assert keep_freed_memory() is glibc
    assert torch.ones(2**22).sum() == 2**22  # and it still allocates

"""SAM3: the real package's forward pass with a tiny random model, and what is said without it."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
from helpers.extras import needs_sam3
from helpers.segmenters import random_pixels
from tensordict import TensorDict

from w2f_torchrl.segmenters import Sam3Segmenter, SegmenterUnavailableError, sam3_requirements
from w2f_torchrl.segmenters.sam3_requirements import find_weights, missing_requirement
from w2f_torchrl.segmenters.sam3_segmenter import mask_box
from w2f_torchrl.transforms import SAM3MaskTransform

PROMPTS = ["robot", "a leg"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    from w2f_torchrl.segmenters.sam3 import save_tiny_sam3

    return save_tiny_sam3(tmp_path_factory.mktemp("weights") / "tiny.pt")


def segmenter(tiny: Path, **settings) -> Sam3Segmenter:
    """A tiny SAM3 whose threshold lets about half of its detections through."""
    settings = {"resolution": 112, "score_threshold": 0.15, "device": "cpu"} | settings
    return Sam3Segmenter(PROMPTS, checkpoint=tiny, **settings)


@pytest.fixture(scope="module")
def built(tiny) -> Sam3Segmenter:
    return segmenter(tiny, confidence=True, batch_size=3)


# ------------------------------------------------------------------ the forward pass


@needs_sam3
def test_batched_equals_single(built):
    pixels = random_pixels(7, size=64)
    batched = built(pixels)
    assert batched.shape == (7, 1, 64, 64)
    assert 0.05 < (batched > 0.5).float().mean() < 0.95  # something to compare
    assert batched.flatten(1).std(0).max() > 1e-3  # and not the same for every frame
    single = torch.cat([built(frame.unsqueeze(0)) for frame in pixels])
    torch.testing.assert_close(batched, single, rtol=0, atol=2e-5)
    assert not batched.is_inference()  # autograd refuses those


@needs_sam3
def test_masks_are_those_of_the_packages_processor(tiny, built):
    """Its picture-by-picture, prompt-by-prompt path, and the union of what it finds."""
    from sam3.model.sam3_image_processor import Sam3Processor

    from w2f_torchrl.segmenters.sam3 import load_sam3, no_pinning

    model, _ = load_sam3(tiny, resolution=112, vocabulary=None, device=CPU)
    processor = Sam3Processor(model, resolution=112, device="cpu", confidence_threshold=0.15)
    pixels, unions = random_pixels(5, size=64), []
    with no_pinning(CPU):
        for frame in pixels:
            union = torch.zeros(1, 64, 64, dtype=torch.bool)
            for prompt in PROMPTS:
                state = processor.set_text_prompt(prompt, processor.set_image(frame))
                union |= state["masks"].any(0)
            unions.append(union)
    agreement = ((built(pixels) > 0.5) == torch.stack(unions)).float().mean()
    assert agreement > 0.98, agreement


@needs_sam3
def test_the_text_tower_is_dropped_and_scores_decide(tiny, built):
    assert built.model.backbone.language_backbone is None
    pixels = random_pixels(2, size=32)
    assert not segmenter(tiny, score_threshold=1.0)(pixels).any()
    everything = segmenter(tiny, score_threshold=0.0)(pixels)
    assert everything.dtype is torch.bool
    assert (everything >= (built(pixels) > 0.5)).all()
    assert everything.sum() > (built(pixels) > 0.5).sum()


@needs_sam3
def test_rotary_tables_follow_the_working_resolution(tiny):
    """The weights' tables hold for 112; at 168 they are those of a model built at 168."""
    from w2f_torchrl.segmenters.sam3 import TINY, build_sam3, load_sam3
    from w2f_torchrl.segmenters.sam3_requirements import find_vocabulary

    loaded, _ = load_sam3(tiny, resolution=168, vocabulary=None, device=CPU)
    fresh = build_sam3(TINY, resolution=168, vocabulary=find_vocabulary())
    stored = torch.load(tiny, weights_only=True)["model"]
    tables = {name: value for name, value in loaded.state_dict().items() if "freqs_cis" in name}
    assert {value.shape[0] for value in tables.values()} == {4 * 4, 12 * 12}
    for name, value in tables.items():
        assert value.is_complex()
        torch.testing.assert_close(value, fresh.state_dict()[name], rtol=0, atol=0)
    assert any(value.shape != stored[name].shape for name, value in tables.items())
    assert segmenter(tiny, resolution=168)(random_pixels(1, size=48)).shape == (1, 1, 48, 48)
    for resolution in (100, 0, -56):
        with pytest.raises(ValueError, match=f"resolution={resolution} must .* multiple of 56"):
            segmenter(tiny, resolution=resolution)


@needs_sam3
def test_boxes_and_examples_change_what_is_found(tiny, built):
    pixels = random_pixels(3, size=64)
    mask = torch.zeros(2, 1, 64, 64, dtype=torch.bool)
    mask[:, :, 8:24, 16:48] = True
    settings = {"confidence": True, "score_threshold": 0.0}
    plain = segmenter(tiny, **settings)(pixels)
    boxed = segmenter(tiny, boxes=[(0.5, 0.25, 0.5, 0.25)], **settings)(pixels)
    shown = segmenter(tiny, examples=(random_pixels(2, size=64, seed=5), mask), **settings)
    assert (boxed - plain).abs().max() > 1e-4
    assert (shown(pixels) - plain).abs().max() > 1e-4
    assert shown._text["language_mask"].shape[0] == len(PROMPTS)
    single = torch.cat([shown(frame.unsqueeze(0)) for frame in pixels])
    torch.testing.assert_close(shown(pixels), single, rtol=0, atol=2e-5)
    assert mask_box(mask[0]).tolist() == [0.5, 0.25, 0.5, 0.25]


@needs_sam3
def test_memory_bounds_the_batch(tiny, built, monkeypatch, caplog):
    pixels, sizes = random_pixels(6, size=32), []
    greedy = segmenter(tiny, batch_size=4)
    whole = greedy(pixels)
    forward = greedy._mask_logits

    def limited(frames):
        sizes.append(len(frames))
        if len(frames) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return forward(frames)

    monkeypatch.setattr(greedy, "_mask_logits", limited)
    assert torch.equal(greedy(pixels), whole)
    assert sizes == [4, 2, 1, 1, 1, 1, 1, 1]
    assert "batch_size=1" in caplog.text


@needs_sam3
def test_the_published_model_is_the_packages_own():
    """Same parameters, buffers and shapes as its builder makes, so that its weights fit."""
    from unittest import mock

    from sam3 import model_builder
    from sam3.model.decoder import TransformerDecoder
    from sam3.model.position_encoding import PositionEmbeddingSine

    from w2f_torchrl.segmenters.sam3 import Sam3Architecture, build_sam3
    from w2f_torchrl.segmenters.sam3_requirements import find_vocabulary

    linspace, coords = torch.linspace, TransformerDecoder._get_coords

    def on_cpu(*args, **kwargs):
        return linspace(*args, **kwargs | {"device": "cpu"})

    def coords_on_cpu(height, width, device):
        return coords(height, width, "cpu")

    def no_cuda(precompute_resolution=None):
        return PositionEmbeddingSine(num_pos_feats=256)

    with (
        torch.device("meta"),
        mock.patch("torch.linspace", on_cpu),
        mock.patch.object(model_builder, "_create_position_encoding", no_cuda),
        mock.patch.object(
            TransformerDecoder,
            "_get_coords",
            staticmethod(lambda h, w, device: coords(h, w, "cpu")),
        ),
    ):
        theirs = model_builder.build_sam3_image_model(
            bpe_path=str(find_vocabulary()), device="cpu", load_from_HF=False
        )
        ours = build_sam3(Sam3Architecture(), resolution=1008, vocabulary=find_vocabulary())
    shapes = [
        {name: value.shape for name, value in model.state_dict().items()}
        for model in (theirs, ours)
    ]
    assert shapes[0] == shapes[1]
    assert sum(p.numel() for p in ours.parameters()) > 800e6


@needs_sam3
def test_importing_the_package_leaves_tf32_alone(tiny):
    segmenter(tiny)
    assert not torch.backends.cuda.matmul.allow_tf32


@needs_sam3
def test_the_transform_is_the_short_form(tiny, built):
    transform = SAM3MaskTransform(
        PROMPTS,
        checkpoint=tiny,
        resolution=112,
        score_threshold=0.15,
        device="cpu",
        confidence=True,
        in_keys=[("next", "pixels")],
    )
    pixels = random_pixels(2, 3, size=64)
    out = transform(TensorDict({"next": {"pixels": pixels}}, [2, 3]))
    masks = out["next", "foreground_mask"]
    torch.testing.assert_close(masks.flatten(0, 1), built(pixels.flatten(0, 1)), rtol=0, atol=2e-5)


@needs_sam3
@pytest.mark.slow
def test_a_compiled_trunk_gives_the_same_masks(tiny, built):
    compiled = segmenter(tiny, confidence=True, compile=True)
    pixels = random_pixels(2, size=64)
    torch.testing.assert_close(compiled(pixels), built(pixels), rtol=0, atol=1e-3)


@pytest.mark.weights
@needs_sam3
def test_published_weights_find_a_robot_like_shape():
    import os

    real = Sam3Segmenter(
        ["black disk"], checkpoint=os.environ["W2F_SAM3_CHECKPOINT"], resolution=336
    )
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    disk = ((rows - 32) ** 2 + (columns - 32) ** 2 < 15**2).view(1, 1, 64, 64)
    found = real(torch.where(disk, 20, 230).expand(-1, 3, -1, -1).to(torch.uint8))
    assert (found == disk).float().mean() > 0.95


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"prompts": "robot"}, "prompts='robot' must be a list"),
        ({"prompts": []}, r"prompts=\[\]"),
        ({"prompts": ["robot", " "]}, "must not be empty"),
        ({"score_threshold": 1.5}, r"score_threshold=1.5 must be in \[0, 1\]"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"boxes": [(0.5, 0.5, 2.0, 0.1)]}, r"boxes=.*in \[0, 1\]"),
        ({"boxes": [(0.5, 0.5)]}, r"boxes=.*in \[0, 1\]"),
    ],
)
def test_settings_are_named_before_anything_is_loaded(settings, match):
    settings = {"prompts": ["robot"], "checkpoint": "nowhere.pt"} | settings
    with pytest.raises(ValueError, match=match):
        Sam3Segmenter(**settings)


def hide(monkeypatch, *names: str) -> None:
    """Make packages look as if they were not installed."""
    find = importlib.util.find_spec

    def find_spec(name, package=None):
        return None if name in names else find(name, package)

    monkeypatch.setattr(sam3_requirements.importlib.util, "find_spec", find_spec)


def pretend_installed(monkeypatch) -> None:
    """Let the checks that come after the package's own be tested without the package."""
    monkeypatch.setattr(sam3_requirements, "require_package", lambda: None)


@pytest.mark.parametrize("package", ["sam3", "torchvision", "psutil"])
def test_a_missing_package_is_an_error_with_the_command(monkeypatch, tmp_path, package):
    hide(monkeypatch, package)
    with pytest.raises(SegmenterUnavailableError, match="make extras") as caught:
        sam3_requirements.require_package()
    message = missing_requirement(tmp_path, None)
    assert message is not None
    for text in (message, str(caught.value)):
        assert 'pip install "w2f_torchrl[sam3]"' in text


def test_a_missing_vocabulary_is_an_error_with_the_command(monkeypatch, tmp_path):
    pretend_installed(monkeypatch)
    hide(monkeypatch, "open_clip")
    weights = tmp_path / "sam3.pt"
    weights.touch()
    assert "pip install open_clip_torch" in missing_requirement(weights, None)
    assert "vocabulary=nowhere is not a file" in missing_requirement(weights, "nowhere")
    vocabulary = tmp_path / "vocabulary.gz"
    vocabulary.touch()
    assert missing_requirement(weights, vocabulary) is None


def test_missing_weights_are_an_error_with_the_commands(monkeypatch, tmp_path):
    pretend_installed(monkeypatch)
    vocabulary = tmp_path / "vocabulary.gz"
    vocabulary.touch()
    message = missing_requirement("nowhere.pt", vocabulary)
    for command in ("checkpoint=nowhere.pt", "hf auth login", "hf download facebook/sam3 sam3.pt"):
        assert command in message
    with pytest.raises(SegmenterUnavailableError, match="hf download"):
        find_weights("nowhere.pt")
    monkeypatch.setattr(sam3_requirements, "_cached_weights", lambda: None)
    assert "hf auth login" in missing_requirement(None, vocabulary)


def test_a_refused_download_is_an_error_with_the_commands(monkeypatch):
    class HfHubHTTPError(OSError):
        pass

    def download(repository, filename):
        assert (repository, filename) == ("facebook/sam3", "sam3.pt")
        raise HfHubHTTPError("401 Client Error: gated repo")

    hub = types.SimpleNamespace(
        hf_hub_download=download, errors=types.SimpleNamespace(HfHubHTTPError=HfHubHTTPError)
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setattr(sam3_requirements, "_cached_weights", lambda: None)
    with pytest.raises(SegmenterUnavailableError, match=r"401.*gated[\s\S]*hf auth login"):
        find_weights(None)


@needs_sam3
def test_other_weights_are_refused_with_a_reason(tiny, tmp_path):
    document = torch.load(tiny, weights_only=True)
    name = "transformer.decoder.query_embed.weight"
    document["model"][name] = document["model"][name][:5]
    torch.save(document, tmp_path / "shape.pt")
    with pytest.raises(
        SegmenterUnavailableError, match=f"1 have another shape, for example {name}"
    ):
        segmenter(tmp_path / "shape.pt")
    del document["model"][name]
    torch.save(document, tmp_path / "short.pt")
    with pytest.raises(SegmenterUnavailableError, match="1 are missing"):
        segmenter(tmp_path / "short.pt")
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(SegmenterUnavailableError, match="holds no weights"):
        segmenter(tmp_path / "text.pt")


@needs_sam3
def test_an_empty_example_is_refused(tiny):
    empty = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    with pytest.raises(ValueError, match="example's mask is empty"):
        segmenter(tiny, examples=(random_pixels(1, size=64), empty))

"""Masks compared, the median, the student and how it learns."""

from __future__ import annotations

import pytest
import torch
from helpers.segmenters import bright, random_pixels
from torch.utils.flop_counter import FlopCounterMode

from w2f_torchrl.segmenters import (
    MedianSegmenter,
    Segmenter,
    SegmenterUnavailableError,
    StudentNetwork,
    StudentSegmenter,
    boundary_error,
    choose_diverse,
    mask_iou,
    teaching,
    train_student,
)
from w2f_torchrl.segmenters.teaching import mask_loss, paste_foreground, vary


def square(top: int, left: int, side: int, size: int = 16) -> torch.Tensor:
    mask = torch.zeros(1, 1, size, size, dtype=torch.bool)
    mask[..., top : top + side, left : left + side] = True
    return mask


# ------------------------------------------------------------------ comparisons


def test_the_boundary_error_is_the_mean_distance_of_the_outlines():
    assert boundary_error(square(4, 4, 5), square(4, 4, 5)).item() == 0
    # Concentric squares of sides 5 and 9: outlines two pixels apart everywhere.
    assert boundary_error(square(4, 4, 5), square(2, 2, 9)).item() == 2
    # One-pixel masks: the chessboard distance.
    assert boundary_error(square(2, 3, 1), square(7, 5, 1)).item() == 5
    empty = torch.zeros_like(square(0, 0, 1))
    assert boundary_error(empty, empty).item() == 0
    assert boundary_error(empty, square(2, 2, 3)).item() == 16
    both = boundary_error(
        torch.cat([square(4, 4, 5), empty]), torch.cat([square(2, 2, 9), square(2, 2, 3)])
    )
    assert both.tolist() == [2, 16]


def test_the_boundary_error_by_brute_force():
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(2, 3, 1, 12, 12, generator=generator) < 0.3
    for a, b, error in zip(*masks, boundary_error(*masks), strict=True):
        outlines = []
        for mask in (a[0], b[0]):
            padded = torch.nn.functional.pad(mask, (1, 1, 1, 1))
            shifted = [padded[i : i + 12, j : j + 12] for i in range(3) for j in range(3)]
            outlines.append((mask & ~torch.stack(shifted).all(0)).nonzero().float())
        distance = (outlines[0][:, None] - outlines[1][None]).abs().amax(-1)
        expected = torch.cat([distance.amin(0), distance.amin(1)]).mean()
        torch.testing.assert_close(error, expected)


def test_boundary_errors_of_other_things_are_refused():
    with pytest.raises(TypeError, match="bool"):
        boundary_error(square(1, 1, 2).float(), square(1, 1, 2))
    with pytest.raises(ValueError, match="one shape"):
        boundary_error(square(1, 1, 2), square(1, 1, 2, size=8))


# ------------------------------------------------------------------ the median


def test_the_median_finds_what_moves_before_a_static_background():
    background = random_pixels(1, size=16)
    pixels = background.repeat(12, 1, 1, 1)
    truth = torch.cat([square(index, 15 - index, 1) for index in range(12)])
    pixels = torch.where(truth, pixels + 128, pixels)  # uint8: half the range away
    segmenter = MedianSegmenter()
    with pytest.raises(RuntimeError, match=r"fit\(pixels\) first"):
        segmenter(pixels)
    assert torch.equal(segmenter.fit(pixels)(pixels), truth)
    assert torch.equal(MedianSegmenter(background=background[0])(pixels), truth)
    assert not MedianSegmenter(200).fit(pixels)(pixels).any()
    with pytest.raises(ValueError, match="same size"):
        segmenter(random_pixels(1, size=8))
    with pytest.raises(ValueError, match="threshold=255"):
        MedianSegmenter(255)
    assert isinstance(segmenter, Segmenter)


# ------------------------------------------------------------------ the student


@pytest.mark.parametrize(("height", "width"), [(64, 64), (84, 84), (17, 30)])
def test_a_student_takes_any_size(height, width):
    pixels = torch.zeros(3, 3, height, width, dtype=torch.uint8)
    assert StudentSegmenter()(pixels).shape == (3, 1, height, width)
    assert StudentSegmenter()(pixels[:0]).shape == (0, 1, height, width)


def test_pasted_backgrounds_get_other_colours_and_keep_their_shapes():
    generator = torch.Generator().manual_seed(0)
    backgrounds = random_pixels(3)
    drawn = teaching._draw_backgrounds(backgrounds, 20, generator, recolor=False)
    assert all(any(torch.equal(one, b) for b in backgrounds) for one in drawn)
    generator = torch.Generator().manual_seed(0)
    other = teaching._draw_backgrounds(backgrounds, 20, generator, recolor=True)
    assert other.dtype is torch.uint8
    assert ((other.float() - drawn.float()).abs().flatten(1).mean(1) > 10).all()
    # One matrix for a picture: pixels of one colour stay pixels of one colour.
    flat = torch.full((1, 3, 8, 8), 90, dtype=torch.uint8)
    one = teaching._draw_backgrounds(flat, 5, generator, recolor=True)
    assert (one == one[:, :, :1, :1]).all()


def test_a_students_frame_costs_less_than_a_tenth_of_a_gflop():
    with FlopCounterMode(display=False) as counter:
        StudentNetwork()(torch.zeros(1, 3, 64, 64))
    assert counter.get_total_flops() < 0.1e9


def test_confidences_and_masks_agree_and_don_t_depend_on_the_batch():
    torch.manual_seed(0)
    student = StudentSegmenter(confidence=True, batch_size=5)
    pixels = random_pixels(13, size=16)
    confidences = student(pixels)
    assert confidences.dtype is torch.float32
    assert 0 <= confidences.min() < confidences.max() <= 1
    student.confidence = False
    assert torch.equal(student(pixels), confidences > 0.5)
    single = torch.cat([student.confidences(frame.unsqueeze(0)) for frame in pixels])
    torch.testing.assert_close(confidences, single, rtol=0, atol=2e-3)
    with pytest.raises(ValueError, match=r"threshold=1\.0"):
        StudentSegmenter(threshold=1.0)
    with pytest.raises(TypeError, match="uint8"):
        student(pixels.float())


def test_what_computes_is_the_trained_network_with_its_normalisation_folded_in():
    torch.manual_seed(0)
    student = StudentSegmenter(confidence=True)
    student.dtype = torch.float32
    pixels = random_pixels(8, size=16)
    network = student.network.train()
    network(pixels / 255 - 0.5)  # statistics that are not the initial ones
    network.eval()
    expected = network(pixels / 255 - 0.5).sigmoid()
    torch.testing.assert_close(student(pixels), expected, rtol=0, atol=1e-5)


def test_a_student_learns_what_it_is_shown_reproducibly(tmp_path):
    pixels = random_pixels(64, size=16)
    students = [train_student(pixels, bright(pixels), steps=60, seed=3) for _ in range(2)]
    unseen = random_pixels(64, size=16, seed=9)
    assert torch.equal(*(student(unseen) for student in students))
    learned = mask_iou(students[0](unseen), bright(unseen)).mean()
    untrained = train_student(pixels, bright(pixels), steps=1, seed=3)
    assert learned > mask_iou(untrained(unseen), bright(unseen)).mean() + 0.1
    assert learned > 0.75
    # In place, further; the fast copy follows.
    further = train_student(pixels, ~bright(pixels), steps=60, student=students[1])
    assert further is students[1]
    assert mask_iou(further(unseen), bright(unseen)).mean() < learned - 0.2
    # Saved and loaded.
    loaded = StudentSegmenter.load(students[0].save(tmp_path / "a" / "student.pt"))
    assert torch.equal(loaded(unseen), students[0](unseen))
    narrow = StudentSegmenter(StudentNetwork((8, 8, 8)), threshold=0.3)
    loaded = StudentSegmenter.load(narrow.save(tmp_path / "narrow.pt"), confidence=True)
    assert loaded.network.widths == (8, 8, 8)
    assert loaded.threshold == 0.3
    assert loaded(unseen).dtype is torch.float32


def test_files_that_hold_no_student_are_refused(tmp_path):
    with pytest.raises(SegmenterUnavailableError, match=r"file .* does not exist"):
        StudentSegmenter.load(tmp_path / "nowhere.pt")
    (tmp_path / "text.pt").write_text("nothing")
    torch.save([1], tmp_path / "other.pt")
    for name in ("text.pt", "other.pt"):
        with pytest.raises(SegmenterUnavailableError, match=f"{name} does not hold a student"):
            StudentSegmenter.load(tmp_path / name)


def test_pasting_keeps_the_foreground_and_replaces_the_rest():
    frames, backgrounds = random_pixels(4, size=16), random_pixels(4, size=16, seed=1)
    masks = square(5, 6, 4).repeat(4, 1, 1, 1).float()
    generator = torch.Generator().manual_seed(0)
    pasted, kept = paste_foreground(frames, masks, backgrounds, generator, moves=0.0)
    assert torch.equal(kept, masks)
    assert torch.equal(pasted, torch.where(masks.bool(), frames, backgrounds))
    pasted, moved = paste_foreground(frames, masks, backgrounds, generator, moves=0.2)
    assert not torch.equal(moved, masks)
    outside = ~moved.bool().expand_as(pasted)
    assert torch.equal(pasted[outside], backgrounds[outside])
    assert set(moved.unique().tolist()) == {0.0, 1.0}


def test_variation_mirrors_pictures_with_their_masks():
    frames = torch.full((32, 3, 8, 8), 100, dtype=torch.uint8)
    masks = torch.zeros(32, 1, 8, 8)
    masks[..., :3] = 1
    frames[..., :3] = 200
    varied, moved = vary(frames, masks, torch.Generator().manual_seed(0))
    mirrored = moved[:, 0, 0, -1] == 1
    assert 4 < mirrored.sum() < 28
    for frame, mask in zip(varied.float(), moved.bool(), strict=True):
        mean = [frame.mean(0)[where[0]].mean() for where in (mask, ~mask)]
        assert mean[0] > mean[1]
    assert varied[0].float().mean() != varied[1].float().mean()


def test_the_loss_is_cross_entropy_and_one_minus_dice():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1, 4, 4, generator=generator)
    target = torch.rand(2, 1, 4, 4, generator=generator)
    chance = 1 / (1 + torch.exp(-logits))
    entropy = -(target * chance.log() + (1 - target) * (1 - chance).log()).mean()
    dice = [
        (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
        for p, t in zip(chance, target, strict=True)
    ]
    expected = entropy + 1 - sum(dice) / 2
    torch.testing.assert_close(mask_loss(logits, target), expected)
    sure = (square(3, 3, 2).float() * 2 - 1) * 20
    assert mask_loss(sure, square(3, 3, 2).float()) < 1e-3


def test_diverse_frames_cover_the_clusters():
    """Three kinds of frames, 98 of one: the first three chosen are one of each."""
    kinds = torch.tensor([0] * 98 + [1, 2])[torch.randperm(100)]
    pixels = (kinds * 100).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 16, 16).clone()
    chosen = choose_diverse(pixels, 3)
    assert set(kinds[chosen].tolist()) == {0, 1, 2}
    everything = choose_diverse(pixels, 200)
    assert sorted(everything.tolist()) == list(range(100))
    with pytest.raises(ValueError, match="count=0"):
        choose_diverse(pixels, 0)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"masks": torch.zeros(2, 1, 16, 16, dtype=torch.bool)}, ValueError, r"\(4, 1, 16, 16\)"),
        ({"masks": torch.zeros(4, 1, 16, 16, dtype=torch.uint8)}, TypeError, "bool or confidences"),
        ({"pixels": torch.zeros(4, 3, 16, 16)}, TypeError, "uint8"),
        ({"backgrounds": random_pixels(2, size=8)}, ValueError, "frames' size"),
        ({"paste": 1.5}, ValueError, r"paste=1.5 must be in \[0, 1.0\]"),
        ({"moves": 0.6}, ValueError, r"moves=0.6 must be in \[0, 0.5\]"),
    ],
)
def test_bad_training_sets_are_named(change, error, match):
    pixels = random_pixels(4, size=16)
    settings = {"pixels": pixels, "masks": bright(pixels), "steps": 1} | change
    with pytest.raises(error, match=match):
        train_student(**settings)
    empty = {"pixels": pixels[:0], "masks": bright(pixels)[:0]}
    with pytest.raises(ValueError, match="at least one labelled frame"):
        train_student(**empty, steps=1)

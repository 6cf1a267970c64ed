"""Training of a student: copy-paste augmentation, the loss, and the choice of frames."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import (
    adaptive_avg_pool2d,
    affine_grid,
    binary_cross_entropy_with_logits,
    grid_sample,
)

from w2f_torchrl.segmenters.base import check_masks, check_pixels
from w2f_torchrl.segmenters.recoloring import draw_recoloring, recolored
from w2f_torchrl.segmenters.student import WIDTHS, StudentNetwork, StudentSegmenter, to_images
from w2f_torchrl.utils.checks import check_number


def train_student(
    pixels: Tensor,
    masks: Tensor,
    *,
    backgrounds: Tensor | None = None,
    steps: int = 700,
    batch_size: int = 64,
    learning_rate: float = 1e-2,
    paste: float = 0.5,
    moves: float = 0.0,
    recolor: bool = False,
    widths: Sequence[int] = WIDTHS,
    seed: int = 0,
    device: torch.device | str = "cpu",
    student: StudentSegmenter | None = None,
) -> StudentSegmenter:
    """Train a student on frames labelled by a teacher, by a simulator, or by hand.

    Args:
        pixels: Frames, uint8 ``[N, 3, H, W]``.
        masks: Their foreground, bool or confidences ``[N, 1, H, W]``.
        backgrounds: Images without the foreground, uint8 ``[K, 3, H, W]``, onto which foregrounds
            are pasted. If they resemble the later backgrounds, few labels are enough.
        steps: Gradient steps.
        batch_size: Frames per step.
        learning_rate: Maximum learning rate of a one-cycle schedule.
        paste: Share of a batch that is pasted onto ``backgrounds``, in [0, 1].
        moves: Maximum shift and scaling of a pasted foreground, as a share of the image, in
            [0, 0.5]; 0 keeps it in place.
        recolor: Whether pasted backgrounds get other colours, so that the student meets more than
            they show. Better for some tasks and worse for others (docs/evidence.md).
        widths: Channels of a new student.
        seed: Seed of the weights, the batches and the augmentation.
        device: Where to train.
        student: One to train further, in place; by default a new one.

    Returns:
        The student, on ``device``.

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If shapes do not match, no frames are given, or a share is out of range.
    """
    _check_training_set(pixels, masks, backgrounds)
    for name, value, most in (("paste", paste, 1.0), ("moves", moves, 0.5)):
        if not 0 <= value <= most:
            raise ValueError(f"{name}={value} must be in [0, {most}].")
    for name, count in (("steps", steps), ("batch_size", batch_size)):
        check_number(name, count, integer=True, minimum=1)
    check_number("learning_rate", learning_rate, above=0)
    generator = torch.Generator().manual_seed(seed)
    if student is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            student = StudentSegmenter(StudentNetwork(widths), device=device)
    network = student.network.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1)
    for _ in range(steps):
        frames, target = _draw(pixels, masks, batch_size, generator, torch.device(device))
        if backgrounds is not None and paste:
            count = round(paste * batch_size)
            behind = _draw_backgrounds(backgrounds, count, generator, recolor=recolor)
            frames, target = _paste_some(frames, target, behind, generator, moves)
        frames, target = vary(frames, target, generator)
        with torch.autocast(student.device.type, torch.bfloat16, student.dtype is torch.bfloat16):
            logits = network(to_images(frames))
        loss = mask_loss(logits.float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()
    student.weights_changed()
    return student


def _draw(
    pixels: Tensor, masks: Tensor, count: int, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    rows = torch.randint(len(pixels), (count,), generator=generator)
    return pixels[rows].to(device), masks[rows].to(device).float()


def _draw_backgrounds(
    backgrounds: Tensor, count: int, generator: torch.Generator, *, recolor: bool
) -> Tensor:
    drawn = backgrounds[torch.randint(len(backgrounds), (count,), generator=generator)]
    if not recolor:
        return drawn
    matrices = torch.stack([draw_recoloring(generator) for _ in range(count)])
    return recolored(drawn.unsqueeze(1), matrices).squeeze(1)


def _paste_some(
    frames: Tensor, target: Tensor, behind: Tensor, generator: torch.Generator, moves: float
) -> tuple[Tensor, Tensor]:
    """Paste the first foregrounds of a batch onto as many backgrounds."""
    count = len(behind)
    new_frames, new_target = paste_foreground(
        frames[:count], target[:count], behind.to(frames.device), generator, moves
    )
    return torch.cat([new_frames, frames[count:]]), torch.cat([new_target, target[count:]])


def mask_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy over pixels plus the soft Dice loss of each image.

    The foreground covers a few per cent of the pixels: the cross-entropy alone would tolerate
    missing thin parts, and the Dice loss alone noisy edges.
    """
    entropy = binary_cross_entropy_with_logits(logits, target)
    chance = logits.sigmoid()
    overlap = (chance * target).sum((1, 2, 3))
    area = (chance + target).sum((1, 2, 3))
    return entropy + (1 - (2 * overlap + 1) / (area + 1)).mean()


def paste_foreground(
    frames: Tensor, masks: Tensor, backgrounds: Tensor, generator: torch.Generator, moves: float
) -> tuple[Tensor, Tensor]:
    """Paste foregrounds onto other backgrounds.

    Args:
        frames: uint8 ``[N, 3, H, W]``.
        masks: float ``[N, 1, H, W]`` in [0, 1].
        backgrounds: uint8 ``[N, 3, H, W]``.
        generator: Random numbers (CPU).
        moves: Maximum shift and scaling, as a share of the image.

    Returns:
        uint8 frames and float masks.
    """
    cut = torch.cat([frames.float(), masks], 1)
    if moves:
        shift = (torch.rand(len(frames), 2, generator=generator) * 2 - 1) * 2 * moves
        scale = 1 + (torch.rand(len(frames), generator=generator) * 2 - 1) * moves
        maps = torch.zeros(len(frames), 2, 3)
        maps[:, 0, 0], maps[:, 1, 1], maps[:, :, 2] = scale, scale, shift
        grid = affine_grid(maps.to(frames.device), list(cut.shape), align_corners=False)
        cut = grid_sample(cut, grid, mode="nearest", align_corners=False)
    colours, over = cut[:, :3], cut[:, 3:]
    return (colours * over + backgrounds.float() * (1 - over)).to(torch.uint8), over


def vary(frames: Tensor, masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mirror half of the images, and slightly change contrast, brightness and each colour.

    Args:
        frames: uint8 ``[N, 3, H, W]``.
        masks: float ``[N, 1, H, W]``.
        generator: Random numbers (CPU).

    Returns:
        uint8 frames and their masks.
    """
    chosen = torch.rand(len(frames), generator=generator) < 0.5
    mirrored = chosen.view(-1, 1, 1, 1).to(frames.device)
    frames = torch.where(mirrored, frames.flip(-1), frames)
    masks = torch.where(mirrored, masks.flip(-1), masks)
    contrast = 0.8 + 0.4 * torch.rand(len(frames), 1, 1, 1, generator=generator)
    colour = 30 * (torch.rand(len(frames), 3, 1, 1, generator=generator) * 2 - 1)
    changed = (frames.float() - 128) * contrast.to(frames.device) + 128 + colour.to(frames.device)
    return changed.clamp(0, 255).to(torch.uint8), masks


def choose_diverse(pixels: Tensor, count: int) -> Tensor:
    """Choose diverse frames: each next one is the farthest from all chosen ones (k-centre).

    Args:
        pixels: uint8 ``[N, 3, H, W]``. Frames are compared at 8 x 8.
        count: Number of frames.

    Returns:
        Indices, int64 ``[min(count, N)]``, the first frame first.

    Raises:
        ValueError: If the count is not positive, or no frames are given.
    """
    check_pixels(pixels)
    check_number("count", count, integer=True)
    if count < 1 or not len(pixels):
        raise ValueError(f"cannot choose count={count} of {len(pixels)} frames: both must be >= 1.")
    features = adaptive_avg_pool2d(pixels.float(), 8).flatten(1)  # [N, 192]
    squares = features.square().sum(1)
    nearest = torch.full((len(pixels),), torch.inf, device=pixels.device)
    chosen = [0]
    while len(chosen) < min(count, len(pixels)):
        last = chosen[-1]
        distance = squares + squares[last] - 2 * (features @ features[last])
        nearest = torch.minimum(nearest, distance)
        nearest[chosen] = -torch.inf  # never twice, even if frames are equal
        chosen.append(int(nearest.argmax()))
    return torch.tensor(chosen)


def _check_training_set(pixels: Tensor, masks: Tensor, backgrounds: Tensor | None) -> None:
    check_pixels(pixels)
    check_masks(masks, pixels)
    if not len(pixels):
        raise ValueError("a student needs at least one labelled frame, got none.")
    if backgrounds is None:
        return
    check_pixels(backgrounds)
    if not len(backgrounds) or backgrounds.shape[2:] != pixels.shape[2:]:
        raise ValueError(
            f"backgrounds must be images of the frames' size {tuple(pixels.shape[2:])}, at least "
            f"one, got {tuple(backgrounds.shape)}."
        )

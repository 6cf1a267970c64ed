"""A small network that segments at the observation's resolution."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, pixel_shuffle
from torch.nn.utils.fusion import fuse_conv_bn_eval

from w2f_torchrl.segmenters.base import check_pixels
from w2f_torchrl.segmenters.sam3_requirements import SegmenterUnavailableError
from w2f_torchrl.utils.checks import check_number
from w2f_torchrl.utils.stopping import check_stop

#: Channels at a half, a quarter and an eighth of the resolution.
WIDTHS = (16, 32, 32)
FORMAT = "w2f_torchrl.student"


def _block(inputs: int, outputs: int, *, stride: int = 1, side: int = 3) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, side, stride, (side - 1) // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class StudentNetwork(nn.Module):
    """A U-Net that never works at full resolution.

    A cell is 2 x 2 pixels. The first convolution covers 3 x 3 cells, 6 x 6 pixels, at a stride of
    one cell, and the last one outputs four mask logits per cell: this keeps the detail at a quarter
    of the cost.

    Args:
        widths: Channels at a half, a quarter and an eighth of the resolution.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        fine, middle, coarse = self.widths = tuple(widths)
        self.down_fine = _block(3, fine, stride=2, side=6)
        self.down_middle = nn.Sequential(_block(fine, middle, stride=2), _block(middle, middle))
        self.down_coarse = nn.Sequential(
            _block(middle, coarse, stride=2), _block(coarse, coarse), _block(coarse, coarse)
        )
        self.to_middle = nn.Conv2d(coarse, middle, 1)
        self.up_middle = _block(middle, middle)
        self.to_fine = nn.Conv2d(middle, fine, 1)
        self.up_fine = _block(fine, fine)
        self.head = nn.Conv2d(fine, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Map images, float ``[N, 3, H, W]`` around zero, to mask logits ``[N, 1, H, W]``."""
        height, width = images.shape[-2:]
        extra = (-width % 8, -height % 8)
        if any(extra):
            images = pad(images, (0, extra[0], 0, extra[1]), mode="replicate")
        fine = self.down_fine(images)  # [N, ., H / 2, W / 2]
        middle = self.down_middle(fine)
        coarse = self.down_coarse(middle)  # [N, ., H / 8, W / 8]
        middle = self.up_middle(middle + interpolate(self.to_middle(coarse), scale_factor=2.0))
        fine = self.up_fine(fine + interpolate(self.to_fine(middle), scale_factor=2.0))
        logits: Tensor = pixel_shuffle(self.head(fine), 2)  # [N, 1, H, W]
        return logits[..., :height, :width]


class StudentSegmenter:
    """A :class:`StudentNetwork` as a segmenter.

    Created by :func:`~w2f_torchrl.segmenters.train_student` or :meth:`load`. It computes in
    bfloat16 on CPUs with instructions for it, which halves its cost, and otherwise in float32;
    parameters stay float32.

    Args:
        network: The network, trained or not.
        confidence: Whether calls return confidences, float32 in [0, 1], instead of bool masks.
        threshold: Confidence above which a pixel is foreground, in (0, 1).
        device: Where it computes; masks are returned on the device of the images.
        batch_size: Number of images segmented at a time.

    Raises:
        ValueError: If the threshold is out of range.
    """

    def __init__(
        self,
        network: StudentNetwork | None = None,
        *,
        confidence: bool = False,
        threshold: float = 0.5,
        device: torch.device | str = "cpu",
        batch_size: int = 64,
    ) -> None:
        if not 0 < threshold < 1:
            raise ValueError(f"threshold={threshold} must be in (0, 1).")
        check_number("batch_size", batch_size, integer=True, minimum=1)
        self.device = torch.device(device)
        self.network = (network or StudentNetwork()).to(self.device).eval()
        self.confidence = confidence
        self.threshold = threshold
        self.batch_size = batch_size
        native = self.device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
        self.dtype = torch.bfloat16 if native else torch.float32
        self._fast: nn.Module | None = None

    def __call__(self, pixels: Tensor) -> Tensor:
        """Find the foreground.

        Args:
            pixels: uint8 ``[N, 3, H, W]``.

        Returns:
            bool ``[N, 1, H, W]``, or float32 confidences in [0, 1].
        """
        confidences = self.confidences(pixels)
        return confidences if self.confidence else confidences > self.threshold

    @torch.no_grad()
    def confidences(self, pixels: Tensor) -> Tensor:
        """Return the probability of foreground: uint8 to float32 ``[N, 1, H, W]``."""
        check_pixels(pixels)
        if self._fast is None:
            self._fast = _fused(self.network).to(self.dtype)
        parts = []
        for part in pixels.split(self.batch_size):
            check_stop()
            images = to_images(part.to(self.device)).to(self.dtype)
            parts.append(self._fast(images).float().sigmoid())
        empty = pixels.new_empty((0, 1, *pixels.shape[2:]), dtype=torch.float32)
        return torch.cat(parts).to(pixels.device) if parts else empty

    def weights_changed(self) -> None:
        """Discard what was derived from the weights, after further training."""
        self._fast = None

    def state_dict(self) -> dict[str, Tensor]:
        """Return the network's parameters and statistics."""
        return dict(self.network.state_dict())

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load a state of a network of the same widths."""
        self.network.load_state_dict(state)
        self.weights_changed()

    def save(self, path: str | Path) -> Path:
        """Write the student to a file that :meth:`load` reads."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {"format": FORMAT, "widths": self.network.widths, "threshold": self.threshold}
        torch.save(document | {"network": self.state_dict()}, path)
        return path

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        confidence: bool = False,
        device: torch.device | str = "cpu",
        batch_size: int = 64,
    ) -> StudentSegmenter:
        """Read a student; nothing in the file is executed (``weights_only``).

        Raises:
            SegmenterUnavailableError: If the file does not exist or does not hold a student.
        """
        if not Path(path).is_file():
            raise SegmenterUnavailableError(f"The student's file {path} does not exist.")
        try:
            document = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise SegmenterUnavailableError(f"{path} does not hold a student: {error}") from error
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise SegmenterUnavailableError(f"{path} does not hold a student written by `save`.")
        network = StudentNetwork(document["widths"])
        network.load_state_dict(document["network"])
        return cls(
            network,
            confidence=confidence,
            threshold=document["threshold"],
            device=device,
            batch_size=batch_size,
        )


def to_images(pixels: Tensor) -> Tensor:
    """Convert uint8 images to the network's input: float32 in [-0.5, 0.5], channels last."""
    return pixels.contiguous(memory_format=torch.channels_last).float().div_(255).sub_(0.5)


def _fused(network: StudentNetwork) -> nn.Module:
    """Return a copy for inference: normalisation folded into the convolutions, channels last."""
    copy = StudentNetwork(network.widths)
    copy.load_state_dict(network.state_dict())
    copy.to(next(network.parameters()).device).eval()
    for module in list(copy.modules()):
        if isinstance(module, nn.Sequential) and isinstance(module[1], nn.BatchNorm2d):
            module[0] = fuse_conv_bn_eval(cast(nn.Conv2d, module[0]), module[1])
            module[1] = nn.Identity()
    return copy.to(memory_format=torch.channels_last).requires_grad_(False)

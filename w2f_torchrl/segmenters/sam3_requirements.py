"""Requirements of SAM3, and the commands that install them. The package is not imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path

REPOSITORY = "facebook/sam3"
WEIGHTS_FILE = "sam3.pt"

INSTALL = """SAM3 needs the packages of the extra `sam3`, but {missing} is not installed. Run:

  make extras                          # in a checkout, or:
  pip install "w2f_torchrl[sam3]"
"""
VOCABULARY = """SAM3's tokenizer needs a vocabulary that is not in the sam3 package: {missing}. Run:

  pip install open_clip_torch          # holds bpe_simple_vocab_16e6.txt.gz

or pass vocabulary=PATH."""
WEIGHTS = """SAM3's weights are missing: {missing}. They are gated: request access at
https://huggingface.co/facebook/sam3 , then run:

  hf auth login
  hf download facebook/sam3 sam3.pt --local-dir checkpoints

and pass checkpoint=checkpoints/sam3.pt (segmentation.checkpoint=checkpoints/sam3.pt on the command
line). Without the weights, segmentation=student learns from a few labelled frames."""


class SegmenterUnavailableError(RuntimeError):
    """A segmenter lacks a package, a file or weights; the message has the commands to get it."""


def missing_requirement(
    checkpoint: str | Path | None, vocabulary: str | Path | None, *, download: bool = False
) -> str | None:
    """Return what SAM3 lacks on this machine and the commands to get it; None if nothing.

    Nothing is downloaded and the package is not imported.

    Args:
        checkpoint: Path of the weights; None for those in Hugging Face's cache.
        vocabulary: Path of the tokenizer's vocabulary; None for open_clip's.
        download: Whether weights that are not in the cache may still be downloaded later.
    """
    try:
        require_package()
        find_vocabulary(vocabulary)
        if checkpoint is None and not download and _cached_weights() is None:
            return WEIGHTS.format(missing=f"{REPOSITORY} is not in Hugging Face's cache")
        if checkpoint is not None:
            _require_file(checkpoint)
    except SegmenterUnavailableError as error:
        return str(error)
    return None


def find_vocabulary(vocabulary: str | Path | None = None) -> Path:
    """Find the tokenizer's vocabulary, by default in the installed open_clip, without importing it.

    Raises:
        SegmenterUnavailableError: If it does not exist.
    """
    if vocabulary is not None:
        path, missing = Path(vocabulary), f"vocabulary={vocabulary} is not a file"
    else:
        spec = importlib.util.find_spec("open_clip")
        folder = Path(spec.origin).parent if spec and spec.origin else Path()
        path = folder / "bpe_simple_vocab_16e6.txt.gz"
        missing = "open_clip_torch is not installed" if spec is None else f"no {path}"
    if not path.is_file():
        raise SegmenterUnavailableError(VOCABULARY.format(missing=missing))
    return path


def find_weights(checkpoint: str | Path | None) -> Path:
    """Find the weights: a path, or a download from Hugging Face, whose cache is searched first.

    Raises:
        SegmenterUnavailableError: If the file does not exist, or cannot be downloaded.
    """
    if checkpoint is not None:
        return _require_file(checkpoint)
    cached = _cached_weights()
    if cached is not None:
        return cached
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(REPOSITORY, WEIGHTS_FILE))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SegmenterUnavailableError(WEIGHTS.format(missing=reason)) from error


def require_package() -> None:
    """Raise a SegmenterUnavailableError unless sam3 and its dependencies can be imported."""
    for package in ("sam3", "torchvision", "timm", "iopath", "huggingface_hub", "psutil"):
        if importlib.util.find_spec(package) is None:
            raise SegmenterUnavailableError(INSTALL.format(missing=package))


def _require_file(checkpoint: str | Path) -> Path:
    path = Path(checkpoint)
    if not path.is_file():
        raise SegmenterUnavailableError(WEIGHTS.format(missing=f"checkpoint={path} is not a file"))
    return path


def _cached_weights() -> Path | None:
    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    import huggingface_hub

    path = huggingface_hub.try_to_load_from_cache(REPOSITORY, WEIGHTS_FILE)
    return Path(path) if isinstance(path, str) else None

"""Make masks for stored or collected frames: ``python sota_configs/preprocess_masks.py --help``.

  --frames data.npz                  an .npz file with pixels uint8 [N, 3, H, W]
  --frames replay/storage --key next.pixels
                                     a memory-mapped tensordict: a dataset, or the storage written
                                     by a replay's `dumps`
  --policy CHECKPOINT --count 5000   frames collected with a run's policy

The output folder holds masks.npy (one bit per pixel, memory-mapped), masks.json (prompts, model,
versions) and contact_sheet.png. If the command is interrupted, run it again to continue.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from tqdm import tqdm

from w2f_torchrl.checkpoint import CheckpointError
from w2f_torchrl.data import MaskStore, load_masks
from w2f_torchrl.logging.pictures.contact_sheet import draw_contact_sheet
from w2f_torchrl.masks.labels import load_pictures
from w2f_torchrl.segmenters import (
    MedianSegmenter,
    Sam3Segmenter,
    Segmenter,
    SegmenterUnavailableError,
    StudentSegmenter,
)
from w2f_torchrl.trainers import ConfigError, load_policy

PACKAGES = {"sam3": ("sam3", "torch"), "student": ("torch",), "median": ("torch",)}


def read_frames(args: argparse.Namespace) -> Tensor:
    """Return the frames to segment, uint8 [N, 3, H, W]; memory-mapped if stored that way."""
    if args.policy is not None:
        policy = load_policy(args.policy)
        env, parts = policy.make_env(seed=args.seed), []
        while sum(map(len, parts)) < args.count:
            parts.append(env.rollout(100_000, policy)["pixels"])
        env.close()
        return torch.cat(parts)[: args.count]
    if args.frames.suffix == ".npz":
        return load_pictures(args.frames)
    if not (args.frames / "meta.json").is_file():
        raise ConfigError(
            f"--frames {args.frames} is neither an .npz file nor a stored tensordict."
        )
    stored = TensorDict.load_memmap(args.frames)
    key = tuple(args.key.split("."))
    if key not in stored.keys(include_nested=True) and args.key not in stored.keys():
        names = sorted(".".join([k] if isinstance(k, str) else k) for k in stored.keys(True, True))
        raise ConfigError(f"--key {args.key} is not in {args.frames}; allowed: {', '.join(names)}.")
    pixels: Tensor = stored[key]
    return pixels.reshape(-1, *pixels.shape[-3:])


def make_segmenter(args: argparse.Namespace, pixels: Tensor) -> Segmenter:
    """Make the segmenter chosen on the command line."""
    if args.segmenter == "sam3":
        return Sam3Segmenter(
            args.prompts,
            checkpoint=args.checkpoint,
            resolution=args.resolution,
            score_threshold=args.score_threshold,
            device=args.device,
        )
    if args.segmenter == "student":
        if args.checkpoint is None:
            raise ConfigError("--segmenter student needs --checkpoint, such as a run's student.pt.")
        return StudentSegmenter.load(args.checkpoint, device=args.device or "cpu")
    every = max(len(pixels) // 500, 1)
    return MedianSegmenter().fit(torch.as_tensor(pixels[::every]))


def describe(args: argparse.Namespace, pixels: Tensor) -> dict[str, Any]:
    """Describe segmenter and frames; if either changes, the work cannot be continued."""
    record: dict[str, Any] = {"segmenter": args.segmenter}
    if args.segmenter == "sam3":
        record |= {
            "prompts": args.prompts,
            "resolution": args.resolution,
            "score_threshold": args.score_threshold,
        }
    if args.checkpoint is not None:
        with args.checkpoint.open("rb") as stream:
            record["checkpoint_sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()
    ends = torch.stack([pixels[0], pixels[-1]]).numpy().tobytes()
    record["frames_sha256"] = hashlib.sha256(ends).hexdigest()
    return record | {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES[args.segmenter]}
    }


def preprocess(args: argparse.Namespace) -> MaskStore:
    """Segment the remaining frames."""
    pixels = read_frames(args)
    segmenter = make_segmenter(args, pixels)
    count, _, height, width = pixels.shape
    store = MaskStore(args.out, (count, height, width), describe(args, pixels))
    with tqdm(total=count, initial=store.done, unit="frame", disable=None) as progress:
        while store.done < count:
            batch = torch.as_tensor(pixels[store.done : store.done + args.batch_size])
            store.append(segmenter(batch))
            progress.update(len(batch))
    shown = torch.linspace(0, count - 1, min(count, 48)).long()
    masks, _ = load_masks(args.out)
    draw_contact_sheet(pixels[shown], masks[shown], args.out / "contact_sheet.png")
    return store


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, then segment."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--frames", type=Path)
    source.add_argument("--policy", type=Path, metavar="CHECKPOINT")
    parser.add_argument(
        "--key", default="pixels", help="key in a stored tensordict, such as next.pixels"
    )
    parser.add_argument("--count", type=int, default=5000, help="frames to collect with a policy")
    parser.add_argument("--seed", type=int, default=0, help="seed of the policy's env")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--segmenter", choices=PACKAGES, default="sam3")
    parser.add_argument(
        "--checkpoint", type=Path, help="weights of SAM3 (default: from Hugging Face) or a student"
    )
    parser.add_argument("--prompts", nargs="+", default=["robot"])
    parser.add_argument(
        "--resolution", type=int, help="SAM3's resolution (default: that of the weights)"
    )
    parser.add_argument("--score-threshold", type=float, default=0.5)
    parser.add_argument("--batch-size", type=int, default=256, help="frames between two saves")
    parser.add_argument("--device", help="default: for SAM3 CUDA if available, otherwise the CPU")
    args = parser.parse_args(arguments)
    if args.checkpoint is not None and not args.checkpoint.is_file():
        sys.exit(f"error: --checkpoint {args.checkpoint} is no file.")
    try:
        preprocess(args)
    except (ConfigError, CheckpointError, SegmenterUnavailableError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(args.out)


if __name__ == "__main__":
    main()

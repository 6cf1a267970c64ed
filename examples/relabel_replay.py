"""Add foreground masks to any stored TorchRL replay buffer, without training.

python examples/relabel_replay.py --replay saved_buffer --out relabelled --student runs/x/student.pt

Reads a buffer written by ``TensorDictReplayBuffer.dumps``, segments each image once, and writes a
buffer that ``loads`` reads, with ``foreground_mask`` next to ``pixels`` (and next to
``next.pixels``).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tensordict import TensorDict, TensorDictBase
from torchrl.data import LazyMemmapStorage, TensorDictReplayBuffer

from w2f_torchrl.segmenters import Sam3Segmenter, Segmenter, StudentSegmenter
from w2f_torchrl.transforms import ForegroundMaskTransform

PIXELS = ("pixels", ("next", "pixels"))


def stored_transitions(folder: Path) -> TensorDictBase:
    """Return the transitions written by a buffer's ``dumps``, memory-mapped and in order."""
    return TensorDict.load_memmap(folder / "storage")


def relabel(
    source: TensorDictBase, segmenter: Segmenter, batch_size: int = 512
) -> TensorDictReplayBuffer:
    """Fill a new buffer with the transitions and their masks.

    Args:
        source: Transitions ``[N]`` with ``pixels`` uint8 ``[N, 3, H, W]``.
        segmenter: Returns the masks.
        batch_size: Transitions segmented at a time.
    """
    keys = [key for key in PIXELS if source.get(key, None) is not None]
    replay = TensorDictReplayBuffer(storage=LazyMemmapStorage(len(source)), batch_size=batch_size)
    # extend() segments a batch in one call, and equal frames once.
    replay.append_transform(ForegroundMaskTransform(segmenter, keys))
    for start in range(0, len(source), batch_size):
        replay.extend(source[start : start + batch_size].clone())
    return replay


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, then relabel."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replay", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--student", type=Path, help="a student (default: SAM3)")
    parser.add_argument(
        "--checkpoint", type=Path, help="SAM3's weights (default: from Hugging Face)"
    )
    parser.add_argument("--prompts", nargs="+", default=["robot"])
    args = parser.parse_args(arguments)
    if args.student is not None:
        segmenter: Segmenter = StudentSegmenter.load(args.student)
    else:
        segmenter = Sam3Segmenter(args.prompts, checkpoint=args.checkpoint, resolution=None)
    replay = relabel(stored_transitions(args.replay), segmenter)
    replay.dumps(args.out)
    print(f"{len(replay)} transitions with masks in {args.out}")


if __name__ == "__main__":
    main()

"""``python -m w2f_torchrl.export CHECKPOINT policy.onnx``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from w2f_torchrl.checkpoint import CheckpointError
from w2f_torchrl.export import ExportError, export_file


def main(arguments: Sequence[str] | None = None) -> int:
    """Export a policy or a student, and print the path of the file.

    Args:
        arguments: Command-line arguments; None for those of the process.

    Returns:
        The exit status: 2, with a message, if nothing was exported.
    """
    parser = argparse.ArgumentParser(
        prog="python -m w2f_torchrl.export",
        description="Write a policy, or a student segmenter, as a file that runs without this "
        "package: .onnx (needs the extra `export`) or .pt2 (torch.export).",
    )
    parser.add_argument(
        "source", type=Path, metavar="CHECKPOINT", help="a checkpoint, or a student's file"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="*.onnx or *.pt2")
    parser.add_argument(
        "--action",
        choices=("mode", "sample"),
        help="how the policy acts; default: the checkpoint's evaluation.action",
    )
    chosen = parser.parse_args(arguments)
    try:
        path = export_file(chosen.source, chosen.out, action=chosen.action)
    except (CheckpointError, ExportError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{path} ({path.stat().st_size / 1e6:.1f} MB)\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

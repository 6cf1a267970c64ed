"""``python -m w2f_torchrl.report RUN... [--out PAGE.html]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from w2f_torchrl.report import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page and print its path.

    Args:
        arguments: Command-line arguments; None for those of the process.

    Returns:
        The exit status: 2, with a message, if a run cannot be read.
    """
    parser = argparse.ArgumentParser(
        prog="python -m w2f_torchrl.report",
        description="Write a self-contained HTML page about one or several runs.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's directory")
    parser.add_argument(
        "--out",
        type=Path,
        help="path of the page; default: report.html in the run's directory, for several runs in "
        "the current one",
    )
    chosen = parser.parse_args(arguments)
    out = chosen.out or (chosen.runs[0] if len(chosen.runs) == 1 else Path()) / "report.html"
    try:
        path = write_report(chosen.runs, out)
    except (FileNotFoundError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{path} ({path.stat().st_size / 1e6:.1f} MB)\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

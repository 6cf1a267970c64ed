"""Install DAVIS 2017, for ``environment.background_source=davis``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from w2f_torchrl.envs.scenery import davis
from w2f_torchrl.envs.scenery.clip_files import BackgroundError


def main() -> None:
    """Download an archive or use an existing one, check it, and install it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=davis.default_directory(), help="where to")
    parser.add_argument("--archive", type=Path, help="a zip file that was already downloaded")
    parser.add_argument("--url", default=davis.URL, help="where from")
    args = parser.parse_args()
    try:
        directory = davis.install_davis(args.to, url=args.url, archive=args.archive)
    except BackgroundError as error:
        sys.exit(f"error: {error}")
    count = sum(map(len, davis.VIDEOS.values()))
    print(f"{directory}: {count} videos, checked; environment.background_source={directory}")


if __name__ == "__main__":
    main()

"""Watch the agent that comes with the repository, in scenery that it has never seen.

python examples/watch_pretrained.py --out film.mp4

It spins a body with a finger. It was trained for an hour on one CPU core before four
distracting videos, with a wandering camera and changing colours (examples/pretrained/README.md),
and plays in front of a video that it has never seen. Prints its return and a random policy's, and
writes a video of what it sees and of what its latents hold; takes less than a minute on a CPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import watch_policy

PRETRAINED = Path(__file__).parent / "pretrained" / "finger_spin_easy.pt"


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Play the agent and a random policy, print the returns, and write the video.

    Returns:
        The returns of the trained and of the random policy.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("film.mp4"))
    parser.add_argument("--scenery", default="unseen_videos_easy", help="an evaluation set")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(arguments)
    options = ["--out", str(args.out), "--scenery", args.scenery, "--seed", str(args.seed)]
    return watch_policy.main([str(PRETRAINED), *options])


if __name__ == "__main__":
    main()

"""Time an update of two versions of the code, in turn, on the same data.

    python benchmarks/speed/versions.py eea98db HEAD --model size1m --latents whole split
    python benchmarks/speed/versions.py ../before . --model size12m --rounds 5

A version is a checkout, or a revision, which is unpacked in a temporary folder. Each runs in its
own process, on one thread of a CPU, and they make updates in turn, so that a drift of the
machine's speed hits both. Kept are medians of the CPU seconds, and each round's ratio.
``--setting`` sets a field of the model in versions that have it: with ``decoder=torchrl
resample=stride`` a version that has these settings builds the same networks as one that does not.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "shared"))


class Version:
    """A process that updates when it is told to.

    Args:
        checkout: Whose package it imports.
        arguments: For :func:`serve`.
    """

    def __init__(self, checkout: Path, arguments: list[str]):
        command = [sys.executable, str(Path(__file__).resolve()), "--serve", *arguments]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=checkout,
            env=os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
        )

    def update(self) -> float:
        """Make an update and return its CPU seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("update\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise RuntimeError(f"a version ended with exit code {self._process.wait()}.")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def serve(model: str, latent: str, shape: tuple[int, int], settings: dict[str, str]) -> None:
    """Make an update for each line of the standard input, and print its CPU seconds."""
    # The version's own, which fits its package; older ones have no folders there.
    sys.path[:1] = [str(Path.cwd() / "benchmarks" / name) for name in ("speed", "shared", ".")]
    import torch
    from learner import ACTION_SIZE, make_sample

    from w2f_torchrl.modules import PRESETS
    from w2f_torchrl.trainers import Learner
    from w2f_torchrl.utils.memory import keep_freed_memory

    torch.set_num_threads(1)
    keep_freed_memory()
    sizes = PRESETS[model]
    known = {name: value for name, value in settings.items() if hasattr(sizes, name)}
    learner = Learner(replace(sizes, **known), action_size=ACTION_SIZE, latent=latent)
    sample = make_sample(*shape)
    for _ in sys.stdin:
        batch, begin = sample.clone(), time.process_time()
        learner.update(batch)
        print("seconds", time.process_time() - begin, flush=True)


def compare(
    before: Path, after: Path, arguments: list[str], rounds: int, warm_up: int = 2
) -> dict[str, Any]:
    """Time updates of two checkouts in turn."""
    versions = [Version(before, arguments), Version(after, arguments)]
    try:
        times = [[version.update() for version in versions] for _ in range(rounds + warm_up)]
    finally:
        for version in versions:
            version.close()
    kept = times[warm_up:]
    return {
        "before_median_seconds": round(statistics.median(b for b, _ in kept), 5),
        "after_median_seconds": round(statistics.median(a for _, a in kept), 5),
        "ratio": round(statistics.median(a / b for b, a in kept), 3),
        "ratios": [round(a / b, 3) for b, a in kept],
    }


def main() -> None:
    """Compare, print and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", help="two checkouts or revisions")
    parser.add_argument("--model", default="size1m")
    parser.add_argument("--latents", nargs="+", default=["whole", "split"])
    parser.add_argument("--shape", nargs=2, type=int, default=(8, 32), metavar=("B", "T"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--setting", nargs="*", default=[], help="FIELD=VALUE of the model")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    settings = dict(item.split("=", 1) for item in args.setting)
    if args.serve:
        serve(args.model, args.latents[0], tuple(args.shape), settings)
        return
    if len(args.versions) != 2:
        parser.error(f"two versions are needed, got {args.versions}.")
    shared = ["--model", args.model, "--shape", *map(str, args.shape)]
    shared += ["--setting", *args.setting]
    from results_file import RESULTS, write_results
    from revisions import unpack

    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / name for name in ("before", "after")]
        found = [unpack(v, place) for v, place in zip(args.versions, places, strict=True)]
        (before, _), (after, _) = found
        for latent in args.latents:
            rows[latent] = compare(before, after, [*shared, "--latents", latent], args.rounds)
            print(latent, rows[latent], flush=True)
    name = f"versions_{args.model}.json"
    words = ("model", "latents", "shape", "rounds", "setting")
    kept = {"settings": {word: getattr(args, word) for word in words}}
    kept |= {name: said for name, (_, said) in zip(("before", "after"), found, strict=True)}
    print(write_results(args.out or RESULTS / name, kept | {"update": rows}))


if __name__ == "__main__":
    main()

"""Size and time of the installation that ``make setup`` makes.

    python benchmarks/speed/install.py --rounds 2

A clone of this checkout is set up with an empty download cache, then again with the filled one, and
the installed files are added up: what the package requires, what only its development does (tests,
linters, documentation), and of both what only the CUDA build of PyTorch brings, which the CPU build
(``make setup CPU=1``) leaves out. PyTorch itself is a separate row, with its libraries for CUDA,
which the CPU build lacks, in a row of their own, and so is the bytecode that set-up compiles. Bytes
are those of the files, not of the blocks that they take on a disk.

The CPU build is not on PyPI for Linux on x86, so ``cpu_build`` adds up what is left without CUDA.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "shared"))

from results_file import RESULTS, write_results

ROOT = Path(__file__).resolve().parents[2]
CUDA_ONLY = ("nvidia-", "cuda-", "triton")

SIZES = """
import importlib.metadata as metadata
import json
import os
import re
from packaging.requirements import Requirement

def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()

installed = {canonical(d.metadata["Name"]): d for d in metadata.distributions()}
required = set()

def walk(name):
    if name in required or name not in installed:
        return
    required.add(name)
    for text in installed[name].requires or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            walk(canonical(requirement.name))

def size(distribution):
    total = 0
    for file in distribution.files or []:
        path = distribution.locate_file(file)
        if not str(file).endswith(".pyc") and os.path.isfile(path):
            total += os.path.getsize(path)
    return total

walk("w2f-torchrl")
sizes = {name: [size(d), name in required] for name, d in installed.items()}
torch = installed["torch"]
cuda = [f for f in torch.files if re.search(r"lib/lib.*(cuda|nvshmem).*\\.so", str(f))]
sizes["torch_cuda"] = [sum(os.path.getsize(torch.locate_file(f)) for f in cuda), True]
sizes["torch"][0] -= sizes["torch_cuda"][0]
print(json.dumps(sizes))
"""


def set_up(checkout: Path, cache: Path) -> float:
    """Set a checkout up anew and return the seconds that it took."""
    shutil.rmtree(checkout / ".venv", ignore_errors=True)
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    start = time.perf_counter()
    subprocess.run(
        ["make", "setup"],
        cwd=checkout,
        env=inherited | {"UV_CACHE_DIR": str(cache), "PIP_CACHE_DIR": str(cache / "pip")},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - start


def sizes(checkout: Path) -> dict[str, float]:
    """Return the sizes of the installed packages in groups, in MB of 1e6 bytes."""
    python = checkout / ".venv" / "bin" / "python"
    done = subprocess.run([python, "-c", SIZES], check=True, capture_output=True, text=True)
    groups = dict.fromkeys(("required", "development", "cuda_only", "torch", "torch_cuda"), 0)
    for name, (size, is_required) in json.loads(done.stdout).items():
        if name.startswith(CUDA_ONLY):
            group = "cuda_only"
        elif name in ("torch", "torch_cuda"):
            group = name
        else:
            group = "required" if is_required else "development"
        groups[group] += size
    bytecode = (checkout / ".venv").rglob("*.pyc")
    groups["bytecode"] = sum(path.stat().st_size for path in bytecode)
    groups["cpu_build"] = groups["required"] + groups["torch"]  # without development, bytecode
    return {group: round(size / 1e6, 1) for group, size in groups.items()}


def main() -> None:
    """Measure and write ``benchmarks/results/install.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=2, help="each with an empty, then a filled cache"
    )
    parser.add_argument("--json", type=Path, default=RESULTS / "install.json")
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {"empty_cache": [], "filled_cache": []}
    megabytes: dict[str, float] = {}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            checkout, cache = Path(folder) / "checkout", Path(folder) / "cache"
            subprocess.run(["git", "clone", "--quiet", str(ROOT), str(checkout)], check=True)
            for kind, times in seconds.items():
                times.append(round(set_up(checkout, cache), 1))
                sys.stdout.write(f"{kind}: {times[-1]} s\n")
            megabytes = sizes(checkout)
    write_results(args.json, {"seconds": seconds, "megabytes": megabytes})
    sys.stdout.write(f"{json.dumps(megabytes)}\n")


if __name__ == "__main__":
    main()

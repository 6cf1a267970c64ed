"""Time from starting a run to its first agent step.

    python benchmarks/speed/first_step.py 4557a1d HEAD --rounds 5

Each version (a checkout, or a revision, which is unpacked in a temporary folder) starts
``sota_configs/world2filter.py`` with one worker process, with and without the bytecode that
``make setup`` compiles. Without it, Python compiles every module that it imports, in every process,
if PYTHONDONTWRITEBYTECODE is set, as it often is in containers. Both kinds of start see the same
files: Python is told to look for bytecode in a folder, which is empty or was filled beforehand.

The first agent step is that of the first env, in the worker. The kinds of start take turns, so that
a drift of the machine's speed hits all. Kept are medians of the wall-clock seconds and of the CPU
seconds of run and worker until they are killed at that moment, and the ratios to the first kind
in the same round.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "shared"))

from results_file import RESULTS, write_results
from revisions import unpack

PLUGIN = """
import os
import time

from w2f_torchrl.envs.dm_control import PixelDMControlEnv

step = PixelDMControlEnv._step


def first_step(self, tensordict):
    with open(os.environ["FIRST_STEP"], "a") as file:
        file.write(f"{time.time()}\\n")
    PixelDMControlEnv._step = step
    return step(self, tensordict)


PixelDMControlEnv._step = first_step
"""
"""A plugin of the run, hence also imported by its workers: it notes when an env makes a step."""

OVERRIDES = (
    "experiment=demo environment.distraction=none environment.num_envs=1 collection.num_workers=1 "
    "training.prefill_steps=1000"
)


def cpu_seconds(group: int) -> float:
    """Return the CPU seconds of a process group's living processes and of their ended children."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[2]) == group:
            ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def start(
    checkout: Path, bytecode: Path, folder: Path, *, writes: bool = False
) -> dict[str, float]:
    """Start a run, wait for its first agent step, and kill it.

    Args:
        checkout: Whose program and package are run.
        bytecode: Where Python looks for bytecode.
        folder: An empty folder.
        writes: Whether the run adds bytecode that it does not find there.

    Returns:
        ``seconds`` to the first agent step, and ``cpu_seconds`` of all processes until then.

    Raises:
        RuntimeError: If the run ends before it.
    """
    plugin, noted, log = folder / "note_first_step.py", folder / "noted", folder / "log"
    plugin.write_text(PLUGIN)
    program = str(checkout / "sota_configs" / "world2filter.py")
    command = [sys.executable, program, *OVERRIDES.split()]
    command += [f"plugins=[{plugin}]", f"run_dir={folder / 'run'}"]
    variables = {
        "PYTHONPATH": str(checkout),
        "PYTHONPYCACHEPREFIX": str(bytecode),
        "PYTHONDONTWRITEBYTECODE": "" if writes else "1",
        "FIRST_STEP": str(noted),
        "OMP_NUM_THREADS": "1",
    }
    began = time.time()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | variables,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        while not (noted.exists() and noted.read_text().endswith("\n")):
            if process.poll() is not None:
                raise RuntimeError(log.read_text()[-2000:])
            time.sleep(0.02)
        cpu = cpu_seconds(process.pid)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return {"seconds": float(noted.read_text().split()[0]) - began, "cpu_seconds": cpu}


def measure(checkouts: dict[str, Path], folder: Path, rounds: int) -> dict[str, Any]:
    """Start every version with and without bytecode, in turns; return medians and ratios."""
    kinds = {
        f"{version}, {kind}": (checkout, folder / version.replace("/", "_") / kind)
        for version, checkout in checkouts.items()
        for kind in ("without bytecode", "with bytecode")
    }
    for name, (checkout, bytecode) in kinds.items():
        bytecode.mkdir(parents=True)
        if name.endswith("with bytecode"):
            with tempfile.TemporaryDirectory() as scratch:
                start(checkout, bytecode, Path(scratch), writes=True)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
    for number in range(rounds):
        for name, (checkout, bytecode) in kinds.items():
            with tempfile.TemporaryDirectory() as scratch:
                found[name].append(start(checkout, bytecode, Path(scratch)))
            print(number, name, found[name][-1])
    first = next(iter(kinds))
    return {
        name: {
            **{key: round(statistics.median(row[key] for row in rows), 2) for key in rows[0]},
            "ratio_of_cpu_seconds": [
                round(row["cpu_seconds"] / base["cpu_seconds"], 3)
                for row, base in zip(rows, found[first], strict=True)
            ],
        }
        for name, rows in found.items()
    }


def main() -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="+", help="checkouts or revisions")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "first_step.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        unpacked = [
            unpack(version, Path(folder) / f"version{number}")
            for number, version in enumerate(arguments.versions)
        ]
        checkouts = {about["commit"]: checkout for checkout, about in unpacked}
        document = {
            "run": OVERRIDES,
            "versions_of_the_code": [about for _, about in unpacked],
            "medians": measure(checkouts, Path(folder) / "bytecode", arguments.rounds),
        }
    print(write_results(arguments.out, document).read_text())


if __name__ == "__main__":
    main()

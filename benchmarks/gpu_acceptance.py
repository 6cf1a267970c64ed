"""Run every check of this project that needs a GPU, on a machine that is lent for minutes.

    python benchmarks/gpu_acceptance.py --out results_gpu
    python benchmarks/gpu_acceptance.py --out results_gpu --stages environment smoke learner \
        --seconds 120
    python benchmarks/gpu_acceptance.py --out results_gpu --small      # the same steps on a CPU

No network is used, and nothing is written outside of ``--out``, which gets up to eight files of
less than 16 MiB. The stages run in one process, which imports and compiles once, the most valuable
first, and each row is written at once. A stage that raises does not stop the others; one that takes
too long, or leaves the GPU unusable, ends the process, and another continues with the next stage.
The exit code is the number of rows that failed.

- environment: versions, the device, rates of a large product;
- smoke: a tiny update of each latent and precision, captured with and without compilation, copies;
- learner: milliseconds, kernels and memory of an update of size12m, 16 x 64, in each mode;
- render: frames per second with the simulator's mask on this machine's OpenGL;
- equality: size1m split in each mode against eager, and eager against itself;
- curves: World2Filter and DreamerV3 learn side by side until the time is up.

Only by name, for a second run: convolutions (the decoder's, done in two ways), peers (TorchRL's
parts and stepper and, with ``--r2dreamer``, that project's update) and masks (the student, SAM3
with random weights).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parent / name) for name in ("speed", "shared")]

import gpu_stages
from gpu_stages import Options, failures
from results_file import provenance

#: Maximum seconds of each stage; ``curves`` takes the remaining time.
LIMITS = {
    "environment": 25,
    "smoke": 60,
    "learner": 120,
    "convolutions": 15,
    "render": 15,
    "equality": 90,
    "curves": 260,
    "peers": 120,
    "masks": 60,
}
DEFAULT_STAGES = ("environment", "smoke", "learner", "render", "equality", "curves")
SECONDS = 520.0
#: By how much longer a stage may take with ``--small``, on a CPU that others use.
PATIENCE = 6
#: Seconds that a stage may run over before its process is ended.
GRACE = 10
RESULTS = "results.json"


class Results:
    """The results file, whole at any moment.

    Args:
        out: Its folder.
    """

    def __init__(self, out: Path):
        self.path = out / RESULTS
        self.stages: dict[str, Any] = {}
        if self.path.exists():
            self.stages = json.loads(self.path.read_text())["stages"]

    def keep(self, stage: str, result: Any) -> None:
        """Write a stage's results so far."""
        self.stages[stage] = result
        text = json.dumps(provenance() | {"stages": self.stages}, indent=2)
        written = self.path.with_suffix(".new")
        written.write_text(text + "\n")
        written.replace(self.path)


def work(names: list[str], options: Options, limits: dict[str, float], end: float) -> None:
    """Run stages in this process."""
    results = Results(options.out)
    for name in names:
        begin = time.monotonic()

        def keep(result: Any, name: str = name, begin: float = begin) -> None:
            results.keep(name, dict(result) | {"seconds": round(time.monotonic() - begin, 1)})

        deadline = min(begin + limits[name], end)
        keep({"begun": True})
        rows = gpu_stages.Rows(options._replace(keep=lambda rows, keep=keep: keep(rows)))
        stage, given = getattr(gpu_stages, name), options._replace(keep=keep, deadline=deadline)
        rows.add(name, lambda stage=stage, given=given: dict(stage(given)))
        keep(rows[name])
        print(name, json.dumps(rows[name])[:400], flush=True)


def supervise(names: list[str], args: argparse.Namespace) -> None:
    """Run stages in a process, and those after one that had to be ended in another."""
    end = time.monotonic() + args.seconds
    while names and time.monotonic() < end - 5:
        left = f"{end - time.monotonic():.1f}"
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", "--seconds", left]
        command += ["--out", str(args.out), "--stages", *names]
        command += ["--small"] if args.small else []
        command += ["--limit", *args.limit] if args.limit else []
        command += ["--r2dreamer", str(args.r2dreamer)] if args.r2dreamer else []
        process = subprocess.Popen(command)
        ended = _watch(process, args, end)
        done = Results(args.out)
        begun = [name for name in names if name in done.stages]
        if process.returncode == 0:
            return
        last = begun[-1] if begun else names[0]
        row = done.stages.get(last, {})
        why = ended or f"its process ended with exit code {process.returncode}"
        done.keep(last, row | {"failed": why})
        names = names[names.index(last) + 1 :]
    for name in names:
        Results(args.out).keep(name, {"failed": "no time left"})


def _watch(process: subprocess.Popen[bytes], args: argparse.Namespace, end: float) -> str | None:
    """Wait for a worker; end it, and say why, when its stage has had its time."""
    stage, since = "", time.monotonic()
    while process.poll() is None:
        time.sleep(0.2)
        stages = Results(args.out).stages
        newest = next(reversed(stages), "") if stages else ""
        if newest != stage:
            stage, since = newest, time.monotonic()
        limit = limits_of(args)[stage] + GRACE if stage else 60 * (PATIENCE if args.small else 1)
        if time.monotonic() > min(since + limit, end + 3):
            process.kill()
            process.wait()
            return f"not done after {time.monotonic() - since:.0f} seconds"
    return None


def limits_of(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of each stage."""
    patience = PATIENCE if args.small else 1
    named = {name: float(seconds) for name, seconds in (x.split("=") for x in args.limit)}
    return {name: float(seconds * patience) for name, seconds in LIMITS.items()} | named


def main() -> None:
    """Run the stages for which there is time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    stages = list(LIMITS)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--stages", nargs="+", default=list(DEFAULT_STAGES), choices=stages)
    parser.add_argument("--seconds", type=float, help=f"for all stages together: {SECONDS:.0f}")
    parser.add_argument("--limit", nargs="*", default=[], help="of a stage, such as learner=90")
    parser.add_argument("--small", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--r2dreamer", type=Path, help="a checkout, for the stage peers")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.seconds is None:
        args.seconds = SECONDS * (PATIENCE if args.small else 1)
    if not args.small and not gpu_stages.torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; --small runs the same stages on the CPU.")
    args.out = args.out.resolve()
    if args.worker:
        end = time.monotonic() + args.seconds
        options = Options(args.out, args.small, args.r2dreamer, lambda result: None, end)
        work(args.stages, options, limits_of(args), end)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / RESULTS).unlink(missing_ok=True)
    try:
        supervise(args.stages, args)
    finally:  # replays and checkpoints are larger than what comes back from a lent machine
        shutil.rmtree(args.out / gpu_stages.RUNS, ignore_errors=True)
    print(args.out / RESULTS)
    sys.exit(min(failures(Results(args.out).stages), 100))


if __name__ == "__main__":
    main()

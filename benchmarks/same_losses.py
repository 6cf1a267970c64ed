"""Check that two versions of the code train alike: every loss, and the final weights.

    python benchmarks/same_losses.py d6b63be HEAD
    python benchmarks/same_losses.py ../before . --algorithms split

A version is a checkout, or a revision, which is unpacked in a temporary folder. Each trains the
same tiny runs in its own process, on the CPU with one thread: short distracted episodes,
evaluations, checkpoints, a row of metrics after every update. A third run of each algorithm begins
with the first version, gets SIGTERM after 20 updates, and is resumed with the second, so the format
of the checkpoints is compared too. All numbers but times must be equal bit for bit. With
``--from-zero`` versions that can keep latents in the replay do not (``replay.latents=false``). If
two numbers differ, the first difference is printed and the exit code is 1.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent / "shared"))

import torch
from fault_runs import final_state, leave_curves_out, rows, small_run
from results_file import write_results
from revisions import unpack

import w2f_torchrl
from w2f_torchrl.trainers import Trainer

ALGORITHMS: dict[str, dict[str, Any]] = {
    "dreamer_v3": {"name": "dreamer_v3", "latent": None},
    **{
        latent: {"name": "world2filter", "latent": latent}
        for latent in ("split", "shared", "foreground")
    },
}
FRAMES = 320
STOP_AT = 20
"""Updates after which the run that changes versions is interrupted."""


def train(
    run_dir: Path,
    algorithm: str,
    *,
    workers: int,
    from_zero: bool = False,
    stop_at: int | None = None,
) -> int:
    """Train, or resume, with the package that this process imports.

    Args:
        run_dir: The run's directory.
        algorithm: One of ``ALGORITHMS``.
        workers: Worker processes.
        from_zero: Whether slices start from zero where the version can do otherwise.
        stop_at: Updates after which the process gets SIGTERM.

    Returns:
        Updates that the run has made.
    """
    config = small_run(
        run_dir,
        "world2filter",
        algo=ALGORITHMS[algorithm],
        training={"total_frames": FRAMES},
        collection={"num_workers": workers},
        logging={"every_updates": 1},
    )
    if from_zero and hasattr(config.replay, "latents"):
        config.replay.latents = False
    trainer = Trainer(config)
    update = trainer.learner.update

    def stopping(sample: Any) -> Any:
        if trainer.updates + 1 == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(sample)

    trainer.learner.update = stopping  # type: ignore[method-assign]
    trainer.train()
    return trainer.updates


def train_all(
    root: Path, algorithms: Sequence[str], workers: int, *, from_zero: bool = False
) -> None:
    """One version's part: its own runs, and its half of those that change versions.

    Raises:
        RuntimeError: If the package is another version's, which a wrong path could hide.
    """
    package = Path(w2f_torchrl.__file__)
    if not package.is_relative_to(Path.cwd()):
        raise RuntimeError(f"{Path.cwd()} holds no w2f_torchrl: {package} is imported.")
    torch.set_num_threads(1)
    leave_curves_out()
    second = (root / "before").exists()
    for algorithm in algorithms:
        settings: dict[str, Any] = {"workers": workers, "from_zero": from_zero}
        train(root / ("after" if second else "before") / algorithm, algorithm, **settings)
        stop_at, shared = None if second else STOP_AT, root / "handed_over" / algorithm
        updates = train(shared, algorithm, stop_at=stop_at, **settings)
        if stop_at is not None and updates != stop_at:
            raise RuntimeError(f"{algorithm} ended after {updates} updates, not after {stop_at}.")


def train_with(
    checkout: Path,
    root: Path,
    algorithms: Sequence[str],
    workers: int,
    *,
    from_zero: bool = False,
) -> None:
    """Call :func:`train_all` in a process that imports the package of a checkout.

    Raises:
        RuntimeError: If it fails; with the end of its log.
    """
    script = str(Path(__file__).resolve())
    command = [sys.executable, script, "--train", str(root), "--workers", str(workers)]
    command += ["--from-zero"] if from_zero else []
    done = subprocess.run(
        [*command, "--algorithms", *algorithms],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{checkout}: {done.stdout[-3000:]}{done.stderr[-3000:]}")


def first_difference(before: Path, after: Path) -> str | None:
    """Compare two runs' metrics, row by row, and their last states, bit by bit.

    Args:
        before: A run's directory.
        after: The other's.

    Returns:
        Where they differ first; None if they don't.
    """
    for number, (one, other) in enumerate(itertools.zip_longest(rows(before), rows(after))):
        if one is None or other is None:
            return f"row {number} is in one run only"
        for name in dict.fromkeys([*one, *other]):
            if one.get(name, "absent") != other.get(name, "absent"):
                values = f"{one.get(name, 'absent')!r} and {other.get(name, 'absent')!r}"
                return f"row {number}, update {one['updates']}: {name} is {values}"
    states = final_state(before), final_state(after)
    for name in dict.fromkeys([*states[0], *states[1]]):
        if any(name not in state for state in states):
            return f"{name} is in one checkpoint only"
        if not torch.equal(states[0][name], states[1][name]):
            return f"{name} differs in the last checkpoints"
    return None


def compare(root: Path, algorithm: str) -> dict[str, Any]:
    """Return the size of the comparison of an algorithm's runs, and the first difference."""
    before = root / "before" / algorithm
    made = rows(before)
    return {
        "updates": made[-1]["updates"],
        "rows": len(made),
        "numbers": sum(len(row) for row in made),
        "tensors": len(final_state(before)),
        "first_difference": first_difference(before, root / "after" / algorithm),
        "first_difference_handed_over": first_difference(before, root / "handed_over" / algorithm),
    }


def compare_versions(
    versions: Sequence[str],
    algorithms: Sequence[str],
    workers: int,
    *,
    from_zero: bool = False,
) -> dict[str, Any]:
    """Train with two versions, and compare.

    Returns:
        The results file's contents without their provenance.
    """
    with tempfile.TemporaryDirectory() as folder:
        root, said = Path(folder) / "runs", []
        for name, version in zip(("first", "second"), versions, strict=True):
            checkout, what = unpack(version, Path(folder) / name)
            said.append(what)
            train_with(checkout, root, algorithms, workers, from_zero=from_zero)
        runs = {algorithm: compare(root, algorithm) for algorithm in algorithms}
    equal = not any(v for row in runs.values() for k, v in row.items() if k.startswith("first"))
    shown = [what["version"] for what in said]
    options = [f"--workers {workers}"] if workers else []
    options += ["--from-zero"] if from_zero else []
    return {
        # Not as typed: a checkout's path is nobody's business.
        "command": " ".join(["python benchmarks/same_losses.py", *shown, *options]),
        "before": said[0],
        "after": said[1],
        "workers": workers,
        "identical": equal,
        "runs": runs,
    }


def main() -> None:
    """Compare two versions, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", metavar="VERSION", help="BEFORE and AFTER")
    parser.add_argument(
        "--algorithms", nargs="+", choices=list(ALGORITHMS), default=list(ALGORITHMS)
    )
    parser.add_argument("--workers", type=int, default=0, help="processes that step the envs")
    parser.add_argument("--from-zero", action="store_true", help="no latents in the replay")
    parser.add_argument("--out", type=Path, help="a results file; none by default")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)  # in a version's process
    args = parser.parse_args()
    if args.train is not None:
        train_all(args.train, args.algorithms, args.workers, from_zero=args.from_zero)
        return
    if len(args.versions) != 2:
        parser.error("two versions are compared: BEFORE AFTER")
    results = compare_versions(
        args.versions, args.algorithms, args.workers, from_zero=args.from_zero
    )
    for name, row in results["runs"].items():
        print(name, row)
    if args.out is not None:
        write_results(args.out, results)
    print("identical" if results["identical"] else "NOT identical")
    sys.exit(0 if results["identical"] else 1)


if __name__ == "__main__":
    main()

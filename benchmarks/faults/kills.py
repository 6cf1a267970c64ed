"""Kill a run with SIGKILL repeatedly, and compare its result with an undisturbed run's.

    python benchmarks/faults/kills.py --kills 30 --out benchmarks/results/kills.json

Every attempt is a separate process, forked after the imports. It is killed at a random moment
after a random number of updates, or, every third time, while a checkpoint is being written.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import mmap
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "shared"))

import torch
from fault_runs import (
    ALGORITHMS,
    final_state,
    fork,
    has_ended,
    kill,
    leave_curves_out,
    rows,
    small_run,
    wait_for,
)
from results_file import RESULTS, write_results

from w2f_torchrl.trainers import Trainer

PATIENCE = 600.0
"""Seconds after which an attempt that makes no progress counts as hung."""


class Progress:
    """Updates done by a child, seen by its parent."""

    def __init__(self) -> None:
        self._shared = ctypes.c_int64.from_buffer(mmap.mmap(-1, 8))

    @property
    def updates(self) -> int:
        """Updates that the child's counter stands at."""
        return self._shared.value

    def watch(self, trainer: Trainer) -> None:
        """Let a trainer write its count."""
        update = trainer.learner.update

        def counted(sample: Any) -> Any:
            made = update(sample)
            self._shared.value = trainer.updates + 1
            return made

        trainer.learner.update = counted  # type: ignore[method-assign]


def train(run_dir: Path, algorithm: str, progress: Progress) -> None:
    """Run, or resume, until the last frame."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    leave_curves_out()
    trainer = Trainer(small_run(run_dir, algorithm))
    progress.watch(trainer)
    trainer.train()


def killed_run(root: Path, algorithm: str, kills: int, chance: random.Random) -> dict[str, Any]:
    """Kill attempt after attempt, then let the last one end."""
    run_dir, progress, log = root / "killed", Progress(), root / "killed.log"
    record: dict[str, Any] = {"at_updates": [], "while_writing": 0}
    while len(record["at_updates"]) < kills:
        child = fork(lambda: train(run_dir, algorithm, progress), log)
        writing = len(record["at_updates"]) % 3 == 2
        target = progress.updates + chance.randint(1, 6)

        def reached(now: int = child, writes: bool = writing, wanted: int = target) -> bool:
            if has_ended(now):
                return True
            if writes:
                return any((run_dir / "checkpoints").glob(".*.tmp"))
            return progress.updates >= wanted

        if not wait_for(reached, PATIENCE):
            raise RuntimeError(f"no progress in {PATIENCE} s: {log.read_text()[-3000:]}")
        time.sleep(chance.random() * (0.01 if writing else 0.3))
        code = kill(child)
        if code is not None:
            raise RuntimeError(f"ended with {code} before the kill: {log.read_text()[-3000:]}")
        record["at_updates"].append(progress.updates)
        record["while_writing"] += writing
        print(algorithm, "killed at update", progress.updates, flush=True)
    child = fork(lambda: train(run_dir, algorithm, progress), log)
    record["last_attempt_exit_code"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return record


def compare(root: Path) -> dict[str, Any]:
    """Metrics line by line, and the last checkpoints bit by bit."""
    whole, killed = rows(root / "undisturbed"), rows(root / "killed")
    states = [final_state(root / name) for name in ("undisturbed", "killed")]
    names = states[0].keys() | states[1].keys()
    unequal = [n for n in sorted(names) if not torch.equal(states[0][n], states[1][n])]
    counters = [(row["frames"], row["updates"]) for row in killed]
    return {
        "rows_undisturbed": len(whole),
        "rows_killed": len(killed),
        "rows_equal": whole == killed,
        "counters_never_go_back": counters == sorted(counters),
        "tensors_compared": len(names),
        "tensors_unequal": unequal,
        "updates": killed[-1]["updates"],
        "frames": killed[-1]["frames"],
    }


def main() -> None:
    """Run both algorithms undisturbed and killed, compare, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--algorithms", nargs="*", default=list(ALGORITHMS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=RESULTS / "kills.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for algorithm in options.algorithms:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            child = fork(
                lambda r=root, a=algorithm: train(r / "undisturbed", a, Progress()),  # type: ignore[misc]
                root / "undisturbed.log",
            )
            chance = random.Random(f"{options.seed} {algorithm}")
            os.waitpid(child, 0)
            results[algorithm] = killed_run(root, algorithm, options.kills, chance) | compare(root)
            print(algorithm, results[algorithm], flush=True)
    write_results(options.out, {"runs": results})


if __name__ == "__main__":
    main()

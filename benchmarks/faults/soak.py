"""Make many updates of a tiny run, and see whether memory, open files or threads grow.

    python benchmarks/faults/soak.py --updates 20000 --minutes 60

The run has everything: collection, replay past its capacity, evaluations, checkpoints, metrics.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "shared"))

import numpy as np
import torch
from fault_runs import leave_curves_out, small_run
from results_file import RESULTS, write_results

from w2f_torchrl.trainers import Trainer


def usage() -> dict[str, float]:
    """Resident memory in MiB, open files, threads, and objects that Python tracks."""
    status = Path("/proc/self/status").read_text().splitlines()
    resident = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
    return {
        "resident_mib": resident / 1024,
        "open_files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "objects": len(gc.get_objects()),
    }


def soak(run_dir: Path, updates: int, minutes: float, every: int) -> list[dict[str, Any]]:
    """Train, and measure memory and handles every so many updates."""
    config = small_run(
        run_dir,
        "world2filter",
        training={"total_frames": 10**9, "batch_length": 4, "train_ratio": 64, "prefill_steps": 32},
        loss={"imagination_horizon": 3},
        replay={"capacity": 300},
        evaluation={"every_frames": 400, "episodes": 1, "video": False},
        checkpoint={"every_updates": 200, "keep": 3},
        logging={"every_updates": 50},
    )
    trainer = Trainer(config)
    update, end = trainer.learner.update, time.monotonic() + 60 * minutes
    records: list[dict[str, Any]] = []

    def watched(sample: Any) -> Any:
        made = update(sample)
        count = trainer.updates + 1
        if count % every == 0:
            gc.collect()
            records.append({"updates": count, "frames": trainer.frames} | usage())
        if count >= updates or time.monotonic() > end:
            os.kill(os.getpid(), 15)
        return made

    trainer.learner.update = watched  # type: ignore[method-assign]
    trainer.train()
    return records


def growth(records: list[dict[str, Any]]) -> dict[str, float]:
    """Slope over the second half, per 1000 updates."""
    half = records[len(records) // 2 :]
    thousands = np.array([record["updates"] for record in half]) / 1000
    return {
        name: round(float(np.polyfit(thousands, [record[name] for record in half], 1)[0]), 4)
        for name in ("resident_mib", "open_files", "threads", "objects")
    }


def main() -> None:
    """Soak, and write how memory and handles changed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=20_000)
    parser.add_argument("--minutes", type=float, default=60.0, help="stop earlier after these")
    parser.add_argument("--every", type=int, default=250, help="updates between measurements")
    parser.add_argument("--out", default=RESULTS / "soak.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    leave_curves_out()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        records = soak(Path(folder) / "run", options.updates, options.minutes, options.every)
    last = records[-1]
    write_results(
        options.out,
        {
            "updates": last["updates"],
            "frames": last["frames"],
            "minutes": round((time.monotonic() - start) / 60, 1),
            "growth_per_1000_updates_second_half": growth(records),
            "records": records,
        },
    )


if __name__ == "__main__":
    main()

"""Measure how long a run takes to end after SIGTERM at random moments.

    python benchmarks/faults/stop_times.py --moments 20 --out benchmarks/results/stop_times.json

Each run is the command line's, with worker processes, evaluations in the run's own environment and
in a named set, videos and a report. It is resumed until it has ended, then another begins.
Measured are the time until the process is gone, and its leftovers: processes, semaphores, its
temporary folder. The moments are evenly spread over phases: the start (imports,
networks, workers), and random ones later on.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "shared"))

from results_file import RESULTS, write_results
from tiny_run import MODEL

from w2f_torchrl.data.collector.leftovers import SHARED_MEMORY, Leftovers

ROOT = Path(__file__).resolve().parents[2]
START, WHOLE = 15.0, 90.0
"""Minimum seconds that the start takes, and over which the moments are spread."""
OVERRIDES = {
    "environment.domain": "cartpole",
    "environment.task": "balance",
    "environment.distraction": "hard",
    "environment.num_envs": 2,
    "environment.image_size": 32,
    "training.total_frames": 100_000,
    "training.batch_size": 4,
    "training.batch_length": 16,
    "training.train_ratio": 16,
    "training.prefill_steps": 64,
    "collection.num_workers": 2,
    "replay.capacity": 4000,
    "evaluation.every_frames": 512,
    "evaluation.episodes": 2,
    "evaluation.sets": "[all_hard]",
    "checkpoint.every_updates": 50,
    "logging.every_updates": 5,
    "device": "cpu",
    "resume": "auto",
}


def start(run_dir: Path, log: Path) -> subprocess.Popen[bytes]:
    """Start the command line in its own session."""
    settings = OVERRIDES | {f"model.{name}": value for name, value in MODEL.items()}
    settings.pop("model.preset")
    command = [sys.executable, str(ROOT / "sota_configs" / "world2filter.py")]
    command += [f"{name}={value}" for name, value in settings.items()]
    command += [f"run_dir={run_dir}", f"hydra.run.dir={run_dir.parent}/hydra"]
    with log.open("ab") as stream:
        return subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)


def session_of(leader: int) -> list[int]:
    """Processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(path.name))
    return found


_ERROR = re.compile(r"[A-Za-z_.]*(Error|Exception|Interrupt|Requested)\b")


def phase(log: str) -> str:
    """Return the phase that the log shows."""
    if "stopping after this update" not in log:
        return "imports"
    return "start" if "nothing new to save" in log or "checkpoint:" not in log else "training"


def measure(run_dir: Path, log: Path, moment: float) -> dict[str, Any]:
    """Run for so many seconds, send SIGTERM, and wait."""
    log.unlink(missing_ok=True)
    child = start(run_dir, log)
    time.sleep(moment)
    if child.poll() is not None:
        raise RuntimeError(f"ended by itself: {log.read_text()[-3000:]}")
    frames = len((run_dir / "metrics.jsonl").read_bytes()) if run_dir.exists() else 0
    sent = time.time()
    os.kill(child.pid, signal.SIGTERM)
    begin = time.monotonic()
    code = child.wait(timeout=600)
    seconds = time.monotonic() - begin
    time.sleep(0.5)
    own = Leftovers(run_dir)
    semaphores = list(SHARED_MEMORY.glob(f"sem.{own._name}-*"))
    checkpoints = sorted((run_dir / "checkpoints").glob("checkpoint_*.pt"))
    said = log.read_text()
    written = checkpoints[-1].stat().st_mtime if checkpoints else 0.0
    saved = round(written - sent, 2) if written > sent else None
    return {
        "moment_seconds": round(moment, 2),
        "seconds": round(seconds, 2),
        "seconds_to_checkpoint": saved,
        "exit_code": code,
        "phase": phase(said),
        "metrics_bytes": frames,
        "checkpoint": checkpoints[-1].stem if checkpoints else None,
        "tracebacks": [text[:200] for text in said.splitlines() if _ERROR.match(text)],
        "processes_left": len(session_of(child.pid)),
        "semaphores_left": len(semaphores),
        "folder_left": own.folder.exists(),
    }


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=RESULTS / "stop_times.json")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for index in range(options.moments):
            # Every third within the start.
            moment = chance.uniform(0.2, START if index % 3 == 0 else WHOLE)
            rows.append(measure(root / "run", root / "log", moment))
            sys.stderr.write(f"{rows[-1]}\n")
            result = {"rows": rows, "longest_seconds": max(row["seconds"] for row in rows)}
            write_results(options.out, result)


if __name__ == "__main__":
    main()

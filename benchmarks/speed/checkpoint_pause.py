"""Measure how long a checkpoint delays training, how long its writing takes, and its size.

    python benchmarks/speed/checkpoint_pause.py --out benchmarks/results/checkpoint_pause.json

The networks are those of size12m; the replay holds pictures of 64 x 64 with masks, and 4000 records
are new since the previous checkpoint, as with the default settings.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "shared"))

import torch
from results_file import RESULTS, write_results
from tensordict import TensorDict

from w2f_torchrl.checkpoint import list_checkpoints, read_manifest
from w2f_torchrl.checkpoint.writer import CheckpointWriter
from w2f_torchrl.data import StreamReplayBuffer, make_replay
from w2f_torchrl.data.replay.replay_files import ReplayFiles, find_damage, ring_rows
from w2f_torchrl.modules import PRESETS
from w2f_torchrl.trainers import Learner

STREAMS = 4
NEW = 4000


def records(count: int) -> TensorDict:
    """Records of noise, the hardest to compress."""
    flag = torch.zeros(count, 1, dtype=torch.bool)
    following = {
        "pixels": torch.randint(256, (count, 3, 64, 64), dtype=torch.uint8),
        "foreground_mask": torch.rand(count, 1, 64, 64) < 0.1,
        "reward": torch.rand(count, 1),
        "terminated": flag,
        "done": flag,
    }
    return TensorDict(
        {
            "stream": torch.arange(count) % STREAMS,
            "action": torch.rand(count, 6),
            "is_init": flag,
            "next": TensorDict(following, [count]),
        },
        [count],
    )


def make(folder: Path, frames: int, storage: str) -> tuple[StreamReplayBuffer, ReplayFiles]:
    """An empty replay of so many frames, and its files."""
    ring = ring_rows(frames // STREAMS, 3 * NEW // STREAMS)
    on_disk = storage == "disk"
    replay = make_replay(
        capacity=frames,
        num_streams=STREAMS,
        batch_size=16,
        batch_length=64,
        path=folder / "0000" if on_disk else None,
        ring=ring if on_disk else None,
        seed=0,
    )
    return replay, ReplayFiles(replay, folder, "0000", ring)


def measure(root: Path, frames: int, storage: str, learner: Learner) -> dict[str, Any]:
    """Fill a replay, then write three checkpoints with new records each."""
    replay, files = make(root / "replay", frames, storage)
    batch = records(NEW)
    for _ in range(0, frames, NEW):
        replay.extend(batch)
        files.commit(files.prepare(None))
    writer = CheckpointWriter(root / "checkpoints", 3, files)
    payload = {"learner": learner.state_dict(), "sampling": replay.sampling_state()}
    pauses, busy, writes = [], [], []
    for update in range(3):
        replay.extend(batch)
        start, worked = time.monotonic(), time.thread_time()
        writer.save(payload, updates=update, frames=frames)
        pauses.append(time.monotonic() - start)
        busy.append(time.thread_time() - worked)
        writer.wait()
        writes.append(time.monotonic() - start)
    newest = list_checkpoints(root / "checkpoints")[-1]
    manifest = read_manifest(newest)
    assert manifest is not None, "the replay isn't empty"
    start = time.monotonic()
    damage = find_damage(manifest, root / "replay")
    assert not damage, "it was written this moment"
    verified = time.monotonic() - start
    writer.close()
    used = sum(p.stat().st_blocks * 512 for p in (root / "replay").rglob("*") if p.is_file())
    return {
        "frames": frames,
        "storage": storage,
        "pause_seconds": [round(seconds, 3) for seconds in pauses],
        "pause_cpu_seconds": [round(seconds, 3) for seconds in busy],
        "on_disk_after_seconds": [round(seconds, 3) for seconds in writes],
        "checkpoint_mib": round(newest.stat().st_size / 2**20, 1),
        "new_records_mib": round(NEW * 12_850 / 2**20, 1),
        "records_mib": round(used / 2**20, 1),
        "verify_at_resume_seconds": round(verified, 2),
    }


def main() -> None:
    """Measure every size and storage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, nargs="*", default=[10_000, 100_000, 500_000])
    parser.add_argument("--storages", nargs="*", default=["memory", "disk"])
    parser.add_argument("--model", default="size12m", choices=list(PRESETS))
    parser.add_argument("--folder", help="where to write; by default the system's for temporaries")
    parser.add_argument("--out", default=RESULTS / "checkpoint_pause.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    learner = Learner(PRESETS[options.model], action_size=6, image_size=64)
    for parameter in learner.parameters_trained:
        parameter.grad = torch.zeros_like(parameter)
    learner.optimizer.step()
    made = []
    for frames in options.frames:
        for storage in options.storages:
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                made.append(measure(Path(folder), frames, storage, learner))
            sys.stderr.write(f"{made[-1]}\n")
            write_results(
                options.out,
                {"model": options.model, "load_average": os.getloadavg()[0], "runs": made},
            )


if __name__ == "__main__":
    main()

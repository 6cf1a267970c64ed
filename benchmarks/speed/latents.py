"""Measure the cost of latents in the replay: bytes, and time to sample, write back and update.

Run from the repository's root::

    python benchmarks/speed/latents.py
    python benchmarks/speed/latents.py --shapes size12m:16x64 --update-rounds 0

For each model and batch two replays hold the same records in memory, one of them with latents.
Both ways are measured in turn, in one process with one thread; reported is the median over the
rounds of CPU time. An update is DreamerV3's (``--latent whole``) on a sample with or without the
latents that its slices start from; the write-back is the host's work for one update's latents.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "shared"))


os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from replay import measure, records
from results_file import RESULTS, write_results
from tensordict import TensorDict

from w2f_torchrl.data import StreamReplayBuffer, make_replay
from w2f_torchrl.data.replay.latents import latent_fields
from w2f_torchrl.modules import PRESETS
from w2f_torchrl.trainers import Learner
from w2f_torchrl.utils.memory import keep_freed_memory

STREAMS = 16
ACTION_SIZE = 6


def fill(args: argparse.Namespace, shape: tuple[int, int], fields: Any) -> StreamReplayBuffer:
    """Make a replay and write random records, with latents if there are fields."""
    replay = make_replay(
        capacity=args.records,
        num_streams=STREAMS,
        batch_size=shape[0],
        batch_length=shape[1],
        newest_first=False,
        seed=0,
        latents=fields,
    )
    per_stream = args.records // STREAMS
    for start in range(0, per_stream, 250):
        num = min(250, per_stream - start)
        chunk = records(STREAMS, start, num, 64, args.latent != "whole").reshape(-1)
        replay.extend(chunk)
    if fields is not None:
        write_random_latents(replay)
    return replay


def write_random_latents(replay: StreamReplayBuffer) -> None:
    """Give all records latents, so that every page of their memory is in use."""
    assert replay.latents is not None
    for slots in torch.arange(replay.latents.num_rows).split(4096):
        values = {
            name: torch.ones(len(slots), *field.shape).to(field.torch_dtype)
            for name, field in replay.latents.fields.items()
        }
        replay.latents.write(slots, values)


def updated_latents(fields: Any, shape: tuple[int, int]) -> TensorDict:
    """Latents as an update returns them."""
    return TensorDict(
        {
            name: torch.ones(*shape, *field.shape).to(field.torch_dtype)
            for name, field in fields.items()
        },
        shape,
    )


def measure_shape(args: argparse.Namespace, preset: str, shape: tuple[int, int]) -> dict[str, Any]:
    """Measure one model and batch."""
    config = PRESETS[preset]
    fields = latent_fields(config, args.latent)
    kept, plain = fill(args, shape, fields), fill(args, shape, None)
    latents, applied = updated_latents(fields, shape), torch.ones(())
    ways: dict[str, Callable[[], Any]] = {
        "sample": kept.sample,
        "sample_without_latents": plain.sample,
        "write_back": lambda: kept.write_back(kept.sample()["index"], latents, applied),
    }
    milliseconds = measure(ways, args.rounds)
    milliseconds["write_back"] = round(milliseconds["write_back"] - milliseconds["sample"], 3)
    if args.update_rounds:
        learner = Learner(config, action_size=ACTION_SIZE, latent=args.latent)
        sample = kept.sample()
        without = sample.exclude("initial")
        updates = {
            "update": lambda: learner.update(sample),
            "update_without_latents": lambda: learner.update(without),
        }
        milliseconds |= measure(updates, args.update_rounds)
    rows = plain.rows
    record = sum(leaf.nbytes for leaf in rows.values(True, True)) / len(rows)
    return {
        "bytes_of_a_record": record,
        "bytes_of_its_latent": sum(field.size for field in fields.values()),
        "cpu_milliseconds": milliseconds,
    }


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", default=["size1m:8x16", "size12m:16x64"])
    parser.add_argument("--latent", default="whole")
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--update-rounds", type=int, default=5, help="0: no updates")
    parser.add_argument("--output", type=Path, default=RESULTS / "latents.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()  # as a run does
    rows = {}
    for name in args.shapes:
        preset, sizes = name.split(":")
        batch, length = (int(size) for size in sizes.split("x"))
        rows[name] = measure_shape(args, preset, (batch, length))
    results = {
        "machine": f"{len(os.sched_getaffinity(0))}-core {platform.machine().replace('_', '-')}",
        "settings": {k: v for k, v in vars(args).items() if k != "output"} | {"threads": 1},
        "shapes": rows,
    }
    print(write_results(args.output, results).read_text())


if __name__ == "__main__":
    main()

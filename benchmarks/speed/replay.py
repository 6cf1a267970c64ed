"""Compare sampling slices from the replay with a raw gather and TorchRL's SliceSampler.

Run from the repository's root::

    python benchmarks/speed/replay.py
    python benchmarks/speed/replay.py --no-masks --output other.json

All three read B x T records out of the same number of records in memory, in turn, in one process
with one thread; reported is the median CPU time over the rounds. ``growth`` has the same
of other batches and lengths, for all but TorchRL's.

- ours: ``StreamReplayBuffer.sample``: draw, gather, unpack the masks;
- gather: indexing the same bytes with a tensor of indices, and nothing else;
- slice_sampler: TorchRL's TensorDictReplayBuffer with SliceSampler on a two-dimensional storage
  [env, time] of the same stored records, masks packed and left so.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "shared"))


os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from results_file import RESULTS, write_results
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer

from w2f_torchrl.data import StreamReplayBuffer, make_replay, pack_mask
from w2f_torchrl.utils.memory import keep_freed_memory

EPISODE = 501
"""Records of a Control Suite episode at an action repeat of 2."""


def records(streams: int, start: int, num: int, size: int, masks: bool) -> TensorDict:
    """Make records ``[S, num]`` of random pixels."""
    shape = (streams, num)
    position = torch.arange(start, start + num).expand(shape).unsqueeze(-1)
    new: dict[str, Any] = {
        "pixels": torch.randint(0, 256, (*shape, 3, size, size), dtype=torch.uint8),
        "reward": torch.rand(*shape, 1),
        "terminated": torch.zeros(*shape, 1, dtype=torch.bool),
        "done": position % EPISODE == EPISODE - 1,
    }
    if masks:
        new["foreground_mask"] = torch.rand(*shape, 1, size, size) < 0.1
    root = {"action": torch.rand(*shape, 6), "is_init": position % EPISODE == 0}
    stream = torch.arange(streams).unsqueeze(-1).expand(shape)
    return TensorDict({"stream": stream, **root, "next": TensorDict(new, shape)}, shape)


def fill(
    args: argparse.Namespace, *, with_theirs: bool = True
) -> tuple[StreamReplayBuffer, TensorDictReplayBuffer]:
    """Write the same records to our replay and to TorchRL's."""
    per_stream = args.records // args.streams
    ours = make_replay(
        capacity=args.records,
        num_streams=args.streams,
        batch_size=args.batch_size,
        batch_length=args.batch_length,
        newest_first=False,
        seed=0,
    )
    theirs = TensorDictReplayBuffer(
        storage=LazyTensorStorage(per_stream * args.streams, ndim=2),
        sampler=SliceSampler(
            slice_len=args.batch_length, end_key=("next", "done"), cache_values=True
        ),
        batch_size=args.batch_size * args.batch_length,
        dim_extend=1,
    )
    for start in range(0, per_stream, 250):
        num = min(250, per_stream - start)
        chunk = records(args.streams, start, num, args.image_size, args.masks)
        ours.extend(chunk.reshape(-1))
        if not with_theirs:
            continue
        if args.masks:
            chunk["next", "foreground_mask"] = pack_mask(chunk["next", "foreground_mask"])
        theirs.extend(chunk.exclude("stream"))
    return ours, theirs


def raw_gather(replay: StreamReplayBuffer, batch_size: int, batch_length: int) -> Callable[[], Any]:
    """Return a function that indexes every stored tensor with random consecutive slots."""
    leaves = list(replay.storage._storage.values(True, True))
    offsets = torch.arange(batch_length)

    def gather() -> list[torch.Tensor]:
        start = torch.randint(len(replay) - batch_length, (batch_size, 1))
        return [leaf[start + offsets] for leaf in leaves]

    return gather


def measure(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the median milliseconds of each way, called in turn."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 3):
        for name, way in ways.items():
            begin = time.process_time()
            way()
            if number >= 3:  # the first rounds warm caches up
                times[name].append(1e3 * (time.process_time() - begin))
    return {name: round(median(values), 3) for name, values in times.items()}


def grow(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Milliseconds at other shapes ``B x T``, one factor at a time."""
    batch, length = args.batch_size, args.batch_length
    shapes = [(batch // 4, length), (batch * 4, length), (batch, length // 4), (batch, length * 4)]
    rows = {}
    for batch_size, batch_length in shapes:
        shape = {"batch_size": batch_size, "batch_length": batch_length}
        ours, _ = fill(argparse.Namespace(**(vars(args) | shape)), with_theirs=False)
        ways = {"ours": ours.sample, "gather": raw_gather(ours, batch_size, batch_length)}
        rows[f"{batch_size}x{batch_length}"] = measure(ways, args.rounds)
    return rows


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--records", type=int, default=50_000)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--batch-length", type=int, default=64)
    parser.add_argument("--masks", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, default=RESULTS / "replay.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()  # as a run does
    ours, theirs = fill(args)
    ways = {
        "ours": ours.sample,
        "gather": raw_gather(ours, args.batch_size, args.batch_length),
        "slice_sampler": theirs.sample,
    }
    medians = measure(ways, args.rounds)
    rows = ours.storage._storage
    architecture = platform.machine().replace("_", "-")
    results = {
        "machine": f"{len(os.sched_getaffinity(0))}-core {architecture}",
        "settings": {k: v for k, v in vars(args).items() if k != "output"} | {"threads": 1},
        "stored_bytes_a_record": sum(v.nbytes for v in rows.values(True, True)) / len(rows),
        "milliseconds_a_sample": medians,
        "time_relative_to_ours": {
            name: round(value / medians["ours"], 2) for name, value in medians.items()
        },
        "growth": grow(args),
    }
    print(write_results(args.output, results).read_text())


if __name__ == "__main__":
    main()

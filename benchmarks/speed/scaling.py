"""Estimate the cost of several ranks: measured on this machine's cores, modelled for GPUs.

``python benchmarks/speed/scaling.py --json benchmarks/results/scaling.json``

Measured: two gloo ranks, one thread each, the same update. ``alone``: the two learn apart at
the same time, so that both cases load the machine alike; then with DistributedDataParallel and with
one flat all-reduce. Rounds alternate; CPU seconds are the process's; the wall-clock time depends on
the machine's other load.

Modelled: efficiency = update / (update + exposed communication) on 1 to 64 GPUs, for update times
and networks that are assumptions, named in the results.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "shared"))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from learner import make_sample
from results_file import write_results

from w2f_torchrl.modules import PRESETS
from w2f_torchrl.trainers import Learner
from w2f_torchrl.utils.ranks import Ranks

KINDS = {"alone": "none", "ddp": "ddp", "flat": "flat"}
GPUS_PER_NODE = 8
#: Bytes a second that each GPU can send; seconds that a message takes. Assumptions, not measured.
NETWORKS = {
    "within a node, NVLink": {"bandwidth": 300e9, "latency": 3e-6},
    "between nodes, 400 Gb/s for each GPU": {"bandwidth": 45e9, "latency": 8e-6},
    "between nodes, 100 Gb/s for each node": {"bandwidth": 11e9 / GPUS_PER_NODE, "latency": 20e-6},
}


def measure_rank(rank: int, args: argparse.Namespace, port: int, out: str) -> None:
    """One rank's measurements, written by rank 0."""
    torch.set_num_threads(1)
    names = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    Ranks.from_environment().connect(torch.device("cpu"), timeout_seconds=1800)
    torch.manual_seed(0)
    learners = {
        name: Learner(PRESETS[args.model], action_size=6, latent="split", gradients=kind)
        for name, kind in KINDS.items()
    }
    sample = make_sample(args.batch_size, args.batch_length)
    times: dict[str, list[list[float]]] = {name: [] for name in (*KINDS, "all_reduce")}
    for number in range(args.rounds + 1):  # the first warms up
        for name, learner in learners.items():
            measured = clock(lambda learner=learner: learner.update(sample), args.updates)
            times[name].append(measured)
        buffer = learners["flat"]._gradients._buffer  # type: ignore[attr-defined]
        times["all_reduce"].append(clock(lambda buffer=buffer: dist.all_reduce(buffer), 5))
        if number == 0:
            times = {name: [] for name in times}
    if rank == 0:
        torch.save(times, out)
    dist.barrier()


def clock(function: Any, repeats: int) -> list[float]:
    """CPU and wall-clock seconds of a call, on average; both ranks begin together."""
    dist.barrier()
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(repeats):
        function()
    return [(time.process_time() - cpu) / repeats, (time.perf_counter() - wall) / repeats]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Median times of both ranks' updates, and their ratio to learning alone."""
    out = f"{args.json}.times"
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    mp.spawn(measure_rank, (args, port, out), nprocs=2)
    times = torch.load(out, weights_only=True)
    Path(out).unlink()
    found: dict[str, Any] = {}
    for name, pairs in times.items():
        cpu, wall = zip(*pairs, strict=True)
        found[name] = {
            "median_cpu_seconds": round(statistics.median(cpu), 4),
            "median_wall_seconds": round(statistics.median(wall), 4),
        }
        if name in KINDS:
            for label, index in (("cpu", 0), ("wall", 1)):
                ratios = [a[index] / b[index] for a, b in zip(pairs, times["alone"], strict=True)]
                found[name][f"median_{label}_ratio_to_alone"] = round(statistics.median(ratios), 3)
    return found


def communication(model: str, batch_size: int, batch_length: int) -> dict[str, Any]:
    """Bytes and calls that an update of a preset needs."""
    with torch.device("meta"):
        learner = Learner(PRESETS[model], action_size=6, latent="split", device="meta")
    parameters = sum(p.numel() for p in learner.parameters_trained)
    horizon = learner.loss.config.imagination_horizon
    return {
        "parameters": parameters,
        "gradient_bytes": 4 * parameters,
        # DistributedDataParallel's buckets: a first one of 1 MiB, then of 25 MiB.
        "ddp_calls_at_least": 1 + -(-max(4 * parameters - 2**20, 0) // (25 * 2**20)),
        "flat_calls": 1,
        "returns_bytes_of_each_rank": 4 * batch_size * batch_length * horizon,
        "returns_calls": 1,
        "stop_flag_bytes": 8,
    }


def all_reduce_seconds(gpus: int, size: int, between: str) -> float:
    """Ring within the node, then between nodes: each GPU its eighth of the buffer.

    Args:
        gpus: How many.
        size: Bytes.
        between: Which of ``NETWORKS`` joins the nodes.
    """
    local = min(gpus, GPUS_PER_NODE)
    inside, outside = NETWORKS["within a node, NVLink"], NETWORKS[between]
    nodes = gpus // local
    seconds = _ring(local, size, inside)
    return seconds + _ring(nodes, size / local, outside)


def _ring(members: int, size: float, network: dict[str, float]) -> float:
    if members == 1:
        return 0.0
    transfer = 2 * (members - 1) / members * size / network["bandwidth"]
    return transfer + 2 * (members - 1) * network["latency"]


def efficiency(gpus: int, update: float, needs: dict[str, Any], between: str) -> float:
    """Share of the time that is not communication, none of which is hidden (the flat mode)."""
    if gpus == 1:
        return 1.0
    gradients = all_reduce_seconds(gpus, needs["gradient_bytes"], between)
    # An all-gather is half an all-reduce of what comes together.
    returns = all_reduce_seconds(gpus, needs["returns_bytes_of_each_rank"] * gpus, between) / 2
    return update / (update + gradients + returns)


def model_table(needs: dict[str, dict[str, Any]], updates: Sequence[float]) -> list[dict[str, Any]]:
    """Efficiencies of presets on 1 to 64 GPUs."""
    return [
        {
            "model": model,
            "update_seconds": update,
            "between_nodes": between,
            "efficiency": {
                str(gpus): round(efficiency(gpus, update, needs[model], between), 3)
                for gpus in (1, 2, 4, 8, 16, 32, 64)
            },
        }
        for model in needs
        for between in list(NETWORKS)[1:]
        for update in updates
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, model and write both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="size1m", choices=sorted(PRESETS))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batch-length", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--updates", type=int, default=2, help="of each kind in a round")
    parser.add_argument(
        "--update-seconds",
        type=float,
        nargs="+",
        default=(0.01, 0.03, 0.1),
        help="an update on one GPU, for the model; benchmarks/speed/learner.py measures it",
    )
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(arguments)
    needs = {model: communication(model, 16, 64) for model in ("size12m", "size200m")}
    shape = {"batch_size": args.batch_size, "batch_length": args.batch_length}
    results = {
        "measured": {
            "settings": {"model": args.model, "ranks": 2, "threads_of_each": 1, **shape},
            "load_of_the_machine": round(os.getloadavg()[0], 1),
            **measure(args),
        },
        "communication_of_an_update": {
            "shape": {"batch_size": 16, "batch_length": 64, "of": "each rank"},
            **needs,
        },
        "model": {
            "assumptions": {
                "networks": NETWORKS,
                "update_seconds": "as given; the defaults are assumed, not measured on a GPU",
                "hidden": "nothing: one flat all-reduce after the backward pass",
                "ranks": "equally fast; collection and evaluation are not counted",
            },
            "table": model_table(needs, args.update_seconds),
        },
    }
    write_results(args.json, results)


if __name__ == "__main__":
    main()

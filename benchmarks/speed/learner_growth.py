"""Measure how an update's time, arithmetic, operations and memory grow, one axis at a time.

    python benchmarks/speed/learner_growth.py
    python benchmarks/speed/learner_growth.py --device cuda --precision bfloat16 \
        --execution cuda_graph --model size12m --batch-size 16 --batch-length 64

Around a base shape the batch, the length, the picture and the model vary. Each point runs in a
separate process, which measures its peak memory; all points take turns, ``--repeats`` times. Kept
are medians of CPU time (on CUDA the time until the device has finished), and everything as a
multiple of the base's. Memory is the growth since before there was a sample or a learner: on a CPU
of resident memory, on CUDA of what torch has reserved. FLOP (a multiplication and
an addition are two) and operations are an eager update's.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "shared"))

import torch
from learner import ACTION_SIZE, count, make_clock, make_sample, measure, product_gflops
from results_file import RESULTS, write_results

from w2f_torchrl.config import EXECUTIONS, PRECISIONS, OptimizerConfig
from w2f_torchrl.modules import PRESETS
from w2f_torchrl.trainers import Learner
from w2f_torchrl.utils.memory import keep_freed_memory

AXES: dict[str, tuple[Any, ...]] = {
    "batch_size": (4, 8, 16),
    "batch_length": (16, 32, 64),
    "image_size": (32, 64, 128),
    "model": ("size1m", "size12m", "size25m"),
}


def points(base: dict[str, Any], axes: dict[str, tuple[Any, ...]]) -> dict[str, dict[str, Any]]:
    """The base and its neighbours along each axis, by name."""
    table = {"base": base}
    for axis, values in axes.items():
        others = (value for value in values if value != base[axis])
        table |= {f"{axis}={value}": base | {axis: value} for value in others}
    return table


def held_mib(device: str) -> float:
    """Peak memory of this process so far."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return torch.cuda.max_memory_reserved() / 2**20


def measure_point(settings: dict[str, Any], counted: bool) -> dict[str, float]:
    """Time updates of one shape, in this process; ``counted``: FLOP and operations too."""
    torch.set_num_threads(settings["threads"])
    keep_freed_memory()
    device = settings["device"]
    before = held_mib(device)
    shape = settings["batch_size"], settings["batch_length"]
    sample = make_sample(*shape, device, settings["image_size"])
    learner = _learner(settings, settings["execution"])
    seconds, _, _ = measure({"": (learner.update, sample)}, settings["rounds"], device)
    row = {"seconds": statistics.median(seconds[""]), "peak_mib": held_mib(device) - before}
    return row | (_count(settings, sample) if counted else {})


def _learner(settings: dict[str, Any], execution: str) -> Learner:
    return Learner(
        PRESETS[settings["model"]],
        action_size=ACTION_SIZE,
        image_size=settings["image_size"],
        latent=settings["latent"],
        execution=execution,
        device=settings["device"],
        optimizer=OptimizerConfig(precision=settings["precision"]),
    )


def _count(settings: dict[str, Any], sample: Any) -> dict[str, float]:
    learner = _learner(settings, "eager")  # a captured graph's operations can't be counted
    parameters = sum(p.numel() for p in learner.parameters_trained)
    return count(learner.update, sample) | {"million_parameters": round(parameters / 1e6, 3)}


def product_rate(settings: dict[str, Any]) -> float:
    """GFLOP per second of a large product, in this process."""
    torch.set_num_threads(settings["threads"])
    dtype = torch.bfloat16 if settings["precision"] == "bfloat16" else torch.float32
    return product_gflops(settings["device"], dtype, make_clock(settings["device"]))


def in_own_process(device: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a separate process.

    Raises:
        EOFError: If it failed; its traceback is on the standard error.
    """
    # A fork has everything imported; CUDA can't be used in one.
    context = multiprocessing.get_context("fork" if device == "cpu" else "spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def _send(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    sender.send(function(*arguments))


def run(base: dict[str, Any], axes: dict[str, tuple[Any, ...]], repeats: int) -> dict[str, Any]:
    """Measure every point ``repeats`` times, in turn."""
    table = points(base, axes)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in table}
    rates = []
    for turn in range(repeats):
        rates.append(in_own_process(base["device"], product_rate, base))
        for name, settings in table.items():
            row = in_own_process(base["device"], measure_point, settings, turn == 0)
            rows[name].append(row)
            print(name, row, flush=True)
    rate = max(rates)
    medians = {name: _medians(each, rate) for name, each in rows.items()}
    first = medians["base"]
    for row in medians.values():
        grown = ("seconds", "gflop", "operations", "peak_mib", "million_parameters")
        row["times_base"] = {key: round(row[key] / first[key], 3) for key in grown}
    return {"product_gflop_per_second": round(rate, 1), "update": medians}


def _medians(rows: list[dict[str, float]], rate: float) -> dict[str, Any]:
    seconds = statistics.median(row["seconds"] for row in rows)
    return {
        "seconds": round(seconds, 5),
        "peak_mib": round(statistics.median(row["peak_mib"] for row in rows), 1),
        **{key: rows[0][key] for key in ("gflop", "operations", "million_parameters")},
        "share_of_product_rate": round(rows[0]["gflop"] / seconds / rate, 3),
    }


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="size1m", choices=list(PRESETS))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batch-length", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--latent", default="split", choices=["whole", "shared", "split"])
    parser.add_argument("--execution", default="eager", choices=EXECUTIONS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="float32", choices=PRECISIONS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="timed updates of a point, each turn")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=list(AXES))
    name = "learner_growth.json"
    parser.add_argument("--out", type=Path, default=RESULTS / name)
    args = parser.parse_args()
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    base = {key: value for key, value in settings.items() if key not in ("axes", "repeats")}
    results = run(base, {axis: AXES[axis] for axis in args.axes}, args.repeats)
    print(write_results(args.out, {"settings": settings, **results}).read_text())


if __name__ == "__main__":
    main()

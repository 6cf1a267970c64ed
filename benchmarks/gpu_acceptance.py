"""Every check of this project that wants a GPU, stage by stage, into one results file.

    python benchmarks/gpu_acceptance.py --r2dreamer CHECKOUT
    python benchmarks/gpu_acceptance.py --stages learner losses --minutes 10
    python benchmarks/gpu_acceptance.py --small        # the same code, tiny, on the CPU

No network is used. Each stage runs in a process of its own, with a limit, and its result or error
is written at once: a run that is cut keeps what it has, the parts of a stage that was cut too, and
a broken stage stops no other. The limits together are below 25 minutes. The exit code is the number
of stages that failed or were not reached.

- environment: versions, the device, rates of a large product;
- render: the simulator's mask on this machine's OpenGL, frames a second;
- learner: milliseconds, arithmetic and memory of an update in each mode (learner.py);
- losses: each mode of execution gives eager's losses, gradients and changes over 50 updates, one by
  one and free-running, and compiles nothing after its first two (execution_equality.py);
- run: a short training on distracted walker_walk, 16 envs at a train ratio of 512, with and without
  overlap: frames a second and where the time goes (end_to_end.py);
- masks: frames a second of SAM3 with random weights, of the student, and of the median;
- peers: milliseconds of an update of TorchRL's parts and stepper and, with a checkout, of
  r2dreamer, beside ours.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from results_file import write_results

HERE = Path(__file__).parent
#: Seconds that a stage may take; their sum stays below 25 minutes. The first imports everything.
LIMITS = {
    "environment": 90,
    "render": 60,
    "learner": 320,
    "losses": 320,
    "run": 270,
    "masks": 140,
    "peers": 270,
}
MINUTES = 24.5
#: By how much more a stage may take with ``--small``, on a CPU that others use.
PATIENCE = 6
#: Writes down what a stage has so far.
Keep = Callable[[dict[str, Any]], None]


class Options(NamedTuple):
    """What the command line says to every stage."""

    small: bool
    """The same code, tiny, on the CPU."""
    r2dreamer: Path | None
    """A checkout."""
    keep: Keep
    """What a stage gave it is not lost when it is cut."""


def environment(options: Options) -> dict[str, Any]:
    """Versions, the device, and what it multiplies."""
    import torch
    from learner import make_clock, product_gflops

    device = _device(options)
    clock = make_clock(device)
    rates = {"float32": round(product_gflops(device, torch.float32, clock))}
    if device == "cuda":
        rates["bfloat16"] = round(product_gflops(device, torch.bfloat16, clock))
    memory = 0 if device == "cpu" else torch.cuda.get_device_properties(0).total_memory
    return {"cuda": torch.version.cuda, "memory_gib": memory >> 30, "product_gflops": rates}


def losses(options: Options) -> dict[str, Any]:
    """Each mode against eager, update by update and free-running."""
    import execution_equality

    device = _device(options)
    shape: dict[str, Any] = {"model": "size1m", "batch_size": 8, "batch_length": 32, "updates": 50}
    modes = ["compile", "cuda_graph", "cuda_graph_parallel"]
    if options.small:
        shape, modes = {"updates": 3}, ["eager"]
    rows: dict[str, Any] = {}
    for latent in ("split", "whole"):
        for mode in modes:
            if mode == "cuda_graph_parallel" and latent != "split":
                continue  # there is nothing beside
            compared = execution_equality.run([mode], latents=[latent], device=device, **shape)
            rows |= compared
            options.keep(rows)
    bad = [name for name, row in rows.items() if not row["passed"]]
    if bad:
        raise AssertionError(f"differs from eager or compiles again: {', '.join(bad)}.")
    return rows


def learner(options: Options) -> dict[str, Any]:
    """What learner.py measures: 12m, batch 16 x 64, bfloat16."""
    modes = [] if options.small else ["compile", "cuda_graph", "cuda_graph_parallel"]
    return _learner_benchmark(options, "--latents whole split --no-stepper", modes)


def peers(options: Options) -> dict[str, Any]:
    """The same of other projects, beside ours."""
    words = "--latents whole"
    if options.r2dreamer is not None:
        words += f" --r2dreamer {options.r2dreamer}"
    return _learner_benchmark(options, words, [] if options.small else ["cuda_graph"])


def _learner_benchmark(options: Options, words: str, modes: list[str]) -> dict[str, Any]:
    import learner as benchmark

    shape = "--device cuda --precision bfloat16 --model size12m --batch-size 16 --batch-length 64"
    if options.small:
        shape = "--batch-size 2 --batch-length 4 --rounds 1"
    return benchmark.run(benchmark.parse([*words.split(), *shape.split(), "--modes", *modes]))


def masks(options: Options) -> dict[str, Any]:
    """Frames a second of each segmenter on random pictures, SAM3's weights random."""
    import torch

    from w2f_torchrl.segmenters import (
        MedianSegmenter,
        SegmenterUnavailableError,
        StudentNetwork,
        StudentSegmenter,
    )

    device, small = _device(options), options.small
    pixels = torch.randint(0, 256, (8 if small else 256, 3, 64, 64), dtype=torch.uint8)
    student = StudentSegmenter(StudentNetwork(), device=device)
    median = MedianSegmenter().fit(pixels)
    result: dict[str, Any] = {"student": _rate(student, pixels), "median": _rate(median, pixels)}
    options.keep(result)
    try:
        result["sam3_random_weights"] = _rate(
            _random_sam3(device, small), pixels[: 2 if small else 32]
        )
    except SegmenterUnavailableError as error:
        result["sam3_random_weights"] = f"not measured: {error}"
    return result


def _rate(segmenter: Callable[[Any], Any], pixels: Any) -> float:
    segmenter(pixels)
    begin = time.perf_counter()
    for _ in range(3):
        segmenter(pixels)  # ends with a copy to the host, so the device has finished
    return round(3 * len(pixels) / (time.perf_counter() - begin), 1)


def _random_sam3(device: str, small: bool) -> Any:
    """SAM3 with random weights: of its own size, or tiny."""
    from dataclasses import asdict

    import torch

    from w2f_torchrl.segmenters import Sam3Segmenter, sam3
    from w2f_torchrl.segmenters.sam3_requirements import find_vocabulary, require_package

    require_package()
    size = sam3.TINY if small else sam3.Sam3Architecture()
    model = sam3.build_sam3(size, resolution=None, vocabulary=find_vocabulary())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.pt"
        torch.save({"architecture": asdict(size), "model": dict(model.state_dict())}, path)
        return Sam3Segmenter(["robot"], checkpoint=str(path), device=device)


def render(options: Options) -> dict[str, Any]:
    """Frames a second with the simulator's mask, and that the mask covers something."""
    from w2f_torchrl.envs import make_env

    env = make_env("walker", "walk", distraction="easy")
    steps = 5 if options.small else 300
    env.rollout(2)
    begin = time.perf_counter()
    rollout = env.rollout(steps)
    seconds = time.perf_counter() - begin
    share = float(rollout["foreground_mask"].float().mean())
    env.close()
    if not 0.005 < share < 0.5:
        raise AssertionError(f"the mask covers {share:.4f} of the picture: wrong on this OpenGL.")
    return {"agent_steps_per_second": round(steps / seconds, 1), "mask_share": round(share, 4)}


def run(options: Options) -> dict[str, Any]:
    """A short training on distracting walker_walk: end_to_end.py's."""
    import end_to_end

    if options.small:
        overrides = ["training.batch_size=2", "training.batch_length=4", "training.train_ratio=1"]
        overrides += ["training.prefill_steps=32", "training.total_frames=256"]
        overrides += ["collection.num_workers=1", "collection.steps_per_batch=4", "device=cpu"]
        return end_to_end.run([*end_to_end.SMALL, *overrides])
    overrides = ["model=size12m", "environment.num_envs=16", "training.batch_size=16"]
    overrides += ["training.batch_length=64", "training.train_ratio=512"]
    overrides += ["training.prefill_steps=2048", "training.total_frames=8192"]
    overrides += ["training.execution=cuda_graph", "optimizer.precision=bfloat16"]
    return end_to_end.run([*end_to_end.SMALL, *overrides])


STAGES: dict[str, Callable[[Options], dict[str, Any]]] = {
    "environment": environment,
    "render": render,
    "learner": learner,
    "losses": losses,
    "run": run,
    "masks": masks,
    "peers": peers,
}


def _device(options: Options) -> str:
    import torch

    if options.small:
        return "cpu"
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; --small runs the same stages on the CPU.")
    return "cuda"


def run_stage(name: str, arguments: list[str], limit: float) -> dict[str, Any]:
    """Run a stage in a process of its own and give what it has, and how it failed if it did."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, str(Path(__file__).resolve()), *arguments]
        command += ["--one", name, str(out)]
        row: dict[str, Any] = {}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
            if done.returncode:
                row["failed"] = f"exit code {done.returncode}: {done.stderr[-1500:]}"
        except subprocess.TimeoutExpired:
            row["failed"] = f"not done after {limit:.0f} seconds"
        if out.exists():
            row["result"] = json.loads(out.read_text())
    return row | {"seconds": round(time.perf_counter() - begin, 1)}


def run_one(name: str, path: Path, options: Options) -> None:
    """Run a stage in this process; its result, or what there is of it, goes into a file."""

    def keep(result: dict[str, Any]) -> None:
        written = path.with_suffix(".new")
        written.write_text(json.dumps(result, allow_nan=False))
        written.replace(path)  # whole, whenever this process is ended

    keep(STAGES[name](options._replace(keep=keep)))


def main() -> None:
    """Run the stages that there is time for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--minutes", type=float, help=f"for all stages together: {MINUTES}")
    parser.add_argument("--small", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--r2dreamer", type=Path, help="a checkout, for the stage peers")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu_acceptance.json")
    parser.add_argument("--one", nargs=2, metavar=("STAGE", "PATH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        options = Options(args.small, args.r2dreamer, lambda result: None)
        run_one(args.one[0], Path(args.one[1]), options)
        return
    patience = PATIENCE if args.small else 1
    minutes = MINUTES * patience if args.minutes is None else args.minutes
    deadline = time.perf_counter() + 60 * minutes
    arguments = ["--small"] if args.small else []
    if args.r2dreamer is not None:
        arguments += ["--r2dreamer", str(args.r2dreamer.resolve())]
    rows: dict[str, Any] = {}
    for name in args.stages:
        left = min(LIMITS[name] * patience, deadline - time.perf_counter())
        rows[name] = run_stage(name, arguments, left) if left > 5 else {"failed": "no time left"}
        settings = {"small": args.small, "minutes": minutes, "limits": LIMITS}
        write_results(args.out, {"settings": settings, "stages": rows})
        print(name, json.dumps(rows[name])[:300], flush=True)
    print(args.out)
    sys.exit(sum("failed" in row for row in rows.values()))


if __name__ == "__main__":
    main()

"""Every check of this project that wants a GPU, stage by stage, into one results file.

    python benchmarks/gpu_acceptance.py
    python benchmarks/gpu_acceptance.py --stages learner losses --minutes 10
    python benchmarks/gpu_acceptance.py --small        # the same code, tiny, on the CPU

No network is used. Each stage runs in a process of its own, with a limit, and its result or error
is written at once: a run that is cut keeps what it has, and a broken stage stops no other. The exit
code is the number of stages that failed or were not reached.

- environment: versions, the device, rates of a large product;
- losses: each mode of execution gives eager's losses on the same data and noise, and compiles
  nothing after its first updates;
- learner: milliseconds of an update, ours and TorchRL's eager parts and stepper (learner.py);
- masks: frames a second of SAM3 with random weights, of the student, and of the median;
- render: the simulator's mask on this machine's OpenGL, frames a second;
- run: a short training on distracting walker_walk, frames a second and where the time goes.
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
from typing import Any

from results_file import write_results

HERE = Path(__file__).parent
#: Seconds that a stage may take; their sum stays below 25 minutes.
LIMITS = {
    "environment": 90,
    "render": 90,
    "losses": 360,
    "learner": 450,
    "masks": 180,
    "run": 300,
}


def environment(small: bool) -> dict[str, Any]:
    """Versions, the device, and what it multiplies."""
    import torch
    from learner import make_clock, product_gflops

    device = _device(small)
    clock = make_clock(device)
    rates = {"float32": round(product_gflops(device, torch.float32, clock))}
    if device == "cuda":
        rates["bfloat16"] = round(product_gflops(device, torch.bfloat16, clock))
    memory = 0 if small else torch.cuda.get_device_properties(0).total_memory
    return {"cuda": torch.version.cuda, "memory_gib": memory >> 30, "product_gflops": rates}


def losses(small: bool) -> dict[str, Any]:
    """Largest difference of a loss from eager's, and graphs compiled after the first updates."""
    import torch
    from learner import ACTION_SIZE, make_sample

    from w2f_torchrl.modules import PRESETS
    from w2f_torchrl.trainers import Learner

    device, updates = _device(small), 3 if small else 50
    modes = ["eager"] if small else ["eager", "compile", "cuda_graph"]
    sample = make_sample(2 if small else 8, 4 if small else 32, device)
    result: dict[str, Any] = {"updates": updates}
    for latent in ("whole", "split"):
        curves: dict[str, torch.Tensor] = {}
        for mode in [*modes, *(["eager"] if small else [])]:
            torch.manual_seed(0)
            learner = Learner(
                PRESETS["size1m"],
                action_size=ACTION_SIZE,
                latent=latent,
                execution=mode,
                device=device,
            )
            torch.manual_seed(1)
            rows, graphs = [], 0
            for number in range(updates):
                metrics = learner.update(sample.clone())
                rows.append(torch.stack([metrics[name] for name in learner.loss.out_keys]))
                if number == 1:
                    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            curve = torch.stack(rows).double().cpu()
            if "eager" in curves:
                later = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
                result[f"{latent}, {mode}"] = _compare(curve, curves["eager"], later)
            curves[mode] = curve
    bad = [name for name, row in result.items() if isinstance(row, dict) and not row["passed"]]
    if bad:
        raise AssertionError(f"differs from eager or compiles again: {bad}: {json.dumps(result)}")
    return result


def _compare(curve: Any, eager: Any, later_graphs: int) -> dict[str, Any]:
    """First updates must agree; later, rounding may turn a draw, so means are compared."""
    import torch

    first = torch.allclose(curve[:3], eager[:3], rtol=1e-3, atol=1e-3)
    mean = torch.allclose(curve.mean(0), eager.mean(0), rtol=5e-2, atol=3e-2)
    return {
        "largest_difference_of_first_3": float((curve[:3] - eager[:3]).abs().max()),
        "largest_difference_of_means": float((curve.mean(0) - eager.mean(0)).abs().max()),
        "graphs_compiled_after_2_updates": later_graphs,
        "passed": bool(first and mean and later_graphs == 0),
    }


def learner(small: bool) -> dict[str, Any]:
    """What learner.py measures: 12m, batch 16 x 64, bfloat16."""
    import learner as benchmark

    words = "--latents whole split --batch-size 2 --batch-length 4 --rounds 1 --modes"
    if not small:
        words = (
            "--latents whole split --device cuda --model size12m --batch-size 16 --batch-length 64 "
            "--precision bfloat16 --rounds 10 --modes compile cuda_graph"
        )
    return benchmark.run(benchmark.parse(words.split()))


def masks(small: bool) -> dict[str, Any]:
    """Frames a second of each segmenter on random pictures, SAM3's weights random."""
    import torch

    from w2f_torchrl.segmenters import (
        MedianSegmenter,
        SegmenterUnavailableError,
        StudentNetwork,
        StudentSegmenter,
    )

    device = _device(small)
    pixels = torch.randint(0, 256, (8 if small else 256, 3, 64, 64), dtype=torch.uint8)
    student = StudentSegmenter(StudentNetwork(), device=device)
    median = MedianSegmenter().fit(pixels)
    result: dict[str, Any] = {"student": _rate(student, pixels), "median": _rate(median, pixels)}
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


def render(small: bool) -> dict[str, Any]:
    """Frames a second with the simulator's mask, and that the mask covers something."""
    from w2f_torchrl.envs import make_env

    env = make_env("walker", "walk", distraction="easy")
    steps = 5 if small else 300
    env.rollout(2)
    begin = time.perf_counter()
    rollout = env.rollout(steps)
    seconds = time.perf_counter() - begin
    share = float(rollout["foreground_mask"].float().mean())
    env.close()
    if not 0.005 < share < 0.5:
        raise AssertionError(f"the mask covers {share:.4f} of the picture: wrong on this OpenGL.")
    return {"agent_steps_per_second": round(steps / seconds, 1), "mask_share": round(share, 4)}


def run(small: bool) -> dict[str, Any]:
    """A short training on distracting walker_walk: end_to_end.py's."""
    import end_to_end

    if small:
        overrides = ["training.batch_size=2", "training.batch_length=4", "training.train_ratio=1"]
        overrides += ["training.prefill_steps=32", "training.total_frames=256"]
        overrides += ["collection.num_workers=1", "collection.steps_per_batch=4", "device=cpu"]
        return end_to_end.run([*end_to_end.SMALL, *overrides])
    overrides = ["model=size12m", "environment.num_envs=16", "training.batch_size=16"]
    overrides += ["training.batch_length=64", "training.train_ratio=512"]
    overrides += ["training.prefill_steps=2048", "training.total_frames=8192"]
    overrides += ["training.execution=cuda_graph", "optimizer.precision=bfloat16"]
    return end_to_end.run([*end_to_end.SMALL, *overrides])


STAGES: dict[str, Callable[[bool], dict[str, Any]]] = {
    "environment": environment,
    "render": render,
    "losses": losses,
    "learner": learner,
    "masks": masks,
    "run": run,
}


def _device(small: bool) -> str:
    import torch

    if small:
        return "cpu"
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; --small runs the same stages on the CPU.")
    return "cuda"


def run_stage(name: str, small: bool, limit: float) -> dict[str, Any]:
    """Run a stage in a process of its own and give its result, or how it failed."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--one", name, str(out)]
        command += ["--small"] if small else []
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
            failed = f"exit code {done.returncode}: {done.stderr[-1500:]}"
        except subprocess.TimeoutExpired:
            failed = f"not done after {limit:.0f} seconds"
        row = {"result": json.loads(out.read_text())} if out.exists() else {"failed": failed}
    return row | {"seconds": round(time.perf_counter() - begin, 1)}


def main() -> None:
    """Run the stages that there is time for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--minutes", type=float, default=24.5, help="for all stages together")
    parser.add_argument("--small", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu_acceptance.json")
    parser.add_argument("--one", nargs=2, metavar=("STAGE", "PATH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        result = STAGES[args.one[0]](args.small)
        Path(args.one[1]).write_text(json.dumps(result, allow_nan=False))
        return
    deadline = time.perf_counter() + 60 * args.minutes
    rows: dict[str, Any] = {}
    for name in args.stages:
        left = min(LIMITS[name], deadline - time.perf_counter())
        rows[name] = run_stage(name, args.small, left) if left > 5 else {"failed": "no time left"}
        settings = {"small": args.small, "minutes": args.minutes, "limits": LIMITS}
        write_results(args.out, {"settings": settings, "stages": rows})
        print(name, json.dumps(rows[name])[:300], flush=True)
    print(args.out)
    sys.exit(sum("failed" in row for row in rows.values()))


if __name__ == "__main__":
    main()

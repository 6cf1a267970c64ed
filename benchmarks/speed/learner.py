"""Time an update against TorchRL's own, in one run, on the same modules and data.

    python benchmarks/speed/learner.py --model size1m
    python benchmarks/speed/learner.py --model size12m --rounds 3 --latents whole split --modes
    python benchmarks/speed/learner.py --device cuda --model size12m --batch-size 16 \
        --batch-length 64 --precision bfloat16 --modes compile cuda_graph

Contenders: ours for each latent (``whole`` is DreamerV3) and mode of execution, with TorchRL's
image encoder and decoder unless ``--decoder`` and ``--resample`` say otherwise; ``torchrl_parts``,
an eager update of TorchRL's rollout, losses, optimizer and target network; on CUDA
``torchrl_stepper``, TorchRL's DreamerV3OptimizationStepper with its defaults (on a CPU it is the
parts, eager); with ``--r2dreamer CHECKOUT`` that project's update at the same widths. Every round
times each once, in turn, so that a drift of the machine's speed hits all: CPU time of the process,
or on CUDA the time until the device has finished. Kept are medians and the median over the rounds
of each ratio; the operations and FLOP of one update; on CUDA the memory that the first one takes;
and the FLOP rate as a share of the measured rate of a large product.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "shared"))

import torch
from first_module import first_module
from peers import r2dreamer_update
from results_file import RESULTS, write_results
from tensordict import TensorDict, TensorDictBase
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torchrl.objectives.utils import SoftUpdate
from torchrl.trainers.algorithms import DreamerV3OptimizationStepper, DreamerV3Optimizer
from torchrl_reference import torchrl_loss, with_torchrls_pictures

from w2f_torchrl.modules import PRESETS, build_actor
from w2f_torchrl.trainers import Learner
from w2f_torchrl.utils.memory import keep_freed_memory

# versions.py times earlier versions with this file, whose modules had other names.
settings = first_module("config", "trainers.config")
EXECUTIONS, PRECISIONS = settings.EXECUTIONS, settings.PRECISIONS
OptimizerConfig = settings.OptimizerConfig
model_settings = first_module("config.model", "modules.config")
DECODERS, RESAMPLINGS = model_settings.DECODERS, model_settings.RESAMPLINGS

ACTION_SIZE = 6
WARM_UP = 2
Update = Callable[[TensorDictBase], Any]


def make_sample(
    batch: int, time_steps: int, device: str = "cpu", image_size: int = 64, seed: int = 0
) -> TensorDict:
    """Random records ``[B, T]`` with masks that cover 5 % of the picture."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, time_steps)
    flag = torch.zeros(*shape, 1, dtype=torch.bool)
    picture = (image_size, image_size)
    pixels = torch.randint(0, 256, (*shape, 3, *picture), generator=generator)
    following = {
        "pixels": pixels.to(torch.uint8),
        "foreground_mask": torch.rand(*shape, 1, *picture, generator=generator) < 0.05,
        "reward": torch.randn(*shape, 1, generator=generator),
        "terminated": flag,
        "done": flag.clone(),
    }
    action = torch.randn(*shape, ACTION_SIZE, generator=generator)
    sample = TensorDict(
        {"action": action, "is_init": flag.clone(), "next": TensorDict(following, shape)}, shape
    )
    return sample.to(device)


def torchrl_update(model: str, device: str = "cpu", mixed: bool = False) -> Update:
    """An eager update made of TorchRL's rollout, losses, optimizer and target network."""
    loss, optimizer, slow_critic = _torchrl_parts(model, device)

    def update(sample: TensorDictBase) -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=mixed):
            losses = loss(sample)
            total = sum(value for key, value in losses.items() if str(key).startswith("loss_"))
        optimizer.zero_grad()
        total.sum().backward()
        optimizer.step()
        slow_critic.step()

    return update


def stepper_update(model: str, device: str, mixed: bool, sample: TensorDictBase) -> Update:
    """TorchRL's stepper with its defaults: compiled and captured on CUDA."""
    stepper = DreamerV3OptimizationStepper(*_torchrl_parts(model, device), mixed_precision=mixed)
    stepper.warmup(sample.clone())
    return lambda batch: stepper.step(None, batch)


def _torchrl_parts(model: str, device: str) -> tuple[Any, DreamerV3Optimizer, SoftUpdate]:
    sizes = with_torchrls_pictures(PRESETS[model])
    learner = Learner(sizes, action_size=ACTION_SIZE, latent="whole", device=device)
    loss = torchrl_loss(learner.loss, build_actor(sizes, ACTION_SIZE)).to(device)
    optimizer = DreamerV3Optimizer([p for p in loss.parameters() if p.requires_grad])
    return loss, optimizer, SoftUpdate(loss.value_loss, tau=0.02)


class _Counter(TorchDispatchMode):
    """Count the operations that reach a device, on CUDA nearly one kernel each, and their FLOP."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.flop = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations += not (func.is_view or "empty" in func.name())
        packet = func._overloadpacket
        if packet in flop_registry:
            self.flop += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        elif func.name() == "mkldnn::_linear_pointwise":
            self.flop += 2 * args[0].numel() * len(args[1])
        return out


def count(update: Update, sample: TensorDictBase) -> dict[str, float]:
    """Operations and GFLOP (a multiplication and an addition are two) of an eager update."""
    with _Counter() as counter:
        update(sample.clone())
    return {"operations": counter.operations, "gflop": round(counter.flop / 1e9, 2)}


def product_gflops(device: str, dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """GFLOP per second of a product of two large square matrices, the best of five."""
    size = 1024 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(6):
        begin = clock()
        a @ b
        times.append(clock() - begin)
    return 2 * size**3 / min(times[1:]) / 1e9


def make_clock(device: str) -> Callable[[], float]:
    """CPU seconds of this process; on CUDA wall-clock seconds once the device has finished."""
    if device == "cpu":
        return time.process_time

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return clock


def measure(
    contenders: dict[str, tuple[Update, TensorDictBase]], rounds: int, device: str
) -> tuple[dict[str, list[float]], dict[str, float], dict[str, float]]:
    """Seconds of each round, wall-clock seconds of the first update, and MiB that it took on CUDA.

    The memory is what torch reserves during the first update: activations, moments and a graph's,
    not the parameters.
    """
    clock, held = make_clock(device), 0
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    first: dict[str, float] = {}
    peak: dict[str, float] = {}
    for turn in range(rounds + WARM_UP):  # the first rounds allocate and compile
        for name, (update, data) in contenders.items():
            batch = data.clone()
            if device != "cpu" and turn == 0:
                torch.cuda.empty_cache()  # so that its memory is taken anew, and is its own
                held = torch.cuda.memory_reserved()
            begin, wall = clock(), time.perf_counter()
            update(batch)
            elapsed = clock() - begin
            if turn == 0:
                first[name] = round(time.perf_counter() - wall, 2)
            elif turn >= WARM_UP:
                seconds[name].append(elapsed)
            if device != "cpu" and turn == 0:
                peak[name] = round((torch.cuda.memory_reserved() - held) / 2**20, 1)
    return seconds, first, peak


def summarise(seconds: dict[str, list[float]], baselines: tuple[str, ...]) -> dict[str, dict]:
    """Medians, and the median over the rounds of the ratio to each baseline."""
    table = {}
    for name, times in seconds.items():
        table[name] = {"median_seconds": round(statistics.median(times), 5)}
        for baseline in baselines:
            if baseline in seconds:
                ratios = [a / b for a, b in zip(times, seconds[baseline], strict=True)]
                table[name][f"ratio_to_{baseline}"] = round(statistics.median(ratios), 3)
    return table


def make_contenders(args: argparse.Namespace) -> dict[str, tuple[Update, TensorDictBase]]:
    """All updates to time, by name, with what each is given."""
    mixed = args.precision == "bfloat16"
    sample = make_sample(args.batch_size, args.batch_length, args.device)
    bare = sample.exclude(("next", "foreground_mask"))
    contenders: dict[str, tuple[Update, TensorDictBase]] = {
        "torchrl_parts": (torchrl_update(args.model, args.device, mixed), bare)
    }
    if args.device != "cpu" and args.stepper:
        stepper = stepper_update(args.model, args.device, mixed, bare)
        contenders["torchrl_stepper"] = (stepper, bare)
    if args.r2dreamer:
        peer = r2dreamer_update(args.r2dreamer, args.model, device=args.device, mixed=mixed)
        contenders["r2dreamer"] = (peer, sample)
    sizes = replace(PRESETS[args.model], decoder=args.decoder, resample=args.resample)
    for latent in args.latents:
        for execution in ("eager", *args.modes):
            if execution == "cuda_graph_parallel" and latent != "split":
                continue  # there is no other
            learner = Learner(
                sizes,
                action_size=ACTION_SIZE,
                latent=latent,
                execution=execution,
                device=args.device,
                optimizer=OptimizerConfig(precision=args.precision),
            )
            label = "dreamer_v3" if latent == "whole" else latent
            label += "" if execution == "eager" else f", {execution}"
            contenders[label] = (learner.update, sample)
    return contenders


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure everything that the arguments ask for."""
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    contenders = make_contenders(args)
    seconds, first, peak = measure(contenders, args.rounds, args.device)
    table = summarise(seconds, ("torchrl_parts", "torchrl_stepper", "r2dreamer", "dreamer_v3"))
    dtype = torch.bfloat16 if args.precision == "bfloat16" else torch.float32
    rate = product_gflops(args.device, dtype, make_clock(args.device))
    for name, (update, sample) in contenders.items():
        if ", " in name or name == "torchrl_stepper":
            continue
        table[name] |= count(update, sample)
        share = table[name]["gflop"] / table[name]["median_seconds"] / rate
        table[name]["share_of_product_rate"] = round(share, 3)
    for name, mebibytes in peak.items():
        table[name]["peak_mib"] = mebibytes
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "r2dreamer")}
    return {
        "settings": settings,
        "first_update_wall_seconds": first,
        "product_gflop_per_second": round(rate, 1),
        "update": table,
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="size1m", choices=list(PRESETS))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batch-length", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="float32", choices=PRECISIONS)
    latents = ["whole", "shared", "split", "foreground"]
    parser.add_argument("--latents", nargs="+", default=latents, choices=latents)
    parser.add_argument("--decoder", default="torchrl", choices=DECODERS, help="of ours")
    parser.add_argument("--resample", default="stride", choices=RESAMPLINGS, help="of ours")
    parser.add_argument(
        "--modes",
        nargs="*",
        default=["compile"],
        choices=EXECUTIONS[1:],
        help="in addition to eager",
    )
    parser.add_argument("--r2dreamer", type=Path, help="a checkout of r2dreamer, timed too")
    parser.add_argument(
        "--stepper", action=argparse.BooleanOptionalAction, default=True, help="TorchRL's, on CUDA"
    )
    parser.add_argument("--out", type=Path)
    return parser.parse_args(arguments)


def main() -> None:
    """Run the rounds and write the results file."""
    args = parse()
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    results = run(args)
    shape = f"{args.batch_size}x{args.batch_length}"
    threads = "" if args.threads == 1 or args.device != "cpu" else f"_threads{args.threads}"
    name = f"learner_{args.device}_{args.model}_{shape}{threads}.json"
    path = write_results(args.out or RESULTS / name, results)
    for label, row in results["update"].items():
        print(f"{label:20s} {row}")
    print(path)


if __name__ == "__main__":
    main()

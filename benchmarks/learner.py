"""Time an update against TorchRL's own parts, in one run, on the same modules and data.

    python benchmarks/learner.py --model size1m --batch-size 8 --batch-length 32

Every round times each contender once, in turn, so that a drift of the machine's speed hits all.
CPU time of one thread; medians and the ratio of each round to TorchRL's are kept.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from results_file import write_results
from tensordict import TensorDict
from torchrl.objectives.utils import SoftUpdate
from torchrl.trainers.algorithms import DreamerV3Optimizer
from torchrl_reference import torchrl_loss

from w2f_torchrl.modules import PRESETS, build_actor
from w2f_torchrl.trainers import Learner
from w2f_torchrl.utils.memory import keep_freed_memory

ACTION_SIZE = 6


def make_sample(batch: int, time_steps: int) -> TensorDict:
    """Random records ``[B, T]`` with masks that cover 5 % of the picture."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, time_steps)
    flag = torch.zeros(*shape, 1, dtype=torch.bool)
    pixels = torch.randint(0, 256, (*shape, 3, 64, 64), generator=generator)
    following = {
        "pixels": pixels.to(torch.uint8),
        "foreground_mask": torch.rand(*shape, 1, 64, 64, generator=generator) < 0.05,
        "reward": torch.randn(*shape, 1, generator=generator),
        "terminated": flag,
        "done": flag,
    }
    action = torch.randn(*shape, ACTION_SIZE, generator=generator)
    return TensorDict(
        {"action": action, "is_init": flag, "next": TensorDict(following, shape)}, shape
    )


def torchrl_update(model: str) -> Callable[[TensorDict], None]:
    """An update made of TorchRL's rollout, losses, optimizer and target network."""
    learner = Learner(PRESETS[model], action_size=ACTION_SIZE, latent="whole")
    actor = build_actor(PRESETS[model], ACTION_SIZE)
    loss = torchrl_loss(learner.loss, actor)
    optimizer = DreamerV3Optimizer([p for p in loss.parameters() if p.requires_grad])
    slow_critic = SoftUpdate(loss.value_loss, tau=0.02)

    def update(sample: TensorDict) -> None:
        losses = loss(sample)
        total = sum(value for key, value in losses.items() if str(key).startswith("loss_"))
        optimizer.zero_grad()
        total.sum().backward()
        optimizer.step()
        slow_critic.step()

    return update


def main() -> None:
    """Run the rounds and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="size1m", choices=list(PRESETS))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batch-length", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--modes", nargs="*", default=["compile"], help="beside eager")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    sample = make_sample(args.batch_size, args.batch_length)
    bare = sample.exclude(("next", "foreground_mask"))
    contenders: dict[str, tuple[Callable, TensorDict]] = {
        "torchrl_parts": (torchrl_update(args.model), bare)
    }
    for name in ("whole", "shared", "split", "foreground"):
        for execution in ("eager", *args.modes):
            learner = Learner(
                PRESETS[args.model], action_size=ACTION_SIZE, latent=name, execution=execution
            )
            label = "dreamer_v3" if name == "whole" else name
            label += "" if execution == "eager" else f", {execution}"
            contenders[label] = (learner.update, sample)
    compile_seconds: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(args.rounds + 2):
        for name, (update, data) in contenders.items():
            begin, begin_wall = time.process_time(), time.perf_counter()
            update(data.clone())
            if turn == 0 and ", " in name:
                compile_seconds[name] = round(time.perf_counter() - begin_wall, 1)
            if turn >= 2:  # the first two rounds allocate and compile
                seconds[name].append(time.process_time() - begin)
    table = {
        name: {
            "median_cpu_seconds": round(statistics.median(times), 4),
            "median_ratio_to_torchrl_parts": round(
                statistics.median(
                    a / b for a, b in zip(times, seconds["torchrl_parts"], strict=True)
                ),
                3,
            ),
            "median_ratio_to_dreamer_v3": round(
                statistics.median(a / b for a, b in zip(times, seconds["dreamer_v3"], strict=True)),
                3,
            ),
        }
        for name, times in seconds.items()
    }
    shape = f"{args.batch_size}x{args.batch_length}"
    out = args.out or Path(__file__).parent / "results" / f"learner_cpu_{args.model}_{shape}.json"
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    path = write_results(
        out, {"settings": settings, "first_update_seconds": compile_seconds, "update": table}
    )
    for name, row in table.items():
        print(f"{name:15s} {row}")
    print(path)


if __name__ == "__main__":
    main()

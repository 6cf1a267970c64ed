"""Measure the cost of each image decoder and way of resampling, and how fast it learns.

    python benchmarks/speed/decoders.py

For every ``model.decoder`` and ``model.resample`` whole learners (world model, actor, critic) start
from the same seed and make the same updates: batches of 8 x 16 records of a random policy without
distraction, which holds each action for 4 steps. Kept is the error of the pictures in episodes that
no update saw, summed over pixels and channels as the loss is; for the latent ``split`` the sum of
foreground, mask (weighted as in the loss) and background. Then all learners' updates are timed in
turn, in CPU time on one thread. ``at_equal_time`` is the error once a learner has had the CPU time
of 50, 100, 200 and 300 updates of TorchRL's pair, from straight lines through the logarithms.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "shared"))

import numpy as np
import torch
from learner import measure
from results_file import RESULTS, write_results
from tensordict import TensorDict, TensorDictBase

from w2f_torchrl.config import OptimizerConfig
from w2f_torchrl.config.model import DECODERS, RESAMPLINGS
from w2f_torchrl.data import records_from_rollout
from w2f_torchrl.envs import make_env
from w2f_torchrl.modules import PRESETS
from w2f_torchrl.trainers import Learner
from w2f_torchrl.utils.memory import keep_freed_memory

BATCH, LENGTH, HOLD = 8, 16, 4
HELD_OUT = 4
"""Batches of pictures that no update sees."""
EVERY = 25
"""Updates between two looks at them."""
SHOWN = (50, 100, 200, 300)
BASELINE = "torchrl, stride"


def combinations() -> dict[str, dict[str, str]]:
    """Every pair of the two settings, by name."""
    pairs = product(DECODERS, RESAMPLINGS)
    return {f"{d}, {r}": {"decoder": d, "resample": r} for d, r in pairs}


def record(task: str, episodes: int, seed: int) -> TensorDict:
    """Episodes of a random policy as records ``[episodes, T]``."""
    env = make_env(*task.split(), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    steps, action = 0, torch.zeros(env.action_spec.shape)

    def act(td: TensorDictBase) -> TensorDictBase:
        nonlocal steps, action
        if steps % HOLD == 0:
            action = 2 * torch.rand(action.shape, generator=generator) - 1
        steps += 1
        return td.set("action", action)

    rollouts = [env.rollout(10_000, act) for _ in range(episodes)]
    env.close()
    return torch.stack([records_from_rollout(r.unsqueeze(0)).exclude("stream") for r in rollouts])


def slices(records: TensorDict, seed: int) -> Iterator[TensorDict]:
    """Batches ``[B, T]`` of random slices, forever the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    episodes, steps = records.shape
    while True:
        rows = torch.randint(episodes, (BATCH, 1), generator=generator)
        starts = torch.randint(steps - LENGTH + 1, (BATCH, 1), generator=generator)
        yield records[rows, starts + torch.arange(LENGTH)]


def make_learner(model: str, latent: str, action_size: int, seed: int, **pair: str) -> Learner:
    """A learner of the benchmark's sizes; the seed sets its weights and draws."""
    torch.manual_seed(seed)
    return Learner(
        replace(PRESETS[model], **pair),
        action_size=action_size,
        latent=latent,
        optimizer=OptimizerConfig(lr=5e-4, warmup_updates=200),
    )


@torch.no_grad()
def picture_error(learner: Learner, batches: list[TensorDict]) -> float:
    """The loss of the pictures, with the same draws at each call."""
    state, loss = torch.random.get_rng_state(), learner.loss
    torch.manual_seed(0)
    total = 0.0
    for batch in batches:
        td = loss.world_model(batch.select(*loss.in_keys))
        losses = loss.world_model_losses(td)[0]
        total += sum(
            float(losses[name]) * (loss.config.mask if name == "mask" else 1)
            for name in ("image", "foreground", "mask", "background")
            if name in losses
        )
    torch.random.set_rng_state(state)
    return total / len(batches)


def learn(
    learner: Learner, batches: Iterator[TensorDict], held_out: list[TensorDict], updates: int
) -> list[float]:
    """Errors after 0, :data:`EVERY`, ... updates."""
    errors = [picture_error(learner, held_out)]
    for update in range(1, updates + 1):
        learner.update(next(batches).clone())
        if update % EVERY == 0:
            errors.append(picture_error(learner, held_out))
    return errors


def curves(args: argparse.Namespace, task: str, latent: str) -> dict[str, list[float]]:
    """For each pair of settings the errors, geometric means over the seeds."""
    logs: dict[str, list[np.ndarray]] = {name: [] for name in combinations()}
    for seed in args.seeds:
        records = record(task, args.episodes, seed=2 * seed)
        unseen = slices(record(task, 2, seed=2 * seed + 1), seed)
        held_out = [next(unseen) for _ in range(HELD_OUT)]
        for name, pair in combinations().items():
            learner = make_learner(args.model, latent, records["action"].shape[-1], seed, **pair)
            errors = learn(learner, slices(records, seed), held_out, args.updates)
            logs[name].append(np.log(errors))
            print(task, latent, seed, name, [round(e, 1) for e in errors], flush=True)
    return {name: np.exp(np.mean(rows, 0)).tolist() for name, rows in logs.items()}


def timing(args: argparse.Namespace, latent: str) -> dict[str, dict[str, float]]:
    """Median CPU seconds of an update, and the median ratio to the baseline's."""
    sample = next(slices(record(args.tasks[0], 1, seed=0), 0))
    action_size = sample["action"].shape[-1]
    learners = {
        name: make_learner(args.model, latent, action_size, 0, **pair)
        for name, pair in combinations().items()
    }
    contenders = {name: (learner.update, sample) for name, learner in learners.items()}
    seconds, _, _ = measure(contenders, args.rounds, "cpu")
    base = seconds[BASELINE]
    return {
        name: {
            "median_seconds": round(statistics.median(times), 5),
            "ratio": round(statistics.median(a / b for a, b in zip(times, base, strict=True)), 3),
            "million_parameters": round(
                sum(p.numel() for p in learners[name].world_model.parameters()) / 1e6, 3
            ),
        }
        for name, times in seconds.items()
    }


def summarise(errors: list[float], ratio: float) -> dict[str, dict[str, float]]:
    """Errors at :data:`SHOWN` updates, and at the CPU time of as many of the baseline's."""
    done = EVERY * np.arange(len(errors))
    shown = [update for update in SHOWN if update <= done[-1]]

    def at(update: float) -> float:
        return round(math.exp(np.interp(update, done, np.log(errors))), 1)

    return {
        "at_updates": {str(update): at(update) for update in shown},
        # A faster learner has no look beyond its last update.
        "at_equal_time": {str(u): at(u / ratio) for u in shown if u / ratio <= done[-1]},
    }


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure everything that the arguments ask for; what there is after each task."""
    torch.set_num_threads(1)
    keep_freed_memory()
    results: dict[str, Any] = {}
    for latent in args.latents:
        times = timing(args, latent)
        print(times, flush=True)
        results[latent] = {"update": times, "error": {}}
        for task in args.tasks:
            results[latent]["error"][task] = {
                name: summarise(errors, times[name]["ratio"])
                for name, errors in curves(args, task, latent).items()
            }
            yield results


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="size1m", choices=list(PRESETS))
    parser.add_argument("--latents", nargs="+", default=["whole", "split"])
    parser.add_argument("--tasks", nargs="+", default=["walker walk", "cartpole swingup"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--episodes", type=int, default=8, help="that the updates see")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path, default=RESULTS / "decoders.json")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure and write the results."""
    args = parse()
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    for results in run(args):
        print(write_results(args.out, {"settings": settings, **results}), flush=True)


if __name__ == "__main__":
    main()

"""Measure agent steps per second of 1, 2 and 4 collector workers, and of other envs and pictures.

    python benchmarks/speed/collection.py

Distracted envs with masks, stepped by the collectors of a run with a policy of size1m that samples.
The clock runs over whole batches, after the first two: a single ``next()`` can return what was
collected beforehand. Another program on the machine changes the figures; the load before each is
in the results, and so is the CPU time of an agent step in all processes, which it changes less.
``growth`` varies the envs of one worker, at the same agent steps in a batch, and the picture.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import sys
import time
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "shared"))

import torch
from results_file import RESULTS, write_results

from w2f_torchrl.config import EnvironmentConfig
from w2f_torchrl.data import make_collector
from w2f_torchrl.data.environments import build_env
from w2f_torchrl.modules import (
    PRESETS,
    build_actor,
    build_policy,
    build_world_model,
    latent_sizes,
)

WARM_UP = 2


def create_env(environment: EnvironmentConfig, index: int, seed: int) -> object:
    """Make a worker's env."""
    del index
    return build_env(environment, seed)


def cpu_seconds() -> float:
    """CPU time of this process and of its workers, on Linux; elsewhere of this process."""
    seconds = time.process_time()
    for worker in multiprocessing.active_children():
        stat = Path(f"/proc/{worker.pid}/stat")
        if stat.exists():
            fields = stat.read_text().rpartition(")")[2].split()  # from the third on
            seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def grow(environment: EnvironmentConfig, steps: int, batches: int) -> dict[str, dict]:
    """One worker with other numbers of envs and other pictures, one at a time."""
    changes: list[dict] = [{"num_envs": envs} for envs in (1, 2, 4, 8)]
    changes += [{"image_size": size} for size in (32, 128)]
    rows = {}
    for change in changes:
        changed = dataclasses.replace(environment, **change)
        of_an_env = environment.num_envs * steps // changed.num_envs
        name = ", ".join(f"{key}={value}" for key, value in change.items())
        rows[name] = measure(changed, 1, of_an_env, batches)
        print(name, rows[name], flush=True)
    return rows


def measure(environment: EnvironmentConfig, workers: int, steps: int, batches: int) -> dict:
    """Collect and count."""
    config = PRESETS["size1m"]
    probe = build_env(environment, 0)
    actions = int(probe.action_spec.shape[-1])
    probe.close()
    world_model = build_world_model(
        config, action_size=actions, image_size=environment.image_size, latent="split"
    )
    collector = make_collector(
        partial(create_env, environment),
        build_policy(world_model, build_actor(config, actions)),
        primers=latent_sizes(config, actions),
        num_envs=environment.num_envs,
        num_workers=workers,
        frames_per_batch=environment.num_envs * steps,
        total_frames=environment.num_envs * steps * (WARM_UP + batches),
    )
    load = os.getloadavg()[0]
    collected, start, cpu = 0, 0.0, 0.0
    for index, batch in enumerate(collector):
        if index >= WARM_UP:
            collected += batch.numel()
        if index == WARM_UP - 1:
            start, cpu = time.perf_counter(), cpu_seconds()
        if index == WARM_UP + batches - 1:
            # Asked for now: the workers end with the iteration.
            seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    collector.shutdown()
    return {
        "agent_steps_per_second": round(collected / seconds, 1),
        "cpu_milliseconds_an_agent_step": round(1e3 * cpu / collected, 3),
        "agent_steps": collected,
        "batches": batches,
        "load_before": round(load, 2),
    }


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--domain", default="walker")
    parser.add_argument("--task", default="walk")
    parser.add_argument("--distraction", default="easy")
    parser.add_argument("--envs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=64, help="agent steps of an env in a batch")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--json", type=Path, default=RESULTS / "collection.json")
    args = parser.parse_args()
    if args.batches < 8:
        parser.error("--batches must be at least 8")
    torch.set_num_threads(1)
    environment = EnvironmentConfig(
        args.domain, args.task, num_envs=args.envs, distraction=args.distraction
    )
    rows = {}
    for workers in (1, 2, 4):
        rows[workers] = measure(environment, workers, args.steps, args.batches)
        print(workers, rows[workers], flush=True)
    settings = vars(args) | {"json": args.json.name, "action_repeat": environment.action_repeat}
    growth = grow(environment, args.steps, args.batches)
    print(write_results(args.json, {"settings": settings, "workers": rows, "growth": growth}))


if __name__ == "__main__":
    main()

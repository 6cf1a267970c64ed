r"""Compare CPU time per agent step of the pixel environments with TorchRL's.

The baseline is a TorchRL user's env, ``DMControlEnv(from_pixels=True, frame_skip=2)``, with
its 240 x 320 picture permuted and resized to 64 x 64. All variants of a task live in one process
and take turns, a few steps each, so that a disturbance of the machine meets all of them. A figure
is the median over the rounds of the process's CPU time per agent step, all its threads together.

python benchmarks/speed/render.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "shared"))

import torch
from results_file import RESULTS, write_results
from torch.nn.functional import interpolate
from torchrl.envs import DMControlEnv, EnvBase

from w2f_torchrl.envs import PixelDMControlEnv

ACTION_REPEAT = 2
TASKS = ("walker walk", "cartpole balance", "reacher easy", "ball_in_cup catch", "quadruped walk")
BASELINE = "DMControlEnv(from_pixels=True, frame_skip=2) resized to 64"
OURS = "fast 64, mask"


class Stepper:
    """An env that is stepped with random actions, and reset at an episode's end."""

    def __init__(self, env: EnvBase, *, resize_to: int | None = None) -> None:
        self.env = env
        self.resize_to = resize_to
        self.data = env.reset()

    def step(self) -> None:
        """Make one agent step."""
        self.data["action"] = self.env.action_spec.rand()
        transition, self.data = self.env.step_and_maybe_reset(self.data)
        if self.resize_to is not None:
            size = (self.resize_to, self.resize_to)
            picture = transition["next", "pixels"].permute(2, 0, 1)[
                None
            ]  # [H, W, C] to [1, C, H, W]
            interpolate(picture, size, mode="bilinear", antialias=True)


def variants(domain: str, task: str) -> dict[str, Callable[[], Stepper]]:
    """The envs to compare, by name."""

    def ours(**settings: object) -> Stepper:
        env = PixelDMControlEnv(domain, task, action_repeat=ACTION_REPEAT, seed=0, **settings)
        return Stepper(env)

    def torchrls() -> Stepper:
        env = DMControlEnv(domain, task, from_pixels=True, frame_skip=ACTION_REPEAT)
        return Stepper(env, resize_to=64)

    return {
        BASELINE: torchrls,
        OURS: ours,
        "fast 64, no mask": partial(ours, foreground_mask=False),
        "fast 84, mask": partial(ours, image_size=84),
        "reference 64, mask": partial(ours, render="reference"),
        "reference 64, no mask": partial(ours, render="reference", foreground_mask=False),
    }


def measure(domain: str, task: str, rounds: int, steps: int) -> dict[str, float]:
    """Median CPU milliseconds per agent step of each variant."""
    steppers = {name: make() for name, make in variants(domain, task).items()}
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for index in range(rounds + 1):
        for name, stepper in steppers.items():
            start = time.process_time()
            for _ in range(steps):
                stepper.step()
            if index > 0:  # the first round compiles shaders
                times[name].append((time.process_time() - start) / steps * 1e3)
    for stepper in steppers.values():
        stepper.env.close()
    return {name: round(statistics.median(values), 3) for name, values in times.items()}


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=10, help="agent steps per turn")
    parser.add_argument("--json", type=Path, default=RESULTS / "render.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    milliseconds, shares = {}, {}
    for name in TASKS:
        milliseconds[name] = measure(*name.split(), rounds=args.rounds, steps=args.steps)
        shares[name] = round(milliseconds[name][OURS] / milliseconds[name][BASELINE], 4)
        print(f"{name}: {milliseconds[name]} -> {shares[name]:.1%}", file=sys.stderr)
    results = {
        "renderer": f"Mesa software rendering, MUJOCO_GL={os.environ['MUJOCO_GL']}",
        "settings": {"rounds": args.rounds, "steps": args.steps, "action_repeat": ACTION_REPEAT},
        "cpu_milliseconds_per_agent_step": milliseconds,
        "fast_with_mask_over_baseline": shares,
    }
    print(write_results(args.json, results))


if __name__ == "__main__":
    main()

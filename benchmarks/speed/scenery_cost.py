"""Compare the CPU time of frames with a video, with scenery that reacts, and with a corruption.

    python benchmarks/speed/scenery_cost.py

Every variant of a task lives in this process, and they take turns. A frame is all that is drawn for
one agent step: the distraction's step, the picture and the mask; the simulation is not stepped. The
action, the reward and the time change at every step, so that no picture of a grid is shown twice in
a row. A corruption is of one kind, in every frame. A figure is the median over the rounds of the
process's CPU time per frame, all its threads together.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "shared"))

import numpy as np
import torch
from results_file import RESULTS, write_results

from w2f_torchrl.envs import (
    BackgroundConfig,
    CorruptionConfig,
    DistractionConfig,
    PixelDMControlEnv,
)
from w2f_torchrl.envs.scenery.distractions import CORRUPTIONS, REACTIVE

TASKS = ("cartpole swingup", "reacher easy", "walker walk")
SIZE = 64
VIDEO = BackgroundConfig(4, ground_alpha=0.0)
"""Its floor is left out, as the grid's is, so that both draw the same passes."""


def always(kind: str) -> CorruptionConfig:
    """Return a corruption of one kind that never clears again for long."""
    others = dict.fromkeys(set(CORRUPTIONS) - {kind}, 0.0)
    return CorruptionConfig(**others, start=1.0, stop=1e-9)


VARIANTS: dict[str, DistractionConfig | None] = {
    "no distraction": None,
    "video": DistractionConfig(background=VIDEO),
    **{name: DistractionConfig(reactive=config) for name, config in REACTIVE.items()},
    **{f"video, {kind}": DistractionConfig(VIDEO, corruption=always(kind)) for kind in CORRUPTIONS},
}


def frames_of(name: str, variant: str, render: str) -> tuple[PixelDMControlEnv, Callable[[], None]]:
    """Return an env after its reset, and a function that draws its next frame."""
    domain, task = name.split()
    env = PixelDMControlEnv(
        domain,
        task,
        image_size=SIZE,
        distraction=VARIANTS[variant] or "none",
        render=render,  # type: ignore[arg-type]
        seed=0,
    )
    env.reset()
    generator = np.random.default_rng(0)
    distractor, renderer = env.distractor, env._renderer

    def draw() -> None:
        action, reward = generator.uniform(-1, 1, env.action_spec.shape), generator.random()
        if distractor is not None:
            distractor.step()
            distractor.react(action, reward)
        renderer.draw()

    return env, draw


def measure(name: str, render: str, rounds: int, frames: int) -> dict[str, float]:
    """Return the median CPU milliseconds per frame of each variant."""
    made = {variant: frames_of(name, variant, render) for variant in VARIANTS}
    times: dict[str, list[float]] = {variant: [] for variant in made}
    for index in range(rounds + 1):
        for variant, (_, draw) in made.items():
            start = time.process_time()
            for _ in range(frames):
                draw()
            if index > 0:  # the first round compiles shaders
                times[variant].append((time.process_time() - start) / frames * 1e3)
    for env, _ in made.values():
        env.close()
    return {variant: round(statistics.median(values), 3) for variant, values in times.items()}


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--frames", type=int, default=20, help="frames per turn")
    parser.add_argument("--json", type=Path, default=RESULTS / "scenery_cost.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = {
        f"{name}, {render}": measure(name, render, args.rounds, args.frames)
        for name in TASKS
        for render in ("fast", "reference")
    }
    results = {
        "renderer": f"Mesa software rendering, MUJOCO_GL={os.environ['MUJOCO_GL']}",
        "settings": {"rounds": args.rounds, "frames": args.frames, "image_size": SIZE},
        "cpu_milliseconds_a_frame": rows,
    }
    print(write_results(args.json, results))


if __name__ == "__main__":
    main()

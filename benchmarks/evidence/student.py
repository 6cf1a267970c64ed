r"""Train students from the simulator, from ten labelled frames, and from a corrupted teacher.

python benchmarks/evidence/student.py

For each task and seed 2,000 frames of a random policy on the distraction's four training videos
teach a student of the default size; half of each batch is pasted onto other computed clips (the
training clips of procedural:1). 300 frames of other episodes on the validation videos, which the
training never saw, test it. Steps are 600 of 64 frames, and 250 for walker and cheetah. The
corrupted teacher grows or shrinks the simulator's mask by a pixel and drops or adds patches. The
few labels are the ten most diverse; these students and those of the corrupted teacher learn in 250
steps of 32, the latter without pasting. With ``--clips FOLDER`` the students of the simulator are
also tested before the validation clips of a folder, such as real scenes. The cost is compared with
the collection of the demo: its envs and its policy, CPU time of an agent step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "shared"))

import torch
from masks import TASKS, cost, frames_of, score
from results_file import RESULTS, write_results
from torch import Tensor
from torch.nn.functional import max_pool2d

from w2f_torchrl.config import to_run_config
from w2f_torchrl.data import make_collector
from w2f_torchrl.data.environments import create_env
from w2f_torchrl.masks.labels import load_backgrounds
from w2f_torchrl.modules import PRESETS, latent_sizes
from w2f_torchrl.segmenters import StudentSegmenter, choose_diverse, mask_iou, train_student
from w2f_torchrl.trainers import Learner

FEW = 10
FRAMES = 2000
STEPS = {"walker walk": 250, "cheetah run": 250}


def corrupted(masks: Tensor, seed: int) -> Tensor:
    """A teacher that errs: masks one pixel too large or too small, and patches lost or added."""
    generator = torch.Generator().manual_seed(seed)
    grown = max_pool2d(masks.float(), 3, 1, 1) > 0
    shrunk = max_pool2d((~masks).float(), 3, 1, 1) == 0
    which = torch.rand(len(masks), 1, 1, 1, generator=generator)
    wrong = torch.where(which < 0.3, grown, torch.where(which < 0.5, shrunk, masks))
    for index in range(len(wrong)):
        for value in (False, True):
            side = int(torch.randint(4, 12 if value is False else 8, (1,), generator=generator))
            top, left = torch.randint(0, 64 - side, (2,), generator=generator).tolist()
            inside = wrong[index].nonzero()
            if value is False and len(inside):  # a patch around some foreground pixel is lost
                pick = int(torch.randint(len(inside), (1,), generator=generator))
                top, left = (max(int(at) - side // 2, 0) for at in inside[pick, 1:])
            if value is False or torch.rand(1, generator=generator) < 0.5:
                wrong[index, :, top : top + side, left : left + side] = value
    return wrong


def experiment(
    name: str,
    seed: int,
    backgrounds: Tensor,
    steps: int,
    few: bool,
    clips: str | None = None,
    recolor: bool = False,
) -> dict[str, Any]:
    """Train and test the students of one task and seed."""
    torch.set_num_threads(1)
    pixels, masks = frames_of(name, "easy", FRAMES, seed, split="train", every=2)
    unseen = frames_of(name, "easy", 300, seed + 1000)
    steps = STEPS.get(name, steps)
    full = train_student(
        pixels, masks, backgrounds=backgrounds, steps=steps, seed=seed, recolor=recolor
    )
    rows: dict[str, Any] = {"simulator": score(full, *unseen)}
    if clips is not None:
        real = frames_of(name, "easy", 300, seed + 1000, source=clips)
        rows[f"simulator, {Path(clips).name}"] = score(full, *real)
    if few:
        train = partial(train_student, steps=250, batch_size=32, seed=seed)
        labelled = choose_diverse(pixels, FEW)
        student = train(
            pixels[labelled], masks[labelled], backgrounds=backgrounds, paste=0.75, moves=0.2
        )
        rows[f"{FEW} labels"] = score(student, *unseen)
        teacher = corrupted(masks, seed)
        student = train(pixels, teacher)
        teacher_iou = float(mask_iou(teacher, masks).mean())
        rows["corrupted"] = score(student, *unseen) | {"teacher_iou": round(teacher_iou, 4)}
    return rows


def collection_milliseconds(steps: int = 640) -> float:
    """CPU time of an agent step of the demo's collection, all in this process."""
    config = to_run_config(
        {
            "environment": {"domain": "cheetah", "task": "run", "num_envs": 4},
            "model": vars(PRESETS["size1m"]),
            "device": "cpu",
        }
    )
    env = create_env(config, 0, 0)
    action_size = int(env.action_spec.shape[-1])
    env.close()
    collector = make_collector(
        partial(create_env, config),
        Learner.from_config(config, action_size).policy,
        primers=latent_sizes(config.model, action_size),
        num_envs=2,  # as many as a worker of the demo steps on two cores
        num_workers=0,
        frames_per_batch=32,
    )
    times, batches = [], iter(collector)
    for _ in range(steps // 32 + 2):
        start = time.process_time()
        next(batches)
        times.append((time.process_time() - start) / 32 * 1e3)
    collector.shutdown()
    return statistics.median(times[2:])


def main() -> None:
    """Run the experiments and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), metavar='"DOMAIN TASK"')
    parser.add_argument("--few", nargs="*", default=["walker walk", "cheetah run"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600, help="gradient steps of a student")
    parser.add_argument("--clips", help="folder of clips to test on too")
    parser.add_argument("--recolor", action="store_true", help="recolour pasted backgrounds")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", type=Path, default=RESULTS / "student.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    backgrounds = load_backgrounds("procedural:1", 64)
    assert backgrounds is not None
    collection = collection_milliseconds()
    frame = cost(StudentSegmenter(), backgrounds)
    results: dict[str, Any] = {
        "settings": {"distraction": "easy", "steps": args.steps, "training_frames": FRAMES},
        "cost": frame
        | {
            "collection_milliseconds_per_agent_step": round(collection, 3),
            "share_of_collection": round(frame["milliseconds"] / collection, 4),
        },
        "on_unseen_backgrounds_and_episodes": {},
    }
    print(results["cost"], file=sys.stderr)
    found = results["on_unseen_backgrounds_and_episodes"]
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        jobs = {
            pool.submit(
                experiment,
                name,
                seed,
                backgrounds,
                args.steps,
                name in args.few,
                args.clips,
                args.recolor,
            ): (name, f"seed {seed}")
            for seed in args.seeds
            for name in args.tasks
        }
        for job in as_completed(jobs):
            name, seed = jobs[job]
            found.setdefault(name, {})[seed] = job.result()
            print(name, seed, job.result(), file=sys.stderr, flush=True)
            write_results(args.json, results)
    print(args.json)


if __name__ == "__main__":
    main()

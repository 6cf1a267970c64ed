r"""Train methods in worlds of scenery, measure all of them alike, and tabulate and draw that.

python benchmarks/evidence/methods.py --runs runs/methods --json benchmarks/results/methods.json \
    --markdown methods.md --plot docs/images/methods.png
python benchmarks/evidence/methods.py --runs runs/methods --no-training ...  # of what is there
python benchmarks/evidence/methods.py --runs runs/methods --add machine1.json machine2.json ...

Every run is ``experiment=cpu`` of ``sota_configs/world2filter.py`` in a process and a directory of
its own, and a later call continues where an earlier one was cut. A finished run is measured once;
``measures.json`` in its directory keeps the result. With --add, runs in the results files of other
calls count as done, so that several machines can share the work; they must have had the same
settings and been measured in the same way. Measured are returns before the scenery of
training, in front of unseen scenery (the validation clips or colours), and after training with
computed videos also in front of the unseen real ones of --clips, what probes read from the latent
that the actor reads, the change of action and value when the scenery is replaced or removed, and
how far latents rolled on from histories with and without scenery part. Aggregates are
interquartile means over tasks and seeds, of returns / 1000, with rliable's stratified intervals.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "shared"))

import torch
from curve_runs import Job, Runs, check_same_settings, is_finished, settings_of
from find_checkpoint import find_checkpoint
from methods_table import Measured, draw, markdown, read_entries, summarise
from results_file import RESULTS, write_results

from w2f_torchrl.algorithms.masked_input import student_of
from w2f_torchrl.config import RunConfig
from w2f_torchrl.envs.scenery.distractions import shows_video
from w2f_torchrl.evaluation.policy import LoadedPolicy, load_learner
from w2f_torchrl.evaluation.run_filtering import FilteringMeter, flat_metrics
from w2f_torchrl.learner import Learner
from w2f_torchrl.logging.environment import read_environment
from w2f_torchrl.logging.metrics_file import read_metrics
from w2f_torchrl.logging.pictures.plotting import save_figure
from w2f_torchrl.utils.seeding import derive_seed

CLIPS = "CLIPS"
"""Stands for the folder of --clips."""
METHODS: dict[str, tuple[str, ...]] = {
    "dreamer_v3": ("algo=dreamer_v3",),
    "masked_input": ("algo=masked_input",),
    "foreground": ("algo=world2filter", "algo.latent=foreground"),
    "split": ("algo=world2filter", "algo.latent=split"),
    "split_replaced": ("algo=world2filter", "algo.latent=split", "augmentation.scenery=0.5"),
    "tia": ("algo=tia",),
    # At the authors' 1e-5 the budget has no effect within so few updates. At 0.6 the posterior's
    # share of the KL, a sixth, has DreamerV3's weight of 0.1.
    "repo": ("algo=repo", "repo.initial_dual=0.6"),
    "r2dreamer": ("algo=r2dreamer",),
}
WORLDS: dict[str, tuple[str, ...]] = {
    "none": ("environment.distraction=none",),
    "easy": ("environment.distraction=easy",),
    "clips": (
        "environment.distraction={background:{num_videos:4}}",
        f"environment.background_source={CLIPS}",
    ),
    "reactive": ("environment.distraction=reactive_action_time",),
}
TASKS: dict[str, tuple[str, ...]] = {
    "finger_spin": (
        "environment.action_repeat=4",
        "loss.discount_horizon=166",
        "training.total_frames=64000",
        "evaluation.every_frames=16000",
    ),
    "ball_in_cup_catch": ("training.total_frames=320000",),
    "cartpole_swingup": ("training.total_frames=640000",),
}
"""Settings of a task: as many frames as DreamerV3 needs to learn it without distraction."""
SHARED = ("experiment=cpu",)
MEASURES = "measures.json"


def jobs_of(args: argparse.Namespace) -> dict[Job, Measured]:
    """Return the runs, those of the first seed first, and what each measures.

    Raises:
        ValueError: If a setting of one is invalid.
    """
    found = {}
    for seed, task, world, method in product(args.seeds, args.tasks, args.worlds, args.methods):
        what = Measured(method, world, task, seed)
        overrides = tuple(o.replace(CLIPS, str(args.clips)) for o in overrides_of(what, args))
        label = f"{method}_{world}_{task}"
        try:
            job = Job(label, seed, overrides, settings_of(overrides))
        except Exception as error:  # Hydra has many kinds
            raise ValueError(f"{label}: {error}") from error
        found[job] = what
    return found


def overrides_of(what: Measured, args: argparse.Namespace) -> tuple[str, ...]:
    """Return the settings of a run, but for its seed; CLIPS stands for the folder of --clips."""
    domain, _, name = what.task.rpartition("_")
    return (
        *SHARED,
        *METHODS[what.method],
        *WORLDS[what.world],
        *TASKS.get(what.task, ()),
        f"environment.domain={domain}",
        f"environment.task={name}",
        *args.override,
    )


def play(
    config: RunConfig,
    learner: Learner,
    episodes: int,
    seed: int,
    split: str,
    source: Path | None = None,
) -> list[float]:
    """Return the returns of episodes with the mode action.

    Args:
        config: The run's settings.
        learner: Its networks.
        episodes: Number of episodes.
        seed: Of the envs: all methods of a task and a world play the same episodes.
        split: ``train`` for the scenery of training, ``val`` for unseen scenery.
        source: Clips instead of the run's.
    """
    environment = config.environment.thawed(background_split=split)
    if source is not None:
        environment.background_source = str(source)
    policy = LoadedPolicy(
        config.thawed(environment=environment), learner, learner.world_model.action_size
    )
    env = policy.make_env(derive_seed(seed, split))
    returns = [float(env.rollout(10_000, policy)["next", "reward"].sum()) for _ in range(episodes)]
    env.close()
    return returns


def recipe_of(what: Measured, args: argparse.Namespace) -> dict[str, Any]:
    """Return what makes a run and its measures, in plain values and without paths."""
    measured = {"episodes": args.episodes, "probed": args.probed, "seed": args.seed}
    return {
        "seed": what.seed,
        "overrides": list(overrides_of(what, args)),
        "measured_with": measured | {"real": args.clips.is_dir()},
    }


def entry_of(run_dir: Path, what: Measured, args: argparse.Namespace) -> dict[str, Any]:
    """Measure a finished run, and say how and with which code it was made."""
    clips = args.clips if args.clips.is_dir() else None
    wanted = {"episodes": args.episodes, "probed": args.probed, "seed": args.seed}
    found = measure(run_dir, what, **wanted, clips=clips)
    start = read_environment(run_dir / "environment.json")[-1]
    made_by = {key: start[key] for key in ("commit", "processor") if key in start}
    return found._asdict() | recipe_of(what, args) | made_by


def measure(
    run_dir: Path, what: Measured, *, episodes: int, probed: int, seed: int, clips: Path | None
) -> Measured:
    """Measure a run's newest checkpoint, or return what ``measures.json`` has of it.

    Args:
        run_dir: The run.
        what: The method, world, task and seed of the run.
        episodes: Episodes played before each scenery.
        probed: Episodes of random actions for the probes.
        seed: Of both.
        clips: Real clips, for runs that were trained with computed ones; None for none.
    """
    checkpoint, path = find_checkpoint(run_dir), run_dir / MEASURES
    asked = {"checkpoint": checkpoint.name, "episodes": episodes, "probed": probed, "seed": seed}
    asked |= {"real": clips is not None}
    if path.exists() and (before := json.loads(path.read_text()))["asked"] == asked:
        return Measured(**before["measured"])
    config, learner, _ = load_learner(checkpoint)
    with_scenery = config.environment.distraction != "none"
    meter = FilteringMeter(config.environment, probed, derive_seed(seed, "probes"))
    found = meter.measure(learner.loss, segment=student_of(learner.policy), seeds=(0,))
    shows_computed = shows_video(config.environment.distraction) and (
        config.environment.background_source is None
    )
    flat = {name.removeprefix("filtering/"): value for name, value in flat_metrics(found).items()}
    result = what._replace(
        frames=int(read_metrics(run_dir)[-1]["frames"]),
        seen=play(config, learner, episodes, seed, "train"),
        unseen=play(config, learner, episodes, seed, "val") if with_scenery else [],
        real=play(config, learner, episodes, seed, "val", clips)
        if clips is not None and shows_computed
        else [],
        measures=flat,
        divergence=found.get("divergence", {}).get("latent", []),
    )
    path.write_text(json.dumps({"asked": asked, "measured": result._asdict()}, indent=2) + "\n")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is not finished, measure what is, tabulate and draw."""
    args = _arguments(arguments)
    torch.set_num_threads(1)
    try:
        jobs = jobs_of(args)
        for job in jobs:
            check_same_settings(job, args.runs / job.name)
        elsewhere = read_entries(args.add)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")

    def say(line: str) -> None:
        sys.stderr.write(f"{line}\n")

    recipes = {job: recipe_of(what, args) for job, what in jobs.items()}
    known = {j: e for j, r in recipes.items() for e in elsewhere if all(e[k] == r[k] for k in r)}
    failure: str | int | None = None  # what the process exits with
    if not args.no_training:
        try:
            Runs(args.runs, args.parallel, say).train([job for job in jobs if job not in known])
        except KeyboardInterrupt:
            say("interrupted; the same command continues")
            failure = 130
        except RuntimeError as error:
            failure = f"error: {error}"
    if not args.clips.is_dir():
        say(f"--clips {args.clips} does not exist: no run is played in front of real clips")
    entries, missing = [], []
    for job, what in jobs.items():
        run_dir = args.runs / job.name
        if is_finished(run_dir):
            say(f"{job.name}: measuring")
            entries.append(entry_of(run_dir, what, args))
        elif job in known:
            entries.append(known[job])
        else:
            missing.append(job.name)
    measured = [Measured(**{key: each[key] for key in Measured._fields}) for each in entries]
    if not measured:
        sys.exit(failure or "error: no run is finished")
    summary = summarise(measured)
    table = markdown(summary, missing)
    print(table)
    if args.markdown is not None:
        args.markdown.write_text(table)
    results = {
        "overrides": args.override,
        "tasks": {task: TASKS.get(task, ()) for task in args.tasks},
        **summary,
        "not_finished": missing,
    }
    write_results(args.json, results | {"runs": entries})
    if args.plot is not None:
        save_figure(draw(summary), args.plot)
    if failure is not None:
        sys.exit(failure)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS)[:2], help="DOMAIN_TASK")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--runs", type=Path, required=True, help="where the runs are")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument(
        "--add", nargs="*", type=Path, default=[], help="results files whose runs count as done"
    )
    parser.add_argument("--no-training", action="store_true", help="measure what is finished")
    parser.add_argument("--clips", type=Path, default=Path("../shared/data/clips"))
    parser.add_argument("--episodes", type=int, default=10, help="played before each scenery")
    parser.add_argument("--probed", type=int, default=32, help="random episodes for the probes")
    parser.add_argument("--seed", type=int, default=0, help="of all measures")
    parser.add_argument("--json", type=Path, default=RESULTS / "methods.json")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--override", nargs="*", default=[], help="settings of every run")
    args = parser.parse_args(arguments)
    for name in ("parallel", "episodes", "probed"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}.")
    return args


if __name__ == "__main__":
    main()

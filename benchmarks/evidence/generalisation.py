"""Measure returns of trained runs under distractions that they have and have not seen.

python benchmarks/evidence/generalisation.py runs/a runs/b runs/c --episodes 10 \
    --json table.json --markdown table.md --plot table.png

Takes checkpoints or run directories (their newest checkpoint). Rows are tasks and methods, columns
the evaluation sets by name, and `own`, the environment that the run was trained in. Runs of one
task and method are its seeds. All runs play the same episodes of a set. `--source FOLDER` plays the
sets with videos once more, with the clips of a folder.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "shared"))

import torch
from find_checkpoint import find_checkpoint
from generalisation_table import OWN, Played, draw, markdown, summarise
from results_file import write_results

from w2f_torchrl.config import EnvironmentConfig
from w2f_torchrl.envs import evaluation_sets
from w2f_torchrl.envs.scenery.distractions import DIFFICULTIES
from w2f_torchrl.evaluation.policy import load_learner
from w2f_torchrl.logging.pictures.plotting import save_figure
from w2f_torchrl.trainers.run import make_evaluator
from w2f_torchrl.utils.seeding import derive_seed

SETS = ("clean", "train_videos_{0}", "unseen_videos_{0}", "color_{0}", "camera_{0}", "all_{0}")


def play(
    path: Path, sets: Sequence[str], episodes: int, seed: int, source: str | None = None
) -> list[Played]:
    """Play a run's policy, with the mode action, in its own environment and in the sets.

    Args:
        path: A checkpoint or a run.
        sets: Names of evaluation sets.
        episodes: Number of episodes in each.
        seed: Of the envs.
        source: Of the videos, in place of the run's: only sets that show them are played, without
            the run's own environment, and their names have the source's.

    Raises:
        ValueError: If a source is given, and no set shows videos of it.
    """
    config, learner, action_size = load_learner(find_checkpoint(path))
    if source is not None:
        config.environment.background_source = source
        sets = [name for name in sets if shows(name, config.environment)]
        if not sets:
            raise ValueError(f"--source {source}: no evaluation set of --sets shows its videos.")
    config.evaluation.sets = list(sets)
    config.validate()
    seed = derive_seed(seed, "generalisation")
    evaluator = make_evaluator(config, learner.policy, action_size, seed=seed)
    rows = [evaluator.evaluate(learner.world_model, 1).metrics for _ in range(episodes)]
    evaluator.close()
    method = config.algo.name + (f" {config.algo.latent}" if config.algo.latent else "")
    task = f"{config.environment.domain} {config.environment.task}"
    played = []
    for name in sets if source is not None else (OWN, *sets):
        prefix = "eval/" if name == OWN else f"eval/{name}/"
        iou = "wm/mask_iou" if name == OWN else f"{prefix}mask_iou"
        ious = [row[iou] for row in rows if iou in row]
        played.append(
            Played(
                method,
                task,
                config.seed,
                name if source is None else f"{name}, {Path(source).name}",
                [row[f"{prefix}return_mean"] for row in rows],
                sum(ious) / len(ious) if ious else None,
            )
        )
    return played


def shows(name: str, environment: EnvironmentConfig) -> bool:
    """Whether an evaluation set shows videos of an environment's source."""
    chosen = evaluation_sets()[name].resolved(environment.distraction, environment.dmcgb_data)
    source = environment.background_source
    return chosen.background_source(source) == source


def main() -> None:
    """Play, tabulate, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--difficulty", choices=DIFFICULTIES, default="easy")
    parser.add_argument(
        "--sets", nargs="+", choices=evaluation_sets(), help="default: six of the difficulty"
    )
    parser.add_argument("--episodes", type=int, default=10, help="in each set, for each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--source",
        action="append",
        default=[],
        help="play the sets with videos of this source too (a folder of clips); repeatable",
    )
    for name in ("json", "markdown", "plot"):
        parser.add_argument(f"--{name}", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sets = args.sets or [name.format(args.difficulty) for name in SETS]
    played = []
    try:
        for run, source in itertools.product(args.runs, (None, *args.source)):
            played += play(run, sets, args.episodes, args.seed, source)
    except ValueError as error:
        sys.exit(f"error: {error}")
    summary = summarise(played, args.difficulty)
    table = markdown(summary)
    print(table)
    if args.markdown is not None:
        args.markdown.write_text(table)
    if args.json is not None:
        write_results(args.json, summary | {"played": [each._asdict() for each in played]})
    if args.plot is not None:
        save_figure(draw(summary), args.plot)


if __name__ == "__main__":
    main()

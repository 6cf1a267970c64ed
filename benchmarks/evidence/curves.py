r"""Draw return curves of runs, published scores of the same protocol and a random policy.

python benchmarks/evidence/curves.py runs/a runs/b --out curves.png --json curves.json
python benchmarks/evidence/curves.py --train benchmarks/evidence/curves/cartpole_easy.yaml \
    --runs runs/cartpole_easy --parallel 2 --out curves.png --json curves.json

The second form first trains a list of configurations with several seeds, or continues where it was
interrupted. Runs that differ only in their seeds are drawn as one curve.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).parents[1] / "shared"))

import numpy as np
from curve_runs import Runs, read_jobs
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from results_file import RESULTS, write_results

from w2f_torchrl.logging.environment import read_environment
from w2f_torchrl.logging.metrics import read_metrics
from w2f_torchrl.logging.pictures.plotting import (
    Array,
    draw_published,
    metric_series,
    save_figure,
    style_frames_axis,
)
from w2f_torchrl.logging.pictures.published import (
    DREAMER_V3,
    FOLDER,
    Published,
    published_scores,
    read_table,
)

# After w2f_torchrl, which imports triton: see the package's docstring.
from dm_control import suite  # isort: skip

COLORS = ("#3b6fb6", "#c8553d", "#4f9d69", "#8d6cab", "#b8923a", "#5b5b5b")
SETTINGS = (
    "algo",
    "environment",
    "segmentation",
    "model",
    "loss",
    "optimizer",
    "training",
    "distributed",
    "collection",
    "replay",
    "evaluation",
    "seed",
    "device",
)


class Run(NamedTuple):
    """A run's settings and returns; frames and values are float64 ``[N]``."""

    label: str
    seed: int
    task: str
    settings: dict[str, Any]
    episodes: tuple[Array, Array]
    eval_mean: tuple[Array, Array]
    eval_std: tuple[Array, Array]
    sets: dict[str, tuple[Array, Array]]
    """The returns of evaluation sets, by their metrics."""
    published: frozenset[Published]
    """The published scores whose protocol it follows."""
    last_frame: int
    updates: tuple[Array, Array]
    seconds: tuple[Array, Array]
    """Wall-clock time of the run so far."""
    commits: list[str]
    """Those of the code that made it, in the order of its starts; none outside a checkout."""

    @property
    def name(self) -> str:
        """``<label>, seed <seed>``."""
        return f"{self.label}, seed {self.seed}"

    @property
    def on_suite(self) -> bool:
        """Whether its task is one of the Control Suite."""
        environment = self.settings["environment"]
        return (environment["domain"], environment["task"]) in suite.ALL_TASKS


def load_run(run_dir: Path, label: str | None = None) -> Run:
    """Read a run directory.

    Args:
        run_dir: A directory with ``config.yaml`` and ``metrics.jsonl``.
        label: What runs are called that differ in their seeds only; by default ``<algo> <latent>``.

    Returns:
        The run.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the configuration lacks what the name needs, or no line was logged.
    """
    path = run_dir / "config.yaml"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: {run_dir} is not a run directory.")
    config = OmegaConf.load(path)
    assert isinstance(config, DictConfig)  # a run's configuration is a mapping
    values = {
        key: OmegaConf.select(config, key)
        for key in ("algo.name", "environment.domain", "environment.task", "seed")
    }
    if missing := [key for key, value in values.items() if value is None]:
        raise ValueError(f"{path} lacks {', '.join(missing)}.")
    records = read_metrics(run_dir)
    starts = read_environment(run_dir / "environment.json")
    if not records:
        raise ValueError(f"{run_dir / 'metrics.jsonl'} is empty.")
    algo = " ".join(filter(None, [values["algo.name"], OmegaConf.select(config, "algo.latent")]))
    return Run(
        label=algo if label is None else label,
        seed=int(values["seed"]),
        task=f"{values['environment.domain']}_{values['environment.task']}",
        settings={key: _plain(config[key]) for key in SETTINGS if key in config},
        episodes=metric_series(records, "episode/return"),
        eval_mean=metric_series(records, "eval/return_mean"),
        eval_std=metric_series(records, "eval/return_std"),
        sets={
            name: metric_series(records, name)
            for name in sorted({name for record in records for name in record})
            if re.fullmatch(r"eval/[^/]+/return_mean", name)
        },
        published=frozenset(published_scores(_container(config))),
        last_frame=int(max(record["frames"] for record in records)),
        updates=metric_series(records, "updates"),
        seconds=metric_series(records, "speed/seconds"),
        commits=list(dict.fromkeys(start["commit"] for start in starts if "commit" in start)),
    )


def collect_runs(paths: Sequence[Path]) -> list[Path]:
    """List the run directories that paths name.

    Args:
        paths: Run directories, and directories of sweeps (``hydra.sweep.dir``), which stand for all
            runs below them.

    Returns:
        Run directories; a sweep's in the order of their names.

    Raises:
        FileNotFoundError: If a path neither is nor contains a run.
    """
    found: list[Path] = []
    for path in paths:
        below = sorted(config.parent for config in path.rglob("config.yaml"))
        runs = [run for run in below if (run / "metrics.jsonl").exists()]
        if not runs:
            raise FileNotFoundError(f"{path} is not a run directory and contains none.")
        found += [path] if path in runs else runs
    return found


def bin_means(frames: Array, values: Array, edges: Array) -> list[dict[str, Any]]:
    """Average the values in each bin ``(edges[i], edges[i + 1]]`` of frames.

    Args:
        frames: float64 ``[N]``.
        values: float64 ``[N]``.
        edges: float64 ``[K + 1]``, ascending.

    Returns:
        One dict per bin with ``from``, ``to``, ``episodes`` (how many), ``mean`` and ``sd`` (None
        where there are too few).
    """
    index = np.searchsorted(edges, frames, side="left") - 1
    bins = []
    for number, (low, high) in enumerate(itertools.pairwise(edges)):
        bins.append({"from": int(low), "to": int(high)} | _moments(values[index == number]))
    return bins


def follows_protocol(run: Run) -> bool:
    """Whether a run's environment is that of the published curves, so that they are comparable.

    Args:
        run: The run.

    Returns:
        True for 64 x 64 pixels, an action repeat of 2, and no distraction.
    """
    environment = run.settings["environment"]
    wanted = {"image_size": 64, "action_repeat": 2, "distraction": "none"}
    return all(environment.get(key) == value for key, value in wanted.items())


def read_published(path: Path, task: str) -> list[dict[str, float]]:
    """Read the published curve of a task.

    Args:
        path: A table with columns task, env_steps, mean, sd_over_seeds, n_seeds; ``#`` comments.
        task: ``<domain>_<task>``.

    Returns:
        The rows, ordered by env_steps; none if the table lacks the task.
    """
    found = [row for row in read_table(path) if row["task"] == f"dmc_{task}"]
    columns = ("env_steps", "mean", "sd_over_seeds", "n_seeds")
    curve = [{name: float(row[name]) for name in columns} for row in found]
    return sorted(curve, key=lambda row: row["env_steps"])


def scores_of_sets(runs: Sequence[Run]) -> list[Published]:
    """Return the published scores of evaluation sets that all runs have, in the same protocol."""
    each = [{score for score in run.published if score.metric in run.sets} for run in runs]
    return sorted(set.intersection(*each), key=lambda score: (score.metric, score.label))


def summarise(run: Run, edges: Array, published: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return a run's entry in the JSON file.

    Args:
        run: The run.
        edges: Edges of the bins, frames.
        published: Rows of :func:`read_published`.

    Returns:
        Settings, binned returns, final returns, and the returns around the published points that
        the run has reached (training episodes that ended within half a bin of the point).
    """
    frames, returns = run.episodes
    half = (edges[1] - edges[0]) / 2
    compared = [
        {"frames": int(row["env_steps"]), "published_mean": row["mean"]}
        | {"published_sd_over_seeds": row["sd_over_seeds"]}
        | _moments(returns[np.abs(frames - row["env_steps"]) <= half])
        for row in published
        if row["env_steps"] <= run.last_frame
    ]
    evaluations = [
        {"frames": int(frame)}
        | {name: int(value) for name, value in _effort(run, frame).items()}
        | {"mean": float(mean)}
        for frame, mean in zip(*run.eval_mean, strict=True)
    ]
    if len(run.eval_std[0]) == len(evaluations):
        for entry, deviation in zip(evaluations, run.eval_std[1], strict=True):
            entry["std_over_episodes"] = float(deviation)
    if evaluations:
        evaluations[-1]["episodes"] = run.settings.get("evaluation", {}).get("episodes")
    last = _final_returns(run)
    return {
        "name": run.name,
        "task": run.task,
        "commits": run.commits,
        "settings": run.settings,
        "frames": run.last_frame,
        "training_episodes_binned": bin_means(frames, returns, edges),
        "at_published_points": compared,
        "evaluations": evaluations,
        "final_training_return": {"over": "the last 10 % of frames"} | _moments(last),
        "final_evaluation": evaluations[-1] if evaluations else None,
    }


def _effort(run: Run, frame: float) -> dict[str, float]:
    """Updates and seconds of a run until a frame, as far as they are known."""
    until = {}
    for name, (frames, values) in {"updates": run.updates, "seconds": run.seconds}.items():
        reached = values[frames <= frame]
        if len(reached):
            until[name] = float(reached.max())
    return until


def summarise_labels(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return means and standard deviations over seeds, one entry for each label.

    Args:
        runs: The runs.

    Returns:
        ``final_training_return`` (of each run over its last 10 % of frames) and
        ``final_evaluation``, each with the value of every seed.
    """
    entries = []
    for label, members in by_label(runs).items():
        training = [_final_returns(run).mean() for run in members if len(_final_returns(run))]
        evaluated = [run.eval_mean[1][-1] for run in members if len(run.eval_mean[1])]
        entries.append(
            {
                "label": label,
                "seeds": [run.seed for run in members],
                "frames": [run.last_frame for run in members],
                "final_training_return": _over_seeds(training),
                "final_evaluation": _over_seeds(evaluated),
            }
        )
    return entries


def by_label(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group runs that differ in their seeds only.

    Args:
        runs: The runs.

    Returns:
        Lists in the order given.

    Raises:
        ValueError: If runs of one label have one seed, or other settings.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    for label, members in groups.items():
        if len({run.seed for run in members}) < len(members):
            raise ValueError(f"two runs are called {members[0].name}; tell them apart by --labels.")
        first = {**members[0].settings, "seed": None}
        if any({**run.settings, "seed": None} != first for run in members):
            raise ValueError(
                f"the runs called {label} differ in more than their seeds; tell them apart by "
                "--labels."
            )
    return groups


def _over_seeds(values: Sequence[float]) -> dict[str, Any]:
    array = np.array(values, dtype=np.float64)
    moments = _moments(array)
    return {"mean": moments["mean"], "sd_over_seeds": moments["sd"], "each": array.tolist()}


def _final_returns(run: Run) -> Array:
    frames, returns = run.episodes
    return returns[frames > 0.9 * run.last_frame]


def draw(
    runs: Sequence[Run],
    edges: Array,
    published: Sequence[Mapping[str, float]],
    random_policy: Mapping[str, float] | None,
    out: Path,
    scores: Sequence[Published] = (),
) -> None:
    """Draw the curves as a PNG.

    Args:
        runs: The runs, all of one task.
        edges: Edges of the bins, frames.
        published: Rows of :func:`read_published`; may be empty.
        random_policy: Results of ``random_policy.py``, or None.
        out: Where to.
        scores: Of :func:`scores_of_sets`; each is drawn with the runs' returns in its set.
    """
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.add_subplot()
    last_frame = max(run.last_frame for run in runs)
    if published:  # a short run's picture still reaches the first published point
        last_frame = max(last_frame, int(published[0]["env_steps"]))
    for number, (label, members) in enumerate(by_label(runs).items()):
        _draw_label(axes, label, members, edges, COLORS[number])
    if published:
        steps, means, deviations = (
            np.array([row[name] for row in published])
            for name in ("env_steps", "mean", "sd_over_seeds")
        )
        seeds = int(published[0]["n_seeds"])
        label = f"DreamerV3, published (mean ± sd over {seeds} seeds)"
        axes.plot(steps, means, color="black", ls="--", lw=1.2, marker="s", ms=3.5, label=label)
        axes.fill_between(steps, means - deviations, means + deviations, color="black", alpha=0.1)
    for score, color in zip(scores, itertools.cycle(reversed(COLORS)), strict=False):
        name = score.metric.split("/")[1]
        for label, members in by_label(runs).items():
            number = min(len(run.sets[score.metric][0]) for run in members)
            frames, means = (
                np.mean([run.sets[score.metric][part][:number] for run in members], 0)
                for part in (0, 1)
            )
            axes.plot(frames, means, color=color, lw=1, marker=".", label=f"{label}, {name}")
        draw_published(axes, replace(score, label=f"{name}: {score.label}"), color)
    if random_policy is not None:
        label = f"random policy (mean of {random_policy['episodes']} episodes)"
        axes.axhline(random_policy["return_mean"], color="grey", ls=":", lw=1.2, label=label)
    if all(run.on_suite for run in runs):
        axes.set_ylim(0, 1030)  # every return lies in [0, 1000]
    axes.set_ylabel("episode return")
    axes.set_title(runs[0].task, fontsize=10)
    style_frames_axis(axes, last_frame)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=2)
    save_figure(figure, out, dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the runs, draw the picture and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dirs", type=Path, nargs="*", help="runs, or directories of sweeps")
    parser.add_argument("--labels", nargs="+", help="what each of the runs is called")
    parser.add_argument("--task", help="<domain>_<task>: refuse runs of another")
    parser.add_argument("--train", type=Path, help="a list of configurations to train first")
    parser.add_argument("--runs", type=Path, help="where the list's runs are")
    parser.add_argument("--parallel", type=int, default=1, help="the list's runs at a time")
    parser.add_argument("--published", type=Path, default=FOLDER / DREAMER_V3)
    parser.add_argument("--random", type=Path, help="JSON that random_policy.py wrote")
    parser.add_argument("--bin-frames", type=int, default=5000)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(arguments)
    if args.bin_frames < 1:
        parser.error(f"--bin-frames must be at least 1, got {args.bin_frames}.")
    runs = _runs(parser, args)
    tasks = sorted({run.task for run in runs} | ({args.task} if args.task else set()))
    if len(tasks) > 1:
        parser.error(f"one task makes a picture, these are {', '.join(tasks)}.")
    if (labels := len(by_label(runs))) > len(COLORS):
        parser.error(f"{labels} curves are too many for one picture; the maximum is {len(COLORS)}.")
    task = tasks[0]
    default = RESULTS / f"random_policy_{task}.json"
    random_file = args.random or (default if default.exists() else None)
    random_policy = json.loads(random_file.read_text()) if random_file else None
    published = read_published(args.published, task)
    if not published:
        sys.stderr.write(f"no published curve: {args.published.name} has none of {task}\n")
    elif strangers := [run.name for run in runs if not follows_protocol(run)]:
        sys.stderr.write(f"no published curve: {', '.join(strangers)} ran another protocol\n")
        published = []
    last_frame = max(run.last_frame for run in runs)
    edges = np.arange(0, last_frame + args.bin_frames, args.bin_frames, dtype=np.float64)
    scores = scores_of_sets(runs)
    draw(runs, edges, published, random_policy, args.out, scores)
    results = {
        "task": task,
        "bin_frames": args.bin_frames,
        "labels": summarise_labels(runs),
        "runs": [summarise(run, edges, published) for run in runs],
        "random_policy": random_policy and random_policy["return_mean"],
        "published_scores_of_sets": [asdict(score) for score in scores],
    }
    write_results(args.json, results)
    sys.stdout.write(f"{args.out}\n{args.json}\n")


def _runs(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[Run]:
    if bool(args.run_dirs) == bool(args.train):
        parser.error("give either run directories or --train LIST.")
    if args.train is None:
        paths = collect_runs(args.run_dirs)
        labels = args.labels or [None] * len(paths)
        if len(labels) != len(paths):
            parser.error(f"--labels has {len(labels)} entries for {len(paths)} runs.")
        return [load_run(path, label) for path, label in zip(paths, labels, strict=True)]
    if args.runs is None or args.parallel < 1 or args.labels:
        parser.error("--train needs --runs FOLDER, --parallel of at least 1, and no --labels.")
    jobs = read_jobs(args.train)
    try:
        trained = Runs(args.runs, args.parallel, lambda line: sys.stderr.write(f"{line}\n")).train(
            jobs
        )
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command to continue\n")
        raise SystemExit(130) from None
    return [load_run(path, label) for label, paths in trained.items() for path in paths]


def _draw_label(axes: Axes, label: str, runs: Sequence[Run], edges: Array, color: str) -> None:
    """The mean over seeds of the binned training returns, between the minimum and the maximum."""
    last_frame = max(run.last_frame for run in runs)
    table = np.array(
        [[_or_nan(entry["mean"]) for entry in bin_means(*run.episodes, edges)] for run in runs]
    )
    filled = np.isfinite(table).all(0)
    table, lows = table[:, filled], edges[:-1][filled]
    centres = (lows + np.minimum(edges[1:][filled], last_frame)) / 2
    seeds = "1 seed" if len(runs) == 1 else f"{len(runs)} seeds"
    if len(centres):  # a run on recorded data plays none
        name = f"{label}, training ({seeds})"
        axes.plot(centres, table.mean(0), color=color, lw=1.8, label=name)
    if len(runs) == 1:
        axes.scatter(*runs[0].episodes, s=6, color=color, alpha=0.25, lw=0)
    else:
        axes.fill_between(centres, table.min(0), table.max(0), color=color, alpha=0.15, lw=0)
    if all(len(run.eval_mean[0]) for run in runs):
        number = min(len(run.eval_mean[0]) for run in runs)
        frames = np.mean([run.eval_mean[0][:number] for run in runs], 0)
        means = np.mean([run.eval_mean[1][:number] for run in runs], 0)
        axes.plot(
            frames, means, color=color, lw=1, ls="-.", marker="o", ms=4, mfc="white",
            label=f"{label}, evaluation",
        )  # fmt: skip


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _moments(values: Array) -> dict[str, Any]:
    return {
        "episodes": len(values),
        "mean": float(values.mean()) if len(values) else None,
        "sd": float(values.std(ddof=1)) if len(values) > 1 else None,
    }


def _container(config: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def _plain(value: Any) -> Any:
    """Turn a setting into plain values, without the paths of the machine it ran on."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return "<path>" if isinstance(value, str) and value.startswith("/") else value


if __name__ == "__main__":
    main()

r"""Return curves of runs beside the published DreamerV3 curve and a random policy.

python benchmarks/curves.py runs/a runs/b --task cartpole_balance \
    --out curves.png --json curves.json
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from results_file import write_results

from w2f_torchrl.utils.logging import read_metrics
from w2f_torchrl.utils.plotting import Array, metric_series, save_figure, style_frames_axis

HERE = Path(__file__).parent
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

    name: str
    task: str
    settings: dict[str, Any]
    episodes: tuple[Array, Array]
    eval_mean: tuple[Array, Array]
    eval_std: tuple[Array, Array]
    last_frame: int


def load_run(run_dir: Path) -> Run:
    """Read a run directory.

    Args:
        run_dir: A directory with ``config.yaml`` and ``metrics.jsonl``.

    Returns:
        The run, named ``<algo> <latent>, seed <seed>``.

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
    if not records:
        raise ValueError(f"{run_dir / 'metrics.jsonl'} is empty.")
    algo = " ".join(filter(None, [values["algo.name"], OmegaConf.select(config, "algo.latent")]))
    return Run(
        name=f"{algo}, seed {values['seed']}",
        task=f"{values['environment.domain']}_{values['environment.task']}",
        settings={key: _plain(config[key]) for key in SETTINGS if key in config},
        episodes=metric_series(records, "episode/return"),
        eval_mean=metric_series(records, "eval/return_mean"),
        eval_std=metric_series(records, "eval/return_std"),
        last_frame=int(max(record["frames"] for record in records)),
    )


def collect_runs(paths: Sequence[Path]) -> list[Path]:
    """List the run directories that paths name.

    Args:
        paths: Run directories, and directories of sweeps (``hydra.sweep.dir``), which stand for all
            runs below them.

    Returns:
        Run directories; a sweep's in the order of their names.

    Raises:
        FileNotFoundError: If a path is no run and holds none.
    """
    found: list[Path] = []
    for path in paths:
        below = sorted(config.parent for config in path.rglob("config.yaml"))
        runs = [run for run in below if (run / "metrics.jsonl").exists()]
        if not runs:
            raise FileNotFoundError(f"{path} is no run directory and holds none.")
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
    """Whether a run's environment is that of the published curves: no number is comparable else.

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
        The rows, ordered by env_steps.

    Raises:
        ValueError: If the table has no such task.
    """
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    rows = list(csv.DictReader(lines))
    found = [row for row in rows if row["task"] == f"dmc_{task}"]
    if not found:
        known = sorted({row["task"].removeprefix("dmc_") for row in rows})
        raise ValueError(f"--task {task} is not in {path.name}; it has {', '.join(known)}.")
    columns = ("env_steps", "mean", "sd_over_seeds", "n_seeds")
    curve = [{name: float(row[name]) for name in columns} for row in found]
    return sorted(curve, key=lambda row: row["env_steps"])


def summarise(run: Run, edges: Array, published: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return what the JSON file says of a run.

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
        {"frames": int(frame), "mean": float(mean)}
        for frame, mean in zip(*run.eval_mean, strict=True)
    ]
    if len(run.eval_std[0]) == len(evaluations):
        for entry, deviation in zip(evaluations, run.eval_std[1], strict=True):
            entry["std_over_episodes"] = float(deviation)
    if evaluations:
        evaluations[-1]["episodes"] = run.settings.get("evaluation", {}).get("episodes")
    last = returns[frames > 0.9 * run.last_frame]
    return {
        "name": run.name,
        "task": run.task,
        "settings": run.settings,
        "frames": run.last_frame,
        "training_episodes_binned": bin_means(frames, returns, edges),
        "at_published_points": compared,
        "evaluations": evaluations,
        "final_training_return": {"over": "the last 10 % of frames"} | _moments(last),
        "final_evaluation": evaluations[-1] if evaluations else None,
    }


def draw(
    runs: Sequence[Run],
    edges: Array,
    published: Sequence[Mapping[str, float]],
    random_policy: Mapping[str, float] | None,
    out: Path,
) -> None:
    """Draw the curves as a PNG.

    Args:
        runs: The runs, all of one task.
        edges: Edges of the bins, frames.
        published: Rows of :func:`read_published`; may be empty.
        random_policy: Results of ``random_policy.py``, or None.
        out: Where to.
    """
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.add_subplot()
    last_frame = max(run.last_frame for run in runs)
    if published:  # a short run's picture still reaches the first published point
        last_frame = max(last_frame, int(published[0]["env_steps"]))
    for color, run in zip(COLORS, runs, strict=False):
        _draw_run(axes, run, edges, color)
    if published:
        steps, means, deviations = (
            np.array([row[name] for row in published])
            for name in ("env_steps", "mean", "sd_over_seeds")
        )
        seeds = int(published[0]["n_seeds"])
        label = f"DreamerV3, published (mean ± sd over {seeds} seeds)"
        axes.plot(steps, means, color="black", ls="--", lw=1.2, marker="s", ms=3.5, label=label)
        axes.fill_between(steps, means - deviations, means + deviations, color="black", alpha=0.1)
    if random_policy is not None:
        label = f"random policy (mean of {random_policy['episodes']} episodes)"
        axes.axhline(random_policy["return_mean"], color="grey", ls=":", lw=1.2, label=label)
    axes.set_ylim(0, 1030)  # every Control Suite return lies in [0, 1000]
    axes.set_ylabel("episode return")
    axes.set_title(runs[0].task, fontsize=10)
    style_frames_axis(axes, last_frame)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=2)
    save_figure(figure, out, dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the runs, draw the picture and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dirs", type=Path, nargs="+", help="runs, or directories of sweeps")
    parser.add_argument("--task", required=True, help="<domain>_<task>")
    parser.add_argument(
        "--published", type=Path, default=HERE / "reference" / "dmc_vision_dreamerv3.csv"
    )
    parser.add_argument("--random", type=Path, help="JSON that random_policy.py wrote")
    parser.add_argument("--bin-frames", type=int, default=5000)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(arguments)
    if args.bin_frames < 1:
        parser.error(f"--bin-frames must be at least 1, got {args.bin_frames}.")
    runs = [load_run(path) for path in collect_runs(args.run_dirs)]
    if wrong := [run.name for run in runs if run.task != args.task]:
        parser.error(f"--task is {args.task}, and {wrong} ran another task.")
    default = HERE / "results" / f"random_policy_{args.task}.json"
    random_file = args.random or (default if default.exists() else None)
    random_policy = json.loads(random_file.read_text()) if random_file else None
    published = read_published(args.published, args.task)
    if strangers := [run.name for run in runs if not follows_protocol(run)]:
        sys.stderr.write(f"no published curve: {', '.join(strangers)} ran another protocol\n")
        published = []
    last_frame = max(run.last_frame for run in runs)
    edges = np.arange(0, last_frame + args.bin_frames, args.bin_frames, dtype=np.float64)
    draw(runs, edges, published, random_policy, args.out)
    results = {
        "task": args.task,
        "bin_frames": args.bin_frames,
        "runs": [summarise(run, edges, published) for run in runs],
        "random_policy": random_policy and random_policy["return_mean"],
    }
    write_results(args.json, results)
    sys.stdout.write(f"{args.out}\n{args.json}\n")


def _draw_run(axes: Axes, run: Run, edges: Array, color: str) -> None:
    bins = [entry for entry in bin_means(*run.episodes, edges) if entry["episodes"]]
    centres = [(entry["from"] + min(entry["to"], run.last_frame)) / 2 for entry in bins]
    means = [entry["mean"] for entry in bins]
    axes.scatter(*run.episodes, s=6, color=color, alpha=0.25, lw=0)
    axes.plot(centres, means, color=color, lw=1.8, label=f"{run.name}, training episodes")
    if len(run.eval_mean[0]):
        axes.plot(
            *run.eval_mean, color=color, lw=1, ls="-.", marker="o", ms=4, mfc="white",
            label=f"{run.name}, evaluation",
        )  # fmt: skip


def _moments(values: Array) -> dict[str, Any]:
    return {
        "episodes": len(values),
        "mean": float(values.mean()) if len(values) else None,
        "sd": float(values.std(ddof=1)) if len(values) > 1 else None,
    }


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

"""Assemble a page: one file with everything in it, which loads nothing else."""

from __future__ import annotations

import base64
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import w2f_torchrl
from w2f_torchrl.logging.progress import format_duration
from w2f_torchrl.report.charts import chart_data
from w2f_torchrl.report.runs import Media, Run, load_runs, newest
from w2f_torchrl.utils.files import write_text

BROWSER_CODECS = ("h264", "vp8", "vp9", "av1")
LAST_EPISODES = 20
_SPOKEN = {
    "train_imagination_comparison": "imagination with the actions that were taken",
    "train_imagination_imagined": "imagination with the policy acting",
    "train_original": "training batch",
    "train_reconstructed": "training batch, reconstructed",
    "segmentation_mask": "training masks",
    "segmentation_predicted_mask": "predicted masks",
}


def write_report(run_dirs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Path:
    """Write one HTML page about one or several runs.

    It has curves of all runs, videos, images, settings, machine and versions. The page needs
    neither network access nor other files. It is written atomically.

    Args:
        run_dirs: Run directories.
        out: Path of the page; directories are created.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: If a run directory has no ``metrics.jsonl``.
        ValueError: If no run is given, or one is given twice.
    """
    if not run_dirs:
        raise ValueError("No run was given to report.")
    page = render([*map(Path, run_dirs)])
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    return path


def render(run_dirs: list[Path]) -> str:
    """Make the page's HTML."""
    runs = load_runs(run_dirs)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("w2f_torchrl", "report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    folder, sections = Path(__file__).parent, chart_data(runs)
    return environment.get_template("page.html").render(
        title=_title(runs),
        version=w2f_torchrl.__version__,
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        style=Markup((folder / "style.css").read_text()),
        script=Markup((folder / "charts.js").read_text()),
        runs=runs,
        overview=[overview(run) for run in runs],
        sections=sections,
        data={"runs": [run.label for run in runs], "sections": sections},
        videos=_media_rows(runs, "videos"),
        images=_media_rows(runs, "images"),
        settings=compare([run.settings for run in runs]),
        environments=compare([run.environment[-1] if run.environment else {} for run in runs]),
        starts=[run.environment for run in runs],
    )


def overview(run: Run) -> dict[str, str]:
    """Return a run's results, label to text; labels without a value are left out."""
    out = {}
    evaluations = run.series("eval/return_mean")
    deviations = run.series("eval/return_std")
    if evaluations:
        last, best = evaluations[-1], max(evaluations, key=lambda point: point[2])
        spread = f" ± {_number(deviations[-1][2])}" if deviations else ""
        out["last evaluation"] = f"{_number(last[2])}{spread} at {last[0]:,}"
        out["best evaluation"] = f"{_number(best[2])} at {best[0]:,}"
    returns = [value for _, _, value in run.series("episode/return")][-LAST_EPISODES:]
    if returns:
        mean = _number(sum(returns) / len(returns))
        out["training episodes"] = f"{mean}, mean of the last {len(returns)}"
    if errors := run.series("recorded/error"):
        out["open-loop error"] = f"{errors[-1][2]:.4f} at {errors[-1][0]:,}"
    if iou := run.series("wm/mask_iou"):
        out["mask IoU"] = f"{iou[-1][2]:.2f}"
    out["frames"], out["updates"] = f"{run.frames:,}", f"{run.updates:,}"
    if seconds := run.series("speed/seconds"):
        out["time"] = format_duration(seconds[-1][2])
        out["frames/s"] = f"{seconds[-1][0] / max(seconds[-1][2], 1e-9):.1f}"
    return out


def compare(tables: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """Arrange tables side by side.

    Args:
        tables: Label to text, one per run.

    Returns:
        Rows with ``name``, ``values`` (None if a table lacks it) and ``differs``; rows that differ
        come first.
    """
    names = list(dict.fromkeys(name for table in tables for name in table))
    rows = []
    for name in names:
        values = [table.get(name) for table in tables]
        rows.append({"name": name, "values": values, "differs": len(set(values)) > 1})
    return sorted(rows, key=lambda row: not row["differs"])


def _media_rows(runs: Sequence[Run], kind: str) -> list[dict[str, Any]]:
    """Return the newest video or image of each name and run, ready for the page."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for index, run in enumerate(runs):
        for item in newest(getattr(run, kind)):
            rows.setdefault(item.name, []).append(_embed(item, index, run))
    return [{"name": _spoken(name), "items": items} for name, items in sorted(rows.items())]


def _embed(item: Media, index: int, run: Run) -> dict[str, Any]:
    kind = "video/mp4" if item.path.suffix == ".mp4" else "image/png"
    note = None
    if kind == "video/mp4":
        import av

        with av.open(os.fspath(item.path)) as container:
            stream = container.streams.video[0]
            width, codec = stream.width, stream.codec_context.name
        if codec not in BROWSER_CODECS:
            note = f"Encoded as {codec}, which browsers cannot play: {item.path}"
    else:
        width = 0
    uri = f"data:{kind};base64,{base64.b64encode(item.path.read_bytes()).decode()}"
    return {
        "run": index,
        "label": run.label,
        "frames": f"{item.frames:,}",
        "uri": uri,
        "wide": width > 700,
        "note": note,
    }


def _spoken(name: str) -> str:
    if name in _SPOKEN:
        return _SPOKEN[name]
    return name.removeprefix("train_").replace("_", " ")


def _title(runs: Sequence[Run]) -> str:
    """Return the runs' task if they share one."""
    keys = ("environment.domain", "environment.task")
    tasks = {" ".join(run.settings.get(key, "") for key in keys).strip() for run in runs}
    task = tasks.pop() if len(tasks) == 1 else ""
    if len(runs) == 1:
        return f"{runs[0].label} · {task}" if task else runs[0].label
    return f"{task or 'several tasks'} · {len(runs)} runs"


def _number(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "-"

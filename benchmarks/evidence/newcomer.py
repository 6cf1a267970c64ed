"""Follow the first pages from a fresh clone as a newcomer would: every command, timed, its end.

    python benchmarks/evidence/newcomer.py --out benchmarks/results/newcomer.json
    python benchmarks/evidence/newcomer.py --only "make" "python examples"
    python benchmarks/evidence/newcomer.py --r2dreamer CHECKOUT

The commit at hand is cloned into a temporary folder; each command of PAGES is run there in the
order of STEPS. A command that would take hours gets Ctrl+C after a while or a shorter form; where
a network, an account or weights are missing, STEPS has the error that the reader has to see. A
command that STEPS lacks is an error, so the list can't age. Packages come from uv's cache where it
has them. The sweep on SLURM has one of a single node (slurm_cluster.py), where its packages are
installed.
"""

from __future__ import annotations

import argparse
import os
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "shared"))

from documents import ROOT, commands, python_blocks
from results_file import RESULTS, write_results
from slurm_cluster import SlurmCluster, missing_requirement

PAGES = ("README.md", "docs/howto/train.md", "docs/howto/masks.md", "docs/evidence.md")
"""What a newcomer follows."""
TRAIN = "python sota_configs/world2filter.py"
EASY = f"{TRAIN} experiment=cpu environment.distraction=easy"
CHECKOUT = "CHECKOUT"
"""The page's word for a checkout of r2dreamer."""
SHORT = "training.total_frames=1600 evaluation.every_frames=0"
PATIENCE = 2400.0
"""Seconds after which a command is given up."""


@dataclass(frozen=True)
class Step:
    """What to do with the commands that begin with some words."""

    start: str
    instead: str | None = None
    """Run in its place; ``None``: the command itself."""
    before: tuple[str, ...] = ()
    """What has to be run first, because the page's own way to it takes hours."""
    interrupt: float | None = None
    """Press Ctrl+C after these seconds; it then has to end with 0, or 130 as shells count it."""
    error: str | None = None
    """It has to fail, and to say this."""
    skip: str | None = None
    """Why it isn't run."""
    python: bool = False
    """Before it, the README's Python is run, which reads what ``make train`` made."""
    slurm: bool = False
    """It needs a SLURM, which is started for it."""


STEPS = (
    Step("make setup"),
    Step(". .venv/bin/activate", skip="changes the reader's shell"),
    Step("make extras"),
    Step("make train"),
    Step("python -m w2f_torchrl.report runs/demo", python=True),
    Step("make test"),
    Step(f"{TRAIN} --cfg job"),
    Step(f"{TRAIN} environment.domain=walker", interrupt=60),
    Step(
        f"{TRAIN} resume=auto",
        f"{TRAIN} environment.domain=walker environment.task=walk resume=auto",
        interrupt=60,
    ),
    Step(f"{TRAIN} algo=dreamer_v3", interrupt=60),
    Step(f"{TRAIN} algo.latent=shared", interrupt=60),
    Step("python examples/own_env_and_segmenter.py"),
    Step(
        "torchrun --nproc_per_node=8",
        f"torchrun --nproc_per_node=2 {TRAIN.split()[1]} experiment=smoke run_dir=runs/two_ranks",
    ),
    Step(
        f"{TRAIN} --multirun",
        f"{TRAIN} --multirun hydra/launcher=submitit_slurm hydra.launcher.partition=main "
        "hydra.launcher.gpus_per_node=null hydra.launcher.cpus_per_task=1 hydra.launcher.mem_gb=4 "
        "experiment=smoke seed=0,1",
        slurm=True,
    ),
    Step("hf auth login", skip="asks for the reader's account"),
    Step("hf download", skip="gated weights"),
    Step(f"{TRAIN} segmentation=sam3", error="sam3.pt"),
    Step(f"{TRAIN} segmentation=student segmentation.teacher=sam3", error="sam3.pt"),
    Step(f"{TRAIN} segmentation=student segmentation.labels", error="frames.npz"),
    Step(f"{TRAIN} segmentation=student", f"{TRAIN} segmentation=student seed=1", interrupt=120),
    Step("python sota_configs/preprocess_masks.py", error="is no file"),
    Step("python benchmarks/evidence/masks.py --choose-prompts", error="does not exist"),
    Step("python sota_configs/download_davis.py", error="davis"),
    Step("make docs"),
    Step(f"{TRAIN} experiment=smoke"),
    Step("python benchmarks/evidence/masks.py --segmenter median"),
    Step(
        "python benchmarks/evidence/curves.py "
        "--train benchmarks/evidence/curves/cartpole_easy.yaml",
        interrupt=75,
    ),
    Step(
        "python benchmarks/evidence/curves.py "
        "--train benchmarks/evidence/curves/cartpole_swingup_easy.yaml",
        interrupt=75,
    ),
    Step(
        "python benchmarks/evidence/filtering.py",
        "python benchmarks/evidence/filtering.py runs/short/split --set train_videos_easy "
        "--json filtering.json",
        before=(f"{EASY} {SHORT} run_dir=runs/short/split",),
    ),
    Step(
        "python benchmarks/evidence/generalisation.py",
        "python benchmarks/evidence/generalisation.py runs/short/split --episodes 5 "
        "--sets train_videos_easy unseen_videos_easy --json generalisation.json",
    ),
    Step("python benchmarks/evidence/methods.py", interrupt=75),
    Step(f"{TRAIN} experiment=cpu algo=dreamer_v3", interrupt=150),
    Step(
        "python benchmarks/evidence/curves.py runs/cpu_swingup_seed0",
        "python benchmarks/evidence/curves.py runs/short/dreamer_v3 --labels DreamerV3 "
        "--out curves.png --json curves.json",
        before=(f"{EASY} algo=dreamer_v3 {SHORT} run_dir=runs/short/dreamer_v3",),
    ),
    Step(
        "python benchmarks/pictures/side_by_side.py",
        "python benchmarks/pictures/side_by_side.py runs/short/dreamer_v3 runs/short/split "
        "--names DreamerV3 World2Filter --set unseen_videos_easy --out side_by_side.png",
        before=(f"{EASY} algo=dreamer_v3 {SHORT} run_dir=runs/short/dreamer_v3",),
    ),
    Step(
        "python benchmarks/speed/render.py",
        "python benchmarks/speed/render.py --rounds 3 --steps 3",
    ),
    Step(
        "python benchmarks/speed/distraction_cost.py",
        "python benchmarks/speed/distraction_cost.py --rounds 1 --frames 2",
    ),
    Step(
        "python benchmarks/speed/learner.py --r2dreamer",
        "python benchmarks/speed/learner.py --r2dreamer CHECKOUT --rounds 1 "
        "--latents whole split shared --modes compile",
    ),
    Step(
        "python benchmarks/speed/learner.py --model size12m",
        "python benchmarks/speed/learner.py --model size12m --r2dreamer CHECKOUT --rounds 1 "
        "--latents whole split shared --modes",
    ),
    Step(
        "python benchmarks/speed/execution_equality.py",
        "python benchmarks/speed/execution_equality.py --modes eager compile --updates 5",
    ),
    Step(
        "python benchmarks/speed/replay.py",
        "python benchmarks/speed/replay.py --records 8000 --streams 4 --rounds 3",
    ),
    Step("python benchmarks/speed/end_to_end.py"),
    Step(
        "python benchmarks/speed/export.py",
        "python benchmarks/speed/export.py --models pretrained --rounds 20 --json export.json",
    ),
    Step(
        "python benchmarks/evidence/student.py",
        "python benchmarks/evidence/student.py --tasks 'walker walk' --few --seeds 0 "
        "--steps 60 --jobs 2",
    ),
    Step("python benchmarks/faults/kills.py", "python benchmarks/faults/kills.py --kills 2"),
    Step(
        "python benchmarks/faults/rank_faults.py",
        "python benchmarks/faults/rank_faults.py --kills 1 --json rank_faults.json",
    ),
    Step("python benchmarks/evidence/newcomer.py", skip="it is what runs them"),
    Step(
        "python benchmarks/gpu_acceptance.py",
        "python benchmarks/gpu_acceptance.py --small --out results_gpu",
    ),
)


def plan(pages: Sequence[Path]) -> list[tuple[str, Step]]:
    """Return every command of the pages with its step: the one that matches the longest beginning.

    Raises:
        ValueError: If commands have no step, or steps no command; names them.
    """
    found: dict[Step, list[str]] = {step: [] for step in STEPS}
    unknown = []
    for command in dict.fromkeys(command for page in pages for command in commands(page)):
        fitting = [step for step in STEPS if command.startswith(step.start)]
        if fitting:
            found[max(fitting, key=lambda step: len(step.start))].append(command)
        else:
            unknown.append(command)
    unused = [step.start for step, its in found.items() if not its]
    if unknown or unused:
        raise ValueError(f"STEPS lacks {unknown}, and has {unused}, which the pages lack.")
    return [(command, step) for step, its in found.items() for command in its]


def run(
    command: str, clone: Path, log: Path, step: Step, variables: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run one command in the clone's virtual environment, and see how it ends.

    Args:
        command: Words as a shell splits them.
        clone: Where it is run.
        log: Gets what it prints.
        step: How it has to end.
        variables: Further ones of its environment.

    Returns:
        ``command``, ``seconds`` by the clock, ``cpu_seconds`` of it and its children, ``exit``
        (negative: a signal), ``ended`` in words, ``well`` (whether it ended as it should), and the
        ``last_line`` that it printed.
    """
    environment = os.environ | {
        "PATH": f"{clone / '.venv' / 'bin'}:{os.environ['PATH']}",
        "HYDRA_FULL_ERROR": "0",
        **(variables or {}),
    }
    environment.pop("PYTHONPATH", None)
    before, began, ended = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic(), "itself"
    with log.open("w") as output:
        process = subprocess.Popen(
            shlex.split(command),
            cwd=clone,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A shell starts what runs in its background with Ctrl+C ignored; programs inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            process.wait(step.interrupt or PATIENCE)
        except subprocess.TimeoutExpired:
            ended = f"Ctrl+C after {step.interrupt or PATIENCE:.0f} s"
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            try:
                process.wait(180)
            except subprocess.TimeoutExpired:
                ended += ", killed 180 s later"
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    seconds = time.monotonic() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    text = log.read_text(errors="replace").replace(str(clone), ".").strip()
    if step.error is not None:
        well = process.returncode > 0 and step.error in text
    else:
        good = (0,) if step.interrupt is None else (0, 130)
        well = process.returncode in good and (ended == "itself") == (step.interrupt is None)
    return {
        "command": command,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(sum(after[:2]) - sum(before[:2]), 1),
        "exit": process.returncode,
        "ended": ended,
        "well": well,
        "last_line": text.splitlines()[-1][:200] if text else "",
    }


def write_python(clone: Path) -> str:
    """The README's Python in a file of the clone, with the demo's own checkpoint; its command."""
    text = "\n".join(block.text for block in python_blocks(clone / "README.md"))
    newest = max((clone / "runs" / "demo" / "checkpoints").glob("checkpoint_*.pt"))
    for word in {word.strip('"()') for word in text.split('"') if word.startswith("runs/demo/")}:
        text = text.replace(word, newest.relative_to(clone).as_posix())
    main = "\n".join(f"    {line}" for line in text.splitlines())
    (clone / "readme.py").write_text(f'if __name__ == "__main__":\n{main}\n')
    return "python readme.py"


def follow(clone: Path, logs: Path, only: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Run the commands, and say how each went: those that are not run have a reason, ``why``."""
    number = 0
    for command, step in plan([clone / page for page in PAGES]):
        if only and not any(command.startswith(start) for start in only):
            continue
        why = missing_requirement() if step.slurm else step.skip
        if why is not None:
            yield {"command": command, "why": why}
            continue
        names = [(each, Step("")) for each in step.before] + [(step.instead or command, step)]
        if step.python:
            names.insert(0, (write_python(clone), Step("")))
        for name, how in names:
            if not (clone / CHECKOUT).exists():
                name = name.replace(f"--r2dreamer {CHECKOUT} ", "")
            with a_slurm() if how.slurm else nullcontext({}) as variables:
                result = run(name, clone, logs / f"{number:02d}.log", how, variables)
            number += 1
            if name != command and how is step:
                result["in_place_of"] = command
            print(f"{result['seconds']:7.1f} s  {result['exit']:3d}  {result['well']!s:5}  {name}")
            yield result


@contextmanager
def a_slurm() -> Iterator[dict[str, str]]:
    """A SLURM of one node, and the variables with which commands find it."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # munged's user has to come in
        with SlurmCluster(Path(folder) / "slurm") as cluster:
            yield {"SLURM_CONF": cluster.environment["SLURM_CONF"]}


def main() -> None:
    """Clone, follow, write; exits with 1 if a command didn't end as it should."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], help="commands that begin with these")
    parser.add_argument("--r2dreamer", type=Path, help="a checkout; without it none is timed")
    parser.add_argument("--logs", type=Path, help="keep what each command printed in this folder")
    parser.add_argument("--out", default=RESULTS / "newcomer.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clone, logs = Path(folder) / "clone", (args.logs or Path(folder) / "logs").absolute()
        logs.mkdir(parents=True, exist_ok=True)
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        if args.r2dreamer is not None:
            (clone / CHECKOUT).symlink_to(args.r2dreamer.resolve(strict=True))
        revision = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=clone, text=True)
        rows: list[dict[str, Any]] = []
        failed: list[str] = []
        for row in follow(clone, logs, args.only):
            rows.append(row)
            failed = [each["command"] for each in rows if not each.get("well", True)]
            results = {"commit": revision.strip(), "failed": failed, "commands": rows}
            write_results(args.out, results)  # now, so that a cut run keeps what it has
    print(args.out)
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()

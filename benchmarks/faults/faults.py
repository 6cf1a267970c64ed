"""Break runs on purpose, and record what happened, when it was noticed and what was lost.

    python benchmarks/faults/faults.py --out benchmarks/results/faults.json
    python benchmarks/faults/faults.py --only worker_killed disk_full

Every fault is real: signals, a file system of a few megabytes (needs root), changed bytes, an env
that fails in its worker, an unreachable server. Repeated SIGKILL is in kills.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "shared"))

import torch
from fault_runs import flip_bit, fork, has_ended, leave_curves_out, rows, small_run, wait_for
from results_file import RESULTS, write_results
from wandb_stub import wandb_stub

from w2f_torchrl.checkpoint import list_checkpoints, load_checkpoint, read_manifest
from w2f_torchrl.data.collector.leftovers import Leftovers
from w2f_torchrl.logging.wandb import FINISH_SECONDS
from w2f_torchrl.trainers import Trainer

Row = dict[str, Any]
QUIET = {"evaluation": {"every_frames": 0}}
ONLINE = {"use_wandb": True, "wandb_mode": "online"}


class Attempt:
    """One run in a child process, with what its log says.

    Args:
        root: Its folder.
        before_update: Called in the child before each update.
        log: Its log, if not in that folder.
        settings: Of the run.
    """

    def __init__(
        self,
        root: Path,
        before_update: Callable[[Trainer, Any], None] | None = None,
        log: Path | None = None,
        **settings: Any,
    ) -> None:
        self.run_dir, self._log = root / "run", log or root / "log"
        self._log.unlink(missing_ok=True)
        config = small_run(self.run_dir, "world2filter", **(QUIET | settings))

        def work() -> None:
            logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
            logging.getLogger("torchrl").setLevel(logging.ERROR)
            leave_curves_out()
            trainer = Trainer(config)
            update = trainer.learner.update

            def watched(sample: Any) -> Any:
                if before_update is not None:
                    before_update(trainer, sample)
                return update(sample)

            trainer.learner.update = watched  # type: ignore[method-assign]
            trainer.train()

        self.child = fork(work, self._log)

    @property
    def log(self) -> str:
        """What it has written so far."""
        return self._log.read_text() if self._log.exists() else ""

    def says(self, text: str, seconds: float = 300.0) -> float:
        """Wait until its log has a text; returns when (monotonic seconds)."""
        if not wait_for(lambda: text in self.log, seconds, every=0.01):
            raise RuntimeError(f"never said {text!r}: {self.log[-3000:]}")
        return time.monotonic()

    def end(self) -> int:
        """Wait for it; returns its exit code."""
        return os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])

    def reaches(self, updates: int) -> None:
        """Wait until the run has a row of metrics after so many updates."""
        metrics = self.run_dir / "metrics.jsonl"

        def there() -> bool:
            return metrics.exists() and any(r["updates"] >= updates for r in rows(self.run_dir))

        if not wait_for(there, 300.0, every=0.02):
            raise RuntimeError(f"no progress: {self.log[-3000:]}")


def line(attempt: Attempt, *words: str) -> str:
    """The first line of a log that has all of these words, without a traceback and its paths."""
    found = [text for text in attempt.log.splitlines() if all(word in text for word in words)]
    found = [text.split("\\nTraceback")[0] for text in found]
    return found[0][:300].replace(str(attempt.run_dir), "RUN") if found else "nothing"


def resume_to_end(root: Path, **settings: Any) -> int:
    """Resume to the end; returns the updates that it began with."""
    attempt = Attempt(root, **settings)
    if attempt.end():
        raise RuntimeError(attempt.log[-3000:])
    return int(line(attempt, "resumed").rsplit(",", 1)[1].split()[0])


def signals(root: Path) -> Row:
    """SIGTERM, SIGINT, SIGUSR1 and SIGUSR2, one after the other, in one run."""
    times, lost = {}, 0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        folder = root / number.name
        folder.mkdir()
        attempt = Attempt(folder)
        attempt.reaches(10)
        os.kill(attempt.child, number)
        start = time.monotonic()
        attempt.says("stopping after this update")
        code = attempt.end()
        times[number.name] = round(time.monotonic() - start, 2)
        saved = load_checkpoint(list_checkpoints(attempt.run_dir / "checkpoints")[-1])
        lost += code or saved.updates < 10
    return {
        "fault": "SIGTERM, SIGINT, SIGUSR1, SIGUSR2",
        "what_happened": "checkpoint after the current update, exit code 0",
        "seconds_to_notice": max(times.values()),
        "seconds": times,
        "lost": "nothing" if not lost else "unexpected",
    }


def hangup(root: Path) -> Row:
    """A closed terminal; and one whose run nohup protects."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    attempt = Attempt(root)
    attempt.reaches(10)
    os.kill(attempt.child, signal.SIGHUP)
    start = time.monotonic()
    code = attempt.end()
    seconds = time.monotonic() - start
    saved = newest_good(attempt.run_dir)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        protected = Attempt(root)
        protected.reaches(saved + 5)
        os.kill(protected.child, signal.SIGHUP)
        protected.reaches(saved + 25)
        ended = protected.end()
    finally:
        signal.signal(signal.SIGHUP, before)
    return {
        "fault": "SIGHUP: the terminal is closed",
        "what_happened": f"checkpoint after the current update (update {saved}), exit code {code}; "
        f"with nohup the run continues to its end, exit code {ended}",
        "seconds_to_notice": round(seconds, 2),
        "lost": "nothing",
    }


def evaluation_cut(root: Path) -> Row:
    """SIGTERM in the middle of an evaluation that takes long, and the resume."""
    long = {"evaluation": {"every_frames": 240, "episodes": 40}}
    whole = root / "whole"
    whole.mkdir()
    undisturbed = Attempt(whole, **long)
    if undisturbed.end():
        raise RuntimeError(undisturbed.log[-3000:])

    def mark(trainer: Trainer, sample: Any) -> None:
        """Say that an evaluation has begun; it is called before each update."""
        evaluate = trainer.evaluator.evaluate
        if not hasattr(evaluate, "marked"):

            def marked(world_model: Any, episodes: int) -> Any:
                logging.getLogger("faults").warning("an evaluation begins")
                return evaluate(world_model, episodes)

            marked.marked = True  # type: ignore[attr-defined]
            trainer.evaluator.evaluate = marked  # type: ignore[method-assign]

    attempt = Attempt(root, mark, **long)
    attempt.says("an evaluation begins")
    time.sleep(0.2)
    start = time.monotonic()
    os.kill(attempt.child, signal.SIGTERM)
    code = attempt.end()
    seconds = time.monotonic() - start
    done = sum("eval/return_mean" in row for row in rows(attempt.run_dir))
    begun = resume_to_end(root, **long)
    same = rows(attempt.run_dir) == rows(undisturbed.run_dir)
    return {
        "fault": "SIGTERM during an evaluation of 40 episodes",
        "what_happened": f"it ends at the agent's next step ({done} evaluations written), "
        f"checkpoint, exit code {code}; resumed at update {begun}, it is repeated, and all rows "
        f"of metrics are {'' if same else 'NOT '}those of an undisturbed run",
        "seconds_to_notice": round(seconds, 2),
        "lost": "the evaluation's steps, which are repeated",
    }


def worker_lost(root: Path, number: int) -> Row:
    """SIGKILL or SIGSTOP of one of two worker processes."""
    attempt = Attempt(root, collection={"num_workers": 2, "timeout_seconds": 5.0})
    attempt.reaches(5)
    workers = children_of(attempt.child, "spawn_main")
    os.kill(workers[0], number)
    start = time.monotonic()
    noticed = attempt.says("All workers of this rank are replaced") - start
    code = attempt.end()
    left = [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    counted = max(row.get("train/worker_restarts", 0) for row in rows(attempt.run_dir))
    left_over = Leftovers(attempt.run_dir).clear()
    hangs = number == signal.SIGSTOP
    return {
        "fault": "a collector's worker hangs (SIGSTOP; collection.timeout_seconds=5)"
        if hangs
        else "SIGKILL of a collector's worker",
        "what_happened": f"the workers are replaced, {len(left)} of the old processes and "
        f"{len(left_over)} semaphores or folders left, train/worker_restarts {counted:.0f}; the "
        f"run continues to its end, exit code {code}",
        "seconds_to_notice": round(noticed, 2),
        "lost": "the batch being collected; new episodes begin",
        "message": line(attempt, "hangs" if hangs else "was killed"),
    }


def workers_lost_for_good(root: Path) -> Row:
    """Workers that are killed each time they are restarted."""
    attempt = Attempt(root, collection={"num_workers": 2, "max_restarts": 1})
    attempt.reaches(5)
    start = time.monotonic()
    # A worker that dies while it starts is reported in other words.
    while attempt.log.count("was killed by SIGKILL") < 2 and not has_ended(attempt.child):
        for worker in children_of(attempt.child, "spawn_main"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        time.sleep(0.2)
    code = attempt.end()
    seconds = time.monotonic() - start
    begun = resume_to_end(root, collection={"num_workers": 2})
    return {
        "fault": "workers are lost more than collection.max_restarts (1 here) times in a row",
        "what_happened": f"WorkerError, emergency checkpoint, exit code {code}; resumed at update "
        f"{begun}",
        "seconds_to_notice": round(seconds, 2),
        "lost": "the batch being collected; new episodes begin",
        "message": line(attempt, "WorkerError", "frame"),
    }


def evaluation_fails(root: Path) -> Row:
    """An evaluation that raises, once and then always."""

    def spoil(trainer: Trainer, sample: Any) -> None:
        if trainer.updates == 3:
            evaluate, failed = trainer.evaluator.evaluate, []

            def fails(world_model: Any, episodes: int) -> Any:
                failed.append(True)
                if len(failed) == 1:
                    raise RuntimeError("the evaluation's renderer is lost")
                return evaluate(world_model, episodes)

            trainer.evaluator.evaluate = fails  # type: ignore[method-assign]

    attempt = Attempt(root, spoil, evaluation={"every_frames": 240})
    code = attempt.end()
    done = sum("eval/return_mean" in row for row in rows(attempt.run_dir))
    kept = (attempt.run_dir / "exceptions.txt").read_text().count("Traceback")
    return {
        "fault": "an evaluation fails",
        "what_happened": f"{kept} traceback in exceptions.txt, training continues, {done} later "
        f"evaluations are made, exit code {code}; evaluation.max_failures in a row end the run",
        "seconds_to_notice": 0,
        "lost": "that evaluation",
        "message": line(attempt, "Training continues"),
    }


def torn_disk(root: Path) -> Row:
    """A disk with room for a part of the next line of metrics only, for a moment."""

    def tear(trainer: Trainer, sample: Any) -> None:
        if trainer.updates == 22:
            trainer.writer.wait()
            stream = trainer.logger._file

            class Torn:
                def write(self, data: bytes) -> int:
                    trainer.logger._file = self.full  # type: ignore[attr-defined]
                    return stream.write(data[:9])

                def __getattr__(self, name: str) -> Any:
                    return getattr(stream, name)

            class Full(Torn):
                def write(self, data: bytes) -> int:
                    trainer.logger._file = stream
                    raise OSError(28, "No space left on device")

            Torn.full = Full()  # type: ignore[attr-defined]
            trainer.logger._file = Torn()  # type: ignore[assignment]

    attempt = Attempt(root, tear)
    code = attempt.end()
    torn = sum(1 for text in (attempt.run_dir / "metrics.jsonl").open() if '"frames"' not in text)
    message = line(attempt, "No space left")
    begun = resume_to_end(root)
    return {
        "fault": "a disk that accepts part of a line of metrics, then nothing",
        "what_happened": f"{torn} torn lines; emergency checkpoint, exit code {code}; resumed at "
        f"update {begun}",
        "seconds_to_notice": 0,
        "lost": "nothing",
        "message": message,
    }


def shared_record(root: Path) -> Row:
    """One bit of a record that all checkpoints have."""
    attempt = Attempt(root)
    attempt.reaches(25)
    os.kill(attempt.child, signal.SIGTERM)
    attempt.end()
    newest = newest_good(attempt.run_dir)
    manifest = read_manifest(list_checkpoints(attempt.run_dir / "checkpoints")[-1])
    assert manifest is not None, "the run has a replay"
    pixels = attempt.run_dir / "replay" / manifest["generation"] / "next/pixels.memmap"
    flip_bit(pixels, 7)
    again = Attempt(root)
    start = time.monotonic()
    noticed = again.says("All checkpoints have damaged records") - start
    if again.end():
        raise RuntimeError(again.log[-3000:])
    return {
        "fault": "a flipped bit in a record that all checkpoints share",
        "what_happened": f"the newest is used (update {newest}), with a warning; no sequence has "
        "one of the 256 records under that digest; the run continues to its end",
        "seconds_to_notice": round(noticed, 2),
        "lost": "at most 256 records of the replay",
        "message": line(again, "All checkpoints have damaged records"),
    }


def render_failure(root: Path) -> Row:
    """An env in a worker process whose renderer fails after 150 pictures."""
    os.environ["W2F_FAULT_DRAWS"] = "150"
    attempt = Attempt(root, collection={"num_workers": 1})
    try:
        failed = attempt.says("no more pictures")
        noticed = attempt.says("are replaced") - failed
        code = attempt.end()
    finally:
        del os.environ["W2F_FAULT_DRAWS"]
    counted = max(row.get("train/worker_restarts", 0) for row in rows(attempt.run_dir))
    return {
        "fault": "rendering fails in a worker, after every 150 images",
        "what_happened": f"the worker's traceback is logged, {counted:.0f} replacements, exit code "
        f"{code}",
        "seconds_to_notice": round(max(noticed, 0.0), 2),
        "lost": "the batches being collected; new episodes begin",
        "message": line(attempt, "ended with exit code"),
    }


def disk_full(root: Path) -> Row:
    """A file system of 24 MB that another file fills during the run."""
    disk = root / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(disk)], check=True)
    try:
        attempt = Attempt(disk, log=root / "log")  # what it says needs room, too
        attempt.reaches(10)
        filler = disk / "filler"
        start = time.monotonic()
        with filler.open("wb", buffering=0) as stream:
            try:
                while True:
                    stream.write(bytes(4096))
            except OSError:
                pass
        code = attempt.end()
        noticed = time.monotonic() - start
        good = newest_good(attempt.run_dir)
        filler.unlink()
        message = line(attempt, "No space left")
        begun = resume_to_end(disk)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
    return {
        "fault": "disk full",
        "what_happened": f"the run ends with the error, exit code {code}; the previous checkpoint "
        f"is intact (update {good}); with free space it resumed at update {begun}",
        "seconds_to_notice": round(noticed, 2),
        "lost": "updates since the last complete checkpoint",
        "message": message,
    }


def newest_good(run_dir: Path) -> int:
    """Updates of the newest checkpoint that loads."""
    return load_checkpoint(list_checkpoints(run_dir / "checkpoints")[-1]).updates


def damaged(root: Path, how: str) -> Row:
    """Truncate the newest checkpoint, or flip a bit in it or in records that only it has."""
    attempt = Attempt(root)
    attempt.reaches(25)
    os.kill(attempt.child, signal.SIGTERM)
    attempt.end()
    paths = list_checkpoints(attempt.run_dir / "checkpoints")
    if how == "truncated":
        os.truncate(paths[-1], paths[-1].stat().st_size // 2)
    elif how == "flipped":
        flip_bit(paths[-1], paths[-1].stat().st_size // 3)
    else:
        manifest = read_manifest(paths[-1])
        assert manifest is not None, "the run has a replay"
        pixels = attempt.run_dir / "replay" / manifest["generation"] / "next/pixels.memmap"
        flip_bit(pixels, (manifest["written"][0] - 1) % manifest["ring"] * 3 * 16 * 16 + 7)
    before = load_checkpoint(paths[-2]).updates
    again = Attempt(root)
    start = time.monotonic()
    noticed = again.says("Trying the previous one") - start
    if again.end():
        raise RuntimeError(again.log[-3000:])
    names = {
        "truncated": "a truncated checkpoint",
        "flipped": "a flipped bit in a checkpoint",
        "record": "a flipped bit in a record of the replay",
    }
    return {
        "fault": names[how],
        "what_happened": f"the previous one is used (update {before}), with a warning",
        "seconds_to_notice": round(noticed, 2),
        "lost": "the updates between the two checkpoints, which are repeated",
        "message": line(again, "Trying the previous one"),
    }


def not_a_number(root: Path, on_nan: str) -> Row:
    """A reward that is not a number, in the samples of updates 12 and 13."""

    def poison(trainer: Trainer, sample: Any) -> None:
        if trainer.updates in (12, 13):
            sample["next", "reward"][0, 2] = math.nan

    attempt = Attempt(root, poison, training={"on_nan": on_nan})
    code = attempt.end()
    if on_nan == "skip":
        skipped = sum(row.get("train/skipped_updates", 0) for row in rows(attempt.run_dir))
        happened, lost = f"{skipped:.0f} updates were not applied; exit code {code}", "2 updates"
        message = line(attempt, "were skipped")
    else:
        saved = load_checkpoint(list_checkpoints(attempt.run_dir / "checkpoints")[-1])
        finite = all(bool(v.isfinite().all()) for v in saved.payload["learner"]["loss"].values())
        batch = len(list(attempt.run_dir.glob("not_finite_after_*")))
        message = line(attempt, "gradients are not finite")
        happened = (
            f"no update is applied from then on; {batch} batch and the state before it (update "
            f"{saved.updates}, all finite: {finite}) saved; exit code {code}; resumed at update "
            f"{resume_to_end(root)}"
        )
        lost = "at most logging.every_updates updates, which are repeated"
    return {
        "fault": f"NaN in the loss, training.on_nan={on_nan}",
        "what_happened": happened,
        "seconds_to_notice": "with the next row of metrics (5 updates here)",
        "lost": lost,
        "message": message,
    }


def two_runs(root: Path) -> Row:
    """A second process on the run directory of a running one."""
    first = Attempt(root)
    first.reaches(5)
    log = root / "second.log"
    config = small_run(first.run_dir, "world2filter", **QUIET)
    start = time.monotonic()
    second = fork(lambda: Trainer(config).train(), log)
    code = os.waitstatus_to_exitcode(os.waitpid(second, 0)[1])
    noticed = time.monotonic() - start
    os.kill(first.child, signal.SIGTERM)
    ended = first.end()
    text = next(t for t in log.read_text().splitlines() if "in use by" in t)
    return {
        "fault": "two runs in one directory",
        "what_happened": f"the second is refused, exit code {code}; the first ended with {ended}",
        "seconds_to_notice": round(noticed, 2),
        "lost": "nothing",
        "message": text.split("is in use")[1]
        .split(" on ")[0]
        .replace(" by process", " by process"),
    }


@contextmanager
def wandb_at(port: int) -> Iterator[None]:
    """Runs begun meanwhile look for wandb's server at a port of this machine."""
    server = {"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": "0" * 40}
    os.environ.update(server)
    try:
        yield
    finally:
        for name in server:
            del os.environ[name]


def wandb_unreachable(root: Path) -> Row:
    """The online mode of wandb with an unreachable server."""
    start = time.monotonic()
    with wandb_at(9):
        attempt = Attempt(root, logging=ONLINE)
    noticed = attempt.says("wandb cannot be reached") - start
    code = attempt.end()
    kept = list((attempt.run_dir / "wandb").glob("offline-run-*/*.wandb"))
    updates = rows(attempt.run_dir)[-1]["updates"]
    return {
        "fault": "wandb unreachable",
        "what_happened": f"logged offline, {len(kept)} file to sync, {updates} updates, exit code "
        f"{code}",
        "seconds_to_notice": round(noticed, 2),
        "lost": "nothing",
        "message": line(attempt, "cannot be reached"),
    }


def wandb_lost(root: Path) -> Row:
    """The online mode of wandb with a server that is killed during the run."""
    with wandb_stub(root / "server.log") as (_, port):
        with wandb_at(port):
            attempt = Attempt(root, logging=ONLINE)
        attempt.reaches(40)
    lost = rows(attempt.run_dir)[-1]["updates"]
    noticed = attempt.says("server does not respond", 900.0)
    code = attempt.end()
    ended = time.monotonic() - noticed
    last, kept = rows(attempt.run_dir)[-1]["updates"], wandb_rows(attempt.run_dir)
    logged = json.loads((attempt.run_dir / "wandb_run.json").read_text())["rows"]
    return {
        "fault": "wandb's server lost while a run is online",
        "what_happened": f"lost at update {lost}, training continues to its end at {last}; the "
        f"upload is given up {FINISH_SECONDS:.0f} seconds later; exit code {code} {ended:.0f} "
        f"seconds after that; {kept} of {logged} rows are in wandb's file",
        "seconds_to_notice": FINISH_SECONDS,
        "lost": "nothing" if kept == logged else f"{logged - kept} rows",
        "message": line(attempt, "server does not respond"),
    }


def wandb_rows(run_dir: Path) -> int:
    """Rows in the one file that wandb keeps of an online run, by wandb's own inspector."""
    (path,) = (run_dir / "wandb").glob("run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return sum("history" in record for record in lines)


def children_of(parent: int, word: str) -> list[int]:
    """Ids of a process's children whose command line has a word."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rsplit(")", 1)[1].split()
            command = (path / "cmdline").read_bytes().decode()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[1]) == parent and word in command:
            found.append(int(path.name))
    return sorted(found)


FAULTS: dict[str, Callable[[Path], Row]] = {
    "signals": signals,
    "hangup": hangup,
    "evaluation_cut": evaluation_cut,
    "worker_killed": lambda root: worker_lost(root, signal.SIGKILL),
    "worker_hung": lambda root: worker_lost(root, signal.SIGSTOP),
    "workers_lost_for_good": workers_lost_for_good,
    "evaluation_fails": evaluation_fails,
    "torn_disk": torn_disk,
    "shared_record": shared_record,
    "render_failure": render_failure,
    "disk_full": disk_full,
    "truncated": lambda root: damaged(root, "truncated"),
    "flipped": lambda root: damaged(root, "flipped"),
    "record": lambda root: damaged(root, "record"),
    "nan_stop": lambda root: not_a_number(root, "stop"),
    "nan_skip": lambda root: not_a_number(root, "skip"),
    "two_runs": two_runs,
    "wandb_unreachable": wandb_unreachable,
    "wandb_lost": wandb_lost,
}


def main() -> None:
    """Cause the requested faults, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--out", default=RESULTS / "faults.json")
    parser.add_argument("--keep", action="store_true", help="keep the file's rows of other faults")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = json.loads(Path(options.out).read_text())["faults"] if options.keep else []
    table = [row for row in kept if row["name"] not in options.only]
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            row = FAULTS[name](Path(folder))
        table.append({"name": name} | row)
        sys.stderr.write(f"{name}: {row}\n")
        write_results(options.out, {"faults": table})


if __name__ == "__main__":
    main()

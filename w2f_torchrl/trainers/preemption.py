"""Preemption by a scheduler: write a checkpoint, requeue the job, resume when it starts again.

The signals arrive before the job is killed: submitit's SIGUSR2 when the time is up or the job is
preempted, SIGTERM for ``scontrol requeue``. submitit's handlers would requeue immediately, in the
middle of an update. Instead the trainer handles the signals, finishes the update, writes a
checkpoint, and only then calls submitit's handler.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

_MARK = ".requeued"
_JOB_VARIABLES = ("SLURM_JOB_ID", "SUBMITIT_LOCAL_JOB_ID")
_RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


def stop_signals() -> tuple[signal.Signals, ...]:
    """Return the signals at which a run ends with a checkpoint.

    They are Ctrl+C; the signal with which clusters end a job; those that clusters can be configured
    to send before it; and the hangup of a terminal, unless nohup or a shell ignores it.
    """
    usual = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        usual.append(signal.SIGHUP)
    return (*(number for number in usual if number not in _requeue_signals()), *_requeue_signals())


def is_restart(run_dir: Path) -> bool:
    """Return whether a launcher has restarted this run, so that it must resume.

    torchrun restarts after a failure and SLURM after a requeue (both count restarts); submitit on
    one machine restarts after its signal (the run then left a mark).
    """
    if any(int(os.environ.get(name) or 0) > 0 for name in _RESTART_COUNTS):
        return True
    mark = run_dir / _MARK
    return mark.exists() and mark.read_text() == _job_id()


def hand_over(received: Sequence[int], run_dir: Path, *, is_first: bool) -> None:
    """Requeue an unfinished submitit job, after its checkpoint. Do nothing outside submitit.

    Args:
        received: The signals that ended the run.
        run_dir: The run's directory.
        is_first: Whether this is rank 0, whose process requeues the job.

    Raises:
        SystemExit: Always, in a submitit job: returning would tell submitit that the job is done.
    """
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return
    asked = [number for number in received if number in _requeue_signals()]
    if is_first and asked:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / _MARK).write_text(_job_id())
        signal.raise_signal(asked[0])  # submitit's handler: requeues, and exits
    # After SIGTERM the scheduler decides whether to restart the job. Ranks that exit with an error
    # could end rank 0 before it has requeued.
    raise SystemExit(128 + signal.SIGTERM if is_first else 0)


def _requeue_signals() -> tuple[signal.Signals, ...]:
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return ()
    return (signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"],)


def _job_id() -> str:
    return next((os.environ[name] for name in _JOB_VARIABLES if name in os.environ), "")

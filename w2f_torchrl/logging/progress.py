"""A run's progress: one line that changes on a terminal, otherwise a log line a minute."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from w2f_torchrl.utils.closing import Closing

logger = logging.getLogger(__name__)

ESTIMATE_AFTER = 5
"""Updates after which the duration of a run is logged."""


class ProgressBar(Closing):
    """Show the last return, the mask IoU, rates and the time left.

    On a terminal this is a tqdm bar, above which log messages appear. Elsewhere (a file, a Slurm
    log) it writes one line through :mod:`logging` every ``log_every`` seconds, at level INFO.

    The time left is the remaining frames, updates and evaluations, each at its recent duration, so
    that it is right from the first updates on, although filling the replay is much faster.

    Args:
        total_frames: Environment frames of the whole run.
        total_updates: Updates of the whole run; None if unknown, which counts frames only.
        evaluations: Evaluations that this process has to make.
        initial_frames: Frames already done (a resumed run).
        initial_updates: Updates already done.
        log_every: Seconds between lines without a terminal.
        plays: Whether episodes are played, so that returns exist.
        window: Seconds over which the rates are computed.
        stream: Stream of the bar; None for standard error.
        clock: Returns monotonic seconds.
    """

    def __init__(
        self,
        total_frames: int,
        *,
        total_updates: int | None = None,
        evaluations: int = 0,
        initial_frames: int = 0,
        initial_updates: int = 0,
        log_every: float = 60.0,
        plays: bool = True,
        window: float = 60.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        stream = sys.stderr if stream is None else stream
        self._total, self._log_every, self._plays = total_frames, log_every, plays
        self._window, self._clock = window, clock
        self._pace = Pace(total_frames, total_updates, evaluations, clock())
        self._points = deque([(clock(), initial_frames, initial_updates)])
        self._return = self._iou = math.nan
        self._activity = ""
        self._logged_at = clock()
        self._estimated = False
        self._bar: tqdm[None] | None = None
        self._above_the_bar = contextlib.ExitStack()
        if stream.isatty():
            self._bar = tqdm(
                total=total_frames,
                initial=min(initial_frames, total_frames),
                file=stream,
                dynamic_ncols=_columns(stream) != 0,
                ncols=80 if _columns(stream) == 0 else None,
                bar_format="{percentage:3.0f}%|{bar}| {desc}",
            )
            self._above_the_bar.enter_context(logging_redirect_tqdm())

    def begin(self, activity: str) -> None:
        """Show that the run is busy with something other than training, until :meth:`update`.

        Args:
            activity: ``evaluating``, which the time left accounts for, or other words.
        """
        self._pace.add(self._clock(), 0, 0, self._activity)
        self._activity = activity
        if self._bar is not None:
            self._draw(self._bar.n)
        else:
            logger.info("%s ...", activity)

    def update(
        self,
        *,
        frames: int,
        updates: int,
        last_return: float | None = None,
        mask_iou: float | None = None,
    ) -> None:
        """Show new counts.

        Args:
            frames: Total frames so far.
            updates: Total updates so far.
            last_return: Return of the last finished episode; None keeps the one shown.
            mask_iou: IoU of the predicted masks, in [0, 1]; None keeps the one shown.
        """
        now = self._clock()
        self._return = self._return if last_return is None else last_return
        self._iou = self._iou if mask_iou is None else mask_iou
        _, old_frames, old_updates = self._points[-1]
        self._pace.add(now, frames - old_frames, updates - old_updates, self._activity)
        self._activity = ""
        self._points.append((now, frames, updates))
        while len(self._points) > 2 and now - self._points[1][0] >= self._window:
            self._points.popleft()
        if not self._estimated and self._pace.updates_timed >= ESTIMATE_AFTER:
            self._log_estimate()
        if self._bar is not None:
            self._draw(frames)
        elif now - self._logged_at >= self._log_every:
            self._logged_at = now
            logger.info("%s", self.text())

    def _log_estimate(self) -> None:
        _, frames, updates = self._points[-1]
        seconds = self._pace.seconds_left(frames, updates)
        if math.isnan(seconds):
            return
        self._estimated = True
        logger.info(
            "about %s from here%s, as measured over %d updates",
            format_duration(seconds),
            self._pace.untimed(),
            self._pace.updates_timed,
        )

    def _draw(self, frames: int) -> None:
        assert self._bar is not None
        # tqdm draws no bar beyond its total; a run's last batch may exceed its frames.
        new = min(frames, self._total) - self._bar.n
        try:
            self._bar.set_description_str(self.short_text(), refresh=new == 0)
            self._bar.update(new)
        except OSError:  # the terminal was closed; the run continues, or ends with a checkpoint
            self._drop_bar()

    def _drop_bar(self) -> None:
        self._above_the_bar.close()
        if self._bar is not None:
            self._bar.disable = True  # its end would write once more
            self._bar = None

    def rates(self) -> tuple[float, float]:
        """Return frames and updates per second over the window; NaN before any time has passed."""
        (begin, frames, updates), (now, new_frames, new_updates) = self._points[0], self._points[-1]
        seconds = now - begin
        if seconds <= 0:
            return math.nan, math.nan
        return (new_frames - frames) / seconds, (new_updates - updates) / seconds

    def text(self) -> str:
        """Return the line that is logged without a terminal."""
        frame_rate, update_rate = self.rates()
        _, frames, updates = self._points[-1]
        parts = [
            *self._results(),
            f"{_number(frame_rate)} frames/s",
            f"{_number(update_rate)} updates/s",
            self._time_left(),
        ]
        return f"{frames:,} of {self._total:,} frames, {updates:,} updates: {', '.join(parts)}"

    def short_text(self) -> str:
        """Return the text next to the bar; a terminal of 80 columns shows all of it."""
        parts = [*self._results(), f"{_number(self.rates()[0])} frames/s", self._time_left()]
        return ", ".join([self._activity, *parts] if self._activity else parts)

    def _results(self) -> list[str]:
        parts = [f"return {_number(self._return)}"] if self._plays else []
        return parts if math.isnan(self._iou) else [*parts, f"mask IoU {self._iou:.2f}"]

    def _time_left(self) -> str:
        _, frames, updates = self._points[-1]
        return f"{format_duration(self._pace.seconds_left(frames, updates))} left"

    def close(self) -> None:
        """Leave the bar unchanged, or write a last line. Closing twice is allowed."""
        self._pace.add(self._clock(), 0, 0, self._activity)
        self._activity = ""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.set_description_str(self.short_text())
                self._bar.close()
            self._drop_bar()
        elif self._points[-1][0] > self._logged_at:
            self._logged_at = self._points[-1][0]
            logger.info("%s", self.text())


class Pace:
    """How long a frame, an update and an evaluation take, and hence the time left.

    Args:
        frames: Frames of the whole run.
        updates: Updates of the whole run; None if unknown.
        evaluations: Evaluations that are still to be made.
        now: Seconds on the clock of :meth:`add`.
    """

    def __init__(self, frames: int, updates: int | None, evaluations: int, now: float) -> None:
        self.frames, self.updates, self.evaluations = frames, updates, evaluations
        self.updates_timed = 0
        """Updates since the first one, which may compile."""
        self._last = now
        self._updated = False
        self._recent: dict[str, deque[tuple[float, int]]] = {
            "frames": deque(maxlen=50),
            "updates": deque(maxlen=50),
            "evaluations": deque(maxlen=3),
        }

    def add(self, now: float, frames: int, updates: int, activity: str = "") -> None:
        """Count the time since the last call as that of new frames, updates, or an evaluation.

        Args:
            now: Seconds.
            frames: New frames.
            updates: New updates.
            activity: What else the time was used for.
        """
        seconds, self._last = now - self._last, now
        if activity == "evaluating":
            self._recent["evaluations"].append((seconds, 1))
            self.evaluations -= 1
        elif activity:
            return
        elif updates > 0:
            if self._updated:
                self._recent["updates"].append((seconds, updates))
                self.updates_timed += updates
            self._updated = True
        elif frames > 0:
            self._recent["frames"].append((seconds, frames))

    def seconds_left(self, frames: int, updates: int) -> float:
        """Return the time left; NaN while no update, or no frame, was timed.

        Args:
            frames: Frames so far.
            updates: Updates so far.
        """
        left = {"frames": self.frames - frames}
        if self.updates is not None:
            left["updates"] = self.updates - updates
        if self._recent["evaluations"]:  # until then they are not counted
            left["evaluations"] = self.evaluations
        return sum(self._mean(name) * count for name, count in left.items() if count > 0)

    def untimed(self) -> str:
        """Return what :meth:`seconds_left` leaves out, such as `` plus 3 evaluations``."""
        if self.evaluations < 1 or self._recent["evaluations"]:
            return ""
        return f" plus {self.evaluations} evaluation{'s' if self.evaluations > 1 else ''}"

    def _mean(self, name: str) -> float:
        recent = self._recent[name]
        if not recent:
            return math.nan
        return sum(seconds for seconds, _ in recent) / sum(count for _, count in recent)


def _columns(stream: TextIO) -> int | None:
    """Return the width of a terminal, 0 if it does not tell; None if it is none."""
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return None


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.1f}"


def format_duration(seconds: float) -> str:
    """Format seconds as hours, minutes and seconds; ``?`` for NaN."""
    if math.isnan(seconds):
        return "?"
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"

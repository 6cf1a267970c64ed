"""A run's progress: a bar on a terminal, otherwise a log line from time to time."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

from tqdm import tqdm

from w2f_torchrl.utils.closing import Closing

logger = logging.getLogger(__name__)


class ProgressBar(Closing):
    """Show frames, updates, their rates, the last return and the time left.

    On a terminal this is a tqdm bar. Elsewhere (a file, a Slurm log) it writes one line through
    :mod:`logging` every ``log_every`` seconds, at level INFO.

    Args:
        total_frames: Environment frames of the whole run.
        initial_frames: Frames already done (a resumed run).
        initial_updates: Updates already done.
        log_every: Seconds between lines without a terminal.
        window: Seconds over which the rates and the time left are computed.
        stream: Stream of the bar; None for standard error.
        clock: Returns monotonic seconds.
    """

    def __init__(
        self,
        total_frames: int,
        *,
        initial_frames: int = 0,
        initial_updates: int = 0,
        log_every: float = 30.0,
        window: float = 60.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        stream = sys.stderr if stream is None else stream
        self._total, self._log_every = total_frames, log_every
        self._window, self._clock = window, clock
        self._points = deque([(clock(), initial_frames, initial_updates)])
        self._last_return = math.nan
        self._logged_at = clock()
        self._bar: tqdm[None] | None = None
        if stream.isatty():
            self._bar = tqdm(
                total=total_frames,
                initial=initial_frames,
                file=stream,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar}| {postfix}",
            )

    def update(self, *, frames: int, updates: int, last_return: float | None = None) -> None:
        """Show new counts.

        Args:
            frames: Total frames so far.
            updates: Total updates so far.
            last_return: Return of the last finished episode; None keeps the one shown.
        """
        now = self._clock()
        if last_return is not None:
            self._last_return = last_return
        self._points.append((now, frames, updates))
        while len(self._points) > 2 and now - self._points[1][0] >= self._window:
            self._points.popleft()
        if self._bar is not None:
            try:
                self._bar.set_postfix_str(self.text(), refresh=False)
                self._bar.update(frames - self._bar.n)
            except OSError:  # the terminal was closed; the run continues, or ends with a checkpoint
                self._drop_bar()
        elif now - self._logged_at >= self._log_every:
            self._logged_at = now
            logger.info("%s", self.text())

    def _drop_bar(self) -> None:
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
        """Return the line that is shown."""
        frame_rate, update_rate = self.rates()
        _, frames, updates = self._points[-1]
        left = (self._total - frames) / frame_rate if frame_rate > 0 else math.nan
        return (
            f"{frames}/{self._total} frames, {updates} updates, "
            f"{_number(frame_rate)} frames/s, {_number(update_rate)} updates/s, "
            f"return {_number(self._last_return)}, {format_duration(left)} left"
        )

    def close(self) -> None:
        """Leave the bar unchanged, or write a last line. Closing twice is allowed."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.refresh()
                self._bar.close()
            self._drop_bar()
        elif self._points[-1][0] > self._logged_at:
            self._logged_at = self._points[-1][0]
            logger.info("%s", self.text())


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"


def format_duration(seconds: float) -> str:
    """Format seconds as hours, minutes and seconds; ``?`` for NaN."""
    if math.isnan(seconds):
        return "?"
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"

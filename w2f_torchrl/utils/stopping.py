"""Stop signals: recorded when they arrive, handled where work may end or be interrupted.

A handler that raised immediately could interrupt an update halfway, so it only records the signal.
Long work that is repeated after a resume runs inside :func:`may_be_cut` and calls
:func:`check_stop` between its steps. Work without such steps, such as loading, compiling and
starting processes, is interrupted as soon as the signal arrives.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)

WhenCut = Callable[[], bool]


class StopRequested(SystemExit):
    """A stop signal interrupted work that may be interrupted.

    If not caught, it ends the process with the exit code that shells use for that signal.

    Args:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


class _Listening:
    received: list[int] | None = None
    """Signals so far; None if signals are not collected."""
    steps: bool = False
    """Whether :func:`check_stop` may raise."""
    at_once: WhenCut | None = None
    """Tells the handler whether it may raise."""


@contextmanager
def listen(numbers: Iterable[int]) -> Iterator[list[int]]:
    """Collect signals in a list while the block runs; outside the main thread none arrive.

    A second Ctrl+C raises KeyboardInterrupt at once.

    Args:
        numbers: The signals to collect.
    """
    if threading.current_thread() is not threading.main_thread():
        yield []
        return
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        logger.warning(
            "%s: stopping after this update; a second Ctrl+C stops at once",
            signal.Signals(number).name,
        )
        if _Listening.at_once is not None and _Listening.at_once():
            raise StopRequested(number)

    before = _Listening.received
    _Listening.received = received
    handlers = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        _Listening.received = before


@contextmanager
def may_be_cut(*, at_once: bool | WhenCut = False) -> Iterator[None]:
    """Let a stop signal end the block with a :class:`StopRequested`.

    Args:
        at_once: Whether to raise as soon as the signal arrives, or a function that decides it then;
            otherwise the next :func:`check_stop` raises.

    Raises:
        StopRequested: If a signal arrived before or during the block.
    """
    before = _Listening.steps, _Listening.at_once
    immediately: WhenCut | None = at_once if callable(at_once) else None
    if at_once is True:
        immediately = _always
    _Listening.steps, _Listening.at_once = True, immediately
    try:
        check_stop()
        yield
    finally:
        _Listening.steps, _Listening.at_once = before


def check_stop() -> None:
    """Raise a :class:`StopRequested` if a signal arrived and the work may be interrupted."""
    if _Listening.steps and _Listening.received:
        raise StopRequested(_Listening.received[0])


def stop_is_wanted() -> bool:
    """Return whether a signal arrived, even if the work may not be interrupted."""
    return bool(_Listening.received)


def _always() -> bool:
    return True

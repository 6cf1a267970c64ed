"""Stop signals: noted as they come, obeyed where work may end or be cut short.

A handler that raised wherever the program happens to be would leave half an update behind, so it
only takes a note. Long work that is done again after a resume runs inside :func:`may_be_cut` and
calls :func:`check_stop` between its steps. Work that has no steps of its own, such as loading,
compiling and starting processes, is left the moment that the signal comes.
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
    """A stop signal ended work that may be cut short.

    Uncaught it ends the process with the exit code that shells give to that signal.

    Args:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


class _Listening:
    received: list[int] | None = None
    """Signals so far; None while nobody listens."""
    steps: bool = False
    """Whether :func:`check_stop` raises."""
    at_once: WhenCut | None = None
    """Asked by the handler whether it may raise."""


@contextmanager
def listen(numbers: Iterable[int]) -> Iterator[list[int]]:
    """Collect signals in a list while the block runs; outside of the main thread none come.

    A second Ctrl+C raises KeyboardInterrupt at once.

    Args:
        numbers: Which signals.
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
        at_once: Whether as soon as the signal comes, or what says so at that moment; otherwise at
            the next :func:`check_stop`.

    Raises:
        StopRequested: If a signal came before, or comes meanwhile.
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
    """Raise a :class:`StopRequested` if a signal came and the work under way may be cut short."""
    if _Listening.steps and _Listening.received:
        raise StopRequested(_Listening.received[0])


def stop_is_wanted() -> bool:
    """Whether a signal came, whatever is under way."""
    return bool(_Listening.received)


def _always() -> bool:
    return True

"""Base of objects that hold files, threads or processes until a ``with`` statement ends."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

logger = logging.getLogger(__name__)


class Closing(ABC):
    """Base of classes with a :meth:`close`: ``with Thing() as thing`` calls it at the end."""

    @abstractmethod
    def close(self) -> None:
        """Release everything that is held."""

    def __enter__(self) -> Self:
        """Return the object itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close, also after an exception."""
        self.close()


def end_all(ends: Iterable[Callable[[], None]]) -> list[Exception]:
    """Call what ends the parts of a run, all of it whatever happens.

    Returns:
        What was raised; it is logged.
    """
    errors = []
    for end in ends:
        try:
            end()
        except Exception as error:  # the other parts must end too
            logger.exception("closing the run")
            errors.append(error)
    return errors

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
        """Close, even after an exception."""
        self.close()


def end_all(ends: Iterable[Callable[[], None]]) -> list[Exception]:
    """Call all functions, which end the parts of a run, even if some of them fail.

    Returns:
        The exceptions, which are also logged.
    """
    errors = []
    for end in ends:
        try:
            end()
        except Exception as error:  # the other parts must end too
            logger.exception("closing the run")
            errors.append(error)
    return errors

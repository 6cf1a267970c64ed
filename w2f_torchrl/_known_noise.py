"""Messages of other packages that a user of a run can do nothing about, dropped by name.

Each package logs through Python's logging. A message is dropped by its logger and the beginning of
its text, in the process that imports the package; every other message of that logger is kept.
"""

from __future__ import annotations

import logging

KNOWN = {
    # dm_control and MuJoCo, through absl.
    "absl": (
        "MUJOCO_GL=",  # the backend that was chosen; if it fails, an error says so
        "MUJOCO_GL is not set, so an OpenGL backend will be chosen",
        "Successfully imported OpenGL backend",
        "MuJoCo library version is",
        # MuJoCo's compiler, for each cheetah that dm_control builds.
        "compiler attribute 'settotalmass' is deprecated",
    ),
    # PyOpenGL's optional accelerator, which rendering with EGL or OSMesa does not use.
    "OpenGL.acceleratesupport": ("No OpenGL_accelerate module loaded",),
    # Matplotlib, once per machine.
    "matplotlib.font_manager": (
        "generated new fontManager",
        "Matplotlib is building the font cache",
    ),
}
"""For each logger, how the dropped messages begin."""


class _DropKnown(logging.Filter):
    """Drop messages that begin as listed.

    Args:
        logger: Name of the logger in :data:`KNOWN`.
    """

    def __init__(self, logger: str) -> None:
        super().__init__()
        self.beginnings = KNOWN[logger]

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a message is to be shown."""
        return not record.getMessage().startswith(self.beginnings)


def drop_known_messages(logger: logging.Logger) -> None:
    """Drop the known messages of a package's logger in this process; calling twice adds nothing.

    Args:
        logger: A logger listed in :data:`KNOWN`. absl's must come from absl, which defines its
            class.

    Raises:
        KeyError: If it is not listed.
    """
    if not any(isinstance(each, _DropKnown) for each in logger.filters):
        logger.addFilter(_DropKnown(logger.name))

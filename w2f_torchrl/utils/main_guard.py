"""A check for scripts that start processes, since these import the script again."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import FrameType

_TELLS = {"__name__", "parent_process", "current_process"}
"""Names in the condition of an ``if`` that excludes worker processes."""


def require_main_guard(what: str) -> None:
    """Refuse to start processes from a script that each of them would run again.

    A spawned process imports the program's main script. If the script starts processes whenever it
    is imported, the new ones fail at once, and the first waits for them forever.

    Args:
        what: Name of the caller that is about to start processes, for the message.

    Raises:
        RuntimeError: If the line of the script that led here is not under an
            ``if __name__ == "__main__":``.
    """
    main = sys.modules.get("__main__")
    path = getattr(main, "__file__", None)
    if main is None or path is None:  # a notebook, or python -c: nothing to import
        return
    line = _line_of_script(sys._getframe(), main.__dict__, path)
    if line is None or _is_guarded(path, line):
        return
    raise RuntimeError(
        f"{what} starts processes, which import {path} again: put line {line}, and everything else "
        'that should run only once, under `if __name__ == "__main__":`'
    )


def _line_of_script(frame: FrameType | None, script: dict[str, object], path: str) -> int | None:
    """Return the current line of the main script; None if it is not on the stack."""
    while frame is not None:
        code = frame.f_code
        if frame.f_globals is script and code.co_name == "<module>" and code.co_filename == path:
            return frame.f_lineno
        frame = frame.f_back
    return None


def _is_guarded(path: str, line: int) -> bool:
    try:
        tree = ast.parse(Path(path).read_bytes())
    except (OSError, SyntaxError):  # deleted or changed since: assume that it is guarded
        return True
    return any(
        node.lineno <= line <= (node.end_lineno or line) and _asks_who_imports(node.test)
        for node in ast.walk(tree)
        if isinstance(node, ast.If)
    )


def _asks_who_imports(test: ast.expr) -> bool:
    names = {node.id for node in ast.walk(test) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(test) if isinstance(node, ast.Attribute)}
    return bool(names & _TELLS)

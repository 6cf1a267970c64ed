"""Files that are complete whenever they can be seen."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | os.PathLike[str], *, unique: bool = False) -> Iterator[Path]:
    """Yield a temporary path that replaces ``path`` when the block ends without an error.

    ``path`` then holds either its previous content or the new one, never a part. On an error the
    temporary file is removed. It is ``.NAME.tmp`` in the same folder; an existing file of that
    name, such as a symbolic link in a foreign folder, is removed instead of written to.

    Args:
        path: The file to write; its folder must exist.
        unique: Use a unique name for the temporary file, because several processes may write the
            same file at the same time.
    """
    path = Path(path)
    if unique:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
        os.close(descriptor)
        temporary = Path(name)
    else:
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.unlink(missing_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")

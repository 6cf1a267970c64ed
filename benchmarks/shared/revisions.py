"""Checkouts and revisions of this repository, for programs that compare two versions of it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def git(folder: Path, *arguments: str) -> str:
    """Return git's output in a folder; empty if it fails."""
    done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def unpack(version: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Find a checkout, or unpack a revision.

    Args:
        version: A folder, or a revision of this file's repository.
        folder: Where a revision is unpacked.

    Returns:
        The checkout, and its description for the results.
    """
    if Path(version).is_dir():
        checkout = Path(version).resolve()
        commit = git(checkout, "rev-parse", "--short", "HEAD")
        changed = bool(git(checkout, "status", "--porcelain", "--untracked-files=no"))
        return checkout, {"version": "CHECKOUT", "commit": commit, "changed": changed}
    commit = git(ROOT, "rev-parse", "--short", "--verify", f"{version}^{{commit}}")
    if not commit:
        raise SystemExit(f"{version} is neither a folder nor a revision.")
    folder.mkdir()
    archive = subprocess.Popen(["git", "-C", ROOT, "archive", commit], stdout=subprocess.PIPE)
    subprocess.run(["tar", "-x", "-C", folder], stdin=archive.stdout, check=True)
    if archive.wait():
        raise RuntimeError(f"git archive {commit} failed.")
    return folder, {"version": commit, "commit": commit, "changed": False}

"""Find the commands and the Python that the documentation tells readers to run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
CODE_SPAN = re.compile(r"`([^`]+)`")
PROGRAMS = (
    "python",
    "make",
    "torchrun",
    "w2f-train",
    "accelerate",
    "srun",
    "sbatch",
    "docker",
    "pip",
    ".ci/run",
)
"""A code span within a sentence is a command if it begins with one of these and has an argument."""
SHELLS = ("", "sh", "bash", "shell", "console")


def pages() -> list[Path]:
    """README.md, CONTRIBUTING.md and every page below docs/."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in found if page.exists()]


def name_of(page: Path) -> str:
    """The page's path in the checkout; of a page from elsewhere its file name."""
    return page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: str
    line: int
    language: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page."""
    text = page.read_text()
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 2
        yield Block(name_of(page), line, match[2], match[3])


def python_blocks(page: Path) -> list[Block]:
    """The blocks of Python."""
    return [block for block in blocks(page) if block.language == "python"]


def file_of(block: Block) -> str | None:
    """The file that a block's first line, a comment, names: ``# my_loss.py``; None without one."""
    match = re.match(r"# (\w+\.py)\n", block.text)
    return match[1] if match else None


def commands(page: Path) -> list[str]:
    """The shell commands of a page, each once: in unnamed or shell blocks, and in code spans.

    Other blocks must be named, for example ```text.
    """
    found = []
    for block in blocks(page):
        if block.language in SHELLS:
            joined = block.text.replace("\\\n", " ")
            found += [line for line in joined.splitlines() if line.strip()]
    prose = FENCE.sub("", page.read_text())
    for span in CODE_SPAN.findall(prose):
        words = span.split()
        if words and words[0] in PROGRAMS and (len(words) > 1 or "/" in words[0]):
            found.append(" ".join(words))
    return list(dict.fromkeys(part for line in found for part in split_command(line)))


def split_command(line: str) -> list[str]:
    """Split at ``&&`` and ``;``; drop comments, prompts and variables set for one command."""
    words = shlex.split(line.strip().removeprefix("$ "), comments=True)
    parts: list[list[str]] = [[]]
    for word in words:
        if word in ("&&", ";", "|", "||"):
            parts.append([])
        else:
            parts[-1].append(word)
    cleaned = []
    for part in parts:
        while part and re.fullmatch(r"[A-Z_0-9]+=.*", part[0]):
            part = part[1:]
        if part:
            cleaned.append(shlex.join(part))
    return cleaned

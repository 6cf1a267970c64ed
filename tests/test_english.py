"""Phrases that native readers stumble over stay out of prose: docs, docstrings, comments, messages.

Each pattern names a better wording. Code is not searched: in Markdown blocks and spans of code are
left out, in Python everything but comments, docstrings and other strings of several words.
"""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FINISHED = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "README.md",
    "docs/**/*.md",
    "examples/*.py",
    "scripts/*.py",
    "sota_configs/**/*.py",
    "sota_configs/**/*.yaml",
    "w2f_torchrl/**/*.py",
)
"""Files whose English has been revised. Add a folder when it has been."""

NOT_YET = {
    "sota_configs/experiment/cpu.yaml": "being revised with the other experiments",
    "w2f_torchrl/data/records.py": "being revised with the keys of records",
}
"""Exceptions from :data:`FINISHED`, with the reason."""

BETTER = {
    r"\b(go|goes|going|went) on\b": "continue, resume, happen",
    r"\bin vain\b": "say what happens to it",
    r"\bof (its|their|his|one's|your) own\b": "separate, own",
    r"\b(at )?least\b": "minimum, at least",
    r"\bgreatest\b": "maximum, largest",
    r", say\b(?! so)|[`'\"\])}] say\b": "such as, for example",
    r"\bthere (is|are|was|were) no\b": "does not exist, is missing, without",
    r"\bbeside\b": "next to, in addition to, in the background of, compared with",
    r"\bdear(er)?\b": "expensive",
    r"\banew\b": "again, new",
    r"\bat hand\b": "current, available",
    r"\btakes? (its|their) names?\b": "is written atomically",
    r"\bin the place of\b": "instead of",
    r"\bcan be had\b": "is available",
    r"\bwhere there (is|are)\b": "if ... exists",
    r"\ball else\b": "everything else, the rest",
    r"\bto and fro\b": "back and forth",
    r"\bleaves? [a-z]+ as (it|they) (is|are)\b": "does not change",
}
"""Patterns, without regard to case, and the usual words for them."""


def finished_files() -> list[Path]:
    found = {path for pattern in FINISHED for path in ROOT.glob(pattern)}
    return sorted(path for path in found if path.relative_to(ROOT).as_posix() not in NOT_YET)


def blank(match: re.Match[str]) -> str:
    """Code is replaced by a stroke and its line ends, so that lines keep their numbers."""
    return "|" + "\n" * match[0].count("\n")


def prose_of(path: Path) -> str:
    """The text of a file with its code blanked, line by line."""
    text = path.read_text()
    if path.suffix == ".md":
        text = re.sub(r"^( *)```.*?^\1```", blank, text, flags=re.MULTILINE | re.DOTALL)
        return re.sub(r"`[^`]+`|\]\([^)\n]*\)", blank, text)
    if path.suffix == ".yaml":
        return "\n".join(line.partition("#")[2] for line in text.splitlines())
    return python_prose(text)


def python_prose(source: str) -> str:
    prose, line = "", 1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        prose += "\n" * (token.start[0] - line)
        line = token.start[0]
        if token.type == tokenize.COMMENT:
            prose += token.string.lstrip("#")
        elif token.type in STRINGS and (FSTRING_MIDDLE or len(token.string.split()) > 2):
            prose += token.string.lstrip("rbfRBF").strip("\"'")
            line += token.string.count("\n")
        elif token.string.strip():
            prose += "|"
    return prose


FSTRING_MIDDLE = getattr(tokenize, "FSTRING_MIDDLE", 0)  # from Python 3.12 on
STRINGS = (tokenize.STRING, FSTRING_MIDDLE)


def stumbles(path: Path) -> Iterator[str]:
    name, prose = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name, prose_of(path)
    for pattern, better in BETTER.items():
        for match in re.finditer(pattern.replace(" ", r"\s+"), prose, re.IGNORECASE):
            said = " ".join(match[0].split())
            if said.lower() != "at least":
                line = prose.count("\n", 0, match.start()) + 1
                yield f"{name}:{line}: {said!r}; better: {better}"


def test_no_finished_file_has_a_phrase_to_stumble_over():
    found = [line for path in finished_files() for line in stumbles(path)]
    assert not found, "\n".join(found)


def test_every_entry_of_the_lists_names_a_file():
    for pattern in FINISHED:
        assert list(ROOT.glob(pattern)), pattern
    for name in NOT_YET:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        (
            "a.md",
            "# A\n\nIt goes\non. At least `goes on`.\n```\nin vain\n```\nNone at hand.",
            [3, 8],
        ),
        (
            "a.py",
            'x = go("on")\n# at\n# least\n\ndef f():\n    """Least\n    of its own."""\n',
            [6, 7],
        ),
        ("a.yaml", "least: 1  # a clip, say\n", [1]),
        ("b.md", "At least one; the last of them, as it is written.", []),
    ],
)
def test_phrases_are_found_in_prose_and_not_in_code(tmp_path, name, text, lines):
    path = tmp_path / name
    path.write_text(text)
    assert sorted(int(line.split(":")[1]) for line in stumbles(path)) == lines

"""Add tables generated from the source, and linked files, when the documentation is built.

MkDocs calls the ``on_*`` functions. A page's ``<!-- generated: NAME -->`` is replaced by the output
of the function in :data:`GENERATED`, README.md and similar files become pages, and links out of
docs/ (to results files, tests, examples) lead to copies in the site.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import settings_reference  # noqa: E402

PAGES = {
    "overview.md": "README.md",
    "pretrained.md": "examples/pretrained/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
"""Pages of the site whose source is outside docs/."""
PROGRAM = re.compile(r"benchmarks/(?:\w+/)*(\w+\.py)")
LINK = re.compile(r"\[([^\[\]]*)\]\((?!\w+:|#|/)([^)\s#]+)(#[^)\s]*)?\)")


def command_today(command: str) -> str:
    """A recorded command with the present path of a program that has moved since."""
    found = PROGRAM.search(command)
    if found is None or (ROOT / found[0]).exists():
        return command
    moved = [path.relative_to(ROOT) for path in (ROOT / "benchmarks").rglob(found[1])]
    return command.replace(found[0], str(moved[0])) if moved else command


def results_table() -> str:
    """Return a table of every results file, with its command and machine."""
    rows = ["| results | command | machine |", "|---|---|---|"]
    folder = ROOT / "benchmarks" / "results"
    for path in sorted(folder.rglob("*.json")):
        results = json.loads(path.read_text())
        machine = results.get("machine", "")
        if isinstance(machine, dict):
            machine = ", ".join(machine["gpus"]) or f"{machine['cpus']} CPU cores"
        name = path.relative_to(folder).as_posix()
        link = f"[{name}](../benchmarks/results/{name})"
        rows.append(f"| {link} | `{command_today(results.get('command', ''))}` | {machine} |")
    return "\n".join(rows)


GENERATED: dict[str, Callable[[], str]] = {
    "settings": settings_reference.reference,
    "results": results_table,
}


def source_of(uri: str) -> str:
    """Return the path of a page in the checkout."""
    return PAGES.get(uri) or join("docs", uri)


def fill_in(markdown: str) -> str:
    """Replace the markers by the generated text."""
    for name, make in GENERATED.items():
        marker = f"<!-- generated: {name} -->"
        if marker in markdown:
            markdown = markdown.replace(marker, make())
    return markdown


def target_of(link: re.Match[str], source: str) -> str:
    """Return the file or folder of the checkout that a page's link leads to.

    Raises:
        FileNotFoundError: If it does not exist.
    """
    target = normpath(join(dirname(source), link[2]))
    generated = target.startswith("docs/") and target.removeprefix("docs/") in PAGES
    if not generated and not (ROOT / target).exists():
        raise FileNotFoundError(f"{source} links to {link[2]}, but {target} does not exist.")
    return target


def mend_links(markdown: str, uri: str) -> str:
    """Convert links that work in the checkout to links that work in the site."""
    source, pages = source_of(uri), {path: name for name, path in PAGES.items()}

    def mend(link: re.Match[str]) -> str:
        target = target_of(link, source)
        if (ROOT / target).is_dir():  # a folder has no page
            return f"{link[1]}"
        inside = pages.get(target) or target.removeprefix("docs/")
        if inside == target:
            inside = join("source", target)
        return f"[{link[1]}]({relpath(inside, dirname(uri) or '.')}{link[3] or ''})"

    return LINK.sub(mend, markdown)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages outside docs/, and files outside docs/ that pages link to."""
    from mkdocs.structure.files import File

    for uri, source in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / source)))
    linked = set()
    for file in files.documentation_pages():
        source = source_of(file.src_uri)
        for link in LINK.finditer(fill_in((ROOT / source).read_text())):
            linked.add(target_of(link, source))
    for target in sorted(linked):
        outside = not target.startswith("docs/") and target not in PAGES.values()
        if outside and (ROOT / target).is_file():
            uri = join("source", target)
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fill in generated text, and convert the links that lead out of docs/."""
    del config, files
    return mend_links(fill_in(markdown), page.file.src_uri)

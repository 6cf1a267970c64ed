"""How the package is built: what imports what, how long things are, and the rules for both.

    python scripts/structure.py              # every figure, as tables in markdown
    python scripts/structure.py --check      # exit code 1 if a rule is broken
    python scripts/structure.py --write      # bring the tables in docs/architecture.md up to date
    python scripts/structure.py --not-yet    # what NOT_YET would be today

A rule that does not hold yet has its exceptions in NOT_YET. The check also fails for an exception
that is no longer needed, so they only get fewer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from package_source import Lines, Package

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "w2f_torchrl"
PAGE = ROOT / "docs" / "architecture.md"
MARKERS = ("<!-- structure -->", "<!-- /structure -->")

ORDER = (
    ("envs",),
    ("segmenters", "transforms"),
    ("config",),
    ("kernels",),
    ("modules",),
    ("objectives",),
    ("algorithms",),
    ("masks",),
    ("data",),
    ("checkpoint",),
    ("learner",),
    ("evaluation",),
    ("logging",),
    ("report",),
    ("export",),
    ("trainers",),
)
"""A folder imports from its own line and those above it, never from one below."""
SERVES_ALL = "utils"
"""Imported by every folder, and imports from none. So do the package's own modules (keys.py)."""
MAX_FILES = 12
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50
MAX_IMPORTS = 12
BUILDS_ALL = "trainers/run.py"
"""May import from as many modules as there are parts."""
ALGORITHM = (
    "config/model.py",
    "config/loss.py",
    "modules/",
    "objectives/",
)
"""What a reader of the algorithm reads: its settings, networks and losses."""
NOT_THE_DEFAULT = "modules/by_env/"
"""Files in ALGORITHM that replace or add parts for some envs: a reader of the algorithm for pixels
and continuous actions never opens them."""
UPDATE = ("learner/learner.py", ("Learner.update", "Learner._eager_update", "Learner._apply_if"))
"""The rest of it: an update."""
NO_ATTRIBUTES_LATER = "trainers/"

NOT_YET: dict[str, int | list[str]] = {}
"""Rules that do not hold yet: a number that must not grow, or the places, which only get fewer."""


# ---------------------------------------------------------------- the rules


def place(folder: str) -> int | None:
    """A folder's line in ORDER, -1 for what serves all, None if it has none."""
    if folder in (SERVES_ALL, ""):
        return -1
    return next((i for i, line in enumerate(ORDER) if folder in line), None)


def imports_against_the_order(package: Package) -> list[str]:
    """Imports from a folder further down, and folders that have no place."""
    found = []
    for name, targets in package.imports.items():
        module = package.modules[name]
        if module.file == "__init__.py":
            continue  # shows the package's names
        here = place(module.folder)
        if here is None:
            found.append(f"{module.folder}/ has no place in ORDER")
            continue
        for target in targets:
            there = place(package.modules[target].folder)
            if there is not None and there > here:
                found.append(f"{module.file} imports {package.modules[target].file}")
    return sorted(set(found))


def cycles(package: Package) -> list[str]:
    """Imports that lead back to where they came from."""
    reached: dict[str, set[str]] = {}
    for name in package.modules:
        waiting, seen = list(package.imports[name]), set()
        while waiting:
            target = waiting.pop()
            if target not in seen:
                seen.add(target)
                waiting.extend(package.imports[target])
        reached[name] = seen
    files = {name: module.file for name, module in package.modules.items()}
    return sorted(
        f"{files[name]} imports {files[target]}"
        for name, targets in package.imports.items()
        for target in targets
        if name in reached[target]
    )


def crowded_folders(package: Package) -> list[str]:
    """Folders with too many files."""
    return sorted(folder for folder, count in package.folders.items() if count > MAX_FILES)


def median_file(package: Package) -> int:
    """Lines of the median file."""
    return int(statistics.median(module.lines.all for module in package.modules.values()))


def long_files(package: Package) -> list[str]:
    """Files with too many lines."""
    modules = package.modules.values()
    return sorted(module.file for module in modules if module.lines.all > MAX_FILE_LINES)


def long_functions(package: Package) -> list[str]:
    """Functions with too many lines."""
    return sorted(
        f"{module.file}: {name}"
        for module in package.modules.values()
        for name, lines in module.functions()
        if lines > MAX_FUNCTION_LINES
    )


def files_with_many_imports(package: Package) -> list[str]:
    """Files that import from too many modules of the package."""
    return sorted(
        package.modules[name].file
        for name, targets in package.imports.items()
        if len(targets) > MAX_IMPORTS and package.modules[name].file != BUILDS_ALL
    )


def attributes_made_later(package: Package) -> list[str]:
    """Attributes that the classes of trainers/ make outside of their constructors."""
    found = package.late_attributes
    return [str(late) for late in found if late.file.startswith(NO_ATTRIBUTES_LATER)]


def algorithm_lines(package: Package) -> int:
    """Lines of code of the files in ALGORITHM and of an update; lists of exports are not read."""
    read = [
        module for module in package.modules.values() if not module.file.endswith("__init__.py")
    ]
    total = sum(
        module.lines.code
        for module in read
        if module.file.startswith(ALGORITHM) and not module.file.startswith(NOT_THE_DEFAULT)
    )
    file, names = UPDATE
    functions = [f for module in read if module.file == file for f in module.functions()]
    return total + sum(lines for name, lines in functions if name in names)


class Rule(NamedTuple):
    """A rule of the package.

    Args:
        text: What it says.
        look: Returns the places that break it, or the figure that it limits.
        limit: The figure's maximum.
    """

    text: str
    look: Callable[[Package], list[str]] | Callable[[Package], int]
    limit: int | None = None


RULES = {
    "order": Rule(
        f"a folder imports from itself and those above it; {SERVES_ALL} serves all",
        imports_against_the_order,
    ),
    "cycles": Rule("no cycle of imports, not even for types", cycles),
    "folders": Rule(
        f"at most {MAX_FILES} files in a folder, without its subfolders", crowded_folders
    ),
    "median": Rule("the median file has fewer than 150 lines", median_file, 149),
    "files": Rule(f"at most {MAX_FILE_LINES} lines in a file", long_files),
    "functions": Rule(
        f"at most {MAX_FUNCTION_LINES} lines in a function, without its docstring", long_functions
    ),
    "imports": Rule(
        f"a file imports from at most {MAX_IMPORTS} modules of the package; not {BUILDS_ALL}",
        files_with_many_imports,
    ),
    "attributes": Rule(
        f"classes of {NO_ATTRIBUTES_LATER} make all attributes in `__init__`", attributes_made_later
    ),
    "algorithm": Rule(
        "the algorithm for continuous actions has at most 1,500 lines of code: model, loss, "
        "modules, objectives, an update; not the other methods of algorithms/",
        algorithm_lines,
        1500,
    ),
}


def problems(
    package: Package, not_yet: Mapping[str, int | Sequence[str]] = NOT_YET
) -> Iterator[str]:
    """What breaks a rule, and what NOT_YET excuses that no longer needs it.

    Args:
        package: What is checked.
        not_yet: What is excused.

    Yields:
        One line each.
    """
    for name, rule in RULES.items():
        found, excused = rule.look(package), not_yet.get(name)
        if isinstance(found, int):
            assert rule.limit is not None
            allowed = excused if isinstance(excused, int) else rule.limit
            if found > allowed:
                yield f"{name}: {rule.text}: {found}, the maximum is {allowed}"
            elif excused is not None and found <= rule.limit:
                yield f"{name}: {found} keeps the rule: remove it from NOT_YET"
        else:
            known = set() if excused is None or isinstance(excused, int) else set(excused)
            for line in sorted(set(found) - known):
                yield f"{name}: {rule.text}: {line}"
            for line in sorted(known - set(found)):
                yield f"{name}: {line}: keeps the rule or is gone: remove it from NOT_YET"
    for name in not_yet.keys() - RULES.keys():
        yield f"{name}: NOT_YET excuses a rule that does not exist"


def excuses(package: Package) -> dict[str, int | list[str]]:
    """What NOT_YET would be today."""
    found: dict[str, int | list[str]] = {}
    for name, rule in RULES.items():
        result = rule.look(package)
        if isinstance(result, int):
            if rule.limit is not None and result > rule.limit:
                found[name] = result
        elif result:
            found[name] = result
    return found


# ---------------------------------------------------------------- the tables


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def ordered(package: Package) -> list[str]:
    """The folders directly below the package: in order, then those that have no place in it."""
    there = {module.folder for module in package.modules.values()} - {""}
    wanted = [folder for line in ORDER for folder in line if folder in there]
    return [*wanted, *sorted(there - {*wanted, SERVES_ALL}), *sorted(there & {SERVES_ALL})]


def lasting_tables(package: Package) -> str:
    """What the documentation shows: figures that few changes of the code change."""
    folders = ordered(package)
    rows = []
    for folder in folders:
        files = sum(module.folder == folder for module in package.modules.values())
        imported = package.folder_imports[folder] - {SERVES_ALL}
        wanted = [other for other in folders if other in imported]
        rows.append([f"`{folder}`", files, ", ".join(wanted) or "-"])
    state = []
    for name, rule in RULES.items():
        excused = NOT_YET.get(name)
        exceptions = "not yet" if isinstance(excused, int) else f"not yet: {len(excused or ())}"
        state.append([rule.text, "yes" if excused is None else exceptions])
    first = table(["folder", "modules", f"imports from, besides {SERVES_ALL}"], rows)
    return f"{first}\n\n{table(['rule', 'holds'], state)}"


def all_tables(package: Package) -> str:
    """Every figure."""
    rows = []
    for folder in [*ordered(package), "", None]:
        modules = [m for m in package.modules.values() if folder in (None, m.folder)]
        name = {"": "the package's own", None: "all"}.get(folder, f"`{folder}`")
        sums = [sum(figures) for figures in zip(*(m.lines for m in modules), strict=True)]
        late = [a for a in package.late_attributes if folder in (None, a.file.partition("/")[0])]
        rows.append([name, len(modules), *sums, max(m.lines.all for m in modules), len(late)])
    header = ["folder", "modules", *(f"lines: {field}" for field in Lines._fields)]
    figures = []
    for rule in RULES.values():
        found = rule.look(package)
        figures.append([rule.text, found if isinstance(found, int) else len(found)])
    return "\n\n".join(
        [
            table([*header, "longest", "attributes made outside `__init__`"], rows),
            table(["rule", "figure, or places that break it"], figures),
        ]
    )


def between_markers(page: str, text: str | None = None) -> str:
    """What stands between the markers of a page; with a text, the page that has it there.

    Raises:
        ValueError: If the page lacks a marker.
    """
    places = [page.find(marker) for marker in MARKERS]
    if -1 in places or any(a > b for a, b in pairwise(places)):
        raise ValueError(f"{PAGE.name} lacks {' or '.join(MARKERS)}")
    begin, end = places[0] + len(MARKERS[0]), places[1]
    return page[begin:end].strip() if text is None else f"{page[:begin]}\n{text}\n{page[end:]}"


def main() -> None:
    """Print, check or write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--check", action="store_true", help="fail if a rule is broken")
    ways.add_argument("--write", action="store_true", help=f"update {PAGE.relative_to(ROOT)}")
    ways.add_argument("--table", action="store_true", help="print what that page shows")
    ways.add_argument("--not-yet", action="store_true", help="print what NOT_YET would be today")
    args = parser.parse_args()
    package = Package(ROOT / PACKAGE)
    if args.check:
        found = list(problems(package))
        print("\n".join(found) or f"{len(RULES)} rules hold, but for what NOT_YET names")
        sys.exit(1 if found else 0)
    if args.write:
        PAGE.write_text(between_markers(PAGE.read_text(), lasting_tables(package)))
    elif args.table:
        print(lasting_tables(package))
    elif args.not_yet:
        print(f"NOT_YET: dict[str, int | list[str]] = {json.dumps(excuses(package), indent=4)}")
    else:
        print(all_tables(package))


if __name__ == "__main__":
    main()

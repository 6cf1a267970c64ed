"""A package as its source has it: lines, functions, imports, attributes; nothing is imported.

Imports inside functions and under TYPE_CHECKING count like any other.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

CONSTRUCTORS = ("__init__", "__post_init__")


class Lines(NamedTuple):
    """Lines of a file, or of several."""

    all: int
    code: int
    docstrings: int
    comments: int


class Attribute(NamedTuple):
    """An attribute that an object gets after its constructor has run."""

    file: str
    class_name: str
    name: str

    def __str__(self) -> str:
        """One line that names it."""
        return f"{self.file}: {self.class_name}.{self.name}"


@dataclass(frozen=True)
class Module:
    """A file of the package.

    Args:
        file: Its path below the package.
        name: Its dotted name.
        source: Its text.
    """

    file: str
    name: str
    source: str

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        return ast.parse(self.source)

    @property
    def folder(self) -> str:
        """The folder directly below the package that it lies in; empty for the package's own."""
        return self.file.partition("/")[0] if "/" in self.file else ""

    @cached_property
    def lines(self) -> Lines:
        """How many lines are what; strings below an assignment are docstrings too."""
        lines = self.source.splitlines()
        documentation: set[int] = set()
        for node in ast.walk(self.tree):
            for text in _strings_that_stand_alone(node):
                documentation.update(range(text.lineno, _end(text) + 1))
        rest = [line.strip() for i, line in enumerate(lines, 1) if i not in documentation]
        comments = sum(line.startswith("#") for line in rest)
        code = sum(bool(line) for line in rest) - comments
        return Lines(len(lines), code, len(documentation), comments)

    def functions(self) -> Iterator[tuple[str, int]]:
        """Every function's qualified name and its lines without its docstring."""
        for name, node in _definitions(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                texts = _strings_that_stand_alone(node)
                yield name, _length(node) - sum(map(_length, texts[:1]))


@dataclass(frozen=True)
class Package:
    """The files of a package, and what they import from each other.

    Args:
        root: Its folder.
    """

    root: Path

    @cached_property
    def modules(self) -> dict[str, Module]:
        """All files by dotted name; a package has the name of its folder."""
        found = {}
        for path in sorted(self.root.rglob("*.py")):
            file = path.relative_to(self.root).as_posix()
            parts = (self.root.name, *Path(file).with_suffix("").parts)
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = Module(file, name, path.read_text())
        return found

    @cached_property
    def imports(self) -> dict[str, set[str]]:
        """The modules of the package that each of its modules imports."""
        return {name: set(self._imported_by(module)) for name, module in self.modules.items()}

    def _imported_by(self, module: Module) -> Iterator[str]:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names if alias.name in self.modules)
            elif isinstance(node, ast.ImportFrom):
                source = _absolute(module, node)
                for alias in node.names:
                    inside = f"{source}.{alias.name}"
                    target = inside if inside in self.modules else source
                    if target in self.modules and target != module.name:
                        yield target

    @cached_property
    def folders(self) -> dict[str, int]:
        """Files in each folder, below the package's name."""
        counts: dict[str, int] = defaultdict(int)
        for path in self.root.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                counts[path.parent.relative_to(self.root.parent).as_posix()] += 1
        return dict(counts)

    @cached_property
    def folder_imports(self) -> dict[str, set[str]]:
        """The folders that each folder imports from."""
        found: dict[str, set[str]] = defaultdict(set)
        for name, targets in self.imports.items():
            folder = self.modules[name].folder
            found[folder] |= {self.modules[target].folder for target in targets} - {folder}
        return found

    @cached_property
    def late_attributes(self) -> list[Attribute]:
        """Attributes of the package's classes that are not made by their constructors."""
        found = set()
        for module in self.modules.values():
            for class_name, attribute in _assignments(module.tree):
                owner = self._find_class(class_name, module.file)
                if owner is not None and attribute not in self._made(*owner):
                    found.add(Attribute(*owner, attribute))
        return sorted(found)

    @cached_property
    def _classes(self) -> dict[tuple[str, str], ast.ClassDef]:
        return {
            (module.file, node.name): node
            for module in self.modules.values()
            for _, node in _definitions(module.tree)
            if isinstance(node, ast.ClassDef)
        }

    def _find_class(self, name: str, file: str) -> tuple[str, str] | None:
        """A class of this name in the file, or the only one in the package."""
        if (file, name) in self._classes:
            return file, name
        found = [key for key in self._classes if key[1] == name]
        return found[0] if len(found) == 1 else None

    def _made(self, file: str, name: str) -> set[str]:
        """What a class and its bases have from the start."""
        node = self._classes[file, name]
        bases = [self._find_class(_last_name(base), file) for base in node.bases]
        return _declared(node).union(*(self._made(*base) for base in bases if base is not None))


def _end(node: ast.stmt) -> int:
    return node.end_lineno or node.lineno


def _length(node: ast.stmt) -> int:
    return _end(node) - node.lineno + 1


def _strings_that_stand_alone(node: ast.AST) -> list[ast.stmt]:
    body = getattr(node, "body", None)
    if not isinstance(body, list):
        return []
    return [
        child
        for child in body
        if isinstance(child, ast.Expr)
        and isinstance(child.value, ast.Constant)
        and isinstance(child.value.value, str)
    ]


def _definitions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.stmt]]:
    for child in ast.iter_child_nodes(node):
        name = prefix
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{prefix}.{child.name}".removeprefix(".")
            yield name, child
        yield from _definitions(child, name)


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    if module.file.endswith("__init__.py"):
        parts.append("")
    return ".".join([*parts[: -node.level], *([node.module] if node.module else [])])


def _last_name(node: ast.AST | None) -> str:
    """``Trainer`` of ``Trainer``, ``module.Trainer``, ``Trainer[X]``, ``"Trainer"``."""
    if isinstance(node, ast.Subscript):
        return _last_name(node.value)
    if isinstance(node, ast.Constant):
        return str(node.value)
    return str(getattr(node, "attr", getattr(node, "id", "")))


def _declared(node: ast.ClassDef) -> set[str]:
    """What a class has from the start: fields, methods, and what its constructor assigns."""
    found: set[str] = set()
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(child.name)
        if isinstance(child, ast.FunctionDef) and child.name in CONSTRUCTORS:
            found |= {name for _, name in _attributes(child, {_first_argument(child): node.name})}
        targets = child.targets if isinstance(child, ast.Assign) else []
        targets += [child.target] if isinstance(child, ast.AnnAssign) else []
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def _assignments(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Class and attribute of every assignment outside a constructor.

    Seen are those to ``self`` in a method, and those to a function's argument that is annotated
    with the class.
    """
    methods = {
        id(child): node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for child in node.body
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        owners = {
            argument.arg: _last_name(argument.annotation)
            for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        }
        if id(node) in methods:
            if node.name in CONSTRUCTORS:
                continue
            bound = not {"staticmethod", "classmethod"} & set(map(_last_name, node.decorator_list))
            owners[_first_argument(node)] = methods[id(node)] if bound else ""
        yield from _attributes(node, owners)


def _first_argument(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    arguments = [*node.args.posonlyargs, *node.args.args]
    return arguments[0].arg if arguments else ""


def _attributes(node: ast.AST, owners: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Class and attribute of each assignment to an attribute of one of these names."""
    for child in ast.walk(node):
        if (
            isinstance(child, ast.Attribute)
            and isinstance(child.ctx, ast.Store)
            and isinstance(child.value, ast.Name)
            and child.value.id in owners
        ):
            yield owners[child.value.id], child.attr

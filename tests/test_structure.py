"""The package keeps the rules of scripts/structure.py, and the script sees what breaks them."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

import pytest
import structure
from helpers.checkout import ROOT
from package_source import Package


@pytest.fixture(scope="module")
def package() -> Package:
    return Package(ROOT / structure.PACKAGE)


def write(root: Path, **files: str) -> Package:
    """A package of these files; ``a__b`` is a/b.py."""
    for name, source in files.items():
        path = root / "house" / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in {path.parent, root / "house"}:
            (folder / "__init__.py").touch()
        path.write_text(textwrap.dedent(source))
    return Package(root / "house")


# ------------------------------------------------------------------ this package


def test_no_rule_is_broken(package):
    assert list(structure.problems(package)) == []


def test_the_documentation_shows_the_package_as_it_is(package):
    shown = structure.between_markers(structure.PAGE.read_text())
    why = "run python scripts/structure.py --write"
    assert shown == structure.lasting_tables(package), why


def test_every_file_and_line_is_counted(package):
    files = list((ROOT / structure.PACKAGE).rglob("*.py"))
    assert len(package.modules) == len(files)
    total = structure.all_tables(package)
    assert (
        f"| all | {len(files)} | {sum(len(f.read_text().splitlines()) for f in files)} |" in total
    )


# ------------------------------------------------------------------ imports


@pytest.mark.parametrize(
    ("file", "source", "target"),
    [
        ("data__a", "from house.trainers.b import x", "trainers/b.py"),
        ("data__a", "from house.trainers import b", "trainers/b.py"),
        ("data__a", "from house.trainers import x", "trainers/__init__.py"),
        ("data__a", "import house.trainers.b", "trainers/b.py"),
        ("data__a", "from ..trainers import b", "trainers/b.py"),
        ("data__a", "def f():\n    from house.trainers import b", "trainers/b.py"),
        ("data__a", "if TYPE_CHECKING:\n    from house.trainers.b import x", "trainers/b.py"),
        ("utils__a", "import house.trainers.b", "trainers/b.py"),
        ("keys", "import house.trainers.b", "trainers/b.py"),
    ],
)
def test_an_import_against_the_order_is_seen(tmp_path, file, source, target):
    package = write(tmp_path, **{file: source, "trainers__b": "x = 1"})
    path = f"{file.replace('__', '/')}.py"
    assert structure.imports_against_the_order(package) == [f"{path} imports {target}"]
    assert structure.cycles(package) == []


def test_imports_in_order_of_neighbours_and_of_what_serves_all_are_fine(tmp_path):
    sources = {
        "trainers__a": "from house.data import b\nfrom house.trainers import c\nimport torch",
        "trainers__c": "import house.utils.d",
        "data__b": "from house.utils.d import x",
        "segmenters__e": "import house.transforms.f",
        "transforms__f": "x = 1",
        "utils__d": "x = 1",
    }
    assert structure.imports_against_the_order(write(tmp_path, **sources)) == []


def test_a_folder_without_a_place_is_seen(tmp_path):
    package = write(tmp_path, attic__a="x = 1", utils__b="x = 1")
    assert structure.imports_against_the_order(package) == ["attic/ has no place in ORDER"]


def test_a_cycle_is_seen_though_it_is_for_types_or_inside_a_function(tmp_path):
    sources = {
        "data__a": "if TYPE_CHECKING:\n    from house.data.b import x",
        "data__b": "def f():\n    from house.data import c",
        "data__c": "import house.data.a",
        "data__outside": "import house.data.a",
    }
    assert structure.cycles(write(tmp_path, **sources)) == [
        "data/a.py imports data/b.py",
        "data/b.py imports data/c.py",
        "data/c.py imports data/a.py",
    ]


def test_a_file_that_imports_from_too_many_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(structure, "MAX_IMPORTS", 2)
    source = "from house.utils import a, b, c\nfrom house.utils.a import x"
    sources = dict.fromkeys(("utils__a", "utils__b", "utils__c"), "x = 1")
    package = write(tmp_path, **sources, trainers__run=source, trainers__other=source)
    assert structure.files_with_many_imports(package) == ["trainers/other.py"]


# ------------------------------------------------------------------ sizes


def test_lines_are_code_docstrings_comments_or_blank(tmp_path):
    source = '''
        """A module.

        Of two paragraphs.
        """

        # A comment.
        X = """no
        docstring"""  # comments after code are code
        """What X is."""


        def f():
            """A function."""
            return X
    '''
    lines = write(tmp_path, a=source).modules["house.a"].lines
    assert (lines.code, lines.docstrings, lines.comments) == (4, 6, 1)


def test_a_function_is_measured_without_its_docstring(tmp_path, monkeypatch):
    monkeypatch.setattr(structure, "MAX_FUNCTION_LINES", 3)
    fine = 'def f():\n    """One.\n\n    Two.\n    """\n    x = 1\n    return x\n'
    long = "class A:\n    def g(self):\n        x = 1\n\n        return x\n"
    assert structure.long_functions(write(tmp_path, a=fine, b=long)) == ["b.py: A.g"]


def test_crowded_folders_and_long_files_are_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(structure, "MAX_FILES", 2)
    monkeypatch.setattr(structure, "MAX_FILE_LINES", 2)
    package = write(tmp_path, data__a="x = 1\n" * 3, data__b="x = 1\n", envs__c="x = 1\n")
    assert structure.crowded_folders(package) == ["house/data"]
    assert structure.long_files(package) == ["data/a.py"]
    assert structure.median_file(package) == 0


def test_the_algorithm_is_code_alone(tmp_path):
    source = '"""A docstring."""\n# A comment.\n\nx = 1\n'
    package = write(tmp_path, modules__a=source, objectives__b=source, data__c=source)
    assert structure.algorithm_lines(package) == 2


# ------------------------------------------------------------------ attributes


@pytest.mark.parametrize(
    "start",
    [
        "class A:\n    def __init__(self):\n        self.x, self.y = 0, 0\n",
        "class A:\n    x = y = 0\n",
        "@dataclass\nclass A:\n    x: int\n    y: int\n",
        "class A:\n    @property\n    def x(self): ...\n    def __post_init__(self):\n"
        "        self.y = 0\n",
        "class B:\n    def __init__(self):\n        self.x = self.y = 0\nclass A(B):\n",
    ],
)
def test_an_attribute_of_the_constructor_may_be_assigned(tmp_path, start):
    method = "    def f(self):\n        self.x = 1\n        (self.y, z) = 1, 2\n"
    assert write(tmp_path, trainers__a=start + method).late_attributes == []


@pytest.mark.parametrize(
    "later",
    [
        "    def f(self):\n        self.x = 1\n",
        "    def f(self):\n        self.x: int = 1\n",
        "    def f(this):\n        with open() as this.x:\n            pass\n",
        "    @property\n    def f(self):\n        self.x += 1\n",
        "    pass\ndef build(a: A):\n    a.x = 1\n",
        "    pass\ndef build(*, a: 'A'):\n    a.x = 1\n",
        "    pass\nclass Other:\n    def build(self, a: A):\n        a.x = 1\n",
    ],
)
def test_an_attribute_made_later_is_seen(tmp_path, later):
    start = "class A:\n    def __init__(self):\n        self.y = 0\n"
    package = write(tmp_path, trainers__a=start + later)
    assert structure.attributes_made_later(package) == ["trainers/a.py: A.x"]
    elsewhere = write(tmp_path / "elsewhere", data__a=start + later)
    assert [str(late) for late in elsewhere.late_attributes] == ["data/a.py: A.x"]
    assert structure.attributes_made_later(elsewhere) == []


def test_what_is_no_object_of_the_package_is_left_alone(tmp_path):
    source = """
        class A:
            @classmethod
            def f(cls, other, tensor: Tensor):
                cls.x = other.y = tensor.grad = 1
            @staticmethod
            def g(self):
                self.x = 1
    """
    assert write(tmp_path, trainers__a=source).late_attributes == []


# ------------------------------------------------------------------ what does not hold yet


@pytest.fixture
def broken(tmp_path, monkeypatch) -> Package:
    monkeypatch.setattr(structure, "MAX_FUNCTION_LINES", 1)
    monkeypatch.setitem(structure.RULES, "median", structure.RULES["median"]._replace(limit=1))
    return write(tmp_path, utils__a="def f():\n    return 1\n", utils__b="x = 1\n" * 2)


def test_what_is_excused_is_no_problem(broken):
    not_yet = structure.excuses(broken)
    assert not_yet == {"functions": ["utils/a.py: f"]}
    assert list(structure.problems(broken, not_yet)) == []
    (problem,) = structure.problems(broken, {})
    assert problem.startswith("functions: at most ")
    assert problem.endswith(": utils/a.py: f")


def test_an_excuse_that_is_not_needed_is_a_problem(broken):
    not_yet = {"functions": ["utils/a.py: f", "utils/b.py: g"], "files": ["utils/b.py"]}
    assert list(structure.problems(broken, not_yet)) == [
        "files: utils/b.py: keeps the rule or is gone: remove it from NOT_YET",
        "functions: utils/b.py: g: keeps the rule or is gone: remove it from NOT_YET",
    ]
    excused = {"functions": ["utils/a.py: f"]}
    assert list(structure.problems(broken, excused | {"kitchen": []})) == [
        "kitchen: NOT_YET excuses a rule that does not exist"
    ]


def test_a_figure_may_shrink_but_not_grow(broken, monkeypatch):
    rest = {"functions": ["utils/a.py: f"]}
    rule = structure.RULES["median"]
    for figure, said in ((5, []), (4, []), (6, ["the maximum is 5"]), (1, ["remove it"])):
        monkeypatch.setitem(
            structure.RULES, "median", rule._replace(look=lambda _, figure=figure: figure)
        )
        found = list(structure.problems(broken, rest | {"median": 5}))
        assert len(found) == len(said)
        assert all(word in line for word, line in zip(said, found, strict=True))


def test_a_page_without_markers_is_refused():
    page = f"before\n{structure.MARKERS[0]}\nold\n{structure.MARKERS[1]}\nafter\n"
    assert structure.between_markers(page) == "old"
    new = structure.between_markers(page, "new")
    assert new == page.replace("old", "new")
    with pytest.raises(ValueError, match="lacks"):
        structure.between_markers("no markers")


# ------------------------------------------------------------------ the tests themselves


def test_no_test_imports_from_another_test():
    found = []
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in getattr(node, "names", ()) if hasattr(alias, "name")]
            source = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
            if isinstance(node, ast.Import | ast.ImportFrom):
                found += [
                    f"{path.name}: {s}" for s in source if s.startswith(("test_", "conftest"))
                ]
    assert found == []

"""The public API is documented: every name, and the shape or unit of every tensor in or out.

Public is what a subpackage's ``__all__`` lists, with the public methods that its classes define.
The rule for tensors is mechanical: where a signature has a tensor or a tensordict, the docstring
(a class's too, for ``forward``, ``__call__`` and the like) has a shape in brackets, ``[B, T]`` say,
or says "scalar".
"""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
from helpers.extras import skip_without_an_extra

import w2f_torchrl

PACKAGE = Path(w2f_torchrl.__file__).parent
SUBPACKAGES = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
SHAPE = re.compile(r"\[[^\]\n]*\b(?:[A-Z]\b|\d|\.\.\.|\*[A-Z])[^\]\n]*\]|\[\.\.\.\]|[Ss]calar")
TENSOR = re.compile(r"\b(Tensor|TensorDict|TensorDictBase)\b")
SPOKEN_FOR_BY_CLASS = {"forward", "__call__", "update", "imagine_step"}
"""Methods whose shapes the class may give."""
STATE = {"state_dict", "load_state_dict", "checkpoint", "restore"}
"""Methods whose tensors are opaque: what one gives the other takes."""


def public_names() -> list[tuple[str, str]]:
    return [
        (package, name)
        for package in SUBPACKAGES
        for name in getattr(importlib.import_module(f"w2f_torchrl.{package}"), "__all__", ())
    ]


def lookup(package: str, name: str) -> Any:
    return getattr(importlib.import_module(f"w2f_torchrl.{package}"), name)


def has_docstring(thing: Any) -> bool:
    text = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    generated = inspect.isclass(thing) and (text or "").startswith(f"{thing.__name__}(")
    return bool(text and text.strip()) and not generated


def methods_of(cls: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that a class defines itself, as functions."""
    for name, member in vars(cls).items():
        function = getattr(member, "fget", None) or getattr(member, "__func__", member)
        if not isinstance(function, FunctionType) or not function.__module__.startswith("w2f_"):
            continue
        if not name.startswith("_") or (name == "__call__" and has_docstring(function)):
            yield name, function


def is_constant_documented(package: str, name: str) -> bool:
    """Whether a constant has a ``#:`` comment above it, or a string below."""
    pattern = rf"(?:^#:.*\n{name}\b)|(?:^{name}\b[^\n]*=(?:.*\n)+?\"\"\")"
    del package  # a package may export what another defines
    files = PACKAGE.rglob("*.py")
    return any(re.search(pattern, path.read_text(), re.MULTILINE) for path in files)


def takes_or_gives_tensors(function: FunctionType) -> bool:
    return any(TENSOR.search(str(kind)) for kind in function.__annotations__.values())


@pytest.mark.parametrize(("package", "name"), public_names())
def test_a_public_name_is_documented(package: str, name: str):
    try:
        thing = lookup(package, name)
    except ModuleNotFoundError as error:
        skip_without_an_extra(error)
    if not inspect.isclass(thing) and not inspect.isroutine(thing):
        assert is_constant_documented(package, name), f"{name} needs a #: comment or a string"
        return
    assert has_docstring(thing), f"{name} has no docstring"
    functions = [("", thing)] if inspect.isroutine(thing) else list(methods_of(thing))
    for method, function in functions:
        where = f"{name}.{method}".rstrip(".")
        assert has_docstring(function), f"{where} has no docstring"
        if not takes_or_gives_tensors(function) or method in STATE:
            continue
        text = function.__doc__ + (thing.__doc__ if method in SPOKEN_FOR_BY_CLASS else "")
        assert SHAPE.search(text), f"{where} takes or gives tensors and names no shape: [B, T] say"


def test_the_rule_notices_what_is_missing():
    def silent(x):
        return x

    def shapeless(x: "Tensor") -> "Tensor":  # noqa: F821, UP037
        """Do something with the tensor."""

    assert not has_docstring(silent)
    assert takes_or_gives_tensors(shapeless)
    assert not SHAPE.search(shapeless.__doc__)
    for text in ("``[B, T]``", "uint8 [N, 3, H, W]", "``[...]``", "float ``[*B, 1]``", "a scalar"):
        assert SHAPE.search(text), text
    for text in ("see [here]", "values in [a, b]", "list[Tensor]"):
        assert not SHAPE.search(text), text


def modules() -> list[str]:
    found = pkgutil.walk_packages([str(PACKAGE)], "w2f_torchrl.")
    return [module.name for module in found]


def test_there_are_examples_in_docstrings():
    assert sum(">>> " in path.read_text() for path in PACKAGE.rglob("*.py")) >= 8


@pytest.mark.parametrize("name", modules())
def test_the_examples_in_docstrings_hold(name: str, tmp_path: Path, monkeypatch):
    if ">>> " not in Path(importlib.util.find_spec(name).origin).read_text():
        return
    monkeypatch.chdir(tmp_path)
    module: ModuleType = importlib.import_module(name)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.testmod(module, optionflags=flags, verbose=False)
    assert result.failed == 0

"""Docstrings in Markdown: Sphinx roles become linked code, and settings show their help."""

from __future__ import annotations

import ast
import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|obj|exc):`(~?)([\w.]+)`")


def link(match: re.Match[str]) -> str:
    """Turn a role into code: the last part of the name for ``~``, linked if it is full."""
    full = match[2]
    shown = full.rpartition(".")[2] if match[1] else full
    if not full.startswith("w2f_torchrl."):
        return f"`{shown}`"
    return f'<autoref identifier="{full}" optional><code>{shown}</code></autoref>'


class Roles(griffe.Extension):
    """Rewrite every docstring before it is parsed."""

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        del kwargs
        if not obj.is_alias and obj.docstring:
            text = re.sub(r":math:`(.+?)`", r"`\1`", obj.docstring.value)
            obj.docstring.value = ROLE.sub(link, text)


class Settings(griffe.Extension):
    """Show a field made by ``setting(default, help, ...)`` with its help and its default."""

    def on_attribute_instance(self, *, attr: Any, **kwargs: Any) -> None:
        """Replace the call by the default, and use the help as docstring."""
        del kwargs
        if isinstance(attr.value, griffe.ExprCall) and str(attr.value.function) == "setting":
            default, text = attr.value.arguments[:2]
            attr.value = default
            attr.docstring = griffe.Docstring(ast.literal_eval(str(text)), parent=attr)

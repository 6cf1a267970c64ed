"""Docstrings in Markdown: Sphinx roles become code, linked where the name has a page."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|obj|exc):`(~?)([\w.]+)`")


def link(match: re.Match[str]) -> str:
    """What a role becomes: the last part of the name for ``~``, linked if it is full."""
    full = match[2]
    shown = full.rpartition(".")[2] if match[1] else full
    if not full.startswith("w2f_torchrl."):
        return f"`{shown}`"
    return f'<autoref identifier="{full}" optional><code>{shown}</code></autoref>'


class Roles(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        """Called for each module, class, function and attribute."""
        del kwargs
        if not obj.is_alias and obj.docstring:
            text = re.sub(r":math:`(.+?)`", r"`\1`", obj.docstring.value)
            obj.docstring.value = ROLE.sub(link, text)

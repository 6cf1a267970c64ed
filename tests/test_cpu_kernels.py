"""The switch of the kernels for CPUs: an update with and without them, and the way of imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from helpers.models import LATENTS, make_learner, make_sample

import w2f_torchrl
from w2f_torchrl.kernels import switch

PACKAGE = Path(w2f_torchrl.__file__).parent


@pytest.mark.parametrize("actions", [None, 4], ids=["continuous", "discrete"])
@pytest.mark.parametrize("latent", LATENTS)
def test_an_update_with_kernels_is_that_of_plain_operations(latent, actions, monkeypatch):
    def update(kernels: bool) -> tuple[dict[str, torch.Tensor], int]:
        asked = []

        def answer(x: torch.Tensor) -> bool:
            asked.append(x.shape)
            return kernels

        monkeypatch.setattr(switch, "use_cpu_kernels", answer)
        learner = make_learner(latent, actions=actions)
        losses = dict(learner.update(make_sample(actions=actions)).items())
        named = learner.loss.named_parameters()
        return losses | {name: p.grad for name, p in named if p.grad is not None}, len(asked)

    (with_kernels, asked), (plain, _) = update(True), update(False)
    assert asked > 50
    assert len(plain) > 100
    for name, value in plain.items():
        torch.testing.assert_close(
            with_kernels[name], value, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def imported_by(path: Path) -> set[str]:
    """Name the modules of this package that a file imports, for types only too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("w2f_torchrl"):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_kernels_import_no_modules():
    for path in (PACKAGE / "kernels").glob("*.py"):
        others = {name for name in imported_by(path) if ".kernels" not in name}
        assert others == set(), path.name


@pytest.mark.parametrize("folder", ["kernels", "modules"])
def test_no_file_imports_itself_through_others(folder):
    prefix = f"w2f_torchrl.{folder}."
    graph = {
        path.stem: {name.removeprefix(prefix) for name in imported_by(path) if prefix in name}
        for path in (PACKAGE / folder).glob("*.py")
        if path.stem != "__init__"
    }

    def reached_from(start: str) -> set[str]:
        reached: set[str] = set()
        waiting = [start]
        while waiting:
            for name in graph.get(waiting.pop(), set()) - reached:
                reached.add(name)
                waiting.append(name)
        return reached

    assert graph
    for name in graph:
        assert name not in reached_from(name)

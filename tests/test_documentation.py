"""docs/: complete, and its links, pages and generated tables hold."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import docs_hooks
import pytest
import settings_reference
from documents import blocks, name_of, pages
from helpers.checkout import ROOT
from omegaconf import OmegaConf

from w2f_torchrl.trainers import RunConfig

SCREEN = 75  # lines of a how-to page, at most


SETTINGS = list(settings_reference.all_settings())


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        nested = isinstance(value, dict) and value
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


# ------------------------------------------------------------------ the settings


def test_the_reference_has_every_setting_with_its_default():
    running = flatten(OmegaConf.to_container(OmegaConf.structured(RunConfig)))
    listed = {setting.name: OmegaConf.create(f"v: {setting.default}").v for setting in SETTINGS}
    assert list(listed) == list(running)
    for name, value in running.items():
        assert listed[name] == value or float(listed[name]) == value, name
    reference = settings_reference.reference()
    assert all(f"| `{name}` |" in reference for name in running)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_a_setting_has_a_help_and_a_number_its_unit(setting):
    assert setting.info.help, f"declare {setting.name} with setting(default, help, ...)"
    assert setting.info.help.endswith((".", "..."))
    assert bool(setting.info.unit) == setting.is_number, setting.name


def test_the_fields_of_a_distraction_are_described():
    fields = settings_reference.distraction_settings()
    assert {"background.num_videos", "camera.scale", "step_unit"} <= {f.name for f in fields}
    assert all(field.info.help for field in fields)


def test_the_reference_shows_units_ranges_and_choices():
    kinds = {setting.name: setting.kind for setting in SETTINGS}
    assert kinds["environment.image_size"] == "int, pixels, in [16, 1024]"
    assert kinds["model.num_bins"] == "int, bins, odd and at least 3"
    assert kinds["loss.selective"] == "float or null, probability, in [0.5, 1)"
    assert kinds["algo.latent"] == "one of split, shared, foreground or null"


def test_the_reference_has_every_option_of_every_group():
    reference = settings_reference.reference()
    for path in (ROOT / "sota_configs").rglob("*.yaml"):
        group = path.parent.relative_to(ROOT / "sota_configs").as_posix()
        assert group == "." or f"`{group}={path.stem}`" in reference, path
    assert "`model=size400m`" in reference


# ------------------------------------------------------------------ pages


def nav_pages(nav: list[Any]) -> list[str]:
    found: list[str] = []
    for entry in nav:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            found += nav_pages(value) if isinstance(value, list) else [value]
    return found


def test_the_commands_of_results_name_programs_that_exist():
    commands = re.findall(r"`python (benchmarks/\S+\.py)", docs_hooks.results_table())
    assert len(commands) > 40
    assert [path for path in commands if not (ROOT / path).is_file()] == []


def test_the_navigation_has_every_page_once():
    config = OmegaConf.to_container(OmegaConf.load(ROOT / "mkdocs.yml"))
    listed = nav_pages(config["nav"])
    docs = ROOT / "docs"
    there = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}
    assert sorted(listed) == sorted(there | set(docs_hooks.PAGES))


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_the_links_of_a_page_lead_somewhere(page: Path):
    text = docs_hooks.fill_in(page.read_text())
    for link in docs_hooks.LINK.finditer(text):
        docs_hooks.target_of(link, name_of(page))


@pytest.mark.parametrize("page", [p for p in pages() if p.parent.name == "howto"], ids=name_of)
def test_a_how_to_fits_on_a_screen_and_shows_how(page: Path):
    assert len(page.read_text().splitlines()) <= SCREEN
    assert list(blocks(page))


def test_every_subpackage_has_a_page_of_the_reference():
    packages = {path.parent.name for path in (ROOT / "w2f_torchrl").glob("*/__init__.py")}
    assert {path.stem for path in (ROOT / "docs" / "api").glob("*.md")} == packages
    for name in packages:
        assert f"::: w2f_torchrl.{name}" in (ROOT / "docs" / "api" / f"{name}.md").read_text()


def test_the_documentation_builds_without_a_warning(tmp_path: Path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "WARNING -" not in result.stderr
    classes = (tmp_path / "api" / "modules.html").read_text()
    assert "DualImageDecoder" in classes
    assert ":class:" not in classes
    assert "Base channels of encoder and decoder." in classes  # a setting's help
    assert "setting(" not in classes
    assert "training.train_ratio" in (tmp_path / "configuration.html").read_text()

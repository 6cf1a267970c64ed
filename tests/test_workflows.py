"""The files of a public host: they run what the Makefile has, and name what it supports."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.checkout import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import w2f_torchrl

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SETUP = (ROOT / "scripts" / "setup.sh").read_text()


def steps(path: Path) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(path.read_text())["jobs"].values()
    return [step for job in jobs for step in job["steps"]]


def commands(path: Path) -> str:
    return "\n".join(step.get("run", "") for step in steps(path))


def test_there_is_one_for_tests_documentation_and_releases():
    assert [path.stem for path in WORKFLOWS] == ["ci", "docs", "release"]
    assert ".ci/run" in commands(WORKFLOWS[0])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_target_and_program_exists(path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", commands(path))) <= targets
    for program in re.findall(r"(?<!\S)\.ci/\w+", commands(path)):
        assert (ROOT / program).exists()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_libraries_that_draw_are_those_of_set_up(path):
    (wanted,) = re.findall(r"egl\) need_packages \"[^\"]+\" (.+) ;;", SETUP)
    for line in commands(path).splitlines():
        if "apt-get install" in line:
            assert set(wanted.split()) <= set(line.split())


def test_the_ends_of_the_supported_pythons_are_tested():
    job = yaml.safe_load(WORKFLOWS[0].read_text())["jobs"]["everything"]
    oldest, newest = job["strategy"]["matrix"]["python"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert SpecifierSet(project["requires-python"]) == SpecifierSet(f">={oldest}")
    assert f"python{newest}" in SETUP


def test_the_oldest_lock_has_the_oldest_packages_that_are_allowed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "requirements" / "oldest.txt").read_text().splitlines()
    locked = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    for text in project["dependencies"]:
        requirement = Requirement(text)
        lower = [s.version for s in requirement.specifier if s.operator == ">="]
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert name in locked, name
        if name == "tensordict":
            continue  # torchrl's lowest needs a newer one
        assert locked[name].startswith(lower[0]), (name, locked[name], lower)


def test_a_tag_must_be_the_version():
    pattern = next(s["run"] for s in steps(WORKFLOWS[2]) if "__version__" in s.get("run", ""))
    line = pattern.split('"', 1)[1].rsplit('"', 1)[0].replace('\\"', '"')
    line = line.replace("${TAG#v}", w2f_torchrl.__version__)
    assert line in (ROOT / "w2f_torchrl" / "__init__.py").read_text().splitlines()


def test_only_publishing_gets_a_token():
    for path in WORKFLOWS:
        workflow = yaml.safe_load(path.read_text())
        assert workflow["permissions"] == {"contents": "read"}
        for name, job in workflow["jobs"].items():
            writes = [key for key, value in job.get("permissions", {}).items() if value == "write"]
            assert not writes or name in ("deploy", "publish")
            assert job["timeout-minutes"] <= 90

"""The package as it is built and locked: version, files, and requirements that agree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
from helpers.checkout import ROOT
from omegaconf import OmegaConf
from packaging.requirements import Requirement
from packaging.version import Version

import w2f_torchrl

PACKAGED = {".py", ".yaml", ".typed", ".html", ".css", ".js"}
LOCKS = {
    "locked.txt": ["dev", "docs"],
    "locked-extras.txt": [
        "dev",
        "docs",
        "sam3",
        "wandb",
        "tensorboard",
        "slurm",
        "analysis",
        "gym",
        "recorded",
        "export",
    ],
}


@cache
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def lock_lines(name: str) -> list[str]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked_versions(name: str) -> dict[str, Version]:
    requirements = [Requirement(line) for line in lock_lines(name)]
    return {
        canonical(requirement.name): Version(str(requirement.specifier).removeprefix("=="))
        for requirement in requirements
    }


def test_version_is_the_one_literal_in_the_package():
    assert "version" not in project()
    assert "version" in project()["dynamic"]
    assert metadata.version("w2f_torchrl") == w2f_torchrl.__version__
    assert str(Version(w2f_torchrl.__version__)) == w2f_torchrl.__version__


def test_changelog_names_the_version():
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] in {"Unreleased", w2f_torchrl.__version__}
    assert w2f_torchrl.__version__ in headings or headings == ["Unreleased"]


def test_citation_is_of_this_version_and_license():
    citation = OmegaConf.load(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert citation.version == w2f_torchrl.__version__
    assert citation.license == project()["license"]
    assert citation.title
    assert [author.name for author in citation.authors] == [
        author["name"] for author in project()["authors"]
    ]
    readme = (ROOT / "README.md").read_text()
    for value in (citation.title, citation.version, citation.license, citation.authors[0].name):
        assert f"{{{value}}}" in readme, "README.md's BibTeX is not CITATION.cff's"


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_satisfies_the_declared_requirements(lock: str):
    extras = project()["optional-dependencies"]
    assert set(LOCKS["locked-extras.txt"]) == set(extras), "a lock must cover every extra"
    wanted = [*project()["dependencies"]]
    wanted += [requirement for extra in LOCKS[lock] for requirement in extras[extra]]
    versions = locked_versions(lock)
    for requirement in map(Requirement, wanted):
        version = versions.get(canonical(requirement.name))
        assert version is not None, f"{requirement} is not in {lock}: run make lock"
        assert requirement.specifier.contains(version), f"{lock} has {version} for {requirement}"


def test_one_environment_serves_all_extras():
    # sam3 0.1.4 holds numpy, typing-extensions and tqdm back; both locks must follow it, or adding
    # the extras to a working .venv would change what was tested.
    assert locked_versions("locked.txt").items() <= locked_versions("locked-extras.txt").items()


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_pins_every_package_and_names_no_host_or_path(lock: str):
    for line in lock_lines(lock):
        assert re.match(r"[A-Za-z0-9._-]+==[^\s/@:]+( ; .+)?$", line), line
        assert "://" not in line


def build(kind: str, directory: Path) -> Path:
    # The backend straight from the environment: nothing is downloaded.
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(directory)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=directory / "source", check=True)
    (archive,) = [path for path in directory.iterdir() if path.suffix in {".whl", ".gz"}]
    return archive


def copy_sources(directory: Path) -> None:
    """Copy what a build reads, so that nothing is written into the checkout."""
    source = directory / "source"
    source.mkdir()
    names = ["pyproject.toml", "setup.cfg", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md"]
    names += ["CONTRIBUTING.md", "Makefile", "scripts", "requirements", "sota_configs", "tests"]
    for name in [*names, "w2f_torchrl"]:
        path = ROOT / name
        for file in [path] if path.is_file() else path.rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                target = source / file.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())


def package_files() -> set[str]:
    files = (ROOT / "w2f_torchrl").rglob("*")
    return {str(f.relative_to(ROOT)) for f in files if f.suffix in PACKAGED}


def configuration_files() -> set[str]:
    files = (ROOT / "sota_configs").rglob("*")
    return {str(f.relative_to(ROOT)) for f in files if f.suffix in {".py", ".yaml"}}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    copy_sources(directory)
    return build("wheel", directory)


def test_wheel_holds_the_package_its_configuration_and_its_license(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"w2f_torchrl-{w2f_torchrl.__version__}.dist-info"
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    assert "w2f-train = sota_configs.world2filter:main" in scripts
    assert configuration_files() >= {"sota_configs/config.yaml", "sota_configs/__init__.py"}
    assert package_files() | configuration_files() <= names
    assert f"{info}/licenses/LICENSE" in names
    allowed = ("w2f_torchrl/", "sota_configs/", info)
    assert not [name for name in names if not name.startswith(allowed)]


def test_an_unpacked_wheel_composes_and_checks_a_run(wheel: Path, tmp_path: Path):
    # -P and an empty directory: neither the checkout nor the current directory can help.
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (tmp_path / "elsewhere").mkdir()
    code = (
        "import sys; sys.argv = ['w2f-train', 'experiment=smoke', '--cfg', 'job']\n"
        "import sota_configs.world2filter as program; program.main()\n"
        "print(program.__file__)"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path / "elsewhere",
        env=dict(os.environ) | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "preset: size1m" in result.stdout
    assert "run_dir: runs/smoke" in result.stdout
    assert result.stdout.splitlines()[-1].startswith(str(site))


def test_sdist_holds_what_a_checkout_needs(tmp_path: Path):
    copy_sources(tmp_path)
    top = f"w2f_torchrl-{w2f_torchrl.__version__}"
    with tarfile.open(build("sdist", tmp_path)) as sdist:
        names = {name.removeprefix(f"{top}/") for name in sdist.getnames()}
    assert package_files() | configuration_files() <= names
    assert {"LICENSE", "Makefile", "scripts/setup.sh", "requirements/locked.txt"} <= names
    assert {"sota_configs/world2filter.py", "tests/conftest.py"} <= names


def test_set_up_compiles_bytecode_even_where_python_is_told_to_write_none(tmp_path: Path):
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup.sh", tmp_path / "scripts")
    venv.create(tmp_path / ".venv")
    [site] = (tmp_path / ".venv" / "lib").glob("python*/site-packages")
    sources = {"w2f_torchrl/part.py": "x = 1", "sota_configs/run.py": "x = 2"}
    for name, text in {**sources, "good.py": "x = 3", "template.py": "{{ no Python }}"}.items():
        path = (tmp_path if name in sources else site) / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    done = subprocess.run(
        ["sh", "scripts/setup.sh", "bytecode"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "setup: compiling bytecode\n")
    for folder, name in ((site, "good"), (tmp_path / "w2f_torchrl", "part")):
        [compiled] = (folder / "__pycache__").glob(f"{name}.*.pyc")
        assert compiled.stat().st_size


RECORDING_UV = """#!/bin/sh
echo "$@" >> uv.log
for last; do :; done
case $last in *.txt) cat "$last" >> uv.log ;; esac
"""


@pytest.fixture
def set_up(tmp_path: Path):
    """Run a step of a copy of set-up, with a uv that only records its arguments."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup.sh", tmp_path / "scripts")
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    uv = tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text(RECORDING_UV)
    uv.chmod(0o755)

    def run(step: str, **variables: str) -> tuple[str, subprocess.CompletedProcess[str]]:
        log = tmp_path / "uv.log"
        log.write_text("")
        path = f"{uv.parent}:{os.environ['PATH']}"
        done = subprocess.run(
            ["sh", "scripts/setup.sh", step],
            cwd=tmp_path,
            env={**os.environ, "PYTHON": sys.executable, "PATH": path, **variables},
            capture_output=True,
            text=True,
        )
        return log.read_text(), done

    return run


def test_the_cpu_build_has_no_cuda_packages_and_is_remembered(set_up):
    log, done = set_up("packages", CPU="1")
    assert done.returncode == 0, done.stderr
    assert "--torch-backend cpu" in log
    torch = re.search(r"^torch==.+$", (ROOT / "requirements/locked.txt").read_text(), re.MULTILINE)
    assert torch
    assert torch[0] in log
    for step in ("packages", "extras"):  # no longer said, still so
        log, done = set_up(step)
        assert done.returncode == 0, done.stderr
        assert "--torch-backend cpu" in log
        assert not re.search(r"^(nvidia-|cuda-|triton==)", log, re.MULTILINE)


def test_the_cuda_build_is_the_default_and_is_not_mixed_with_the_other(set_up):
    log, done = set_up("packages")
    assert done.returncode == 0, done.stderr
    assert "--torch-backend" not in log
    assert "\nnvidia-cublas==" in log
    log, done = set_up("packages", CPU="1")
    assert done.returncode == 1
    assert "CPU=1, but .venv has the CUDA build: remove .venv" in done.stderr
    assert "pip install" not in log

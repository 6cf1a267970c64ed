"""The container's files, as far as they can be checked without an engine."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import replay_dockerfile as replay
import yaml
from helpers.checkout import ROOT

STEPS = replay.instructions(ROOT / "Dockerfile")


class Loader(yaml.SafeLoader):
    """Knows Compose's own tag."""


Loader.add_constructor("!reset", lambda loader, node: None)


def load(name: str) -> dict[str, Any]:
    return yaml.load((ROOT / name).read_text(), Loader)


def arguments(name: str) -> list[str]:
    return [argument for step, argument in STEPS if step == name]


def test_the_base_is_one_pinned_image():
    (image,) = arguments("FROM")
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu\d+\.\d+", image)


def test_the_image_has_the_libraries_that_set_up_installs():
    wanted = re.findall(r"\blib[a-z0-9-]+", (ROOT / "scripts" / "setup.sh").read_text())
    wanted = {name for name in wanted if "osmesa" not in name and re.search(r"e?gl", name)}
    assert len(wanted) == 4
    assert wanted <= set(" ".join(arguments("RUN")).split())


def test_nothing_of_the_project_runs_as_root():
    last_user = max(index for index, (step, _) in enumerate(STEPS) if step == "USER")
    first_copy = min(index for index, (step, _) in enumerate(STEPS) if step == "COPY")
    assert arguments("USER") == ["$UID"]
    assert last_user < first_copy
    assert all(argument.startswith("--chown=w2f ") for argument in arguments("COPY"))


def test_the_image_installs_a_lock_and_renders_with_egl():
    (lock,) = [a.partition("=")[2] for a in arguments("ARG") if a.startswith("LOCK=")]
    assert re.search(r"^uv==", (ROOT / "requirements" / lock).read_text(), re.MULTILINE)
    variables = dict(pair.split("=", 1) for a in arguments("ENV") for pair in shlex.split(a))
    assert variables["MUJOCO_GL"] == "egl"
    assert "graphics" in variables["NVIDIA_DRIVER_CAPABILITIES"]


def test_the_build_gets_what_it_needs_and_no_runs():
    files = {path.as_posix() for path in replay.context_files()}
    assert {"pyproject.toml", "README.md", "LICENSE", "requirements/locked-extras.txt"} <= files
    assert {"sota_configs/config.yaml", "w2f_torchrl/__init__.py"} <= files
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs", "checkpoints"} <= set(ignored)


SERVICES = {"shell": False, "train": True, "resume": True, "tensorboard": False}


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_mounts_the_project_and_passes_the_key_through(name: str):
    compose = load("docker-compose.yml")
    assert set(compose["services"]) == set(SERVICES)
    service = compose["services"][name]
    assert ".:/project" in service["volumes"]
    assert arguments("WORKDIR") == ["/project"]
    assert "WANDB_API_KEY" in service["environment"]  # a name alone: the host's value, if any
    assert set(service["build"]["args"]) <= {a.partition("=")[0] for a in arguments("ARG")}
    if SERVICES[name]:
        script = Path(service["entrypoint"][1])
        assert (ROOT / script).exists()
        assert ("resume=auto" in service["entrypoint"]) == (name == "resume")
        assert service["command"] == []  # what follows the service's name are overrides
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]


def test_without_a_gpu_no_service_asks_for_one():
    reset = load("docker-compose.cpu.yml")["services"]
    asks = {n for n, s in load("docker-compose.yml")["services"].items() if s["deploy"]}
    assert asks == set(reset)
    assert all(service == {"deploy": None} for service in reset.values())


def test_the_replay_reads_continued_lines_and_comments(tmp_path: Path):
    (tmp_path / "Dockerfile").write_text("# c\nFROM a:1\nRUN one \\\n  && two\n# d\nUSER $UID\n")
    steps = replay.instructions(tmp_path / "Dockerfile")
    assert [step for step, _ in steps] == ["FROM", "RUN", "USER"]
    assert steps[1][1].split() == ["one", "&&", "two"]

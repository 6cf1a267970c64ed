"""Start-up: what is wrong with a configuration is said before torch or a simulator is imported."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.checkout import ROOT, run_python

from w2f_torchrl.envs.suite_tasks import TASKS_BY_DOMAIN

HEAVY = ("torch", "tensordict", "torchrl", "triton", "dm_control", "mujoco", "matplotlib", "av")
PACKAGES = ("data", "envs", "modules", "objectives", "segmenters", "trainers", "transforms")

# Overrides of the command line, and what the error has to say.
BAD = {
    "environment.domain=walke": ("walke", "walker"),
    "environment.task=fly": ("fly", "walk"),
    "environment.image_size=65": ("environment.image_size=65", "multiple of 16"),
    "environment.image_size=8": ("environment.image_size=8", "must be in [16, 1024]"),
    "environment.image_size=big": ("environment.image_size", "big"),
    "environment.render=nice": ("environment.render", "nice", "reference"),
    "environment.distraction=harder": ("distraction", "harder", "medium"),
    "environment.distraction={camera:{scale:7}}": ("camera.scale", "7"),
    "environment.distraction=easy environment.background_source=/no/such": ("/no/such",),
    "environment.background_split=test": ("environment.background_split", "test", "val"),
    "environment.num_envs=0": ("environment.num_envs=0", "at least 1"),
    "model=size3m": ("size3m", "size1m"),
    "model.belief_size=100": ("model.belief_size=100", "model.num_blocks=8"),
    "algo.latent=double": ("algo.latent", "double", "split"),
    "algo=dreamer_v3 algo.latent=split": ("algo.latent", "dreamer_v3"),
    "algo=ppo": ("algo/ppo", "world2filter"),
    "segmentation.source=magic": ("segmentation", "magic", "simulator"),
    "segmentation=sam3 segmentation.checkpoint=/no/sam3.pt": ("segmentation=sam3",),
    "segmentation=student segmentation.labels=/no/labels.npz": ("/no/labels.npz",),
    "evaluation.sets=[unseen_vids]": ("evaluation.sets", "unseen_vids", "unseen_videos_easy"),
    "training.batch_lenght=8": ("training.batch_lenght",),
    "training.execution=fast": ("training.execution", "fast", "compile"),
    "loss.foreground_target=outside": ("loss.foreground_target", "outside", "inside"),
    "optimizer.lr=-1": ("optimizer.lr=-1",),
    "device=tpu": ("device", "tpu", "cuda:N"),
    "+setting=1 seed=x": ("seed", "x"),
    "colour=red": ("colour",),
}

RUN_ALL = """
import contextlib, io, json, os, runpy, sys
said = {}
for overrides in json.loads(sys.stdin.read()):
    sys.argv = ["world2filter.py", *overrides.split()]
    errors, code = io.StringIO(), 0
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            runpy.run_path("sota_configs/world2filter.py", run_name="__main__")
        except SystemExit as exit:
            code = exit.code
    text = code if isinstance(code, str) else errors.getvalue()
    said[overrides] = [bool(code), text, [n for n in HEAVY if n in sys.modules]]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said() -> dict[str, tuple[bool, str, list[str]]]:
    """What the command line answers to each bad override, asked in one fresh process."""
    result = subprocess.run(
        [sys.executable, "-c", f"HEAVY = {HEAVY!r}\n" + RUN_ALL],
        input=json.dumps([*BAD, "--cfg job"]),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("overrides", BAD)
def test_a_bad_setting_is_named_before_anything_heavy_is_imported(said, overrides: str) -> None:
    failed, message, imported = said[overrides]
    assert failed
    assert "Traceback" not in message
    for word in BAD[overrides]:
        assert word in message
    assert imported == []


def test_the_configuration_is_printed_without_anything_heavy(said) -> None:
    failed, _, imported = said["--cfg job"]
    assert not failed
    assert imported == []


def test_cuda_without_a_device_is_refused() -> None:
    result = subprocess.run(
        [sys.executable, "sota_configs/world2filter.py", "device=cuda:99"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 1
    assert "device='cuda:99': this machine has" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_table_of_tasks_is_the_suites() -> None:
    suite = importlib.import_module("dm_control.suite")
    assert dict(suite.TASKS_BY_DOMAIN) == TASKS_BY_DOMAIN


@pytest.mark.parametrize("name", PACKAGES)
def test_lazy_names_are_all_there(name: str) -> None:
    package = importlib.import_module(f"w2f_torchrl.{name}")
    modules = {path.stem for path in Path(package.__file__).parent.glob("*.py")}
    assert set(package.__all__) <= set(dir(package))
    for export in package.__all__:
        # A module of that name would take the export's place when it is imported.
        assert export not in modules or export == "evaluation_sets"
        if export == "MujocoTask" and importlib.util.find_spec("gymnasium") is None:
            with pytest.raises(ModuleNotFoundError, match=r"needs gymnasium: pip install"):
                getattr(package, export)
            continue
        assert getattr(package, export) is vars(package)[export]
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        package.no_such_name  # noqa: B018


def test_evaluation_sets_stays_a_function() -> None:
    importlib.import_module("w2f_torchrl.envs.scenery.evaluation_sets")
    assert callable(importlib.import_module("w2f_torchrl.envs").evaluation_sets)


def test_the_package_is_light_and_guards_the_order() -> None:
    code = (
        "import sys, w2f_torchrl, w2f_torchrl.envs, w2f_torchrl.trainers, w2f_torchrl.segmenters\n"
        f"assert not [n for n in {HEAVY!r} if n in sys.modules]\n"
        "import mujoco\n"
        "assert 'triton' in sys.modules and 'torchrl' in sys.modules\n"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr

"""Former names of modules, which import for one release."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
from helpers.extras import skip_without_an_extra

from w2f_torchrl._moved import MOVED


@pytest.mark.parametrize("name", sorted(MOVED))
def test_a_former_name_of_a_module_imports_with_a_warning(name):
    sys.modules.pop(f"w2f_torchrl.{name}", None)
    try:
        for present in MOVED[name].split():
            importlib.import_module(f"w2f_torchrl.{present}")
    except ModuleNotFoundError as error:
        skip_without_an_extra(error)
    with pytest.warns(FutureWarning, match=rf"w2f_torchrl\.{name} has moved to w2f_torchrl\."):
        former = importlib.import_module(f"w2f_torchrl.{name}")
    for present in MOVED[name].split():
        found = importlib.import_module(f"w2f_torchrl.{present}")
        public = [n for n in vars(found) if not n.startswith("_") and n != "logger"]
        assert public
        assert all(getattr(former, n) is getattr(found, n) for n in public)


def test_only_former_names_are_found():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("w2f_torchrl.trainers.nothing")
    run = "import w2f_torchrl.trainers.checkpointing as c; c.CheckpointError; c.save_checkpoint"
    subprocess.run([sys.executable, "-W", "ignore", "-c", run], check=True)


def test_no_former_module_takes_the_place_of_a_public_name():
    """Importing a submodule sets its name in its package."""
    for name in MOVED:
        package, _, module = name.rpartition(".")
        public = importlib.import_module(f"w2f_torchrl.{package}")
        assert module not in getattr(public, "__all__", ()), name

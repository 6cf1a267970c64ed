"""Tests that need packages which only `make extras` installs."""

from __future__ import annotations

from typing import NoReturn

import pytest

PACKAGES = ("rliable", "sklearn")


def skip_without_an_extra(error: ModuleNotFoundError) -> NoReturn:
    """Skip the test if what is missing is in an extra; any other missing module is a failure."""
    if error.name not in PACKAGES:
        raise error
    pytest.skip(f"needs {error.name}: make extras")

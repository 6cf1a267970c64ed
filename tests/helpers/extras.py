"""Tests that need packages which only `make extras` installs."""

from __future__ import annotations

from typing import NoReturn

import pytest

from w2f_torchrl.segmenters.sam3_requirements import missing_requirement

PACKAGES = ("onnxruntime", "rliable", "sklearn", "gymnasium")
needs_sam3 = pytest.mark.skipif(
    missing_requirement(__file__, None) is not None,
    reason="needs the packages of the extra sam3: run make extras",
)


def skip_without_an_extra(error: ModuleNotFoundError) -> NoReturn:
    """Skip the test if what is missing is in an extra; any other missing module is a failure."""
    if error.name not in PACKAGES:
        raise error
    pytest.skip(f"needs {error.name}: make extras")

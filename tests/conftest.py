"""Settings and fixtures shared by all tests."""

from __future__ import annotations

import os
import signal

# Read when the libraries below load, hence before them: one quiet thread (spinning threads make a
# shared machine many times slower) and rendering without a display.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("MUJOCO_GL", "egl")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import w2f_torchrl  # noqa: F401  # before anything that loads MuJoCo: see its docstring

torch.set_num_threads(1)

WEIGHTS_VARIABLE = "W2F_SAM3_CHECKPOINT"


def _missing_weights() -> str | None:
    """Say why tests marked weights can't run here, or None when they can."""
    checkpoint = os.environ.get(WEIGHTS_VARIABLE)
    if checkpoint is None:
        return f"needs SAM3's weights: set {WEIGHTS_VARIABLE} to the checkpoint's path"
    if not Path(checkpoint).is_file():
        raise pytest.UsageError(f"{WEIGHTS_VARIABLE}={checkpoint!r} is no file.")
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, the tests whose hardware or files this machine lacks."""
    reasons = {
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device",
        "weights": _missing_weights(),
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason is not None and item.get_closest_marker(marker) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def background_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where background clips are kept while the tests run; worker processes inherit it."""
    path = tmp_path_factory.mktemp("cache")
    os.environ["W2F_CACHE"] = str(path)
    return path


@pytest.fixture(autouse=True)
def usual_signals() -> Iterator[None]:
    """Signals as a terminal's shell leaves them, whatever started the tests or ran before.

    nohup has SIGHUP ignored, a script's background Ctrl+C, and TorchRL handles two from its first
    storage on disk on.
    """
    before = {signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler)}
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        before[number] = signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def no_curves() -> Iterator[None]:
    """For runs of a few seconds: drawing their curves takes longer than the rest."""
    from w2f_torchrl.logging import diagnostics
    from w2f_torchrl.trainers import run_logging

    with pytest.MonkeyPatch.context() as patch:
        for module in (diagnostics, run_logging):
            patch.setattr(module, "plot_curves", lambda run_dir: run_dir / "curves.png")
        yield


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """An empty directory for the outputs of one run."""
    path = tmp_path / "run"
    path.mkdir()
    return path

"""Import order: whichever comes first, a process renders or gets an error, and never crashes."""

from __future__ import annotations

import ctypes
import importlib
import os
import subprocess

import pytest
from helpers.checkout import run_python

from w2f_torchrl.envs.renderers import _gl

pytestmark = pytest.mark.render

LIBRARIES = {"egl": "libEGL.so.1", "osmesa": "libOSMesa.so.8"}

RENDER = """
from w2f_torchrl.envs import make_env
env = make_env("cartpole", "balance", image_size=16)
assert env.reset()["pixels"].float().std() > 0
env.close()
print("rendered")
"""


def available(backend: str) -> bool:
    try:
        ctypes.CDLL(LIBRARIES[backend])
    except OSError:
        return False
    return True


def renders_or_is_refused(result: subprocess.CompletedProcess[str]) -> bool:
    rendered = result.returncode == 0 and "rendered" in result.stdout
    refused = (
        result.returncode == 1 and "import w2f_torchrl (or torch and torchrl)" in result.stderr
    )
    return rendered or refused


@pytest.mark.parametrize("backend", ["egl", pytest.param("osmesa", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "first",
    [
        "import w2f_torchrl; import dm_control.suite",
        pytest.param("import w2f_torchrl, mujoco.gl_context, torch", marks=pytest.mark.slow),
        pytest.param("import torch, torchrl; import dm_control.suite", marks=pytest.mark.slow),
    ],
)
def test_torchrl_first_renders(first: str, backend: str) -> None:
    if not available(backend):
        pytest.skip(f"no {LIBRARIES[backend]}")
    result = run_python(first + RENDER, MUJOCO_GL=backend)
    assert result.returncode == 0, result.stderr
    assert "rendered" in result.stdout


@pytest.mark.parametrize("backend", ["egl", pytest.param("osmesa", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "first",
    [
        "import dm_control.suite",
        pytest.param("import torch; import dm_control.suite", marks=pytest.mark.slow),
        pytest.param("import mujoco.gl_context", marks=pytest.mark.slow),
    ],
)
def test_dm_control_first_never_crashes(first: str, backend: str) -> None:
    if not available(backend):
        pytest.skip(f"no {LIBRARIES[backend]}")
    result = run_python(first + RENDER, MUJOCO_GL=backend)
    assert renders_or_is_refused(result), f"exit status {result.returncode}: {result.stderr}"


@pytest.mark.parametrize("first", ["", "import w2f_torchrl.envs; import dm_control.suite"])
def test_the_backend_is_chosen_where_the_variable_is_unset(first: str) -> None:
    code = f"import os\n{first}\n" + RENDER + "print(os.environ['MUJOCO_GL'])"
    result = run_python(code, MUJOCO_GL=None)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] in LIBRARIES


def test_validate_task_needs_no_rendering() -> None:
    code = (
        "from w2f_torchrl.envs import PixelDMControlEnv, validate_task\n"
        "validate_task('walker', 'walk')\n"
        "PixelDMControlEnv('walker', 'walk')"
    )
    result = run_python(code, MUJOCO_GL="disabled")
    assert result.returncode == 1
    assert "RuntimeError: MuJoCo cannot render (MUJOCO_GL=disabled)" in result.stderr
    assert _gl.INSTALL_COMMAND in result.stderr


@pytest.mark.parametrize(
    ("egl", "osmesa", "choice"),
    [(True, True, "egl"), (False, True, "osmesa"), (False, False, "disabled")],
)
def test_preference(monkeypatch: pytest.MonkeyPatch, egl: bool, osmesa: bool, choice: str) -> None:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(_gl, "_egl_works", lambda: egl)
    monkeypatch.setattr(_gl, "_osmesa_works", lambda: osmesa)
    _gl.load_gl_backend()
    assert os.environ["MUJOCO_GL"] == choice


def test_a_backend_that_cannot_be_loaded_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")

    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setattr(_gl.importlib, "import_module", fail)
    with pytest.raises(RuntimeError, match=r"MUJOCO_GL=egl.*apt-get install -y libegl1"):
        _gl.load_gl_backend()


def test_a_window_system_backend_without_display_is_explained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.import_module("dm_control._render"), "BACKEND", "glfw")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(RuntimeError, match="Set MUJOCO_GL=egl"):
        _gl.require_gl_backend()

"""The choice of MuJoCo's OpenGL backend, made before dm_control is imported."""

from __future__ import annotations

import ctypes
import importlib
import os

from w2f_torchrl._import_order import import_torch

_EGL_PLATFORM_DEVICE = 0x313F
_MAX_DEVICES = 16
_HEADLESS = ("egl", "osmesa")

INSTALL_COMMAND = "apt-get install -y libegl1 libgl1 libgles2 libegl-mesa0"


def _egl_works() -> bool:
    """Return whether some EGL device provides a display, which headless MuJoCo requires."""
    try:
        egl = ctypes.CDLL("libEGL.so.1")
    except OSError:
        return False
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    egl.eglInitialize.argtypes = [ctypes.c_void_p] * 3
    query_address = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    display_address = egl.eglGetProcAddress(b"eglGetPlatformDisplayEXT")
    if not query_address or not display_address:
        return False
    query = ctypes.CFUNCTYPE(
        ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int)
    )(query_address)
    get_display = ctypes.CFUNCTYPE(
        ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p
    )(display_address)
    devices = (ctypes.c_void_p * _MAX_DEVICES)()
    count = ctypes.c_int(0)
    if not query(_MAX_DEVICES, devices, ctypes.byref(count)):
        return False
    for device in devices[: count.value]:
        display = get_display(_EGL_PLATFORM_DEVICE, device, None)
        if display and egl.eglInitialize(display, None, None):
            return True
    return False


def _osmesa_works() -> bool:
    for name in ("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so"):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return True
    return False


def choose_gl_backend() -> None:
    """Choose ``MUJOCO_GL`` if it is unset: EGL if it finds a device, otherwise OSMesa.

    dm_control reads the variable only once, when it is imported, so this runs just before (see
    :mod:`w2f_torchrl._import_order`). Worker processes inherit the choice. If neither works, the
    value is ``"disabled"``: the package can be imported, but an env that has to render raises (see
    :func:`require_gl_backend`).
    """
    if os.environ.get("MUJOCO_GL"):
        return
    import_torch()  # the trial below loads Mesa
    if _egl_works():
        os.environ["MUJOCO_GL"] = "egl"
    elif _osmesa_works():
        os.environ["MUJOCO_GL"] = "osmesa"
    else:
        os.environ["MUJOCO_GL"] = "disabled"


def load_gl_backend() -> None:
    """Choose ``MUJOCO_GL`` if it is unset, and load dm_control's renderer with it.

    Raises:
        RuntimeError: If ``MUJOCO_GL`` names a backend that cannot be loaded; the message has the
            command that installs one.
    """
    choose_gl_backend()
    try:
        importlib.import_module("dm_control._render")
    except (ImportError, AttributeError) as error:  # PyOpenGL: None has no attribute 'egl...'
        raise RuntimeError(_missing_gl(error)) from error


def require_gl_backend() -> None:
    """Raise an error that says what to do if dm_control cannot render.

    Raises:
        RuntimeError: If rendering is switched off or no library was found; or if dm_control was
            imported before this package, without ``MUJOCO_GL``, and chose the window system's
            backend on a machine without a display.
    """
    backend = importlib.import_module("dm_control._render").BACKEND
    if backend in _HEADLESS:
        return
    if backend != "glfw":
        raise RuntimeError(_missing_gl("rendering is off, or no library was found"))
    if not os.environ.get("DISPLAY") and not os.environ.get("WAYLAND_DISPLAY"):
        raise RuntimeError(
            "MuJoCo's OpenGL backend is glfw, which needs a display, but none is available. Set "
            "MUJOCO_GL=egl, or leave it unset and import w2f_torchrl.envs before dm_control."
        )


def _missing_gl(cause: object) -> str:
    return (
        f"MuJoCo cannot render (MUJOCO_GL={os.environ.get('MUJOCO_GL')}): {cause}. "
        "Without a display it needs EGL or OSMesa; on Debian and Ubuntu: "
        f"`{INSTALL_COMMAND}`. MUJOCO_GL can be egl, osmesa or glfw (needs a display); if unset, "
        "it is chosen automatically."
    )

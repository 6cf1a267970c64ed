"""MuJoCo's scene and OpenGL context, shared by the renderers of this package."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt

from w2f_torchrl.envs._dm_control import _render, wrapper
from w2f_torchrl.envs.renderers.foreground import Foreground
from w2f_torchrl.envs.simulation import Camera, FreeCamera, Simulation

UInt8Array = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]

ALL = int(mujoco.mjtCatBit.mjCAT_ALL)
STATIC = int(mujoco.mjtCatBit.mjCAT_STATIC) | int(mujoco.mjtCatBit.mjCAT_DECOR)


@dataclass(frozen=True)
class Quality:
    """Rendering quality; None keeps the model's value.

    Attributes:
        multisamples: Samples per pixel. Only with 0 does each pixel show a single object.
        shadow_map: Side of the shadow map, texels; 0 disables shadows.
        reflections: Whether floors reflect.
        slices: Vertices around a round body, and along it.
    """

    multisamples: int | None = None
    shadow_map: int | None = None
    reflections: bool = True
    slices: tuple[int, int] | None = None


FULL = Quality()
"""The quality of dm_control's renderer."""
FAST = Quality(multisamples=0, shadow_map=0, reflections=False)
SHARP = Quality(multisamples=0, shadow_map=512, slices=(16, 10))
"""Like dm_control's renderer except for smooth outlines, at a fraction of the cost."""


class SceneView:
    """The view of one camera on some categories of objects.

    Args:
        simulation: The simulation.
        camera: Camera to look through.
        quality: Effects of the scene.
        hidden_group: A group of geoms and sites to hide; None renders the same as MuJoCo.
    """

    def __init__(
        self,
        simulation: Simulation,
        camera: Camera,
        quality: Quality,
        *,
        hidden_group: int | None = None,
    ) -> None:
        self.scene = wrapper.MjvScene(model=simulation.model)
        self._simulation = simulation
        self._option = mujoco.MjvOption()
        self._perturb = mujoco.MjvPerturb()
        self._free = camera if isinstance(camera, FreeCamera) else None
        self._camera = _mjv_camera(camera)
        if quality.shadow_map == 0:
            self.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        if not quality.reflections:
            self.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        if hidden_group is not None:
            self._option.geomgroup[hidden_group] = self._option.sitegroup[hidden_group] = 0

    def leave_out_sky(self) -> None:
        """Hide the sky box, the haze in front of it, and the rays of range finders."""
        self.scene.flags[mujoco.mjtRndFlag.mjRND_SKYBOX] = 0
        self.scene.flags[mujoco.mjtRndFlag.mjRND_HAZE] = 0
        self._option.flags[mujoco.mjtVisFlag.mjVIS_RANGEFINDER] = 0

    def update(self, categories: int) -> None:
        """Collect the objects of these categories in their present poses."""
        mujoco.mjv_updateScene(
            self._simulation.model.ptr,
            self._simulation.data.ptr,
            self._option,
            self._perturb,
            self._camera,
            categories,
            self.scene,
        )
        if self._free is not None and self._free.moved is not None:
            self._move(*self._free.moved)

    def _move(self, position: npt.NDArray[np.float64], frame: npt.NDArray[np.float64]) -> None:
        """Look from elsewhere, and shine from there if there is a headlight."""
        for eye in self.scene.camera:  # the picture is seen from between the two
            eye.pos[:], eye.up[:], eye.forward[:] = position, frame[1::3], -frame[2::3]
        for light in self.scene.lights[: self.scene.nlight]:
            if light.headlight:
                light.pos[:], light.dir[:] = position, -frame[2::3]

    def update_background(self, foreground: Foreground) -> None:
        """Collect everything but the foreground in its present pose."""
        self.update(STATIC if foreground.all_that_moves else ALL)
        for geom in self.scene.geoms[: self.scene.ngeom]:
            if foreground(geom.objtype, geom.objid):
                geom.type = mujoco.mjtGeom.mjGEOM_NONE


def _mjv_camera(camera: Camera) -> mujoco.MjvCamera:
    found = mujoco.MjvCamera()
    if isinstance(camera, FreeCamera):
        found.type = mujoco.mjtCamera.mjCAMERA_FREE
        found.lookat[:] = camera.lookat
        found.distance = camera.distance
        found.azimuth, found.elevation = camera.azimuth, camera.elevation
    else:
        found.type = mujoco.mjtCamera.mjCAMERA_FIXED
        found.fixedcamid = camera
    return found


class RenderContext:
    """An OpenGL context with an offscreen buffer of one size.

    Args:
        simulation: The simulation, whose textures are copied.
        image_size: Height and width of the buffer, pixels.
        quality: Multisampling and shadow map of the buffer.
        shared: Whether other code of this process uses OpenGL as well, such as an env's own
            renderer. dm_control makes a context current only if another one that it made was,
            so that a picture would be drawn into the other code's buffer.
    """

    def __init__(
        self, simulation: Simulation, image_size: int, quality: Quality, *, shared: bool = False
    ) -> None:
        self._model = simulation.model
        self._shared = shared
        self._rect = mujoco.MjrRect(0, 0, image_size, image_size)
        with _context_settings(self._model, image_size, quality):
            self._gl = _render.Renderer(max_width=image_size, max_height=image_size)
            self._mujoco = wrapper.MjrContext(self._model, self._gl)
        # Read depth as stored, 0 at the far end: the other mapping is 1 - depth, which rounds.
        self._mujoco.ptr.readDepthMap = mujoco.mjtDepthMap.mjDEPTH_ZEROFAR

    def draw(self, scene: mujoco.MjvScene, pixels: UInt8Array | None, nearness: FloatArray) -> None:
        """Render a scene, bottom row first.

        Args:
            scene: The scene.
            pixels: Receives the image, uint8 [H, W, 3]; None renders only depth.
            nearness: Receives the depth, float32 [H, W]: 0 at the far end, 1 at the near one.
        """
        # OSMesa's context lives on a separate thread, so OpenGL calls go through the executor.
        with self._current() as executor:
            executor.call(self._draw, scene, pixels, nearness)

    @contextlib.contextmanager
    def _current(self) -> Iterator[Any]:
        with self._gl.make_current() as executor:
            if self._shared:
                executor.call(self._gl._platform_make_current)
            yield executor

    def _draw(
        self, scene: mujoco.MjvScene, pixels: UInt8Array | None, nearness: FloatArray
    ) -> None:
        mujoco.mjr_render(self._rect, scene, self._mujoco.ptr)
        mujoco.mjr_readPixels(pixels, nearness, self._rect, self._mujoco.ptr)

    def upload_height_fields(self) -> None:
        """Upload terrain to OpenGL, which keeps a copy."""
        with self._current() as executor:
            for index in range(self._model.nhfield):
                executor.call(mujoco.mjr_uploadHField, self._model.ptr, self._mujoco.ptr, index)

    def upload_texture(self, index: int) -> None:
        """Upload the model's present texture to OpenGL, which keeps a copy."""
        with self._current() as executor:
            executor.call(mujoco.mjr_uploadTexture, self._model.ptr, self._mujoco.ptr, index)

    def close(self) -> None:
        """Free OpenGL's resources."""
        self._mujoco.free()


@contextlib.contextmanager
def _context_settings(model: wrapper.MjModel, image_size: int, quality: Quality) -> Iterator[None]:
    """Change the settings that MuJoCo reads when a context is made, then restore them.

    A permanent change would also degrade ``physics.render``.
    """
    visual_global, visual_quality = model.vis.global_, model.vis.quality
    saved = (
        visual_global.offwidth,
        visual_global.offheight,
        visual_quality.offsamples,
        visual_quality.shadowsize,
        visual_quality.numslices,
        visual_quality.numstacks,
    )
    visual_global.offwidth = visual_global.offheight = image_size
    if quality.multisamples is not None:
        visual_quality.offsamples = quality.multisamples
    if quality.shadow_map is not None:
        visual_quality.shadowsize = quality.shadow_map
    if quality.slices is not None:
        visual_quality.numslices, visual_quality.numstacks = quality.slices
    try:
        yield
    finally:
        (
            visual_global.offwidth,
            visual_global.offheight,
            visual_quality.offsamples,
            visual_quality.shadowsize,
            visual_quality.numslices,
            visual_quality.numstacks,
        ) = saved

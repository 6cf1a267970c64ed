"""MuJoCo's scene and OpenGL context, shared by the renderers of this package."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mujoco
import numpy as np
import numpy.typing as npt

from w2f_torchrl.envs._dm_control import _render, wrapper
from w2f_torchrl.envs.renderers.foreground import StaticTargets

if TYPE_CHECKING:
    from dm_control.mujoco import Physics

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
        physics: The simulation.
        camera_id: Index of the model's camera.
        quality: Effects of the scene.
        hidden_group: A group of geoms and sites to hide; None renders the same as MuJoCo.
    """

    def __init__(
        self,
        physics: Physics,
        camera_id: int,
        quality: Quality,
        *,
        hidden_group: int | None = None,
    ) -> None:
        self.scene = wrapper.MjvScene(model=physics.model)
        self._physics = physics
        self._option = mujoco.MjvOption()
        self._perturb = mujoco.MjvPerturb()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._camera.fixedcamid = camera_id
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
            self._physics.model.ptr,
            self._physics.data.ptr,
            self._option,
            self._perturb,
            self._camera,
            categories,
            self.scene,
        )

    def hide(self, targets: StaticTargets) -> None:
        """Hide the targets until the next update."""
        for geom in self.scene.geoms[: self.scene.ngeom]:
            if targets(geom.objtype, geom.objid):
                geom.type = mujoco.mjtGeom.mjGEOM_NONE


class RenderContext:
    """An OpenGL context with an offscreen buffer of one size.

    Args:
        physics: The simulation, whose textures are copied.
        image_size: Height and width of the buffer, pixels.
        quality: Multisampling and shadow map of the buffer.
    """

    def __init__(self, physics: Physics, image_size: int, quality: Quality) -> None:
        self._model = physics.model
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
        with self._gl.make_current() as executor:
            executor.call(self._draw, scene, pixels, nearness)

    def _draw(
        self, scene: mujoco.MjvScene, pixels: UInt8Array | None, nearness: FloatArray
    ) -> None:
        mujoco.mjr_render(self._rect, scene, self._mujoco.ptr)
        mujoco.mjr_readPixels(pixels, nearness, self._rect, self._mujoco.ptr)

    def upload_height_fields(self) -> None:
        """Upload terrain to OpenGL, which keeps a copy."""
        with self._gl.make_current() as executor:
            for index in range(self._model.nhfield):
                executor.call(mujoco.mjr_uploadHField, self._model.ptr, self._mujoco.ptr, index)

    def upload_texture(self, index: int) -> None:
        """Upload the model's present texture to OpenGL, which keeps a copy."""
        with self._gl.make_current() as executor:
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

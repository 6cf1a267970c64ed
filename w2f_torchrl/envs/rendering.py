"""Small, cheap pictures of a dm_control simulation, with the simulator's foreground mask."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, get_args

import mujoco
import numpy as np
import numpy.typing as npt
from dm_control import _render
from dm_control.mujoco import wrapper

from w2f_torchrl.envs._gl import require_gl_backend
from w2f_torchrl.envs.foreground import BoolArray, StaticTargets

if TYPE_CHECKING:
    from dm_control.mujoco import Physics

RenderMode = Literal["fast", "reference"]
RENDER_MODES: tuple[str, ...] = get_args(RenderMode)

UInt8Array = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]

_ALL = int(mujoco.mjtCatBit.mjCAT_ALL)
_STATIC = int(mujoco.mjtCatBit.mjCAT_STATIC) | int(mujoco.mjtCatBit.mjCAT_DECOR)
_COSTLY_FLAGS = (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION)


class SceneRenderer:
    """Draw one camera of a simulation at one size.

    The renderer has OpenGL contexts of its own, with an offscreen buffer of the picture's size.
    ``physics.render`` keeps working beside it, at any size and at dm_control's full quality, say
    for a video.

    The mask comes from depth: the scene is drawn once with everything and once without the
    foreground, and where the first is nearer, foreground shows. Both passes put the background's
    triangles through the same pipeline, so its depths are equal to the last bit. A segmentation
    pass draws everything twice, and labels what lies behind a transparent surface wrongly.

    Args:
        physics: The simulation.
        image_size: Height and width in pixels.
        camera_id: Index of the model's camera.
        render: ``"fast"`` draws without multisampling, shadows and reflections; ``"reference"``
            draws the model's own quality, which is what ``physics.render`` shows.
        foreground_mask: Whether :meth:`draw` makes the mask too.

    Raises:
        RuntimeError: If there is no OpenGL backend; the message says how to get one.
    """

    def __init__(
        self,
        physics: Physics,
        *,
        image_size: int,
        camera_id: int,
        render: RenderMode = "fast",
        foreground_mask: bool = True,
    ) -> None:
        require_gl_backend()
        self.image_size = image_size
        self.foreground_mask = foreground_mask
        full_quality = render == "reference"
        self._context = _Context(physics, image_size, full_quality=full_quality)
        self._everything = _View(physics, camera_id, full_quality=full_quality)
        self._pixels: UInt8Array = np.empty((image_size, image_size, 3), dtype=np.uint8)
        self._nearness: FloatArray = np.empty((image_size, image_size), dtype=np.float32)
        self._background_nearness = np.empty_like(self._nearness)
        self._background: _View | None = None
        self._silhouette: SceneRenderer | None = None
        if foreground_mask and full_quality:
            # Multisampling mixes the depths along an outline; the mask is drawn without.
            self._silhouette = SceneRenderer(physics, image_size=image_size, camera_id=camera_id)
        elif foreground_mask:
            self._background = _View(physics, camera_id, full_quality=False)
            self._targets = StaticTargets(physics)

    def draw(self) -> tuple[UInt8Array, BoolArray | None]:
        """Draw the simulation's present state.

        Returns:
            The picture, uint8 [3, H, W] in [0, 255], and the foreground mask, bool [1, H, W], or
            None if the renderer makes none. Both are fresh arrays.
        """
        self._everything.update(_ALL)
        self._context.draw(self._everything.scene, self._pixels, self._nearness)
        # OpenGL's first row is the bottom one.
        pixels = np.ascontiguousarray(self._pixels[::-1].transpose(2, 0, 1))
        if self._silhouette is not None:
            return pixels, self._silhouette.draw()[1]
        return pixels, None if self._background is None else self._draw_mask(self._background)

    def _draw_mask(self, background: _View) -> BoolArray:
        background.update(_STATIC)
        background.hide(self._targets)
        self._context.draw(background.scene, None, self._background_nearness)
        mask: BoolArray = (self._nearness > self._background_nearness)[np.newaxis, ::-1]
        return np.ascontiguousarray(mask)

    def upload_height_fields(self) -> None:
        """Hand terrain to OpenGL, which keeps a copy: call it after each episode's reset."""
        self._context.upload_height_fields()
        if self._silhouette is not None:
            self._silhouette.upload_height_fields()

    def close(self) -> None:
        """Free the OpenGL contexts."""
        self._context.close()
        if self._silhouette is not None:
            self._silhouette.close()


class _View:
    """What one camera sees of some categories of objects."""

    def __init__(self, physics: Physics, camera_id: int, *, full_quality: bool) -> None:
        self.scene = wrapper.MjvScene(model=physics.model)
        self._physics = physics
        self._option = mujoco.MjvOption()
        self._perturb = mujoco.MjvPerturb()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._camera.fixedcamid = camera_id
        if not full_quality:
            for flag in _COSTLY_FLAGS:
                self.scene.flags[flag] = 0

    def update(self, categories: int) -> None:
        """Collect the objects of these categories at their present poses."""
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
        """Leave the targets out, until the next update."""
        for geom in self.scene.geoms[: self.scene.ngeom]:
            if targets(geom.objtype, geom.objid):
                geom.type = mujoco.mjtGeom.mjGEOM_NONE


class _Context:
    """An OpenGL context with an offscreen buffer of one size."""

    def __init__(self, physics: Physics, image_size: int, *, full_quality: bool) -> None:
        self._model = physics.model
        self._rect = mujoco.MjrRect(0, 0, image_size, image_size)
        with _context_settings(self._model, image_size, full_quality=full_quality):
            self._gl = _render.Renderer(max_width=image_size, max_height=image_size)
            self._mujoco = wrapper.MjrContext(self._model, self._gl)
        # Depth as it is stored, 0 at the far end: the other map is 1 - depth, which rounds.
        self._mujoco.ptr.readDepthMap = mujoco.mjtDepthMap.mjDEPTH_ZEROFAR

    def draw(self, scene: mujoco.MjvScene, pixels: UInt8Array | None, nearness: FloatArray) -> None:
        # OSMesa's context lives on a thread of its own, so OpenGL calls go through the executor.
        with self._gl.make_current() as executor:
            executor.call(self._draw, scene, pixels, nearness)

    def _draw(
        self, scene: mujoco.MjvScene, pixels: UInt8Array | None, nearness: FloatArray
    ) -> None:
        mujoco.mjr_render(self._rect, scene, self._mujoco.ptr)
        mujoco.mjr_readPixels(pixels, nearness, self._rect, self._mujoco.ptr)

    def upload_height_fields(self) -> None:
        with self._gl.make_current() as executor:
            for index in range(self._model.nhfield):
                executor.call(mujoco.mjr_uploadHField, self._model.ptr, self._mujoco.ptr, index)

    def close(self) -> None:
        self._mujoco.free()


@contextlib.contextmanager
def _context_settings(
    model: wrapper.MjModel, image_size: int, *, full_quality: bool
) -> Iterator[None]:
    """Change the model's settings that MuJoCo reads once, when a context is made; then restore.

    Changed for good, they would also degrade ``physics.render``.
    """
    visual_global, quality = model.vis.global_, model.vis.quality
    saved = (
        visual_global.offwidth,
        visual_global.offheight,
        quality.offsamples,
        quality.shadowsize,
    )
    visual_global.offwidth = visual_global.offheight = image_size
    if not full_quality:
        quality.offsamples = quality.shadowsize = 0
    try:
        yield
    finally:
        (
            visual_global.offwidth,
            visual_global.offheight,
            quality.offsamples,
            quality.shadowsize,
        ) = saved

"""Images of a distracted simulation, with a mask that is exact to the pixel."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import mujoco
import numpy as np
import numpy.typing as npt

from w2f_torchrl.envs.renderers._gl import require_gl_backend
from w2f_torchrl.envs.renderers.corruption import CorruptedRenderer
from w2f_torchrl.envs.renderers.foreground import BoolArray, StaticTargets
from w2f_torchrl.envs.renderers.rendering import Renderer, SceneRenderer
from w2f_torchrl.envs.renderers.scene import (
    ALL,
    FAST,
    SHARP,
    STATIC,
    FloatArray,
    Quality,
    RenderContext,
    SceneView,
    UInt8Array,
)
from w2f_torchrl.envs.renderers.textured_rendering import (
    FLOOR_MATERIAL,
    DistractedRenderer,
    PaletteRenderer,
    SkyBoxRenderer,
    sky_texture,
)
from w2f_torchrl.envs.scenery.distractions import DistractionConfig
from w2f_torchrl.envs.scenery.distractor import Distractor
from w2f_torchrl.envs.tasks import RenderMode

if TYPE_CHECKING:
    from dm_control.mujoco import Physics

_HIDDEN_GROUP = 5


def is_composite(config: DistractionConfig, render: RenderMode) -> bool:
    """Return whether a background is fixed to the screen, and not on the sky box."""
    background = config.background
    return render == "fast" or (background is not None and background.replaces != "scenery")


def frame_size(
    physics: Physics,
    config: DistractionConfig,
    *,
    image_size: int,
    camera_id: int,
    render: RenderMode,
) -> int:
    """Return the side of a background's frames, pixels, as far as an image can resolve them.

    A composite shows a frame unchanged. The sky box stretches it over 90 degrees, of which the
    camera sees its field of view. OpenGL halves the reference's 800 x 800 texels until they match
    the image's resolution; the frame starts at that size.
    """
    if is_composite(config, render):
        return image_size
    field_of_view = math.radians(float(physics.model.cam_fovy[camera_id]))
    needed = image_size / math.tan(field_of_view / 2)
    size = int(physics.model.tex_width[sky_texture(physics)])
    while size % 2 == 0 and size // 2 >= needed:
        size //= 2
    return size


def make_distracted_renderer(
    physics: Physics,
    distractor: Distractor,
    *,
    image_size: int,
    camera_id: int,
    domain: str,
    render: RenderMode,
    foreground_mask: bool,
) -> Renderer:
    """Make the renderer of a simulation with distractions.

    Args:
        physics: The simulation.
        distractor: Its distractions.
        image_size: Height and width in pixels.
        camera_id: Index of the model's camera.
        domain: The suite's domain, which decides how opaque the floor is.
        render: ``"fast"`` lays the agent over the background's frame; ``"reference"`` puts it on
            the sky box and renders shadows and reflections. Neither multisamples, so that the mask
            is exact.
        foreground_mask: Whether to render the mask too.
    """
    settings: dict[str, Any] = {"image_size": image_size, "camera_id": camera_id}
    renderer = _clear_renderer(physics, distractor, domain, render, foreground_mask, settings)
    if distractor.corruption is None:
        return renderer
    return CorruptedRenderer(renderer, distractor.corruption)


def _clear_renderer(
    physics: Physics,
    distractor: Distractor,
    domain: str,
    render: RenderMode,
    foreground_mask: bool,
    settings: dict[str, Any],
) -> Renderer:
    scenery = distractor.config.scenery
    quality = FAST if render == "fast" else SHARP
    if scenery is not None and is_composite(distractor.config, render):
        return CompositeRenderer(
            physics,
            distractor,
            scenery.alpha(domain),
            foreground_mask,
            quality=quality,
            keep_rest=getattr(scenery, "replaces", "scenery") != "scenery",
            **settings,
        )
    scene = SceneRenderer(physics, foreground_mask=foreground_mask, quality=quality, **settings)
    if distractor.palette is not None:
        return PaletteRenderer(scene, distractor, physics)
    if scenery is None:
        return DistractedRenderer(scene, distractor)
    return SkyBoxRenderer(scene, distractor, physics, scenery.alpha(domain))


class CompositeRenderer:
    """A background's frame, the floor blended over it, and the foreground in front of both.

    All other scenery (sky, rails, walls, bases) is left out: each background pixel is the frame's,
    or a mixture of it and the floor's. An opaque floor hides everything below it. With
    ``keep_rest`` rails, walls and bases stay, opaque, and only the sky is left out, and the floor
    if its opacity is 0.

    Args:
        physics: The simulation.
        distractor: Its distractions, with a background whose frames have the image's size.
        ground_alpha: Opacity of the floor, in [0, 1].
        foreground_mask: Whether :meth:`draw` returns the mask.
        quality: Quality without multisampling.
        keep_rest: Whether to keep the scenery that is neither sky nor floor; the floor must be
            opaque or left out.
        image_size: Height and width in pixels.
        camera_id: Index of the model's camera.
    """

    def __init__(
        self,
        physics: Physics,
        distractor: Distractor,
        ground_alpha: float,
        foreground_mask: bool,
        *,
        quality: Quality = FAST,
        keep_rest: bool = False,
        image_size: int,
        camera_id: int,
    ) -> None:
        require_gl_backend()
        self.image_size, self.foreground_mask = image_size, foreground_mask
        self._distractor = distractor
        self._alpha = np.float32(1.0 if keep_rest else ground_alpha)
        self._model = physics.model
        self._context = RenderContext(physics, image_size, quality)
        self._everything = self._view(physics, camera_id, quality)
        static = ground_alpha > 0 or keep_rest
        self._floor = self._view(physics, camera_id, quality) if static else None
        self._targets = StaticTargets(physics)
        self._scenery = _scenery(
            physics, self._targets, keep_floor=ground_alpha > 0, keep_rest=keep_rest
        )
        self._pixels: UInt8Array = np.empty((image_size, image_size, 3), dtype=np.uint8)
        self._nearness: FloatArray = np.empty((image_size, image_size), dtype=np.float32)
        self._floor_nearness = np.zeros_like(self._nearness)

    @staticmethod
    def _view(physics: Physics, camera_id: int, quality: Quality) -> SceneView:
        view = SceneView(physics, camera_id, quality, hidden_group=_HIDDEN_GROUP)
        view.leave_out_sky()
        return view

    def draw(self) -> tuple[UInt8Array, BoolArray | None]:
        """Return the image and the mask."""
        with self._distractor.applied(), self._scenery_hidden():
            self._everything.update(ALL)
            self._context.draw(self._everything.scene, self._pixels, self._nearness)
            if self._floor is not None:
                self._floor.update(STATIC)
                self._floor.hide(self._targets)
                self._context.draw(self._floor.scene, None, self._floor_nearness)
        # OpenGL's first row is the bottom one. Without a floor, its nearness is 0, the far end.
        pixels, floor = self._pixels[::-1], self._floor_nearness[::-1]
        mask = self._nearness[::-1] > floor
        picture = np.array(self._distractor.frame)
        if self._floor is not None:
            shows_floor = (floor > 0) & ~mask
            if self._alpha < 1:
                blend = self._alpha * pixels + (1 - self._alpha) * picture
                pixels = np.where(mask[..., None], pixels, np.rint(blend).astype(np.uint8))
            np.copyto(picture, pixels, where=(mask | shows_floor)[..., None])
        else:
            np.copyto(picture, pixels, where=mask[..., None])
        picture = np.ascontiguousarray(picture.transpose(2, 0, 1))
        return picture, np.ascontiguousarray(mask[None]) if self.foreground_mask else None

    @contextlib.contextmanager
    def _scenery_hidden(self) -> Iterator[None]:
        """Move the scenery to a group that is not rendered, then restore it."""
        geoms, sites = self._scenery
        model = self._model
        saved = model.geom_group[geoms].copy(), model.site_group[sites].copy()
        model.geom_group[geoms], model.site_group[sites] = _HIDDEN_GROUP, _HIDDEN_GROUP
        try:
            yield
        finally:
            model.geom_group[geoms], model.site_group[sites] = saved

    def upload_height_fields(self) -> None:
        """Upload terrain to OpenGL."""
        self._context.upload_height_fields()

    def close(self) -> None:
        """Free OpenGL's resources."""
        self._context.close()


IndexArray = npt.NDArray[np.intp]


def _scenery(
    physics: Physics, targets: StaticTargets, *, keep_floor: bool, keep_rest: bool
) -> tuple[IndexArray, IndexArray]:
    """Return the indices of the geoms and sites to hide: neither foreground nor kept."""
    model = physics.model
    floors = (mujoco.mjtGeom.mjGEOM_PLANE, mujoco.mjtGeom.mjGEOM_HFIELD)
    materials = [model.id2name(index, "material") for index in range(model.nmat)]

    def is_floor(geom: int) -> bool:
        if int(model.geom_type[geom]) not in floors:
            return False
        material = int(model.geom_matid[geom])
        return material < 0 or materials[material] == FLOOR_MATERIAL

    def hidden(kind: mujoco.mjtObj, bodies: npt.NDArray[np.int32]) -> list[int]:
        still = np.flatnonzero(np.asarray(model.body_weldid)[bodies] == 0)
        return [index for index in still.tolist() if not targets(int(kind), index)]

    geoms = hidden(mujoco.mjtObj.mjOBJ_GEOM, np.asarray(model.geom_bodyid))
    geoms = [index for index in geoms if not (keep_floor if is_floor(index) else keep_rest)]
    sites = hidden(mujoco.mjtObj.mjOBJ_SITE, np.asarray(model.site_bodyid))
    sites = [] if keep_rest else sites
    return np.array(geoms, dtype=np.intp), np.array(sites, dtype=np.intp)

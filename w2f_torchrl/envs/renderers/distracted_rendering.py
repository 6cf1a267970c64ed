"""Images of a distracted simulation, with a mask that is exact to the pixel."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import mujoco
import numpy as np
import numpy.typing as npt

from w2f_torchrl.envs.renderers._gl import require_gl_backend
from w2f_torchrl.envs.renderers.corruption import CorruptedRenderer
from w2f_torchrl.envs.renderers.foreground import BoolArray, Foreground
from w2f_torchrl.envs.renderers.rendering import Drawing, Renderer, SceneRenderer
from w2f_torchrl.envs.renderers.scene import (
    ALL,
    FAST,
    SHARP,
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
from w2f_torchrl.envs.simulation import Simulation, field_of_view, names_of

_HIDDEN_GROUP = 5
_UPRIGHT = 0.7
"""Minimum cosine between a floor's normal and the vertical."""


def is_composite(config: DistractionConfig, drawing: Drawing) -> bool:
    """Return whether a background is fixed to the screen, and not on the sky box."""
    background = config.background
    return (
        drawing.render == "fast"
        or drawing.domain is None
        or (background is not None and background.replaces != "scenery")
    )


def frame_size(simulation: Simulation, config: DistractionConfig, drawing: Drawing) -> int:
    """Return the side of a background's frames, pixels, as far as an image can resolve them.

    A composite shows a frame unchanged. The sky box stretches it over 90 degrees, of which the
    camera sees its field of view. OpenGL halves the reference's 800 x 800 texels until they match
    the image's resolution; the frame starts at that size.
    """
    if is_composite(config, drawing):
        return drawing.image_size
    needed = drawing.image_size / math.tan(field_of_view(simulation, drawing.camera) / 2)
    size = int(simulation.model.tex_width[sky_texture(simulation)])
    while size % 2 == 0 and size // 2 >= needed:
        size //= 2
    return size


def make_distracted_renderer(
    simulation: Simulation, distractor: Distractor, drawing: Drawing
) -> Renderer:
    """Make the renderer of a simulation with distractions.

    Args:
        simulation: The simulation.
        distractor: Its distractions.
        drawing: How to render. ``"fast"`` lays the agent over the background's frame;
            ``"reference"`` puts it on the sky box of the suite's models, and renders shadows and
            reflections. Neither multisamples, so that the mask is exact.
    """
    renderer = _clear_renderer(simulation, distractor, drawing)
    if distractor.corruption is None:
        return renderer
    return CorruptedRenderer(renderer, distractor.corruption)


def _clear_renderer(simulation: Simulation, distractor: Distractor, drawing: Drawing) -> Renderer:
    scenery = distractor.config.scenery
    quality = FAST if drawing.render == "fast" else SHARP
    if scenery is not None and is_composite(distractor.config, drawing):
        return CompositeRenderer(
            simulation,
            distractor,
            drawing,
            scenery.alpha(drawing.domain),
            quality=quality,
            keep_rest=getattr(scenery, "replaces", "scenery") != "scenery",
        )
    scene = SceneRenderer(simulation, drawing, quality=quality)
    if distractor.palette is not None:
        return PaletteRenderer(scene, distractor, simulation)
    if scenery is None:
        return DistractedRenderer(scene, distractor)
    return SkyBoxRenderer(scene, distractor, simulation, scenery.alpha(drawing.domain))


class CompositeRenderer:
    """A background's frame, the floor blended over it, and the foreground in front of both.

    All other scenery (sky, rails, walls, bases) is left out: each background pixel is the frame's,
    or a mixture of it and the floor's. An opaque floor hides everything below it. With
    ``keep_rest`` rails, walls and bases stay, opaque, and only the sky is left out, and the floor
    if its opacity is 0.

    Args:
        simulation: The simulation.
        distractor: Its distractions, with a background whose frames have the image's size.
        drawing: How to render.
        ground_alpha: Opacity of the floor, in [0, 1].
        quality: Quality without multisampling.
        keep_rest: Whether to keep the scenery that is neither sky nor floor; the floor must be
            opaque or left out.
    """

    def __init__(
        self,
        simulation: Simulation,
        distractor: Distractor,
        drawing: Drawing,
        ground_alpha: float,
        *,
        quality: Quality = FAST,
        keep_rest: bool = False,
    ) -> None:
        require_gl_backend()
        self.image_size, self.foreground_mask = drawing.image_size, drawing.foreground_mask
        image_size = drawing.image_size
        self._distractor = distractor
        self._alpha = np.float32(1.0 if keep_rest else ground_alpha)
        self._model = simulation.model
        self._context = RenderContext(
            simulation, image_size, quality, shared=drawing.domain is None
        )
        self._everything = self._view(simulation, drawing, quality)
        self._foreground = Foreground(simulation, drawing.rule)
        rest = ground_alpha > 0 or keep_rest or not self._foreground.all_that_moves
        self._floor = self._view(simulation, drawing, quality) if rest else None
        floors = _floors(simulation, suite=drawing.domain is not None)
        self._scenery = _scenery(
            simulation,
            self._foreground,
            kept=np.where(floors, ground_alpha > 0, keep_rest),
            keep_sites=keep_rest,
        )
        self._pixels: UInt8Array = np.empty((image_size, image_size, 3), dtype=np.uint8)
        self._nearness: FloatArray = np.empty((image_size, image_size), dtype=np.float32)
        self._floor_nearness = np.zeros_like(self._nearness)

    @staticmethod
    def _view(simulation: Simulation, drawing: Drawing, quality: Quality) -> SceneView:
        view = SceneView(simulation, drawing.camera, quality, hidden_group=_HIDDEN_GROUP)
        view.leave_out_sky()
        return view

    def draw(self) -> tuple[UInt8Array, BoolArray | None]:
        """Return the image and the mask."""
        with self._distractor.applied(), self._scenery_hidden():
            self._everything.update(ALL)
            self._context.draw(self._everything.scene, self._pixels, self._nearness)
            if self._floor is not None:
                self._floor.update_background(self._foreground)
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
    simulation: Simulation, foreground: Foreground, *, kept: BoolArray, keep_sites: bool
) -> tuple[IndexArray, IndexArray]:
    """Return the indices of the geoms and sites to hide: neither foreground nor kept."""
    model, kinds = simulation.model, mujoco.mjtObj
    geoms = [i for i in range(model.ngeom) if not (kept[i] or foreground(kinds.mjOBJ_GEOM, i))]
    sites = [i for i in range(model.nsite) if not (keep_sites or foreground(kinds.mjOBJ_SITE, i))]
    return np.array(geoms, dtype=np.intp), np.array(sites, dtype=np.intp)


def _floors(simulation: Simulation, *, suite: bool) -> BoolArray:
    """Return which geoms are floors, bool [ngeom].

    In the suite's models that is what has the floor's material, or none. In others it is terrain,
    and every plane that points upwards.
    """
    model = simulation.model
    geom_type = np.asarray(model.geom_type)
    planes = geom_type == mujoco.mjtGeom.mjGEOM_PLANE
    terrain = geom_type == mujoco.mjtGeom.mjGEOM_HFIELD
    if suite:
        materials = names_of(simulation, "material")
        floor = [m < 0 or materials[m] == FLOOR_MATERIAL for m in model.geom_matid]
        in_suite: BoolArray = (planes | terrain) & np.array(floor, dtype=np.bool_)
        return in_suite
    data = mujoco.MjData(model.ptr)
    mujoco.mj_kinematics(model.ptr, data)
    found: BoolArray = terrain | (planes & (data.geom_xmat[:, 8] > _UPRIGHT))
    return found

"""Small, cheap images of a MuJoCo simulation, with the simulator's foreground mask."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from w2f_torchrl.envs.renderers._gl import require_gl_backend
from w2f_torchrl.envs.renderers.drawing import DEFAULT_RULE, ForegroundRule, RenderMode
from w2f_torchrl.envs.renderers.foreground import BoolArray, Foreground
from w2f_torchrl.envs.renderers.scene import (
    ALL,
    FAST,
    FULL,
    FloatArray,
    Quality,
    RenderContext,
    SceneView,
    UInt8Array,
)
from w2f_torchrl.envs.simulation import Camera, Simulation


class Renderer(Protocol):
    """Renders an environment."""

    image_size: int
    foreground_mask: bool

    def draw(self) -> tuple[UInt8Array, BoolArray | None]:
        """Return the image uint8 [3, H, W], and the mask bool [1, H, W] or None."""

    def upload_height_fields(self) -> None:
        """Upload terrain to OpenGL."""

    def close(self) -> None:
        """Free OpenGL's resources."""


@dataclass(frozen=True)
class Drawing:
    """How an env is drawn.

    Attributes:
        image_size: Height and width in pixels.
        camera: Camera to look through.
        render: ``"fast"`` renders without multisampling, shadows and reflections; ``"reference"``
            uses the model's own quality, as ``physics.render`` does.
        foreground_mask: Whether to render the mask too.
        rule: Which bodies are foreground.
        domain: The Control Suite's domain, which decides what is floor and how opaque; None for
            other models.
    """

    image_size: int
    camera: Camera
    render: RenderMode = "fast"
    foreground_mask: bool = True
    rule: ForegroundRule = DEFAULT_RULE
    domain: str | None = None


class SceneRenderer:
    """Render one camera of a simulation at one size.

    The renderer has separate OpenGL contexts, with an offscreen buffer of the image's size, so
    that ``physics.render`` still works at any size and at dm_control's full quality.

    The mask is computed from depth: the scene is rendered with and without the foreground, and the
    foreground covers the pixels where the first is nearer. Both passes send the background's
    triangles through the same pipeline, so its depths are equal to the last bit. A segmentation
    pass would render everything twice, and label objects behind a transparent surface wrongly.

    Args:
        simulation: The simulation.
        drawing: How to render it.
        quality: Overrides the quality implied by ``drawing.render``.

    Raises:
        RuntimeError: If no OpenGL backend works; the message says how to install one.
    """

    def __init__(
        self, simulation: Simulation, drawing: Drawing, *, quality: Quality | None = None
    ) -> None:
        require_gl_backend()
        self.image_size = image_size = drawing.image_size
        self.foreground_mask = foreground_mask = drawing.foreground_mask
        quality = quality or (FULL if drawing.render == "reference" else FAST)
        self.context = RenderContext(simulation, image_size, quality, shared=drawing.domain is None)
        self._everything = SceneView(simulation, drawing.camera, quality)
        self._pixels: UInt8Array = np.empty((image_size, image_size, 3), dtype=np.uint8)
        self._nearness: FloatArray = np.empty((image_size, image_size), dtype=np.float32)
        self._background_nearness = np.empty_like(self._nearness)
        self._background: SceneView | None = None
        self._silhouette: SceneRenderer | None = None
        if foreground_mask and quality.multisamples is None:
            # Multisampling mixes the depths along an outline, so the mask is rendered without it.
            self._silhouette = SceneRenderer(simulation, replace(drawing, render="fast"))
        elif foreground_mask:
            self._background = SceneView(simulation, drawing.camera, FAST)
            self._foreground = Foreground(simulation, drawing.rule)

    def draw(self) -> tuple[UInt8Array, BoolArray | None]:
        """Render the simulation's present state.

        Returns:
            The image, uint8 [3, H, W] in [0, 255], and the foreground mask, bool [1, H, W], or None
            if the renderer makes none. Both are new arrays.
        """
        self._everything.update(ALL)
        self.context.draw(self._everything.scene, self._pixels, self._nearness)
        # OpenGL's first row is the bottom one.
        pixels = np.ascontiguousarray(self._pixels[::-1].transpose(2, 0, 1))
        if self._silhouette is not None:
            return pixels, self._silhouette.draw()[1]
        return pixels, None if self._background is None else self._draw_mask(self._background)

    def _draw_mask(self, background: SceneView) -> BoolArray:
        background.update_background(self._foreground)
        self.context.draw(background.scene, None, self._background_nearness)
        mask: BoolArray = (self._nearness > self._background_nearness)[np.newaxis, ::-1]
        return np.ascontiguousarray(mask)

    def upload_height_fields(self) -> None:
        """Upload terrain to OpenGL, which keeps a copy; call it after each episode's reset."""
        self.context.upload_height_fields()
        if self._silhouette is not None:
            self._silhouette.upload_height_fields()

    def close(self) -> None:
        """Free the OpenGL contexts."""
        self.context.close()
        if self._silhouette is not None:
            self._silhouette.close()

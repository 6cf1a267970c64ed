"""Scenes whose textures change: a background on the sky box, colours of sky and floor."""

from __future__ import annotations

import mujoco
import numpy as np

from w2f_torchrl.envs.protocols.palette import Palette
from w2f_torchrl.envs.renderers.foreground import BoolArray
from w2f_torchrl.envs.renderers.rendering import SceneRenderer
from w2f_torchrl.envs.renderers.scene import UInt8Array
from w2f_torchrl.envs.scenery.distractor import Distractor
from w2f_torchrl.envs.simulation import Simulation

FLOOR_MATERIAL = "grid"
BACKDROP_MATERIAL = "background"
"""A wall that would hide the sky."""
FLOOR_TEXTURE = "grid"


class DistractedRenderer:
    """A scene with another camera and other colours.

    Args:
        scene: Renders the scene.
        distractor: Changes the scene.
    """

    def __init__(self, scene: SceneRenderer, distractor: Distractor) -> None:
        self.image_size, self.foreground_mask = scene.image_size, scene.foreground_mask
        self._scene, self._distractor = scene, distractor

    def draw(self) -> tuple[UInt8Array, BoolArray | None]:
        """Return the image and the mask, as :class:`SceneRenderer` does."""
        with self._distractor.applied():
            return self._scene.draw()

    def upload_height_fields(self) -> None:
        """Upload terrain to OpenGL."""
        self._scene.upload_height_fields()

    def close(self) -> None:
        """Free OpenGL's resources."""
        self._scene.close()


class SkyBoxRenderer(DistractedRenderer):
    """A scene whose sky box shows the background, the same frame on its six faces.

    Args:
        scene: Renders the scene.
        distractor: Changes the scene.
        simulation: The simulation.
        ground_alpha: Opacity of the floor; a backdrop that hides the sky is left out.
    """

    def __init__(
        self,
        scene: SceneRenderer,
        distractor: Distractor,
        simulation: Simulation,
        ground_alpha: float,
    ) -> None:
        super().__init__(scene, distractor)
        self._model = simulation.model
        self._texture = sky_texture(simulation)
        self._shown: tuple[object, ...] | None = None
        names = [simulation.model.id2name(i, "material") for i in range(simulation.model.nmat)]
        self._alphas = [
            (names.index(name), alpha)
            for name, alpha in ((FLOOR_MATERIAL, ground_alpha), (BACKDROP_MATERIAL, 0.0))
            if name in names
        ]

    def draw(self) -> tuple[UInt8Array, BoolArray | None]:
        """Return the image and the mask."""
        key = self._distractor.frame_key
        if self._shown != key:
            self._upload(self._distractor.frame)
            self._shown = key
        with self._distractor.applied():  # restores the alphas as well
            for material, alpha in self._alphas:
                self._model.mat_rgba[material, 3] = alpha
            return self._scene.draw()

    def _upload(self, frame: UInt8Array) -> None:
        """Upload a frame to OpenGL through the model's texture, which is then restored."""
        model, index = self._model, self._texture
        start = int(model.tex_adr[index])
        texels = slice(start, start + frame.size)
        saved = model.tex_data[texels].copy(), model.tex_height[index], model.tex_width[index]
        model.tex_data[texels] = frame.reshape(-1)
        model.tex_height[index], model.tex_width[index] = frame.shape[:2]
        try:
            self._scene.context.upload_texture(index)
        finally:
            model.tex_data[texels], model.tex_height[index], model.tex_width[index] = saved


def sky_texture(simulation: Simulation) -> int:
    """Return the index of the sky box's texture."""
    types = np.asarray(simulation.model.tex_type)
    return int(np.flatnonzero(types == mujoco.mjtTexture.mjTEXTURE_SKYBOX)[0])


class PaletteRenderer(DistractedRenderer):
    """A scene whose sky and floor have the colours of a palette.

    The textures are made as MuJoCo's compiler makes the suite's own, with these colours.

    Args:
        scene: Renders the scene.
        distractor: Changes the scene; has a palette.
        simulation: The simulation.

    Raises:
        ValueError: If the model's floor or sky are not the suite's common ones.
    """

    def __init__(
        self, scene: SceneRenderer, distractor: Distractor, simulation: Simulation
    ) -> None:
        super().__init__(scene, distractor)
        self._model = simulation.model
        self._shown: int | None = None
        names = [simulation.model.id2name(i, "texture") for i in range(simulation.model.ntex)]
        if FLOOR_TEXTURE not in names:
            raise ValueError(
                f"the palette colours the texture {FLOOR_TEXTURE!r}, but this model has "
                f"{', '.join(names)}."
            )
        self._textures = sky_texture(simulation), names.index(FLOOR_TEXTURE)

    def draw(self) -> tuple[UInt8Array, BoolArray | None]:
        """Return the image and the mask."""
        walk = self._distractor.palette
        assert walk is not None, "made only with a palette"
        if self._shown != walk.index:
            self._upload(walk.palette)
            self._shown = walk.index
        return super().draw()

    def _upload(self, palette: Palette) -> None:
        """Upload both textures to OpenGL through the model's, which are then restored."""
        made = mujoco.MjModel.from_xml_string(_textures_xml(palette))
        for index, name in zip(self._textures, ("sky", "grid"), strict=True):
            source = mujoco.mj_name2id(made, mujoco.mjtObj.mjOBJ_TEXTURE, name)
            start = int(made.tex_adr[source])
            size = int(made.tex_width[source]) * int(made.tex_height[source]) * 3
            pixels = made.tex_data[start : start + size]
            begin = int(self._model.tex_adr[index])
            texels = slice(begin, begin + size)
            saved = self._model.tex_data[texels].copy()
            self._model.tex_data[texels] = pixels
            try:
                self._scene.context.upload_texture(index)
            finally:
                self._model.tex_data[texels] = saved


def _textures_xml(palette: Palette) -> str:
    """Return a model with the textures of the suite's skybox.xml and materials.xml, coloured."""
    sky, dark, light = (
        " ".join(map(str, color)) for color in (palette.sky, palette.grid, palette.light_grid)
    )
    return (
        "<mujoco><asset>"
        f'<texture name="sky" type="skybox" builtin="gradient" rgb1="{sky}" rgb2="0 0 0" '
        'width="800" height="800" mark="random" markrgb="1 1 1"/>'
        f'<texture name="grid" type="2d" builtin="checker" rgb1="{dark}" rgb2="{light}" '
        'width="300" height="300" mark="edge" markrgb=".2 .3 .4"/>'
        "</asset></mujoco>"
    )

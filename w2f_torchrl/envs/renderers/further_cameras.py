"""Pictures of further cameras, as additional observations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torchrl.data import Bounded, Categorical, Composite

from w2f_torchrl.envs.renderers.rendering import Drawing, SceneRenderer
from w2f_torchrl.envs.simulation import Simulation
from w2f_torchrl.keys import mask_of


def camera_key(camera_id: int) -> str:
    """Return the key of a further camera's pictures."""
    return f"pixels_camera_{camera_id}"


class FurtherCameras:
    """Draw further cameras of a simulation, each with its own mask.

    Args:
        simulation: The simulation.
        camera_ids: Indices of the model's cameras; none makes this do nothing.
        drawing: How to draw them, but for the camera.
    """

    def __init__(self, simulation: Simulation, camera_ids: Sequence[int], drawing: Drawing) -> None:
        self._renderers = {
            camera_key(camera): SceneRenderer(simulation, replace(drawing, camera=camera))
            for camera in camera_ids
        }

    def add_specs(self, observation: Composite) -> None:
        """Add ``pixels_camera_N`` and, with masks, ``pixels_camera_N_mask``."""
        for key, renderer in self._renderers.items():
            size, device = renderer.image_size, observation.device
            observation[key] = Bounded(
                0, 255, shape=(3, size, size), dtype=torch.uint8, device=device
            )
            if renderer.foreground_mask:
                observation[mask_of(key)] = Categorical(
                    2, shape=(1, size, size), dtype=torch.bool, device=device
                )

    def draw(self) -> dict[str, torch.Tensor]:
        """Return the pictures uint8 [3, H, W] and masks bool [1, H, W] by key."""
        drawn = {}
        for key, renderer in self._renderers.items():
            pixels, mask = renderer.draw()
            drawn[key] = torch.from_numpy(pixels)
            if mask is not None:
                drawn[mask_of(key)] = torch.from_numpy(mask)
        return drawn

    def upload_height_fields(self) -> None:
        """Upload terrain to OpenGL; call it after each episode's reset."""
        for renderer in self._renderers.values():
            renderer.upload_height_fields()

    def close(self) -> None:
        """Free OpenGL's resources."""
        for renderer in self._renderers.values():
            renderer.close()

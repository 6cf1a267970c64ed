"""What the networks observe besides ``pixels``."""

from __future__ import annotations

from dataclasses import dataclass

from w2f_torchrl.utils.settings import Settings, setting


@dataclass
class ObservationSettings(Settings):
    """Further observations of the env that are encoded and reconstructed."""

    vectors: dict[str, int] = setting(
        {},
        "Further observations that are vectors, such as joint positions, by name with their "
        "sizes: {position: 8, velocity: 9}. They are encoded and reconstructed, in the latent "
        "that the actor reads, and each is small by its symlog.",
        unit="features",
        minimum=1,
    )
    pictures: list[str] = setting(
        [],
        "Further observations that are images, of the size of ``pixels``, by name. Each has an "
        "encoder and a decoder, and for algo=world2filter a mask NAME_mask.",
    )

    @property
    def observes_more(self) -> bool:
        """Whether there are observations besides ``pixels``."""
        return bool(self.vectors or self.pictures)

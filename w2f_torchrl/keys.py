"""Keys of entries that several components read and write."""

from __future__ import annotations

PIXELS = "pixels"
"""An observation: uint8 ``[..., 3, H, W]``."""
MASK = "foreground_mask"
"""Which of its pixels show the agent and the task: bool ``[..., 1, H, W]``."""
NEXT_PIXELS = ("next", PIXELS)
"""The observation in records ``[B, T]`` and transitions."""
NEXT_MASK = ("next", MASK)
"""Its mask."""


def mask_of(picture: str) -> str:
    """Return the key of a further picture's mask, as of ``pixels_wrist`` ``pixels_wrist_mask``."""
    return MASK if picture == PIXELS else f"{picture}_mask"

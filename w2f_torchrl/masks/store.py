"""Masks of stored frames, on disk: bit-packed, memory-mapped, and written in pieces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from w2f_torchrl.masks.packing import pack_mask, unpack_mask
from w2f_torchrl.utils.checks import check_number
from w2f_torchrl.utils.files import write_text
from w2f_torchrl.utils.tensors import check_tensor

MASKS_FILE = "masks.npy"
RECORD_FILE = "masks.json"


class MaskStore:
    """A folder with the masks of N frames and a record of how they were made.

    ``masks.npy`` is uint8 ``[N, 1, H, W // 8]``, one bit per pixel, the leftmost in the highest
    bit; ``masks.json`` has the number of finished frames and how they were made. Finished masks
    survive a crash, because the number is written after the masks.

    Args:
        folder: The folder; created if missing.
        shape: (N, H, W); W must be a multiple of 8.
        made_by: How the masks are made, in JSON types: segmenter, prompts, versions. A folder with
            another record or shape is refused.

    Raises:
        ValueError: If the folder holds masks of other frames or made differently, or W is not a
            multiple of 8.
    """

    def __init__(
        self, folder: str | Path, shape: tuple[int, int, int], made_by: dict[str, Any]
    ) -> None:
        self.folder = Path(folder)
        count, height, width = shape
        for name, size in (("frames", count), ("height", height), ("width", width)):
            check_number(name, size, integer=True, minimum=1)
        if width % 8:
            raise ValueError(f"masks have one bit per pixel: width {width} must be 8 x n.")
        self._record: dict[str, Any] = {"frames": count, "height": height, "width": width}
        self._record |= {"made_by": json.loads(json.dumps(made_by)), "done": 0}
        path = self.folder / RECORD_FILE
        if path.exists():
            self._resume(json.loads(path.read_text()))
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            empty: np.memmap[Any, Any] = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
                self.folder / MASKS_FILE, "w+", np.uint8, (count, 1, height, width // 8)
            )
            empty.flush()
            self._write_record()
        self._masks = np.load(self.folder / MASKS_FILE, mmap_mode="r+")

    @property
    def done(self) -> int:
        """Number of finished frames, counted from the first."""
        return int(self._record["done"])

    def append(self, masks: Tensor) -> None:
        """Write the masks of the next frames, bool ``[M, 1, H, W]``."""
        record = self._record
        check_tensor("masks", masks, torch.bool, ("M", 1, record["height"], record["width"]))
        stop = self.done + len(masks)
        if stop > record["frames"]:
            raise ValueError(f"masks of {stop} frames exceed the store's {record['frames']}.")
        self._masks[self.done : stop] = pack_mask(masks.cpu()).numpy()
        self._masks.flush()
        self._record["done"] = stop
        self._write_record()

    def _resume(self, saved: dict[str, Any]) -> None:
        for name, value in self._record.items():
            if name != "done" and saved.get(name) != value:
                raise ValueError(
                    f"{self.folder} holds masks with {name}={saved.get(name)}, not {value}: choose "
                    "another folder."
                )
        self._record["done"] = saved["done"]

    def _write_record(self) -> None:
        write_text(self.folder / RECORD_FILE, json.dumps(self._record, indent=2) + "\n")


def load_masks(folder: str | Path) -> tuple[Tensor, dict[str, Any]]:
    """Read the finished masks.

    Args:
        folder: Folder of a :class:`MaskStore`.

    Returns:
        bool ``[done, 1, H, W]`` and the record.

    Raises:
        FileNotFoundError: If the folder does not contain masks.
    """
    record = json.loads((Path(folder) / RECORD_FILE).read_text())
    packed = np.load(Path(folder) / MASKS_FILE, mmap_mode="r")[: record["done"]]
    return unpack_mask(torch.from_numpy(np.array(packed))), record

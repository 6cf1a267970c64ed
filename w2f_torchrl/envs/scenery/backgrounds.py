"""The clips of a background: procedural ones, DAVIS 2017, or those in a folder."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from w2f_torchrl.envs.scenery import davis
from w2f_torchrl.envs.scenery.clip_cache import Clip, mapped_clip
from w2f_torchrl.envs.scenery.clip_files import BackgroundError, FileClip, find_clips
from w2f_torchrl.envs.scenery.procedural import ProceduralClip

SPLITS = ("train", "val")
ALL = "all"
"""Instead of a split: all clips of a source."""
TEST = "test"
"""Another name for the folder of validation clips."""
PROCEDURAL = "procedural"
DAVIS = "davis"
NUM_PROCEDURAL = {"train": 60, "val": 30}
"""The numbers of clips in DAVIS 2017."""
VAL_EVERY = 3
"""In a folder without splits, about one clip in three is for validation."""

_PROCEDURAL = re.compile(rf"{PROCEDURAL}(?::(\d+))?")

UInt8Array = npt.NDArray[np.uint8]


def validate_split(split: str) -> None:
    """Check the name of a split.

    Raises:
        ValueError: If it is neither the name of a split nor ``"all"``.
    """
    allowed = (*SPLITS, ALL)
    if split not in allowed:
        raise ValueError(f"background_split is {split!r}: must be one of {', '.join(allowed)}.")


def list_clips(source: str | None, split: str) -> Sequence[Clip]:
    """List the clips of a source's split, in a fixed order. Nothing is decoded.

    The two splits of a source never share a clip:

    - ``"procedural"`` (or None) and ``"procedural:7"``: computed clips of seed 0, or 7;
    - ``"davis"``: DAVIS 2017 as installed by ``download_davis.py``;
    - a folder in the layout of DAVIS 2017 (``JPEGImages/480p``): the dataset's fixed lists;
    - a folder with the subfolders ``train`` and ``val`` (or ``test``): their clips;
    - any other folder: the split of a clip depends only on its name, so that adding or removing
      other clips does not move it; about one in three is for validation
      (:func:`is_for_validation`).

    Args:
        source: One of these.
        split: ``"train"``, ``"val"``, or ``"all"`` for the clips of both.

    Returns:
        At least one clip.

    Raises:
        BackgroundError: If the source does not exist or has no clips; the message names it.
    """
    validate_split(split)
    if split == ALL:
        return _all_clips(source)
    matched = _PROCEDURAL.fullmatch(PROCEDURAL if source is None else source)
    if matched:
        seed = int(matched[1] or 0)
        return [ProceduralClip(seed, split, index) for index in range(NUM_PROCEDURAL[split])]
    assert source is not None, "None is procedural"
    folder = davis.default_directory() if source == DAVIS else Path(source).expanduser()
    if not folder.is_dir():
        raise BackgroundError(_missing(source, folder))
    frames = davis.frames_directory(folder)
    if frames is not None:
        return [FileClip(path) for path in davis.clip_paths(frames, split)]
    return _folder_split(folder, split)


def _all_clips(source: str | None) -> list[Clip]:
    """Return all clips of a source; a folder without splits need not have any for validation."""
    folder = Path(source or "").expanduser()
    plain = source is not None and folder.is_dir() and davis.frames_directory(folder) is None
    if plain and len(_halves(folder)) < len(SPLITS):
        return list(find_clips(folder))
    return [clip for half in SPLITS for clip in list_clips(source, half)]


def _halves(folder: Path) -> dict[str, Path]:
    """Return the subfolders for training and validation that a folder has."""
    named = {"train": ("train",), "val": ("val", TEST)}
    found = {
        split: next((folder / name for name in names if (folder / name).is_dir()), None)
        for split, names in named.items()
    }
    return {split: path for split, path in found.items() if path is not None}


def _missing(source: str, folder: Path) -> str:
    if source == DAVIS:
        return f"background_source is 'davis', but {folder} is missing. {davis.HOW_TO_GET_IT}"
    return (
        f"background_source is {source!r}: no such folder. It must be a folder of clips, 'davis', "
        "'procedural', or 'procedural:SEED'."
    )


def _folder_split(folder: Path, split: str) -> list[FileClip]:
    halves = _halves(folder)
    if len(halves) == len(SPLITS):
        clips = {name: find_clips(half) for name, half in halves.items()}
        resolved = [{clip.path.resolve() for clip in half} for half in clips.values()]
        if shared := set.intersection(*resolved):
            raise BackgroundError(
                f"background_source {folder}: train and val share {sorted(shared)[0]}."
            )
        return clips[split]
    found = find_clips(folder)
    chosen = [clip for clip in found if is_for_validation(clip.path.name) == (split == "val")]
    if not chosen:
        raise BackgroundError(
            f"background_source {folder} has {len(found)} clips, but by their names none of them "
            f"is for background_split={split!r} (about one in three is for 'val'): add clips, or "
            f"make subfolders {' and '.join(SPLITS)}."
        )
    return chosen


def is_for_validation(name: str) -> bool:
    """Return whether a clip in a folder without splits is for validation.

    Args:
        name: Name of the clip's file or folder.
    """
    return hashlib.sha256(name.encode()).digest()[0] % VAL_EVERY == 0


def select_clips(source: str | None, split: str, num_videos: int | None) -> Sequence[Clip]:
    """Return the first clips of a split.

    Args:
        source: See :func:`list_clips`.
        split: ``"train"`` or ``"val"``.
        num_videos: Number of clips; None for all.

    Raises:
        BackgroundError: If there are fewer, or the source does not exist.
    """
    clips = list_clips(source, split)
    if num_videos is not None and num_videos > len(clips):
        raise BackgroundError(
            f"the distraction's num_videos is {num_videos}: background_source "
            f"{source or PROCEDURAL!r} has {len(clips)} clips for background_split={split!r}. Add "
            "clips, or pass a DistractionConfig with fewer."
        )
    return clips[:num_videos]


def load_clips(
    source: str | None, split: str, num_videos: int | None, size: int
) -> list[UInt8Array]:
    """Map the clips of a background into memory, read-only, decoded once for all processes.

    Args:
        source: See :func:`list_clips`.
        split: ``"train"`` or ``"val"``.
        num_videos: Number of clips, the first by name; None for all.
        size: Side of the frames, pixels.

    Returns:
        Arrays uint8 [T, size, size, 3], one per clip, T at least 2.

    Raises:
        BackgroundError: If a clip cannot be read, or there are too few; the message names it.
    """
    return [mapped_clip(clip, size) for clip in select_clips(source, split, num_videos)]


class LazyClips(Sequence[UInt8Array]):
    """Clips that are decoded when they are first shown, for sources of many.

    Args:
        clips: The clips.
        size: Side of the frames, pixels.
    """

    def __init__(self, clips: Sequence[Clip], size: int) -> None:
        self._clips, self._size = clips, size

    def __len__(self) -> int:
        """Return the number of clips."""
        return len(self._clips)

    def __getitem__(self, index: Any) -> Any:
        """Map a clip into memory, uint8 [T, size, size, 3].

        Raises:
            BackgroundError: If it cannot be read.
        """
        return mapped_clip(self._clips[index], self._size)

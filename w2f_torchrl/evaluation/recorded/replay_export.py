"""Write the episodes in a run's replay as files that runs can be trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from w2f_torchrl.checkpoint.folder import checkpoints_of, find_latest, records_folder
from w2f_torchrl.config import ConfigError
from w2f_torchrl.data.recorded.episodes import RecordedEpisode
from w2f_torchrl.data.recorded.write import note_facts, write_episode
from w2f_torchrl.data.replay.replay_files import open_records, read_streams
from w2f_torchrl.masks.packing import unpack_mask

PIXELS, PACKED_MASK = "next/pixels", "next/foreground_mask"


def export_replay(
    run_dir: Path, folder: Path, tell: Callable[[Path], None] = lambda path: None
) -> list[Path]:
    """Write every episode, whole or cut, of the replay of a run's newest checkpoint.

    Masks are those that the run was trained on. True states are not part of a replay. Files that
    exist are kept, so an interrupted export continues.

    Args:
        run_dir: The run's directory.
        folder: The folder of the files; created if missing.
        tell: Called with the path of each new file.

    Returns:
        The paths of the new files.

    Raises:
        ConfigError: If the run has no replay, or the folder holds another recording.
    """
    found = find_latest(checkpoints_of(run_dir))
    manifest = None if found is None else found.checkpoint.payload.get("replay")
    if found is None or manifest is None:
        raise ConfigError(f"{run_dir} has no checkpoint with a replay to export.")
    note_facts(folder, {"replay": found.path.name})
    written = []
    with open_records(manifest, records_folder(run_dir)) as files:
        rows = read_streams(files, manifest, found.damage)
        for index, episode in enumerate(_episodes(rows)):
            path = folder / f"{index:06d}-replay-{len(episode)}.npz"
            if not path.exists():
                written.append(write_episode(path, episode))
                tell(path)
    return written


def _episodes(blocks: Iterator[dict[str, Tensor] | None]) -> Iterator[RecordedEpisode]:
    """Cut blocks of consecutive records into episodes; None separates what is not consecutive."""
    held: dict[str, Tensor] | None = None
    for block in blocks:
        if block is None:
            yield from _episode(held)
            held = None
            continue
        rows = block if held is None else {k: torch.cat((held[k], block[k])) for k in block}
        starts = rows["is_init"].flatten().nonzero().flatten().tolist()
        bounds = sorted({0, *starts})
        for start, stop in pairwise(bounds):
            yield from _episode({key: value[start:stop] for key, value in rows.items()})
        held = {key: value[bounds[-1] :] for key, value in rows.items()}
    yield from _episode(held)


def _episode(rows: dict[str, Tensor] | None) -> Iterator[RecordedEpisode]:
    """Yield the episode of some records, unless it has no step."""
    if rows is None or len(rows["action"]) < 2:
        return
    action, reward = rows["action"].clamp(-1, 1), rows["next/reward"].flatten().clone()
    action[0], reward[0] = 0, 0  # of an episode whose beginning has been overwritten
    yield RecordedEpisode(
        "replay",
        rows[PIXELS],
        action,
        reward,
        bool(rows["next/terminated"][-1]),
        unpack_mask(rows[PACKED_MASK]) if PACKED_MASK in rows else None,
    )

"""DAVIS 2017: its fixed lists, its layout, and its installation."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from w2f_torchrl.envs.scenery.clip_cache import cache_directory
from w2f_torchrl.envs.scenery.clip_files import IMAGE_SUFFIXES, MIN_FRAMES, BackgroundError

URL = "https://data.vision.ee.ethz.ch/csergi/share/davis/DAVIS-2017-trainval-480p.zip"
"""Images at 480p and annotations of train and val."""

_TRAIN = (
    "bear bmx-bumps boat boxing-fisheye breakdance-flare bus car-turn cat-girl classic-car "
    "color-run crossing dance-jump dancing disc-jockey dog-agility dog-gooses dogs-scale "
    "drift-turn drone elephant flamingo hike hockey horsejump-low kid-football kite-walk koala "
    "lady-running lindy-hop longboard lucia mallard-fly mallard-water miami-surf motocross-bumps "
    "motorbike night-race paragliding planes-water rallye rhino rollerblade schoolgirls "
    "scooter-board scooter-gray sheep skate-park snowboard soccerball stroller stunt surf swing "
    "tennis tractor-sand train tuk-tuk upside-down varanus-cage walking"
)
_VAL = (
    "bike-packing blackswan bmx-trees breakdance camel car-roundabout car-shadow cows "
    "dance-twirl dog dogs-jump drift-chicane drift-straight goat gold-fish horsejump-high india "
    "judo kite-surf lab-coat libby loading mbike-trick motocross-jump paragliding-launch parkour "
    "pigs scooter-black shooting soapbox"
)
VIDEOS = {"train": tuple(_TRAIN.split()), "val": tuple(_VAL.split())}
"""The names of each split's videos, in the dataset's (alphabetical) order."""

COMMAND = "python sota_configs/download_davis.py"
HOW_TO_GET_IT = (
    f"Run `{COMMAND}`; or, without network access, download {URL} elsewhere, copy it here, and run "
    f"`{COMMAND} --archive FILE`."
)
_FRAMES = Path("JPEGImages") / "480p"
_PIN = "archive.json"


def default_directory() -> Path:
    """Return the folder of the download command and of ``background_source="davis"``."""
    return cache_directory() / "DAVIS"


def frames_directory(folder: Path) -> Path | None:
    """Return the folder of videos in a folder with DAVIS's layout; None for other layouts."""
    frames = folder / _FRAMES
    return frames if frames.is_dir() else None


def clip_paths(frames: Path, split: str) -> list[Path]:
    """Return the folders of a split's videos, in DAVIS's order.

    Raises:
        BackgroundError: If one is missing.
    """
    paths = [frames / name for name in VIDEOS[split]]
    missing = [path.name for path in paths if not path.is_dir()]
    if missing:
        raise BackgroundError(
            f"{frames} looks like DAVIS 2017, but lacks {len(missing)} of its {len(paths)} {split} "
            f"videos: {' '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}. {HOW_TO_GET_IT}"
        )
    return paths


def install_davis(
    directory: Path | None = None, *, url: str = URL, archive: Path | None = None
) -> Path:
    """Download and check DAVIS 2017, and install it completely or not at all.

    No official checksum of the archive exists. The first installation writes its SHA-256 digest
    next to the images, and a later installation in the same place must have the same digest.

    Args:
        directory: Target; None for :func:`default_directory`.
        url: Source.
        archive: A file that was already downloaded.

    Returns:
        The directory, which is a ``background_source``.

    Raises:
        BackgroundError: If the download fails or the archive is wrong; the message says what to do.
    """
    directory = directory or default_directory()
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".davis-") as scratch:
        if archive is None:
            archive = Path(scratch) / "davis.zip"
            _download(url, archive)
        digest = _digest(archive)
        _check_pin(directory, digest)
        images = _unpack(archive, Path(scratch) / "unpacked")
        frames = directory / _FRAMES
        shutil.rmtree(frames, ignore_errors=True)
        frames.parent.mkdir(parents=True, exist_ok=True)
        os.replace(images, frames)
        pin = {"sha256": digest, "bytes": archive.stat().st_size}
        (directory / _PIN).write_text(json.dumps(pin) + "\n")
    return directory


def _download(url: str, path: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=60) as response, path.open("wb") as stream:
            shutil.copyfileobj(response, stream, 1 << 20)
            expected = response.headers.get("Content-Length")
    except (urllib.error.URLError, OSError) as error:
        raise BackgroundError(f"{url} cannot be downloaded: {error}. {HOW_TO_GET_IT}") from error
    if expected is not None and int(expected) != path.stat().st_size:
        raise BackgroundError(
            f"{url} was cut short: {path.stat().st_size} of {expected} bytes arrived. Run it again."
        )


def _digest(path: Path) -> str:
    if not path.is_file():
        raise BackgroundError(f"{path} is not a file. {HOW_TO_GET_IT}")
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_pin(directory: Path, digest: str) -> None:
    path = directory / _PIN
    if not path.exists():
        return
    pinned = json.loads(path.read_text())["sha256"]
    if digest != pinned:
        raise BackgroundError(
            f"the archive's SHA-256 digest is {digest}, but that of the one installed in "
            f"{directory} is {pinned}. Delete {path} if the change is intended."
        )


def _unpack(archive: Path, scratch: Path) -> Path:
    """Unpack the images; the checksum of every file in the archive is checked."""
    try:
        with zipfile.ZipFile(archive) as contents:
            inside = [n for n in contents.namelist() if f"/{_FRAMES.as_posix()}/" in f"/{n}"]
            contents.extractall(scratch, inside)
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise BackgroundError(
            f"{archive} is not a complete zip archive: {error}. Download it again."
        ) from error
    found = sorted(scratch.glob(f"**/{_FRAMES.as_posix()}"))
    if not found:
        raise BackgroundError(f"{archive} holds no {_FRAMES}: it is not DAVIS 2017 at 480p.")
    for split in VIDEOS:
        for path in clip_paths(found[0], split):
            images = [p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES]
            if len(images) < MIN_FRAMES:
                raise BackgroundError(f"{archive}: video {path.name} has {len(images)} images.")
    return found[0]

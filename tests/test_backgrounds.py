"""Backgrounds: sources and splits, the cache, files that are broken, DAVIS 2017, and statistics."""

from __future__ import annotations

import json
import multiprocessing
import os
import zipfile
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest
from backgrounds import REAL_VIDEO, gradient_kurtosis, spectrum_slope, statistics
from PIL import Image

from w2f_torchrl.envs import BackgroundError, davis
from w2f_torchrl.envs.backgrounds import list_clips, load_clips, select_clips
from w2f_torchrl.envs.clip_cache import cached_path, mapped_clip
from w2f_torchrl.envs.procedural import ProceduralClip

SIZE = 16
Clip = npt.NDArray[np.uint8]


def write_images(
    folder: Path, frames: int = 3, size: tuple[int, int] = (20, 12), shade: int = 0
) -> Path:
    """Frame i of a clip has the grey level shade + 10 i."""
    folder.mkdir(parents=True)
    for index in range(frames):
        Image.new("RGB", size, (shade + 10 * index,) * 3).save(folder / f"frame_{index}.png")
    return folder


def write_video(path: Path, frames: int = 5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for index in range(frames):
            picture = np.full((32, 32, 3), 40 * index, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    return path


def names(source: Path | str, split: str) -> list[str]:
    return [Path(clip.name).name for clip in list_clips(str(source), split)]


def fake_davis(root: Path, frames: int = 2) -> Path:
    for videos in davis.VIDEOS.values():
        for name in videos:
            write_images(root / "JPEGImages" / "480p" / name, frames, size=(4, 4))
    return root


# ------------------------------------------------------------------ sources and splits


def test_every_third_clip_of_a_folder_is_for_validation(tmp_path: Path) -> None:
    for name in "abcdefg":
        write_images(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no clip")
    (tmp_path / ".hidden").mkdir()
    assert names(tmp_path, "train") == ["a", "b", "d", "e", "g"]
    assert names(tmp_path, "val") == ["c", "f"]


def test_subfolders_train_and_val_are_the_splits(tmp_path: Path) -> None:
    write_images(tmp_path / "train" / "x")
    write_video(tmp_path / "train" / "y.mp4")
    write_images(tmp_path / "val" / "z")
    assert names(tmp_path, "train") == ["x", "y.mp4"]
    assert names(tmp_path, "val") == ["z"]
    (tmp_path / "val" / "w").symlink_to(tmp_path / "train" / "x")
    with pytest.raises(BackgroundError, match=r"train and val share .*train/x"):
        list_clips(str(tmp_path), "val")


def test_davis_is_known_by_its_layout(tmp_path: Path) -> None:
    fake_davis(tmp_path)
    write_images(tmp_path / "JPEGImages" / "480p" / "a-video-of-ones-own")
    train, val = names(tmp_path, "train"), names(tmp_path, "val")
    assert (len(train), len(val)) == (60, 30)
    assert train == sorted(train)
    assert val == sorted(val)
    assert (train[:4], val[-1]) == (["bear", "bmx-bumps", "boat", "boxing-fisheye"], "soapbox")
    assert not set(train) & set(val)
    (tmp_path / "JPEGImages" / "480p" / "camel").rename(tmp_path / "camel")
    with pytest.raises(BackgroundError, match=r"lacks 1 of its 30 val videos: camel.*download_dav"):
        list_clips(str(tmp_path), "val")


def test_procedural_splits_and_seeds_share_nothing() -> None:
    sources = ("procedural", "procedural:7")
    clips = [list_clips(s, split)[0].read(SIZE) for s in sources for split in ("train", "val")]
    clips.append(list_clips(None, "train")[1].read(SIZE))
    for index, clip in enumerate(clips):
        for other in clips[:index]:
            assert (clip != other).mean() > 0.5
    assert [len(list_clips(None, split)) for split in ("train", "val")] == [60, 30]
    assert [c.key() for c in list_clips(None, "val")] == [
        c.key() for c in list_clips("procedural:0", "val")
    ]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/folder", "background_source is 'no/such/folder': no such folder"),
        ("procedural:x", "background_source is 'procedural:x': no such folder"),
        ("davis", r"background_source is 'davis', and .*DAVIS is not there. Run `python sota_conf"),
    ],
)
def test_missing_sources_are_named(source: str, message: str) -> None:
    with pytest.raises(BackgroundError, match=message):
        list_clips(source, "train")


def test_too_few_clips_are_named(tmp_path: Path) -> None:
    with pytest.raises(BackgroundError, match=r"has no clips: .*holds neither"):
        list_clips(str(tmp_path), "train")
    write_images(tmp_path / "a")
    with pytest.raises(BackgroundError, match=r"has 1 clips, and every third is for .*'val'"):
        list_clips(str(tmp_path), "val")
    with pytest.raises(BackgroundError, match=r"num_videos is 4: .* has 1 clips"):
        select_clips(str(tmp_path), "train", 4)
    with pytest.raises(BackgroundError, match=r"has no clips: .*images, but no folder of them"):
        list_clips(str(tmp_path / "a"), "train")
    assert len(select_clips(str(tmp_path), "train", None)) == 1


# ------------------------------------------------------------------ files


def test_images_play_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    write_images(tmp_path / "a", frames=12)
    [clip] = load_clips(str(tmp_path), "train", 1, SIZE)
    assert clip.shape == (12, SIZE, SIZE, 3)
    assert clip[:, 0, 0, 0].tolist() == [10 * index for index in range(12)]


def test_frames_of_any_size_and_form_are_stretched_to_a_square(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "a", frames=1)
    halves = np.zeros((30, 90), dtype=np.uint8)
    halves[:, 45:] = 200
    Image.fromarray(halves).save(folder / "frame_1.png")  # grey
    Image.new("RGBA", (7, 50), (9, 8, 7, 255)).save(folder / "frame_2.png")
    [clip] = load_clips(str(tmp_path), "train", 1, SIZE)
    assert clip.shape == (3, SIZE, SIZE, 3)
    assert (clip[1, :, : SIZE // 2 - 1] == 0).all()
    assert (clip[1, :, SIZE // 2 + 1 :] == 200).all()
    assert (clip[2] == [9, 8, 7]).all()


def test_videos_are_decoded(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4")
    [clip] = load_clips(str(tmp_path), "train", 1, SIZE)
    levels = clip.reshape(len(clip), -1).mean(axis=1)
    np.testing.assert_allclose(levels, [0, 40, 80, 120, 160], atol=4)


def test_broken_files_are_named(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images" / "a")
    whole = (folder / "frame_1.png").read_bytes()
    (folder / "frame_1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BackgroundError, match=r"background image .*a/frame_1.png can't be read"):
        load_clips(str(tmp_path / "images"), "train", 1, SIZE)
    assert not cached_path(list_clips(str(tmp_path / "images"), "train")[0], SIZE).exists()
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "b.mp4").write_bytes(b"no video at all")
    with pytest.raises(BackgroundError, match=r"background video .*b.mp4 can't be read"):
        load_clips(str(tmp_path / "videos"), "train", 1, SIZE)
    write_images(tmp_path / "short" / "c", frames=1)
    with pytest.raises(BackgroundError, match=r"c has 1 frames: it needs at least 2"):
        load_clips(str(tmp_path / "short"), "train", 1, SIZE)
    (tmp_path / "empty" / "d").mkdir(parents=True)
    with pytest.raises(BackgroundError, match=r"d has 0 frames"):
        load_clips(str(tmp_path / "empty"), "train", 1, SIZE)


# ------------------------------------------------------------------ cache


class CountedClip:
    """A clip that notes each reading in a file, whichever process does it."""

    def __init__(self, notes: Path, *, fails: bool = False) -> None:
        self.notes, self.fails = notes, fails

    @property
    def name(self) -> str:
        return "counted"

    def key(self) -> list[object]:
        return ["counted", str(self.notes)]

    def read(self, size: int) -> Clip:
        with self.notes.open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        if self.fails:
            raise BackgroundError("no")
        return np.full((2, size, size, 3), 7, dtype=np.uint8)


def map_it(notes: Path) -> int:
    return int(mapped_clip(CountedClip(notes), SIZE).sum())


def test_a_clip_is_made_once_for_all_processes(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    with multiprocessing.get_context("fork").Pool(3) as pool:
        sums = pool.map(map_it, [notes] * 6)
    assert sums == [7 * 2 * SIZE * SIZE * 3] * 6
    assert len(notes.read_text().splitlines()) == 1


def test_mapped_frames_are_read_only_and_in_the_file(tmp_path: Path) -> None:
    frames = mapped_clip(CountedClip(tmp_path / "notes"), SIZE)
    assert isinstance(frames, np.memmap)
    assert not frames.flags.writeable
    path = cached_path(CountedClip(tmp_path / "notes"), SIZE)
    assert Path(frames.filename) == path
    assert not [p for p in path.parent.iterdir() if p.suffix == ".tmp"]


def test_a_clip_that_fails_leaves_nothing(tmp_path: Path) -> None:
    clip = CountedClip(tmp_path / "notes", fails=True)
    with pytest.raises(BackgroundError):
        mapped_clip(clip, SIZE)
    assert not cached_path(clip, SIZE).exists()


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "a")
    before = load_clips(str(tmp_path), "train", 1, SIZE)[0].max()
    Image.new("RGB", (20, 12), (250, 250, 250)).save(folder / "frame_0.png")
    os.utime(folder / "frame_0.png", (1, 1))
    assert load_clips(str(tmp_path), "train", 1, SIZE)[0].max() == 250 > before


def test_procedural_clips_repeat_and_keep_their_scene_at_other_sizes() -> None:
    clip = ProceduralClip(3, "val", 5)
    small, again, large = clip.read(32), clip.read(32), clip.read(64)
    assert small.shape == (100, 32, 32, 3)
    np.testing.assert_array_equal(small, again)
    halved = large.reshape(100, 32, 2, 32, 2, 3).mean(axis=(2, 4))
    assert np.abs(halved - small).mean() < 12  # the fine texture differs
    other = ProceduralClip(3, "val", 6).read(32)
    assert np.abs(halved - other).mean() > 24


# ------------------------------------------------------------------ DAVIS


def zipped_davis(tmp_path: Path, *, without: str = "") -> Path:
    root = fake_davis(tmp_path / "made" / "DAVIS")
    archive = tmp_path / f"davis{without}.zip"
    with zipfile.ZipFile(archive, "w") as contents:
        for path in sorted(root.rglob("*.png")):
            if path.parent.name != without:
                contents.write(path, path.relative_to(root.parent))
    return archive


def test_davis_is_installed_checked_and_pinned(tmp_path: Path) -> None:
    archive = zipped_davis(tmp_path)
    directory = davis.install_davis(tmp_path / "to" / "DAVIS", url=archive.as_uri())
    assert len(list_clips(str(directory), "train")) == 60
    pin = json.loads((directory / "archive.json").read_text())
    assert pin["bytes"] == archive.stat().st_size
    assert davis.install_davis(directory, archive=archive) == directory  # again: the same digest
    (directory / "archive.json").write_text(json.dumps(pin | {"sha256": "0" * 64}))
    with pytest.raises(BackgroundError, match=r"SHA-256 digest is \w{64}, and that .* is 0000"):
        davis.install_davis(directory, archive=archive)


def test_what_goes_wrong_with_davis_is_said(tmp_path: Path) -> None:
    to = tmp_path / "to"
    with pytest.raises(BackgroundError, match=r"can't be downloaded: .*--archive FILE"):
        davis.install_davis(to, url=(tmp_path / "nothing.zip").as_uri())
    with pytest.raises(BackgroundError, match=r"nothing.zip is no file. Run"):
        davis.install_davis(to, archive=tmp_path / "nothing.zip")
    archive = zipped_davis(tmp_path, without="camel")
    with pytest.raises(BackgroundError, match=r"lacks 1 of its 30 val videos: camel"):
        davis.install_davis(to, archive=archive)
    archive.write_bytes(archive.read_bytes()[:5000])
    with pytest.raises(BackgroundError, match="is no whole zip archive"):
        davis.install_davis(to, archive=archive)
    with zipfile.ZipFile(archive, "w") as contents:
        contents.writestr("readme.txt", "something else")
    with pytest.raises(BackgroundError, match=r"holds no JPEGImages.480p: it is not DAVIS"):
        davis.install_davis(to, archive=archive)
    assert not to.exists()


# ------------------------------------------------------------------ statistics


def test_the_slope_of_noise_with_a_known_spectrum() -> None:
    generator = np.random.default_rng(0)
    frequency = np.maximum(np.hypot(np.fft.fftfreq(64)[:, None], np.fft.fftfreq(64)[None, :]), 1e-3)
    for slope in (-3.0, -2.0):
        spectrum = np.fft.fft2(generator.standard_normal((40, 64, 64))) * frequency ** (slope / 2)
        assert spectrum_slope(np.fft.ifft2(spectrum).real) == pytest.approx(slope, abs=0.15)


def test_the_kurtosis_of_known_gradients() -> None:
    noise = np.random.default_rng(0).standard_normal((4, 64, 64))
    assert gradient_kurtosis(noise) == pytest.approx(3, abs=0.15)
    # An edge of height h in one of n differences: kurtosis about n.
    edge = np.zeros((1, 64, 64))
    edge[:, :, 32:] = 100
    assert gradient_kurtosis(edge) == pytest.approx(2 * 63, rel=0.05)


def test_procedural_clips_look_like_real_video_by_the_numbers() -> None:
    """A few clips here; benchmarks/backgrounds.py measures more."""
    rows = [statistics(clip.read(64)) for clip in list_clips(None, "train")[:8]]
    median = {name: np.median([row[name] for row in rows]) for name in REAL_VIDEO}
    for name in ("slope", "contrast", "frame_difference"):
        low, _, high = REAL_VIDEO[name]
        assert low < median[name] < high
    assert 9 < median["gradient_kurtosis"] < 20
    assert 10 < median["frame_difference_over_8"] < 27

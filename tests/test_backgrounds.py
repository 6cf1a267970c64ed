"""Backgrounds: sources and splits, the cache, files that are broken, DAVIS 2017, and statistics."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import struct
import zipfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest
from backgrounds import REAL_VIDEO, gradient_kurtosis, spectrum_slope, statistics
from PIL import Image

from w2f_torchrl.envs import BackgroundError
from w2f_torchrl.envs.scenery import davis
from w2f_torchrl.envs.scenery.backgrounds import list_clips, load_clips, select_clips
from w2f_torchrl.envs.scenery.clip_cache import cached_path, mapped_clip
from w2f_torchrl.envs.scenery.clip_files import FileClip, even_intervals
from w2f_torchrl.envs.scenery.procedural import ProceduralClip

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


def test_a_clips_split_does_not_depend_on_the_others(tmp_path: Path) -> None:
    everything = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    for name in everything:
        write_images(tmp_path / name, frames=1)
    (tmp_path / "notes.txt").write_text("no clip")
    (tmp_path / ".hidden").mkdir()
    train, val = names(tmp_path, "train"), names(tmp_path, "val")
    assert sorted(train + val) == everything
    assert 4 <= len(val) <= 13
    for name in ("c", val[0], train[0]):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        assert names(tmp_path, "train") == [n for n in train if (tmp_path / n).exists()]
        assert names(tmp_path, "val") == [n for n in val if (tmp_path / n).exists()]


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
        ("davis", r"background_source is 'davis', but .*DAVIS is missing. Run `python sota_conf"),
    ],
)
def test_missing_sources_are_named(source: str, message: str) -> None:
    with pytest.raises(BackgroundError, match=message):
        list_clips(source, "train")


def test_too_few_clips_are_named(tmp_path: Path) -> None:
    with pytest.raises(BackgroundError, match=r"has no clips: .*holds neither"):
        list_clips(str(tmp_path), "train")
    write_images(tmp_path / "a")
    with pytest.raises(BackgroundError, match=r"has 1 clips, but by their names none .*'val'"):
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
    with pytest.raises(BackgroundError, match=r"background image .*a/frame_1.png cannot be read"):
        load_clips(str(tmp_path / "images"), "train", 1, SIZE)
    assert not cached_path(list_clips(str(tmp_path / "images"), "train")[0], SIZE).exists()
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "c.mp4").write_bytes(b"no video at all")
    with pytest.raises(BackgroundError, match=r"background video .*c.mp4 cannot be read"):
        load_clips(str(tmp_path / "videos"), "train", 1, SIZE)
    write_images(tmp_path / "short" / "c", frames=1)
    with pytest.raises(BackgroundError, match=r"c has 1 frames: it needs at least 2"):
        load_clips(str(tmp_path / "short"), "train", 1, SIZE)
    (tmp_path / "empty" / "f").mkdir(parents=True)
    with pytest.raises(BackgroundError, match=r"f has 0 frames"):
        load_clips(str(tmp_path / "empty"), "train", 1, SIZE)


def read_image(folder: Path, picture: Image.Image, name: str = "0.png", **options: object) -> Clip:
    """What a clip makes of a picture: uint8 [SIZE, SIZE, 3]."""
    folder.mkdir(parents=True)
    picture.save(folder / name, **options)
    picture.save(folder / name.replace("0.", "1."), **options)
    return FileClip(folder).read(SIZE)[0]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path, suffix: str) -> None:
    values = np.full((20, 20), 32639, dtype=np.uint16)  # 127 * 257
    values[:, :10] = 65535
    shown = read_image(tmp_path / "a", Image.fromarray(values), f"0.{suffix}")
    assert (shown[:, -1] == 127).all()
    assert (shown[:, 0] == 255).all()


@pytest.mark.parametrize(("dtype", "said"), [(np.float32, "floating-point"), (np.int32, "32-bit")])
def test_pixels_of_no_known_range_are_refused(tmp_path: Path, dtype: type, said: str) -> None:
    with pytest.raises(BackgroundError, match=rf"0\.tif cannot be read: its pixels are {said}"):
        read_image(tmp_path / "a", Image.fromarray(np.ones((8, 8), dtype=dtype)), "0.tif")


def test_transparent_pixels_lie_before_black_in_every_mode(tmp_path: Path) -> None:
    half = Image.new("RGBA", (8, 8), (200, 100, 50, 128))
    np.testing.assert_allclose(read_image(tmp_path / "rgba", half)[0, 0], [100, 50, 25], atol=1)
    grey = Image.new("LA", (8, 8), (200, 0))
    assert not read_image(tmp_path / "la", grey).any()
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert (read_image(tmp_path / "p", palette) == [0, 255, 0]).all()
    assert not read_image(tmp_path / "hole", palette, transparency=1).any()
    assert (read_image(tmp_path / "one", Image.new("1", (8, 8), 1)) == 255).all()
    cmyk = read_image(tmp_path / "cmyk", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "0.jpg")
    np.testing.assert_allclose(cmyk[0, 0], [255, 0, 0], atol=3)


def test_a_photograph_lies_as_its_camera_says(tmp_path: Path) -> None:
    picture = Image.new("RGB", (40, 20))
    picture.paste((255, 255, 255), (0, 0, 20, 20))  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right: left comes to the top
    shown = read_image(tmp_path / "a", picture, "0.jpg", exif=exif)
    assert shown[0].mean() > 250
    assert shown[-1].mean() < 5


def test_only_formats_that_are_meant_are_opened(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "a")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n"
    (folder / "frame_0.png").write_bytes(eps)
    with pytest.raises(BackgroundError, match=r"frame_0.png cannot be read: cannot identify"):
        FileClip(folder).read(SIZE)
    write_video(tmp_path / "clip.mp4")
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nclip.mp4\n#EXT-X-ENDLIST\n"
    for name, text in {"a.mp4": playlist, "b.mp4": "ffconcat version 1.0\nfile clip.mp4\n"}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(BackgroundError, match=rf"{name} cannot be read"):
            FileClip(tmp_path / name).read(SIZE)


def test_a_video_of_uneven_intervals_plays_evenly(tmp_path: Path) -> None:
    assert even_intervals([0.0, 0.033, 0.067, 0.1]) == [0, 1, 2, 3]  # a clock's rounding
    assert even_intervals([0.0, 0.1, 0.2, 0.5, 0.6]) == [0, 1, 2, 2, 2, 3, 4]
    assert even_intervals([0.0, None, 0.2]) == [0, 1, 2]
    with av.open(tmp_path / "a.mp4", "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for level, moment in enumerate((0, 1, 2, 5, 6)):
            picture = np.full((32, 32, 3), 40 * level, dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(picture)
            frame.pts, frame.time_base = moment, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    levels = FileClip(tmp_path / "a.mp4").read(SIZE).reshape(7, -1).mean(axis=1)
    np.testing.assert_allclose(levels, [0, 40, 80, 80, 80, 120, 160], atol=4)


def test_a_video_lies_as_its_phone_says(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 64, 32
        stream.pix_fmt = "yuv420p"
        picture = np.zeros((32, 64, 3), dtype=np.uint8)
        picture[:, :32] = 255  # the left half is white
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    content = path.read_bytes()
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    track = content.index(upright, content.index(b"tkhd"))
    path.write_bytes(content[:track] + turned + content[track + len(turned) :])
    shown = FileClip(path).read(SIZE)[0]
    assert shown[0].mean() > 240  # turned to the right
    assert shown[-1].mean() < 15


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
    assert not frames.flags.writeable
    path = cached_path(CountedClip(tmp_path / "notes"), SIZE)
    assert str(path) in Path("/proc/self/maps").read_text()
    np.testing.assert_array_equal(frames, np.load(path))
    assert not [p for p in path.parent.iterdir() if p.suffix == ".tmp"]


def test_mapped_clips_hold_no_descriptors(tmp_path: Path) -> None:
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    mapped_clip(CountedClip(tmp_path / "first"), SIZE)
    before = open_files()
    held = [mapped_clip(CountedClip(tmp_path / str(index)), SIZE) for index in range(20)]
    assert open_files() == before
    assert len(held) == 20


@pytest.mark.parametrize("how", ["cut", "empty", "header", "shape", "pickle"])
def test_a_damaged_file_of_the_cache_is_made_again(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    clip = CountedClip(tmp_path / "notes")
    whole = np.array(mapped_clip(clip, SIZE))
    path = cached_path(clip, SIZE)
    content = path.read_bytes()
    if how == "shape":
        np.save(path, np.zeros((2, SIZE, SIZE), dtype=np.uint8))
    elif how == "pickle":
        np.save(path, np.array([{}, {}], dtype=object), allow_pickle=True)
    else:
        bad = {"cut": content[:-1], "empty": b"", "header": b"x" + content[1:]}
        path.write_bytes(bad[how])
    np.testing.assert_array_equal(mapped_clip(clip, SIZE), whole)
    assert f"{path} is damaged: reading counted again" in caplog.text
    assert path.read_bytes() == content


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
    with pytest.raises(BackgroundError, match=r"SHA-256 digest is \w{64}, but that .* is 0000"):
        davis.install_davis(directory, archive=archive)


def test_what_goes_wrong_with_davis_is_said(tmp_path: Path) -> None:
    to = tmp_path / "to"
    with pytest.raises(BackgroundError, match=r"cannot be downloaded: .*--archive FILE"):
        davis.install_davis(to, url=(tmp_path / "nothing.zip").as_uri())
    with pytest.raises(BackgroundError, match=r"nothing.zip is not a file. Run"):
        davis.install_davis(to, archive=tmp_path / "nothing.zip")
    archive = zipped_davis(tmp_path, without="camel")
    with pytest.raises(BackgroundError, match=r"lacks 1 of its 30 val videos: camel"):
        davis.install_davis(to, archive=archive)
    archive.write_bytes(archive.read_bytes()[:5000])
    with pytest.raises(BackgroundError, match="is not a complete zip archive"):
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
    """A few clips here; benchmarks/evidence/backgrounds.py measures more."""
    rows = [statistics(clip.read(64)) for clip in list_clips(None, "train")[:8]]
    median = {name: np.median([row[name] for row in rows]) for name in REAL_VIDEO}
    for name in ("slope", "contrast", "frame_difference"):
        low, _, high = REAL_VIDEO[name]
        assert low < median[name] < high
    assert 9 < median["gradient_kurtosis"] < 20
    assert 10 < median["frame_difference_over_8"] < 27

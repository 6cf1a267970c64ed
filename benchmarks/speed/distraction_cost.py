"""Compare the CPU time of a distracted frame with a clean one's and the reference code's.

    python benchmarks/speed/distraction_cost.py

Every variant of a task lives in this process, in the same state and with the same background, and
they take turns. A frame is all that is drawn for one agent step: the walks of video, camera and
colours (one step), the picture, and the mask where noted. A figure is the median over the rounds
of the process's CPU time per frame, all its threads together.

The reference code's way, on today's MuJoCo: dm_control's own picture (4 samples a pixel, a shadow
map of 2048), the video's frame at 800 x 800, decoded beforehand, copied into the model's sky box
and uploaded, no mask.

The sky box of ``render="reference"`` is compared with it picture by picture: same state, camera,
colours and frame; mean absolute difference in grey levels of 255.

The memory of a further env's clips is what becomes private to its process as it maps and reads 60
clips that another process has mapped too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "shared"))

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from results_file import RESULTS, write_results

from w2f_torchrl.envs import (
    BackgroundConfig,
    CameraConfig,
    ColorConfig,
    DistractionConfig,
    PixelDMControlEnv,
)
from w2f_torchrl.envs.scenery.backgrounds import load_clips
from w2f_torchrl.envs.scenery.procedural import ProceduralClip

# isort: split
# MuJoCo after torch's compiler: see the package's docstring.
import mujoco

TASKS = (
    "ball_in_cup catch",
    "cartpole swingup",
    "cheetah run",
    "finger spin",
    "reacher easy",
    "walker walk",
)
SIZE = 64
SKY_SIZE = 800
FRAME_SIZE = 480
"""Of the video files that both decode, pixels: that of DAVIS."""
CLIPS, FRAMES = 2, 24
DISTRACTION = DistractionConfig(BackgroundConfig(CLIPS), CameraConfig(0.2), ColorConfig(0.2))

Picture = npt.NDArray[np.uint8]


def write_videos(folder: Path) -> None:
    """Folders of images, each a part of a procedural clip."""
    for index in range(CLIPS):
        (folder / str(index)).mkdir()
        frames = ProceduralClip(0, "val", index).read(FRAME_SIZE)
        for number, frame in enumerate(frames[:FRAMES]):
            Image.fromarray(frame).save(folder / str(index) / f"{number}.png")


def make(name: str, **settings: object) -> PixelDMControlEnv:
    """An env after its reset and a few steps."""
    domain, task = name.split()
    env = PixelDMControlEnv(domain, task, image_size=SIZE, seed=0, **settings)
    torch.manual_seed(0)
    data = env.reset()
    for _ in range(5):
        data["action"] = env.action_spec.rand()
        data = env.step(data)["next"]
    return env


class ReferenceWay:
    """The distracted picture as the reference code makes it, in an env's own simulation."""

    def __init__(self, env: PixelDMControlEnv, source: str) -> None:
        self.physics, self.distractor = env.physics, env.distractor
        self.alpha = self.distractor.config.background.alpha(env.env_name)
        model = self.physics.model
        names = [model.id2name(index, "texture") for index in range(model.ntex)]
        self.sky, self.grid = names.index("skybox"), model.name2id("grid", "material")
        self.address = int(model.tex_adr[self.sky])
        self.clips = load_clips(source, "train", CLIPS, SKY_SIZE)

    def draw(self) -> Picture:
        """Upload the sky box, and draw at dm_control's quality."""
        model, video = self.physics.model, self.distractor.video
        texture = self.clips[video.clip][video.frame].reshape(-1)
        model.tex_height[self.sky] = model.tex_width[self.sky] = SKY_SIZE
        model.tex_data[self.address : self.address + texture.size] = texture
        contexts = self.physics.contexts
        with contexts.gl.make_current() as executor:
            executor.call(mujoco.mjr_uploadTexture, model.ptr, contexts.mujoco.ptr, self.sky)
        with self.distractor.applied():
            model.mat_rgba[self.grid, 3] = self.alpha
            picture: Picture = self.physics.render(SIZE, SIZE, 0)
        return picture


def distracted(env: PixelDMControlEnv) -> Callable[[], object]:
    """Walk and draw."""
    distractor, renderer = env.distractor, env._renderer

    def frame() -> object:
        distractor.step()
        return renderer.draw()

    return frame


def reference_way(env: PixelDMControlEnv, source: str) -> Callable[[], object]:
    """Walk and draw as the reference does."""
    way = ReferenceWay(env, source)

    def frame() -> object:
        way.distractor.step()
        return way.draw()

    return frame


def measure(name: str, source: str, rounds: int, frames: int) -> dict[str, float]:
    """Median CPU milliseconds a frame of each variant."""
    clean, fast = make(name), make(name, distraction=DISTRACTION, background_source=source)
    sky = make(name, distraction=DISTRACTION, background_source=source, render="reference")
    theirs = make(name, distraction=DISTRACTION, background_source=source, render="reference")
    draws = {
        "fast clean, mask": clean._renderer.draw,
        "fast distracted, mask": distracted(fast),
        "reference distracted, mask": distracted(sky),
        "reference code's way, no mask": reference_way(theirs, source),
    }
    times: dict[str, list[float]] = {variant: [] for variant in draws}
    for index in range(rounds + 1):
        for variant, draw in draws.items():
            start = time.process_time()
            for _ in range(frames):
                draw()
            if index > 0:  # the first round compiles shaders
                times[variant].append((time.process_time() - start) / frames * 1e3)
    for env in (clean, fast, sky, theirs):
        env.close()
    return {variant: round(statistics.median(values), 3) for variant, values in times.items()}


def difference(name: str, source: str, pictures: int) -> float:
    """Mean absolute difference between our sky box and the reference code's way, grey levels."""
    env = make(name, distraction=DISTRACTION, background_source=source, render="reference")
    way, differences = ReferenceWay(env, source), []
    for index in range(pictures):
        if index % 5 == 0:
            env.distractor.reset()
        env.distractor.step()
        ours = env._renderer.draw()[0].transpose(1, 2, 0).astype(int)
        model, sky = env.physics.model, way.sky
        saved = model.tex_data.copy(), model.tex_height[sky], model.tex_width[sky]
        differences.append(np.abs(ours - way.draw()).mean())
        model.tex_data[:], model.tex_height[sky], model.tex_width[sky] = saved
    env.close()
    return float(np.mean(differences))


PRIVATE = """
import re, sys
from pathlib import Path
import w2f_torchrl
from w2f_torchrl.envs.scenery.backgrounds import load_clips
def private():
    text = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(kilobytes) for kilobytes in re.findall(r"Private_\\w+: +(\\d+)", text))
clips = load_clips(None, "train", 4, 64)
before = private()
clips = load_clips(None, "train", int(sys.argv[1]), 64)
total = sum(int(clip.sum()) for clip in clips)  # reads every byte
print(private() - before, sum(clip.nbytes for clip in clips) // 1024)
"""


def memory(clips: int) -> dict[str, float]:
    """Private memory that the clips of one more process take, and the size of their files, MB."""
    mine = load_clips(None, "train", clips, SIZE)  # the first process, which stays
    assert all(clip.any() for clip in mine)
    done = subprocess.run(
        [sys.executable, "-c", PRIVATE, str(clips)], capture_output=True, text=True, check=True
    )
    private, mapped = map(int, done.stdout.split())
    return {
        "clips": clips,
        "private_megabytes": round(private / 1024, 2),
        "mapped_megabytes": round(mapped / 1024, 1),
    }


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--frames", type=int, default=10, help="frames per turn")
    parser.add_argument("--pictures", type=int, default=30, help="compared with the reference's")
    parser.add_argument("--json", type=Path, default=RESULTS / "distraction_cost.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["W2F_CACHE"] = str(Path(folder) / "cache")
        videos = Path(folder) / "videos"
        for split in ("train", "val"):
            (videos / split).mkdir(parents=True)
        write_videos(videos / "train")
        (videos / "val" / "none").mkdir()
        rows = {name: compare(name, str(videos), args) for name in TASKS}
        private = memory(60)
    settings = {"rounds": args.rounds, "frames": args.frames, "image_size": SIZE, "scale": 0.2}
    results = {
        "renderer": f"Mesa software rendering, MUJOCO_GL={os.environ['MUJOCO_GL']}",
        "settings": settings,
        "tasks": rows,
        "memory_of_one_more_process": private,
    }
    print(write_results(args.json, results))


def compare(name: str, source: str, args: argparse.Namespace) -> dict[str, Any]:
    """One task's times, their ratios, and how far the pictures are apart."""
    times = measure(name, source, args.rounds, args.frames)
    clean, theirs = times["fast clean, mask"], times["reference code's way, no mask"]
    row = {
        "cpu_milliseconds_a_frame": times,
        "fast_over_clean": round(times["fast distracted, mask"] / clean, 3),
        "reference_over_reference_codes_way": round(
            times["reference distracted, mask"] / theirs, 3
        ),
        "mean_grey_levels_from_reference_codes_way": round(
            difference(name, source, args.pictures), 2
        ),
    }
    print(name, row, flush=True)
    return row


if __name__ == "__main__":
    main()

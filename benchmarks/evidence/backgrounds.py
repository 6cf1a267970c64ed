"""Compare statistics of moving backgrounds with those of real video.

    python benchmarks/evidence/backgrounds.py            # the procedural clips, train and val
    python benchmarks/evidence/backgrounds.py --source /path/to/clips --json clips.json

Measured on grey frames (the mean of the channels) of 64 x 64 pixels, one figure per clip:

- slope: of log power against log frequency, power averaged over frames and over rings of whole
  frequencies from 2 to 24 waves a frame (Hann window, mean removed);
- contrast: standard deviation of all pixels, grey levels;
- frame difference: mean absolute difference of neighbouring frames, and of frames 8 apart;
- gradient kurtosis: fourth moment over squared variance of the differences between horizontal and
  vertical neighbours (3 for a Gaussian).

The ranges are the 10 and 90 % quantiles of 100 clips of a public set of real videos at 64 x 64.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "shared"))

import numpy as np
import numpy.typing as npt
from results_file import RESULTS, write_results

from w2f_torchrl.envs.scenery.backgrounds import list_clips

SIZE = 64
REAL_VIDEO: dict[str, tuple[float | None, float, float | None]] = {
    "slope": (-3.06, -2.67, -2.26),
    "contrast": (33.0, 49.0, 65.0),
    "frame_difference": (1.6, 3.5, 6.0),
    "frame_difference_over_8": (None, 18.5, None),
    "gradient_kurtosis": (None, 14.7, None),
}
"""10 % quantile, median and 90 % quantile, as far as they are known."""

Clip = npt.NDArray[np.uint8]


def statistics(clip: Clip) -> dict[str, float]:
    """Measure one clip, uint8 [T, S, S, 3]."""
    grey = clip.mean(axis=-1, dtype=np.float64)
    return {
        "slope": spectrum_slope(grey),
        "contrast": float(grey.std()),
        "frame_difference": float(np.abs(grey[1:] - grey[:-1]).mean()),
        "frame_difference_over_8": float(np.abs(grey[8:] - grey[:-8]).mean())
        if len(grey) > 8
        else float("nan"),
        "gradient_kurtosis": gradient_kurtosis(grey),
    }


def spectrum_slope(grey: npt.NDArray[np.float64]) -> float:
    """Return the slope of log power over log frequency of frames [T, S, S]."""
    size = grey.shape[-1]
    window = np.hanning(size + 2)[1:-1]
    centred = grey - grey.mean(axis=(1, 2), keepdims=True)
    power = np.abs(np.fft.fft2(centred * np.outer(window, window))) ** 2
    waves = np.fft.fftfreq(size) * size
    ring = np.rint(np.hypot(waves[:, None], waves[None, :])).astype(int)
    rings = np.arange(2, 3 * size // 8 + 1)
    mean_power = [power[:, ring == number].mean() for number in rings]
    return float(np.polyfit(np.log(rings), np.log(mean_power), 1)[0])


def gradient_kurtosis(grey: npt.NDArray[np.float64]) -> float:
    """Kurtosis of the differences between neighbouring pixels of frames [T, S, S]."""
    differences = np.concatenate([np.diff(grey, axis=axis).ravel() for axis in (1, 2)])
    differences -= differences.mean()
    return float((differences**4).mean() / (differences**2).mean() ** 2)


def summarise(figures: list[dict[str, float]]) -> dict[str, list[float]]:
    """Return the 10 % quantile, median and 90 % quantile of each figure over the clips."""
    return {
        name: np.nanquantile([row[name] for row in figures], [0.1, 0.5, 0.9]).round(3).tolist()
        for name in REAL_VIDEO
    }


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default="procedural", help="procedural, davis or a folder")
    parser.add_argument("--clips", type=int, default=30, help="maximum number per split")
    parser.add_argument("--json", type=Path, default=RESULTS / "backgrounds.json")
    args = parser.parse_args()
    results = {}
    for split in ("train", "val"):
        clips = list_clips(args.source, split)[: args.clips]
        start, figures = time.process_time(), []
        for clip in clips:
            frames = clip.read(SIZE)
            figures.append(statistics(frames) | {"frames": len(frames)})
        seconds = time.process_time() - start
        results[split] = {
            "clips": len(clips),
            "quantiles_10_50_90": summarise(figures),
            "each": {
                clip.name.rpartition("/")[2]: row for clip, row in zip(clips, figures, strict=True)
            },
            "cpu_milliseconds_per_frame_read_and_measured": round(
                1e3 * seconds / sum(row["frames"] for row in figures), 2
            ),
        }
        print(split, results[split]["quantiles_10_50_90"])
    settings = {"source": args.source, "size": SIZE}
    real = {"real_video_quantiles_10_50_90": REAL_VIDEO}
    print(write_results(args.json, {"settings": settings} | real | results))


if __name__ == "__main__":
    main()

"""Draw what updates see with augmentation.scenery: one sequence, and its copies with other scenery.

python benchmarks/pictures/replaced_scenery.py --out docs/images/replaced_scenery.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tensordict import TensorDict

from w2f_torchrl.envs import make_env
from w2f_torchrl.envs.scenery.backgrounds import load_clips
from w2f_torchrl.logging.pictures.plotting import save_figure
from w2f_torchrl.transforms import ReplacedSceneryTransform


def main() -> None:
    """Draw the sequences."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="finger spin", help="Domain and task.")
    parser.add_argument("--source", help="Clips, as for augmentation.source; default: procedural.")
    parser.add_argument("--sequences", type=int, default=3, help="Copies with other scenery.")
    parser.add_argument("--steps", type=int, default=6, help="Frames of a sequence, every second.")
    parser.add_argument("--seed", type=int, default=0, help="Of the env and of the scenery.")
    parser.add_argument("--out", type=Path, required=True, help="The picture.")
    args = parser.parse_args()
    env = make_env(*args.task.split(), distraction="easy", seed=args.seed)
    frames = env.rollout(2 * args.steps)[::2]
    env.close()
    keys = ("pixels", "foreground_mask")
    copies = {key: frames[key].expand(args.sequences, *frames[key].shape).clone() for key in keys}
    data = TensorDict(copies, [args.sequences, args.steps])
    clips = load_clips(args.source, "train", None, frames["pixels"].shape[-1])
    replaced = ReplacedSceneryTransform(clips, 1.0, ["pixels"], seed=args.seed)(data)["pixels"]
    rows = torch.cat([frames["pixels"][None], replaced])  # [R, T, 3, H, W]
    sheet = rows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)  # [R * H, T * W, 3]
    figure = Figure(figsize=(args.steps * 1.2, len(rows) * 1.2), layout="constrained")
    axes = figure.subplots()
    axes.imshow(sheet.numpy())
    side = frames["pixels"].shape[-1]
    axes.set_yticks(
        [(row + 0.5) * side for row in range(len(rows))],
        ["recorded", *["replaced"] * args.sequences],
    )
    axes.set_xticks([])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    save_figure(figure, args.out, dpi=75)


if __name__ == "__main__":
    main()

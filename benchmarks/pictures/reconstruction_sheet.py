"""Draw a trained world model's reconstruction of an episode that it plays; measure its mask.

    python benchmarks/pictures/reconstruction_sheet.py \
        runs/demo/checkpoints/checkpoint_000000000792.pt \
        --out docs/images/demo_reconstruction.png --json benchmarks/results/demo.json

Actions are sampled, so that the agent moves even after a short training.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "shared"))

import torch
from results_file import write_results
from torchrl.envs.utils import ExplorationType, set_exploration_type

from w2f_torchrl.data import records_from_rollout
from w2f_torchrl.evaluation.evaluator import reconstruct
from w2f_torchrl.logging.metrics import read_metrics
from w2f_torchrl.logging.pictures.video import contact_sheet
from w2f_torchrl.segmenters import mask_iou
from w2f_torchrl.trainers import load_policy


def main() -> None:
    """Play, reconstruct, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rows", type=int, default=6)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    loaded = load_policy(args.checkpoint)
    env = loaded.make_env(args.seed)
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        episode = env.rollout(1000, loaded.policy)
    env.close()
    records = records_from_rollout(episode.unsqueeze(0)).unsqueeze(0)
    columns, iou = reconstruct(loaded.world_model, records)
    contact_sheet(args.out, columns, every=-(-len(columns["frame"]) // args.rows))
    moved = mask_iou(columns["true mask"][1:], columns["true mask"][:-1]).mean()
    evaluations = [
        {key: row[key] for key in ("frames", "updates", "eval/return_mean", "wm/mask_iou")}
        for row in read_metrics(args.checkpoint.parents[1])
        if "eval/return_mean" in row
    ]
    sampled = {
        "mask_iou": iou,
        "true_mask_iou_with_the_frame_before": float(moved),
        "frames": len(columns["frame"]),
        "return": float(episode["next", "reward"].sum()),
    }
    results = {"evaluations_in_the_run": evaluations, "episode_with_sampled_actions": sampled}
    print(write_results(args.json, results), results)


if __name__ == "__main__":
    main()

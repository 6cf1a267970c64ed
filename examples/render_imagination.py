"""Load a checkpoint and make videos of its world model's imagination.

python examples/render_imagination.py runs/demo/checkpoints/checkpoint_000000000792.pt \
    --out imagination.mp4

Plays an episode. The model sees five frames of each window of it (green bar) and then imagines the
rest (red bar): once with the actual actions, next to the truth, and once with its policy acting in
the imagination.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torchrl.envs.utils import ExplorationType, set_exploration_type

from w2f_torchrl.data import records_from_rollout
from w2f_torchrl.evaluation.imagination import imagine_windows
from w2f_torchrl.logging.pictures.film import film
from w2f_torchrl.logging.pictures.video import write_video
from w2f_torchrl.trainers import load_policy


def main(arguments: list[str] | None = None) -> tuple[Path, Path]:
    """Play, imagine, write two videos.

    Returns:
        The video with the truth, and that of the policy's imagination.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, default=Path("imagination.mp4"))
    parser.add_argument("--steps", type=int, default=100, help="agent steps of the episode")
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(arguments)

    policy = load_policy(args.checkpoint)
    if not policy.world_model.decoder.out_keys:
        raise SystemExit(f"error: algo={policy.config.algo.name} has no decoder: nothing to see.")
    env = policy.make_env(seed=args.seed)
    with torch.no_grad(), set_exploration_type(ExplorationType.MODE):
        episode = env.rollout(args.steps, policy)  # [T]
    env.close()

    # The model is trained on records, one per observation, so it gets records here: [1, T + 1].
    records = records_from_rollout(episode.unsqueeze(0)).unsqueeze(0)
    actor = policy.policy[-2][0].module  # encoder, state estimator, actor, carry
    made = imagine_windows(policy.world_model, actor, records, count=args.windows, seed=args.seed)
    if made is None:
        raise SystemExit(f"error: an episode of {args.steps} steps leaves nothing to imagine.")
    acting = args.out.with_stem(f"{args.out.stem}_policy")
    for path, rows in ((args.out, made.comparison), (acting, made.imagined)):
        write_video(path, film(rows, made.context), fps=5, scale=1)
        print(path)
    for name, value in made.metrics.items():
        print(f"{name}: {value:.3f}")
    return args.out, acting


if __name__ == "__main__":
    main()

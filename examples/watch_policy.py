"""Watch a trained agent in unseen scenery.

python examples/watch_policy.py runs/demo/checkpoints/checkpoint_000000000792.pt --out film.mp4

Plays an episode with an unseen background video, and another with random actions, prints both
returns, and writes a video of the observations, the predicted mask and the two reconstructions.
Takes less than a minute on a CPU. Exported policies (``python -m w2f_torchrl.evaluation.export``)
work too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tensordict import TensorDictBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from w2f_torchrl.data import records_from_rollout
from w2f_torchrl.evaluation.evaluator import reconstruct
from w2f_torchrl.logging.pictures.video import panel, write_video
from w2f_torchrl.trainers import LoadedPolicy, load_policy


def play(policy: LoadedPolicy, seed: int, scenery: str | None, *, random: bool) -> TensorDictBase:
    """Play one episode.

    Args:
        policy: The trained policy, whose environment is used.
        seed: Seed of the environment and of random actions.
        scenery: Name of an evaluation set; None for the scenery of the training.
        random: Whether actions are uniformly random.

    Returns:
        The episode's transitions ``[T]``.
    """
    env = policy.make_env(seed=seed, evaluation_set=scenery)
    torch.manual_seed(seed)
    with torch.no_grad(), set_exploration_type(ExplorationType.MODE):
        episode: TensorDictBase = env.rollout(1000, None if random else policy)
    env.close()
    return episode


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Play both episodes, print the returns, and write the video.

    Returns:
        The returns of the trained and of the random policy.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, default=Path("film.mp4"))
    parser.add_argument("--scenery", default="unseen_videos_easy", help="an evaluation set")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(arguments)

    policy = load_policy(args.checkpoint)
    task = f"{policy.config.environment.domain} {policy.config.environment.task}"
    episode = play(policy, args.seed, args.scenery, random=False)
    chance = play(policy, args.seed, args.scenery, random=True)
    trained, random = (float(e["next", "reward"].sum()) for e in (episode, chance))
    print(f"{task}, {args.scenery}: return {trained:.0f}; with random actions {random:.0f}")

    # The model is trained on records, one per observation, so it gets records here: [1, T + 1].
    records = records_from_rollout(episode.unsqueeze(0)).unsqueeze(0)
    columns, iou = reconstruct(policy.world_model, records)
    if iou is not None:
        print(f"IoU of the predicted mask with the simulator's: {iou:.2f}")
    fps = 1 / (0.01 * policy.config.environment.action_repeat)
    print(write_video(args.out, panel(columns, scale=3), fps=min(fps, 50), scale=1))
    return trained, random


if __name__ == "__main__":
    main()

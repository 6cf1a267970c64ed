"""Draw a run's imagination as one picture: ``RUN_OR_CHECKPOINT --out picture.png``.

Plays an episode with the mode action and imagines from the middle of it, as the run's own
``train/imagination/comparison`` does.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torchrl.envs.utils import ExplorationType, set_exploration_type

from w2f_torchrl.checkpoint import latest_valid_checkpoint
from w2f_torchrl.data import records_from_rollout
from w2f_torchrl.evaluation.imagination import imagine_windows
from w2f_torchrl.logging.pictures.film import film_strip
from w2f_torchrl.logging.pictures.video import write_image
from w2f_torchrl.trainers import load_policy


def main() -> None:
    """Read the arguments, write the picture, print the errors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a run's directory")
    parser.add_argument("--out", type=Path, required=True, help="the picture, .png")
    parser.add_argument("--steps", type=int, default=200, help="agent steps of the episode")
    parser.add_argument("--window", type=int, default=1, help="which of three windows, from 0")
    parser.add_argument("--every", type=int, default=2, help="steps between columns")
    parser.add_argument("--seed", type=int, default=7, help="seed of the episode")
    arguments = parser.parse_args()
    path = arguments.checkpoint
    if path.is_dir():
        path = latest_valid_checkpoint(path / "checkpoints")
    policy = load_policy(path)
    env = policy.make_env(seed=arguments.seed)
    torch.manual_seed(arguments.seed)
    with torch.no_grad(), set_exploration_type(ExplorationType.MODE):
        episode = env.rollout(arguments.steps, policy)
    env.close()
    records = records_from_rollout(episode.unsqueeze(0)).unsqueeze(0)
    actor = policy.policy[-2][0].module  # encoder, state estimator, actor, carry
    made = imagine_windows(policy.world_model, actor, records, seed=arguments.seed)
    if made is None:
        parser.error("the episode is too short, or the model has no decoder.")
    strip = film_strip(made.comparison, made.context, arguments.window, arguments.every)
    write_image(arguments.out, strip)
    print(json.dumps({"picture": str(arguments.out), **made.metrics}, indent=1))


if __name__ == "__main__":
    main()

r"""Draw one episode as two world models reconstruct it, and as they imagine it to continue.

python benchmarks/pictures/side_by_side.py runs/dreamer_v3 runs/split --set unseen_videos_easy \
    --out docs/images/side_by_side.png

Takes checkpoints or run directories (their newest checkpoint). The last run's policy acts, with
sampled actions. Imagination has seen the frames before those that are shown, and then reads only
the actions.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "shared"))

import torch
from find_checkpoint import find_checkpoint
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs.utils import ExplorationType, set_exploration_type

from w2f_torchrl.data import records_from_rollout
from w2f_torchrl.envs import evaluation_sets
from w2f_torchrl.evaluation.evaluator import reconstruct
from w2f_torchrl.evaluation.imagination import decode, observe, roll
from w2f_torchrl.logging.pictures.video import contact_sheet
from w2f_torchrl.modules import WorldModel
from w2f_torchrl.trainers import load_policy


def columns_of(
    model: WorldModel, records: TensorDictBase, start: int, length: int, name: str
) -> dict[str, Tensor]:
    """Pictures ``[length, C, H, W]`` of the frames from ``start`` on: inferred, then imagined.

    Args:
        model: The world model.
        records: One episode ``[1, T]``.
        start: First frame shown, and the first that is imagined, at least 1.
        length: Frames.
        name: The model's label.
    """
    seen, _ = reconstruct(model, records)
    window = observe(model, records)[:, start - 1 : start + length]
    dreamt = decode(model, roll(model, window, context=1))
    shown = slice(start, start + length)
    found = {}  # empty for a model without a decoder
    if "reconstruction" in seen:
        found["reconstruction"] = seen["reconstruction"][shown]
    if "foreground" in seen:
        found["foreground"] = seen["foreground"][shown]
        found["both"] = seen.get("composed", seen["foreground"])[shown]
    if dreamt:
        found["imagined"] = dreamt["imagined"][0, 1:]
    return {f"{name}: {key}": pictures for key, pictures in found.items()}


def main() -> None:
    """Play one episode, look at it with each model, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--names", nargs="+", help="default: the directories' names")
    parser.add_argument("--set", choices=evaluation_sets(), help="default: as the run was trained")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start", type=int, default=40, help="first frame shown")
    parser.add_argument("--length", type=int, default=15, help="frames shown, from the start on")
    parser.add_argument("--rows", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    names = args.names or [find_checkpoint(path).parents[1].name for path in args.checkpoints]
    if len(names) != len(args.checkpoints):
        parser.error(f"--names has {len(names)} entries for {len(args.checkpoints)} checkpoints.")
    if args.start < 1 or not 1 <= args.rows <= args.length:
        parser.error("--start must be at least 1, --rows in [1, length].")
    torch.manual_seed(args.seed)
    loaded = [load_policy(find_checkpoint(path)) for path in args.checkpoints]
    actor = loaded[-1]
    env = actor.make_env(args.seed, args.set)
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        episode = env.rollout(args.start + args.length + 1, actor.policy)
    env.close()
    records = records_from_rollout(episode.unsqueeze(0)).unsqueeze(0)
    shown = slice(args.start, args.start + args.length)
    columns = {"frame": records["next", "pixels"][0, shown].cpu()}
    for policy, name in zip(loaded, names, strict=True):
        columns |= columns_of(policy.world_model, records, args.start, args.length, name)
    print(contact_sheet(args.out, columns, every=args.length // args.rows))


if __name__ == "__main__":
    main()

r"""Record episodes to train on: ``python sota_configs/record.py OUT --episodes 20 [settings]``.

  python sota_configs/record.py data/swingup --episodes 20 \
      environment.domain=cartpole environment.task=swingup environment.distraction=easy
  python sota_configs/record.py data/replay --replay runs/a
  python sota_configs/record.py data/mixed --episodes 60 --policy random \
      --policy runs/a/checkpoints/checkpoint_000000002000.pt --policy runs/a/checkpoints/best.pt

Each episode is an .npz file in the form of DreamerV2 and V-D4RL, with the masks, and the true
states of agent and scenery, if the environment has them. Policies take turns. Settings are those of
the group `environment`; without any, the environment is that of the first checkpoint. --replay
writes the episodes that a run has collected. If the command is interrupted, run it again to
continue.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from w2f_torchrl.checkpoint import CheckpointError
from w2f_torchrl.config import EnvironmentConfig
from w2f_torchrl.evaluation.recorded.record import RANDOM, Player, Recorder
from w2f_torchrl.evaluation.recorded.replay_export import export_replay
from w2f_torchrl.plugins import load_plugins
from w2f_torchrl.trainers import ConfigError, load_policy, to_run_config

SETTING = re.compile(r"\w+(\.\w+)+=")
"""A setting in the form of Hydra's overrides, anywhere among the arguments."""


def load_players(args: argparse.Namespace) -> list[Player]:
    """Load the policies to record."""
    players = []
    for number, name in enumerate(args.policy or [RANDOM]):
        if name == RANDOM:
            players.append(Player(RANDOM))
            continue
        policy = load_policy(name)
        policy.config.evaluation.action = args.action
        players.append(Player(f"policy{number}_{Path(name).stem}", policy))
    return players


def environment_of(settings: list[str], players: list[Player]) -> EnvironmentConfig:
    """Return the env's settings: those of the first checkpoint, and what the command line changes.

    Raises:
        ConfigError: If a setting is not one of the environment, or is out of range.
    """
    for setting in settings:
        if not setting.startswith("environment."):
            raise ConfigError(
                f"{setting!r} is no setting of the environment; allowed: environment.NAME=VALUE."
            )
    policies = [player.policy for player in players if player.policy is not None]
    base = OmegaConf.structured(policies[0].config.environment if policies else EnvironmentConfig())
    OmegaConf.set_struct(base.kwargs, False)
    try:
        changed = OmegaConf.from_dotlist(settings).get("environment", {})
        merged = OmegaConf.merge({"environment": base}, {"environment": changed})
    except OmegaConfBaseException as error:
        raise ConfigError(f"settings of the environment: {error}") from error
    config = to_run_config(merged)
    config.validate()
    sizes = {policy.config.environment.image_size for policy in policies}
    if sizes - {config.environment.image_size}:
        raise ConfigError(
            f"environment.image_size={config.environment.image_size} must be that of the policies: "
            f"{', '.join(map(str, sorted(sizes)))}."
        )
    return config.environment


def read_command_line(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options, and the settings of the environment.

    Raises:
        SystemExit: If an option is out of range, or neither or both ways to record are chosen.
    """
    parser = argparse.ArgumentParser(
        usage="%(prog)s OUT (--episodes N | --replay RUN) [options] [environment.NAME=VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, help="folder of the episodes")
    parser.add_argument("--episodes", type=int, help="in the folder, afterwards")
    parser.add_argument(
        "--replay",
        type=Path,
        metavar="RUN",
        help="write the episodes in a run's replay instead of playing",
    )
    parser.add_argument(
        "--policy",
        action="append",
        metavar="random | CHECKPOINT",
        help="may be repeated: the policies take turns (default: random)",
    )
    parser.add_argument(
        "--action",
        choices=("sample", "mode"),
        default="sample",
        help="how checkpoints act (default: sample, as while they are trained)",
    )
    parser.add_argument(
        "--hold", type=int, default=4, help="agent steps that a random action lasts"
    )
    parser.add_argument("--max-steps", type=int, help="agent steps of an episode")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plugins", nargs="*", default=[], help="files that register an env")
    settings = [word for word in words if SETTING.match(word)]
    args = parser.parse_args([word for word in words if word not in settings])
    for name in ("episodes", "hold", "max_steps"):
        value = getattr(args, name)
        if value is not None and value < 1:
            sys.exit(f"error: --{name.replace('_', '-')} {value} must be at least 1.")
    if (args.episodes is None) == (args.replay is None):
        sys.exit("error: pass either --episodes or --replay.")
    return args, settings


def record(args: argparse.Namespace, settings: list[str]) -> None:
    """Play episodes until the folder holds as many as the command line says."""
    players = load_players(args)
    recorder = Recorder(
        args.out,
        environment_of(settings, players),
        players,
        seed=args.seed,
        hold=args.hold,
        max_steps=args.max_steps,
    )
    there = len(list(args.out.glob("*.npz")))
    with tqdm(total=args.episodes, initial=there, unit="episode", disable=None) as progress:
        recorder.record(args.episodes, tell=lambda path: progress.update())


def main(arguments: list[str] | None = None) -> None:
    """Record what the command line says."""
    args, settings = read_command_line(sys.argv[1:] if arguments is None else arguments)
    try:
        load_plugins(args.plugins)
        if args.replay is not None:
            with tqdm(unit="episode", disable=None) as progress:
                export_replay(args.replay, args.out, tell=lambda path: progress.update())
        else:
            record(args, settings)
    except (ConfigError, CheckpointError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(args.out)


if __name__ == "__main__":
    main()

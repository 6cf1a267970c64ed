"""Train r2dreamer in a run directory that :mod:`parity` has made, or continue there.

python benchmarks/evidence/peer_run.py RUN_DIR --r2dreamer CHECKOUT --updates N
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.append(str(Path(__file__).parents[1] / "shared"))

from parity_settings import ROW, Settings, read_settings
from peer_envs import EnvBatch
from peer_loop import PeerLoop
from peers import import_from, r2dreamer_agent

from w2f_torchrl.data import UpdateSchedule
from w2f_torchrl.data.environments import create_env
from w2f_torchrl.modules import PRESETS
from w2f_torchrl.trainers.interruptions import stop_on_signal
from w2f_torchrl.utils.seeding import derive_seed


def make_envs(settings: Settings) -> EnvBatch:
    """Make our envs, with the seeds that our own run's envs get."""
    seed = derive_seed(settings.seed, "train", 0)
    make = partial(create_env, settings.run_config())
    return EnvBatch([make(i, derive_seed(seed, "env", i)) for i in range(settings.num_envs)])


def make_loop(checkout: Path, settings: Settings, run_dir: Path, updates: int) -> PeerLoop:
    """Build r2dreamer's agent and replay, and the loop around them.

    Args:
        checkout: The root of its repository.
        settings: The run's.
        run_dir: Its directory.
        updates: In all.

    Raises:
        FileNotFoundError: If that is not a checkout of it.
    """
    envs = make_envs(settings)
    import_from(checkout, "tools").set_seed_everywhere(settings.seed)
    agent = r2dreamer_agent(
        checkout,
        settings.preset,
        int(envs.envs[0].action_spec.shape[-1]),
        settings={"lr": settings.lr, "warmup": settings.warmup, "horizon": settings.horizon},
    )
    replay = import_from(checkout, "buffer").Buffer(
        SimpleNamespace(
            device="cpu",
            storage_device="cpu",
            batch_size=settings.batch_size,
            batch_length=settings.batch_length,
            max_size=settings.records(updates),  # all of it is taken at once
        )
    )
    schedule = UpdateSchedule(
        settings.batch_size * settings.batch_length,
        settings.batch_size,
        settings.batch_length,
        start=settings.prefill,
    )
    return PeerLoop(
        agent,
        replay,
        envs,
        schedule,
        run_dir,
        action_repeat=settings.action_repeat,
        row=ROW,
        unimix=PRESETS[settings.preset].unimix,
    )


def main() -> None:
    """Train to the last update, or until a stop signal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--r2dreamer", type=Path, required=True, help="its checkout")
    parser.add_argument("--updates", type=int, required=True, help="in all")
    args = parser.parse_args()
    _, settings = read_settings(args.run_dir)
    loop = make_loop(args.r2dreamer, settings, args.run_dir, args.updates)
    with stop_on_signal() as stopped:
        if loop.resume():
            print(f"continuing at update {loop.updates}", flush=True)
        complete = loop.run(args.updates, stopped)
    print(f"{'complete' if complete else 'stopped'} at update {loop.updates}", flush=True)


if __name__ == "__main__":
    main()

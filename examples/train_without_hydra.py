"""Train from Python: the settings are dataclasses, without command line or YAML.

python examples/train_without_hydra.py --run-dir runs/from_python

docs/configuration.md lists all settings with their defaults. This run is short; it shows the
components and learns little. For a longer one increase ``total_frames`` and ``train_ratio``.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from w2f_torchrl.config import (
    CollectionConfig,
    EnvironmentConfig,
    EvaluationConfig,
    TrainingConfig,
)
from w2f_torchrl.modules import PRESETS
from w2f_torchrl.trainers import RunConfig, Trainer, load_policy


def make_config(run_dir: Path, frames: int) -> RunConfig:
    """World2Filter on cartpole balance. A wrong setting is an error that names it."""
    return RunConfig(
        environment=EnvironmentConfig("cartpole", "balance", num_envs=2, distraction="easy"),
        model=PRESETS["size1m"],
        training=TrainingConfig(
            total_frames=frames, batch_size=4, batch_length=8, train_ratio=4, prefill_steps=64
        ),
        # In this process: worker processes only pay off in runs of more than a minute.
        collection=CollectionConfig(num_workers=0),
        evaluation=EvaluationConfig(every_frames=0),
        run_dir=str(run_dir),
    )


def main(arguments: list[str] | None = None) -> Path:
    """Train, then load the checkpoint and act with it.

    Returns:
        The checkpoint's path.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/from_python"))
    parser.add_argument("--frames", type=int, default=400, help="total control steps")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    trainer = Trainer(make_config(args.run_dir, args.frames))
    trainer.train()

    checkpoint = max((args.run_dir / "checkpoints").glob("*.pt"))
    policy = load_policy(checkpoint)
    env = policy.make_env(seed=1)
    rollout = env.rollout(20, policy)
    print(f"{checkpoint}: reward {rollout['next', 'reward'].sum():.2f} in 20 agent steps")
    env.close()
    return checkpoint


if __name__ == "__main__":
    main()

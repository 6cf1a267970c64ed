"""Play an exported policy with onnxruntime and numpy: neither torch nor this package computes it.

python -m w2f_torchrl.export examples/pretrained/finger_spin_easy.pt policy.onnx
python examples/play_onnx.py policy.onnx --scenery unseen_videos_easy

:class:`OnnxPolicy` is all that a robot or a game needs: copy it. It reads the names and shapes of
its inputs from the file. Only the environment, :class:`TaskEnv`, comes from this package.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray


class OnnxPolicy:
    """A policy that acts in N envs at once, and carries its state from call to call.

    Args:
        path: A file of ``python -m w2f_torchrl.export``.
        seed: Of the draws of the latent's state, and of the action if it is sampled.
    """

    def __init__(self, path: str | Path, seed: int = 0) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # the networks are small: more threads cost time
        self.session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.description = json.loads(metadata["w2f_torchrl"])
        self.outputs = [entry["name"] for entry in self.description["outputs"]]
        self.random = np.random.default_rng(seed)
        self.carried: dict[str, NDArray[np.float32]] = {}

    def __call__(self, **observation: NDArray[Any]) -> NDArray[np.float32]:
        """Act.

        Args:
            **observation: ``pixels``, uint8 ``[N, 3, H, W]``, ``is_init``, bool ``[N, 1]``, true
                where an episode begins, and what else the policy observes.

        Returns:
            Actions ``[N, A]`` in [-1, 1], or one-hot.
        """
        count = len(observation["pixels"])
        given = dict(observation)
        for entry in self.description["inputs"]:
            name, shape = entry["name"], (count, *entry["shape"][1:])
            if entry["kind"] == "carried":
                given[name] = self.carried.get(name, np.zeros(shape, np.float32))
            elif entry["kind"] == "uniform":
                given[name] = self.random.random(shape, np.float32)
            elif entry["kind"] == "normal":
                given[name] = self.random.standard_normal(shape, np.float32)
        made = dict(zip(self.outputs, self.session.run(self.outputs, given), strict=True))
        self.carried = {name: made[key] for key, name in self.description["carried"].items()}
        return made["action"]


class TaskEnv:
    """The task that a policy was trained on, in numpy.

    Args:
        description: The policy's.
        seed: The env's seed.
        scenery: An evaluation set, whose distraction replaces that of training.
    """

    def __init__(self, description: dict[str, Any], seed: int, scenery: str | None = None) -> None:
        from w2f_torchrl.config import to_run_config
        from w2f_torchrl.data.environments import build_env
        from w2f_torchrl.envs import evaluation_sets

        environment = to_run_config(description["settings"]).environment
        sets = evaluation_sets()
        if scenery is not None and scenery not in sets:
            raise SystemExit(f"--scenery={scenery} is unknown; allowed: {', '.join(sets)}.")
        chosen = None if scenery is None else sets[scenery]
        self.env = build_env(environment, seed, evaluation_set=chosen)
        self.observed = {
            entry["name"]: entry["dtype"]
            for entry in description["inputs"]
            if entry["kind"] == "observation"
        }

    def reset(self) -> dict[str, NDArray[Any]]:
        """Begin an episode, and return the observation of one env, ``[1, ...]``."""
        self.data = self.env.reset()
        return self._observation()

    def step(self, action: NDArray[np.float32]) -> tuple[dict[str, NDArray[Any]], float, bool]:
        """Take an action ``[1, A]``: the next observation, the reward, and whether that was all."""
        import torch

        self.data["action"] = torch.from_numpy(action[0])
        self.data = self.env.step(self.data)["next"]
        return self._observation(), float(self.data["reward"]), bool(self.data["done"])

    def _observation(self) -> dict[str, NDArray[Any]]:
        return {
            name: self.data[name].numpy()[None].astype(dtype)
            for name, dtype in self.observed.items()
        }


def play(policy: OnnxPolicy, env: TaskEnv) -> tuple[float, int]:
    """Play one episode, and return its return and length in agent steps."""
    observation, total, steps, done = env.reset(), 0.0, 0, False
    while not done:
        observation, reward, done = env.step(policy(**observation))
        total, steps = total + reward, steps + 1
    return total, steps


def main(arguments: list[str] | None = None) -> float:
    """Play an episode, and print and return what it got."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("policy", type=Path, help="a file of python -m w2f_torchrl.export")
    parser.add_argument("--scenery", help="an evaluation set, such as unseen_videos_easy")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(arguments)
    policy = OnnxPolicy(args.policy, args.seed)
    about = policy.description
    total, steps = play(policy, TaskEnv(about, args.seed, args.scenery))
    print(
        f"{about['domain']} {about['task']}: return {total:.0f} in {steps} agent steps of "
        f"{about['action_repeat']} control steps"
    )
    return total


if __name__ == "__main__":
    main()

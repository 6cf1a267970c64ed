"""Time a step of a policy: ``load_policy``, its ONNX file under onnxruntime, and its ``.pt2`` file.

    python benchmarks/speed/export.py
    python benchmarks/speed/export.py --models size1m size12m --envs 1 4

``pretrained`` is examples/pretrained/finger_spin_easy.pt; a preset is a random policy of its size.
Every round times one step of each contender in turn, with one thread: CPU time of the process, so
that waiting for a core does not count. Kept are medians, the median over the rounds of each ratio
to ``load_policy``, and the sizes of the files. Inputs exist before a step; only ``load_policy``
draws its noise in it. The environment's picture is not part of a step. The pretrained agent also
plays an episode, in which the largest differences from ``load_policy`` and from the computation in
float64 are kept.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "shared"))

import onnxruntime
import torch
from learner import summarise
from results_file import RESULTS, write_results
from tensordict import TensorDict
from torch import Tensor

from w2f_torchrl.checkpoint import save_checkpoint
from w2f_torchrl.config import to_run_config
from w2f_torchrl.config.run import config_to_dict
from w2f_torchrl.export import export_policy, read_description
from w2f_torchrl.export.write import policy_program
from w2f_torchrl.modules import PRESETS
from w2f_torchrl.trainers import Learner, LoadedPolicy, load_policy

PRETRAINED = Path(__file__).parents[2] / "examples" / "pretrained" / "finger_spin_easy.pt"
BASELINE = "load_policy"
WARM_UP = 10
Call = Callable[[dict[str, Tensor]], dict[str, Any]]


def checkpoint_of(model: str, folder: Path) -> Path:
    """The agent that comes with the repository, or a random one of a preset's size."""
    if model == "pretrained":
        return PRETRAINED
    config = to_run_config({"model": vars(PRESETS[model]), "device": "cpu"})
    torch.manual_seed(0)
    learner = Learner.from_config(config, 1)
    payload = {
        "config": config_to_dict(config),
        "action_size": 1,
        "learner": {"loss": learner.loss.state_dict()},
        "exported": True,
    }
    return save_checkpoint(folder, payload, updates=0, frames=0)


def inputs_of(description: dict[str, Any], envs: int) -> dict[str, Tensor]:
    """Random inputs, as in the middle of an episode."""
    generator = torch.Generator().manual_seed(0)
    given = {}
    for entry in description["inputs"]:
        shape = [envs, *entry["shape"][1:]]
        values = torch.rand(shape, generator=generator)
        given[entry["name"]] = (255 * values).byte() if entry["dtype"] == "uint8" else values
    given["is_init"] = torch.zeros(envs, 1, dtype=torch.bool)
    return given


def step_policy(policy: LoadedPolicy, given: dict[str, Tensor]) -> dict[str, Any]:
    """Return what ``load_policy``'s step makes, under the names of a file's outputs."""
    seen = {name: given[name] for name in policy.in_keys}
    acted = policy(TensorDict(seen, [len(given["pixels"])]))
    return {"action": acted["action"], **{f"next_{k}": v for k, v in acted["next"].items()}}


def callers(paths: dict[str, Path]) -> dict[str, Call]:
    """How each file is called, with one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        paths["onnx"], options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    module = torch.export.load(paths["pt2"]).module()

    def onnx(given: dict[str, Tensor]) -> dict[str, Any]:
        arrays = {name: value.numpy() for name, value in given.items()}
        return dict(zip(names, session.run(names, arrays), strict=True))

    def pt2(given: dict[str, Tensor]) -> dict[str, Any]:
        with torch.no_grad():
            made: dict[str, Any] = module(**given)
        return made

    return {"onnxruntime": onnx, "pt2": pt2}


def in_float64(checkpoint: Path) -> Call:
    """The same computation in double precision."""
    step = policy_program(checkpoint).step.double()

    def call(given: dict[str, Tensor]) -> dict[str, Any]:
        with torch.no_grad():
            made: dict[str, Any] = step(
                **{k: v.double() if v.is_floating_point() else v for k, v in given.items()}
            )
        return made

    return call


def play_episode(checkpoint: Path, paths: dict[str, Path], seed: int = 2) -> dict[str, Any]:
    """Let all act in one episode in unseen scenery, each from the state that it carries itself.

    ``load_policy``'s action is the one that is taken; all get the numbers that it draws.

    Returns:
        By contender the largest difference from ``load_policy`` over the episode, of a step from
        the same carried state (``one_step``) and of the whole (``episode``), and by output the
        largest difference of the whole from the computation in float64 (``from_float64``).
    """
    policy = load_policy(checkpoint)
    env = policy.make_env(seed=seed, evaluation_set="unseen_videos_easy")
    exact, files = in_float64(checkpoint), callers(paths)
    zeros = inputs_of(read_description(paths["pt2"]), 1)
    carried = [name for name in zeros if name in policy.in_keys[2:]]
    start = {name: torch.zeros_like(zeros[name]) for name in carried}
    own: dict[str, dict[str, Tensor]] = dict.fromkeys((BASELINE, "float64", *files), start)
    found: dict[str, Any] = {name: {"one_step": {}, "episode": {}} for name in files}
    found |= {name: found.get(name, {}) | {"from_float64": {}} for name in (BASELINE, *files)}
    data, total, steps, done = env.reset(), 0.0, 0, False
    while not done:
        torch.manual_seed(steps)
        noise = torch.rand(zeros["state_noise"].shape)
        seen = {"pixels": data["pixels"][None], "is_init": data["is_init"][None]}
        seen["state_noise"] = noise
        torch.manual_seed(steps)
        wanted = step_policy(policy, seen | own[BASELINE])
        calls = {"float64": exact, **files}
        made = {name: tensors(call(seen | own[name])) for name, call in calls.items()}
        for name, call in files.items():
            worsen(found[name]["one_step"], tensors(call(seen | own[BASELINE])), wanted)
            worsen(found[name]["episode"], made[name], wanted)
        made[BASELINE] = wanted
        for name in (BASELINE, *files):
            worsen(found[name]["from_float64"], made[name], made["float64"])
        own = {name: {key: made[name][f"next_{key}"] for key in carried} for name in own}
        data["action"] = wanted["action"][0]
        data = env.step(data)["next"]
        total, steps, done = total + float(data["reward"]), steps + 1, bool(data["done"])
    env.close()
    return {"agent_steps": steps, "return": round(total, 1), "differences": found}


def tensors(made: Mapping[str, Any]) -> dict[str, Tensor]:
    """Outputs as tensors."""
    return {name: torch.as_tensor(value) for name, value in made.items()}


def worsen(worst: dict[str, float], made: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Keep the largest difference of each output; an action is compared as the env gets it."""
    for name, value in tensors(made).items():
        difference = float((value.clamp(-1, 1) - wanted[name].clamp(-1, 1)).abs().max())
        if name != "next_previous_action":
            worst[name] = max(worst.get(name, 0.0), difference)


def time_steps(
    calls: dict[str, Call], given: dict[str, Tensor], rounds: int
) -> dict[str, list[float]]:
    """CPU seconds of each round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + WARM_UP):
        for name, call in calls.items():
            begin = time.process_time()
            call(given)
            if turn >= WARM_UP:
                seconds[name].append(time.process_time() - begin)
    return seconds


def measure(model: str, envs: list[int], rounds: int, folder: Path) -> dict[str, Any]:
    """Export a policy, and time its steps for each number of envs."""
    checkpoint = checkpoint_of(model, folder)
    policy = load_policy(checkpoint)
    paths = {
        suffix: export_policy(checkpoint, folder / f"{model}.{suffix}")
        for suffix in ("onnx", "pt2")
    }
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in policy.policy.parameters()),
        "bytes": {name: path.stat().st_size for name, path in paths.items()},
    }
    calls = {BASELINE: partial(step_policy, policy), **callers(paths)}
    for count in envs:
        given = inputs_of(read_description(paths["pt2"]), count)
        table = summarise(time_steps(calls, given, rounds), (BASELINE,))
        for row in table.values():
            row["milliseconds"] = round(1e3 * row.pop("median_seconds"), 3)
        found[f"envs_{count}"] = table
    if model == "pretrained":
        found["episode"] = play_episode(checkpoint, paths)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", choices=["pretrained", *PRESETS], default=["pretrained", "size12m"]
    )
    parser.add_argument("--envs", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--json", type=Path, default=RESULTS / "export.json")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    packages = {
        name: importlib.metadata.version(name) for name in ("onnx", "onnxruntime", "onnxscript")
    }
    results: dict[str, Any] = {"rounds": args.rounds, "export_versions": packages, "policies": {}}
    for model in args.models:
        with tempfile.TemporaryDirectory() as folder:
            results["policies"][model] = measure(model, args.envs, args.rounds, Path(folder))
    for model, found in results["policies"].items():
        for count in args.envs:
            for name, row in found[f"envs_{count}"].items():
                print(f"{model}, {count} envs, {name}: {row}")
        print(found.get("episode", ""))
    write_results(args.json, results)


if __name__ == "__main__":
    main()

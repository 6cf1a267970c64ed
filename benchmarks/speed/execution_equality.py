"""Check that every mode of execution learns what eager learns: update by update, and freely.

    python benchmarks/speed/execution_equality.py
    python benchmarks/speed/execution_equality.py --device cuda --modes eager compile cuda_graph \
        --model size1m --batch-size 8 --batch-length 32

One by one: before each update the mode's learner is given eager's parameters, optimizer and return
statistics, the same batch and the same seed, so that nothing accumulates. What remains are the
rounding differences of one update: of the world model's losses, and of those that learn from
returns (actor, critic, replayed critic), each relative to eager's; of the gradients; and of the
parameters' change; the latter two as norms of the difference over norms of eager's. The medians
over all updates must be within ``MEDIANS``, and each update within ``TOLERANCES``; a rounding
difference can flip a sampled class (a uniform number lies between two roundings of a probability),
so one update in ten may exceed them. For comparison the results have the differences of a third
learner: eager, from parameters that were nudged by one unit in the last place.

Free-running: the same batches and seeds from the same first parameters, and nothing else in common.
Flipped samples grow as in any chaotic system, so means over all updates are compared, and set
against the largest difference of five eager runs that were nudged at their start.

Rewards and values are read off bins that reach ``LARGEST_BIN`` here, not 4.8e8. With those, where a
head is still unsure, one unit in the last place of an outer bin's probability moves a reward by one
or more, and returns of two learners could be compared with nothing.

Graphs that are compiled after the second update are counted: there must be none.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "shared"))

import torch
from results_file import RESULTS, write_results
from tensordict import TensorDictBase
from tiny_run import TINY
from torch import Tensor, nn
from torchrl.modules import symexp

from w2f_torchrl.config import EXECUTIONS, OptimizerConfig
from w2f_torchrl.learner.execution import PIECES, compile_core
from w2f_torchrl.modules import PRESETS
from w2f_torchrl.trainers import Learner

#: Largest differences of one update that are called rounding.
TOLERANCES = {"world_model": 1e-5, "returns": 1e-4, "gradients": 1e-3, "change": 1e-2}
#: Of the medians over all updates; float32's unit in the last place is 1.2e-7.
MEDIANS = {"world_model": 1e-6, "returns": 1e-5, "gradients": 1e-5, "change": 1e-4}
#: The losses that learn from returns.
OF_RETURNS = ("loss_actor", "loss_critic", "loss_replay_critic")
#: Share of the updates in which a draw may turn.
TURNED = 0.1
#: Eager runs that are nudged at their start: one alone says little of how far such runs part.
NUDGED_RUNS = 5
#: Of the means over all updates, relative and absolute, and times the nudged runs' largest.
MEAN_RTOL, MEAN_ATOL, MEAN_FACTOR = 5e-2, 3e-2, 3
#: The outermost bin of rewards and values, in DreamerV3's units before symexp: 147 after it.
LARGEST_BIN = 5.0

Make = Callable[[str], Learner]
Batch = Callable[[int], TensorDictBase]


def compare(make: Make, mode: str, batch: Batch, updates: int) -> dict[str, Any]:
    """Compare a mode's updates with eager's.

    Args:
        make: Makes the learner of a mode, always with the same parameters.
        mode: One of ``training.execution``.
        batch: Gives the samples ``[B, T]`` of an update, by its number.
        updates: How many.

    Returns:
        ``one_by_one`` and ``free_running`` (see the module), and ``passed``.
    """
    # Noise that is drawn inside a graph comes from torch's own generator only if asked.
    with torch._inductor.config.patch(fallback_random=True):
        learner, eager, nudged = make(mode), make("eager"), make("eager")
        one_by_one = _one_by_one(eager, learner, nudged, batch, updates)
        want = _losses_of(make("eager"), batch, updates)
        restart(make("eager"), learner)
        got, runs = _losses_of(learner, batch, updates), []
        for seed in range(NUDGED_RUNS):
            restart(make("eager"), nudged)
            nudge(nudged, seed)
            runs.append(_losses_of(nudged, batch, updates))
        free = _free_running(want, got, torch.stack(runs))
    passed = one_by_one["passed"] and free["passed"]
    return {"updates": updates, "one_by_one": one_by_one, "free_running": free, "passed": passed}


def _one_by_one(
    eager: Learner, other: Learner, nudged: Learner, batch: Batch, updates: int
) -> dict[str, Any]:
    rows: dict[str, dict[str, list[float]]] = {
        who: {name: [] for name in TOLERANCES} for who in ("mode", "nudged")
    }
    graphs = 0
    for number in range(updates):
        before = [p.detach().clone() for p in eager.parameters_trained]
        for each in (other, nudged):
            synchronise(eager, each)
        nudge(nudged, number)
        want = _update(eager, batch, number)
        if not want.isfinite().all() or torch.equal(want, torch.zeros_like(want)):
            raise AssertionError(f"eager's losses of update {number} are {want.tolist()}.")
        for who, each in (("mode", other), ("nudged", nudged)):
            start = [p.detach().clone() for p in each.parameters_trained]
            got = _update(each, batch, number)
            row = rows[who]
            of_returns = torch.tensor([name in OF_RETURNS for name in eager.loss.out_keys])
            row["world_model"].append(_relative(got[~of_returns], want[~of_returns]))
            row["returns"].append(_relative(got[of_returns], want[of_returns]))
            gradients = ([p.grad for p in of.parameters_trained] for of in (each, eager))
            row["gradients"].append(_distance(*gradients))
            row["change"].append(_distance(_change(each, start), _change(eager, before)))
        if number == 1:
            graphs = unique_graphs()
    return _judge(rows, unique_graphs() - graphs)


def _change(learner: Learner, before: Sequence[Tensor]) -> list[Tensor]:
    pairs = zip(learner.parameters_trained, before, strict=True)
    return [parameter.detach() - old for parameter, old in pairs]


def _judge(rows: dict[str, dict[str, list[float]]], later_graphs: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    out: set[int] = set()
    for name, tolerance in TOLERANCES.items():
        differences, expected = rows["mode"][name], rows["nudged"][name]
        out |= {i for i, value in enumerate(differences) if value > tolerance}
        result[name] = {
            "median": statistics.median(differences),
            "largest": max(differences),
            "nudged_median": statistics.median(expected),
            "nudged_largest": max(expected),
            "updates_within_tolerance": sum(value <= tolerance for value in differences),
        }
    updates = len(rows["mode"]["change"])
    result["updates_equal"] = updates - len(out)
    result["graphs_compiled_after_2_updates"] = later_graphs
    medians = all(result[name]["median"] <= limit for name, limit in MEDIANS.items())
    result["passed"] = medians and len(out) <= TURNED * updates and later_graphs == 0
    return result


def _free_running(want: Tensor, got: Tensor, nudged: Tensor) -> dict[str, Any]:
    """Compare losses ``[updates, L]``; ``nudged``: of several runs ``[R, updates, L]``."""
    difference, apart = ((run.mean(-2) - want.mean(0)).abs() for run in (got, nudged))
    expected = apart.amax(0)
    limit = MEAN_ATOL + MEAN_RTOL * want.mean(0).abs() + MEAN_FACTOR * expected
    return {
        "largest_relative_difference_of_first_5": _relative(got[:5], want[:5]),
        "largest_difference_of_means": float(difference.max()),
        "nudged_largest_difference_of_means": float(expected.max()),
        "passed": bool((difference <= limit).all()),
    }


@torch.no_grad()
def nudge(learner: Learner, seed: int) -> None:
    """Move every trained parameter by one unit in the last place, up or down at random."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in learner.parameters_trained:
        up = torch.rand(parameter.shape, generator=generator) < 0.5
        infinity = torch.where(up, torch.inf, -torch.inf).to(parameter.device)
        parameter.copy_(torch.nextafter(parameter, infinity))


def _update(learner: Learner, batch: Batch, number: int) -> Tensor:
    """One update; its losses ``[L]`` on the host."""
    torch.manual_seed(number + 1)
    metrics = learner.update(batch(number))
    return torch.stack([metrics[name] for name in learner.loss.out_keys]).double().cpu()


def _losses_of(learner: Learner, batch: Batch, updates: int) -> Tensor:
    return torch.stack([_update(learner, batch, number) for number in range(updates)])


def unique_graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@torch.no_grad()
def synchronise(source: Learner, target: Learner) -> None:
    """Copy all that an update changes, in place: a captured graph holds the addresses."""
    # Of the modules: a learner's own holds its optimizer too.
    states = [nn.Module.state_dict(learner).items() for learner in (source, target)]
    pairs = zip(*states, strict=True)
    for (name, theirs), (own_name, own) in pairs:
        assert name == own_name
        own.copy_(theirs)
    optimizers = zip(source.optimizer.param_groups, target.optimizer.param_groups, strict=True)
    for theirs, own in optimizers:
        count = theirs["step"]
        if isinstance(own["step"], Tensor):
            own["step"].copy_(torch.as_tensor(count))
        else:
            own["step"] = count.clone() if isinstance(count, Tensor) else count
    for theirs, own in zip(source.parameters_trained, target.parameters_trained, strict=True):
        state = target.optimizer.state[own]
        for name, moment in source.optimizer.state[theirs].items():
            if name in state:
                state[name].copy_(moment)
            else:
                state[name] = moment.clone()


@torch.no_grad()
def restart(fresh: Learner, learner: Learner) -> None:
    """Take a learner back to a fresh one's state: no moments, no updates counted."""
    for state in learner.optimizer.state.values():
        for moment in state.values():
            moment.zero_()
    synchronise(fresh, learner)


def _relative(got: Tensor, want: Tensor) -> float:
    """The largest relative difference; losses below 1e-3 count as that large."""
    return float(((got - want).abs() / want.abs().clamp(min=1e-3)).max())


def _distance(got: Sequence[Any], want: Sequence[Any]) -> float:
    """Norm of the difference over the norm of the expected change; 0 where none is expected."""
    pairs = zip(got, want, strict=True)
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    size = sum(float(b.double().square().sum()) for b in want)
    return (difference / size) ** 0.5 if size else difference**0.5


def make_batch(
    number: int,
    batch: int,
    time_steps: int,
    size: int,
    device: str,
    actions: int | None = None,
) -> TensorDictBase:
    """Random records, another batch for each number, with an episode that ends in it."""
    from learner import make_sample

    sample = make_sample(batch, time_steps, device, size, seed=number)
    if actions is not None:
        index = torch.randint(
            actions, sample.shape, generator=torch.Generator().manual_seed(number)
        )
        sample["action"] = nn.functional.one_hot(index, actions).float().to(device)
    last = time_steps // 2
    sample["next", "done"][0, last] = sample["next", "terminated"][0, last] = True
    sample["is_init"][0, last + 1] = True
    sample["is_init"][-1, 0] = True
    return sample


def run(
    modes: Sequence[str],
    *,
    model: str = "tiny",
    latents: Sequence[str] = ("whole", "split"),
    batch_size: int = 3,
    batch_length: int = 6,
    updates: int = 50,
    device: str = "cpu",
    actions: int | None = None,
) -> dict[str, Any]:
    """Compare each mode with eager, and eager with itself, for each latent."""
    from learner import ACTION_SIZE

    sizes, image = (TINY, 16) if model == "tiny" else (PRESETS[model], 64)
    rows: dict[str, Any] = {}
    for latent in latents:

        def make(mode: str, latent: str = latent) -> Learner:
            torch.manual_seed(0)
            learner = Learner(
                sizes,
                action_size=actions or ACTION_SIZE,
                discrete_actions=actions is not None,
                image_size=image,
                latent=latent,
                execution="eager" if mode == "compile" else mode,
                device=device,
                optimizer=OptimizerConfig(lr=1e-3, warmup_updates=3),
            )
            if mode == "compile":  # on a CPU too all that is compiled on CUDA
                compile_core(learner.loss, PIECES)
            bins = learner.loss.world_model.two_hot.bins
            bins.copy_(symexp(torch.linspace(-LARGEST_BIN, LARGEST_BIN, len(bins))))
            return learner

        def batch(number: int) -> TensorDictBase:
            return make_batch(number, batch_size, batch_length, image, device, actions)

        for mode in modes:
            row = rows[f"{latent}, {mode}"] = compare(make, mode, batch, updates)
            print(f"{latent}, {mode}: {row}", flush=True)
    return rows


def main() -> None:
    """Compare and write the results; the exit code is the number of modes that differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    modes = ["eager", "compile", "compile_all"]
    parser.add_argument("--modes", nargs="+", default=modes, choices=EXECUTIONS)
    parser.add_argument("--model", default="tiny", choices=["tiny", *PRESETS])
    parser.add_argument(
        "--latents", nargs="+", default=["whole", "split"], choices=["whole", "split", "shared"]
    )
    parser.add_argument("--batch-size", type=int, default=3)
    parser.add_argument("--batch-length", type=int, default=6)
    parser.add_argument("--updates", type=int, default=50)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--actions", type=int, help="of so many discrete actions")
    name = "execution_equality.json"
    parser.add_argument("--out", type=Path, default=RESULTS / name)
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    rows = run(**settings)
    tolerances = {
        "update": TOLERANCES,
        "medians": MEDIANS,
        "largest_bin": LARGEST_BIN,
        "share_out": TURNED,
        "means": {"relative": MEAN_RTOL, "absolute": MEAN_ATOL, "times_nudged": MEAN_FACTOR},
    }
    results = {"settings": settings, "tolerances": tolerances, "against_eager": rows}
    print(write_results(args.out, results).read_text())
    raise SystemExit(sum(not row["passed"] for row in rows.values()))


if __name__ == "__main__":
    main()

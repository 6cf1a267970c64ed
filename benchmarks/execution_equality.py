"""Every mode of execution learns what eager learns: update by update, and left to itself.

    python benchmarks/execution_equality.py
    python benchmarks/execution_equality.py --device cuda --modes eager compile cuda_graph \
        --model size1m --batch-size 8 --batch-length 32

One by one: before each update the mode's learner is given eager's parameters, optimizer and return
statistics, the same batch and the same seed, so that nothing accumulates. What is left are the
rounding differences of one update: of each loss, relative to eager's; of the gradients; and of the
parameters' change; the latter two as norms of the difference over norms of eager's. A rounding
difference can turn a draw (a uniform number lies between two roundings of a probability), and such
an update is far out. A small model draws a thousand numbers an update, and none of 50 may be out; a
preset draws a hundred thousand, and one in ten may.

Free-running: the same batches and seeds from the same first parameters, and nothing else in common.
Rounding differences grow as in any chaotic system, so means over all updates are compared.

Graphs that are compiled after the second update are counted: there must be none.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from results_file import write_results
from tensordict import TensorDictBase
from torch import Tensor

from w2f_torchrl.modules import PRESETS, ModelConfig
from w2f_torchrl.trainers import Learner
from w2f_torchrl.trainers.config import EXECUTIONS, OptimizerConfig

#: Largest differences of one update that are called rounding.
TOLERANCES = {"losses": 1e-4, "gradients": 1e-3, "change": 1e-2}
#: Share of the updates of a preset in which a draw may turn.
TURNED = 0.1
#: Of the means over all updates, relative and absolute.
MEAN_RTOL, MEAN_ATOL = 5e-2, 3e-2
#: A model of a few thousand parameters for pictures of 16 x 16: compiles in a minute or two.
TINY = ModelConfig(
    preset="tiny",
    belief_size=16,
    hidden_size=8,
    num_categoricals=4,
    num_classes=4,
    cnn_depth=4,
    units=8,
    background_belief_size=8,
    background_hidden_size=8,
    background_num_classes=4,
    background_cnn_depth=4,
    num_blocks=4,
    num_bins=41,
)

Make = Callable[[str], Learner]
Batch = Callable[[int], TensorDictBase]


def compare(make: Make, mode: str, batch: Batch, updates: int, turned: float = 0) -> dict[str, Any]:
    """Compare a mode's updates with eager's.

    Args:
        make: Makes the learner of a mode, always with the same parameters.
        mode: One of ``training.execution``.
        batch: Gives the samples ``[B, T]`` of an update, by its number.
        updates: How many.
        turned: Share of them that may be out of the tolerances.

    Returns:
        ``one_by_one`` and ``free_running`` (see the module), and ``passed``.
    """
    # Noise that is drawn inside a graph comes from torch's own generator only if asked.
    with torch._inductor.config.patch(fallback_random=True):
        learner = make(mode)
        one_by_one = _one_by_one(make("eager"), learner, batch, updates)
        enough = one_by_one["updates_within_tolerances"] >= (1 - turned) * updates
        want = _losses_of(make("eager"), batch, updates)
        restart(make("eager"), learner)
        got = _losses_of(learner, batch, updates)
    difference = (got.mean(0) - want.mean(0)).abs()
    free = {
        "largest_relative_difference_of_first_5": _relative(got[:5], want[:5]),
        "largest_difference_of_means": float(difference.max()),
        "passed": bool((difference <= MEAN_ATOL + MEAN_RTOL * want.mean(0).abs()).all()),
    }
    compiled_once = one_by_one["graphs_compiled_after_2_updates"] == 0
    passed = enough and compiled_once and free["passed"]
    return {"updates": updates, "one_by_one": one_by_one, "free_running": free, "passed": passed}


def _one_by_one(eager: Learner, other: Learner, batch: Batch, updates: int) -> dict[str, Any]:
    rows: dict[str, list[float]] = {name: [] for name in TOLERANCES}
    graphs = 0
    for number in range(updates):
        synchronise(eager, other)
        before = [p.detach().clone() for p in eager.parameters_trained]
        want, got = (_update(learner, batch, number) for learner in (eager, other))
        if not want.isfinite().all() or torch.equal(want, torch.zeros_like(want)):
            raise AssertionError(f"eager's losses of update {number} are {want.tolist()}.")
        rows["losses"].append(_relative(got, want))
        gradients = ([p.grad for p in each.parameters_trained] for each in (other, eager))
        rows["gradients"].append(_distance(*gradients))
        changes = (
            [p.detach() - old for p, old in zip(each.parameters_trained, before, strict=True)]
            for each in (other, eager)
        )
        rows["change"].append(_distance(*changes))
        if number == 1:
            graphs = unique_graphs()
    within = [all(rows[k][i] <= limit for k, limit in TOLERANCES.items()) for i in range(updates)]
    result: dict[str, Any] = {
        name: {"largest": max(values), "median": statistics.median(values)}
        for name, values in rows.items()
    }
    result["updates_within_tolerances"] = sum(within)
    result["graphs_compiled_after_2_updates"] = unique_graphs() - graphs
    return result


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
    pairs = zip(source.state_dict().items(), target.state_dict().items(), strict=True)
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
    """Norm of the difference over the norm of what is wanted; 0 where nothing is to change."""
    pairs = zip(got, want, strict=True)
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    size = sum(float(b.double().square().sum()) for b in want)
    return (difference / size) ** 0.5 if size else difference**0.5


def make_batch(number: int, batch: int, time_steps: int, size: int, device: str) -> TensorDictBase:
    """Random records, another batch for each number, with an episode that ends in it."""
    from learner import make_sample

    sample = make_sample(batch, time_steps, device, size, seed=number)
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
) -> dict[str, Any]:
    """Compare each mode with eager, for each latent; eager with itself shows what is no mode's."""
    from learner import ACTION_SIZE

    sizes, image, turned = (TINY, 16, 0) if model == "tiny" else (PRESETS[model], 64, TURNED)
    rows: dict[str, Any] = {}
    for latent in latents:

        def make(mode: str, latent: str = latent) -> Learner:
            torch.manual_seed(0)
            return Learner(
                sizes,
                action_size=ACTION_SIZE,
                image_size=image,
                latent=latent,
                execution=mode,
                device=device,
                optimizer=OptimizerConfig(lr=1e-3, warmup_updates=3),
            )

        def batch(number: int) -> TensorDictBase:
            return make_batch(number, batch_size, batch_length, image, device)

        for mode in modes:
            row = rows[f"{latent}, {mode}"] = compare(make, mode, batch, updates, turned)
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
    name = "execution_equality.json"
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / name)
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    rows = run(**settings)
    tolerances = TOLERANCES | {
        "share_of_turned_updates": 0 if args.model == "tiny" else TURNED,
        "means": {"relative": MEAN_RTOL, "absolute": MEAN_ATOL},
    }
    results = {"settings": settings, "tolerances": tolerances, "against_eager": rows}
    print(write_results(args.out, results).read_text())
    raise SystemExit(sum(not row["passed"] for row in rows.values()))


if __name__ == "__main__":
    main()

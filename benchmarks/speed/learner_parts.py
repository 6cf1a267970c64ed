"""Measure where an update's time is spent on a CPU, and which parts are faster compiled.

    python benchmarks/speed/learner_parts.py
    python benchmarks/speed/learner_parts.py --threads 2

The parts are the pieces that ``training.execution=compile`` compiles: encoder, decoder and
recurrence forward and back, imagination forward only; eager and compiled take turns. Kept are
medians of CPU time. ``seconds_by_kind`` sorts what torch's profiler notes in an eager update, ours
(with TorchRL's encoder and decoder) and one of TorchRL's parts: matrix products, convolutions, and
the rest of the update's median: everything else and Python.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "shared"))

import torch
from learner import ACTION_SIZE, Update, make_sample, measure, torchrl_update
from results_file import RESULTS, write_results
from tensordict import TensorDictBase
from torch.profiler import ProfilerActivity, profile
from torchrl_reference import with_torchrls_pictures

from w2f_torchrl.learner.execution import PIECES, compile_core
from w2f_torchrl.modules import PRESETS, imagine
from w2f_torchrl.modules.image_decoder import ImageDecoder
from w2f_torchrl.trainers import Learner
from w2f_torchrl.utils.memory import keep_freed_memory

#: Parts of the names of the profiler's operations, by kind.
KINDS = {
    "products": ("::mm", "::addmm", "::bmm", "::baddbmm", "::mv", "::addmv", "_linear_pointwise"),
    "convolutions": ("convolution",),
}
#: Floats that are touched and freed first: memory that grows during the measurement is cleared
#: page by page, which the profiler would count with the operation that asks for it.
HEAP = 2**28


def parts(learner: Learner, sample: TensorDictBase) -> dict[str, Callable[[], object]]:
    """Each part as a function without arguments."""
    loss, model = learner.loss, learner.world_model
    pixels = sample["next", "pixels"]
    with torch.no_grad():
        latent = model.infer(sample.select(*loss.in_keys)).get("next")
    state, belief = latent["state"], latent["belief"]
    starts = state.flatten(0, 1), belief.flatten(0, 1)
    inputs = [x.clone().requires_grad_() for x in (state, belief, latent["encoded_latents"])]
    (decoder,) = (m for m in model.decoder.modules() if isinstance(m, ImageDecoder))
    encode = model.compiled.get("encoder", model.encoder)

    def back(outputs: list[torch.Tensor]) -> None:
        learner.optimizer.zero_grad()
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])

    def roll() -> None:
        back(list(model.rollout.unroll(inputs[2], sample["action"], sample["is_init"])))

    return {
        "encoder": lambda: back([encode(pixels)]),
        "decoder": lambda: back([decoder(*inputs[:2])]),
        "recurrence": roll,
        "imagination": lambda: imagine(
            model.prior, loss.actor, *starts, loss.config.imagination_horizon, loss.imagine_step
        ),
    }


def timed(
    functions: dict[str, Callable[[], object]], sample: TensorDictBase, rounds: int
) -> dict[str, float]:
    """Median CPU seconds of functions that take turns."""
    takers = {name: (lambda _, call=call: call(), sample) for name, call in functions.items()}
    seconds, _, _ = measure(takers, rounds, "cpu")
    return {name: round(statistics.median(times), 5) for name, times in seconds.items()}


def by_kind(update: Update, sample: TensorDictBase, rounds: int) -> dict[str, float]:
    """Seconds of an eager update by kind of operation."""
    total = timed({"update": lambda: update(sample.clone())}, sample, rounds)["update"]
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(rounds):
            update(sample.clone())
    table = {
        kind: sum(
            row.self_cpu_time_total
            for row in profiled.key_averages()
            if any(name in row.key for name in names) and "Backward" not in row.key
        )
        for kind, names in KINDS.items()
    }
    seconds = {kind: round(micro / rounds / 1e6, 5) for kind, micro in table.items()}
    rest = total - sum(seconds.values())
    return {"update": total, **seconds, "rest": round(rest, 5)}


def run(model: str, batch: tuple[int, int], rounds: int, threads: int) -> dict[str, Any]:
    """Measure everything."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    torch.ones(HEAP)
    sample = make_sample(*batch)
    bare = sample.exclude(("next", "foreground_mask"))
    torchrls = with_torchrls_pictures(PRESETS[model])
    comparable = Learner(torchrls, action_size=ACTION_SIZE, latent="whole")
    learners = [Learner(PRESETS[model], action_size=ACTION_SIZE, latent="whole") for _ in range(2)]
    kinds = {
        "torchrl_parts": by_kind(torchrl_update(model), bare, rounds),
        "dreamer_v3": by_kind(comparable.update, sample, rounds),
    }
    compile_core(learners[1].loss, PIECES)
    eager, compiled = (parts(learner, sample) for learner in learners)
    table = {}
    for name in eager:
        row = timed({"eager": eager[name], "compiled": compiled[name]}, sample, rounds)
        table[name] = row | {"compiled_to_eager": round(row["compiled"] / row["eager"], 3)}
    return {"seconds_by_kind": kinds, "parts": table}


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="size1m", choices=list(PRESETS))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batch-length", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="default: results/learner_parts.json")
    args = parser.parse_args()
    batch = (args.batch_size, args.batch_length)
    results = run(args.model, batch, args.rounds, args.threads)
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    path = args.out or RESULTS / "learner_parts.json"
    print(write_results(path, {"settings": settings, **results}).read_text())


if __name__ == "__main__":
    main()

r"""Count the kernels that an update launches on a GPU; no GPU is needed.

    python benchmarks/speed/kernels.py
    python benchmarks/speed/kernels.py --torchrl --r2dreamer ../r2dreamer \
        --output benchmarks/results/kernels.json

An eager update runs on fake CUDA tensors (:mod:`fake_cuda`) and every operation that it dispatches
is counted, below autograd and autocast, by kind and by the part of the update that did it. A
captured graph replays the same kernels, one after the other, each of which takes 1.5 to 2
microseconds on a GPU however little it computes, and a compiler fuses some of them.

Kernels per operation:

- views, ``empty`` and ``detach``: none, they touch no memory of the device;
- an operation on a list of tensors (``_foreach``): as many as the tensors need at 65,536 elements
  per block, 320 blocks and a limited number of tensors per launch, as ``multi_tensor_apply`` cuts
  them; a norm one more, which joins the blocks;
- ``cat`` and ``stack``: one for each 128 tensors;
- a convolution's backward pass: one for each gradient that it gives;
- ``addmm`` and ``baddbmm`` whose summand is not a row, so must be copied first: two;
- all others: one. cuBLAS, cuDNN and sorting may take more, fused random numbers fewer.

The second update is counted: the first makes the optimizer's state. ``compiled`` is the update
whose recurrence's steps, imagined steps, encoders and decoders are compiled, by Inductor's plan
(:mod:`compiled_groups`).
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.append(str(Path(__file__).parents[1] / "shared"))

from compiled_groups import count_pictures, count_pieces
from fake_cuda import Watch, fake_cuda, fake_like
from learner import ACTION_SIZE, Update, make_sample, torchrl_update
from peers import r2dreamer_update
from results_file import write_results
from torch import Tensor
from torch.utils._pytree import tree_leaves

from w2f_torchrl.config import PRECISIONS, OptimizerConfig
from w2f_torchrl.kernels import scan
from w2f_torchrl.modules import PRESETS, ModelConfig
from w2f_torchrl.objectives import world2filter
from w2f_torchrl.trainers import Learner

#: Elements of a block, blocks of a launch, and tensors of a launch by the lists that it reads and
#: writes (ATen/native/cuda/MultiTensorApply.cuh).
CHUNK, BLOCKS, TENSORS = 65_536, 320, (110, 64, 48, 36, 30)
CAT_TENSORS = 128
PEER_MODEL, PEER_BATCH = "size1m", 2
#: Operations other than views that touch no memory of the device.
FREE = tuple(
    f"aten::{name}"
    for name in ("empty", "new_empty", "detach", "lift_fresh", "alias", "_unsafe_view")
)
PRODUCTS = ("mm", "convolution", "mv", "dot")
RANDOM = ("rand", "uniform", "normal", "bernoulli", "exponential", "multinomial")
FILLS = ("zero", "ones", "full", "fill", "arange", "eye", "scalar_tensor")
COPIES = ("clone", "copy", "cat", "stack", "contiguous", "repeat", "_to_copy")
REDUCTIONS = ("sum", "mean", "softmax", "norm", "amax", "amin", "max", "min", "any", "all", "sort")


class Count:
    """Kernels by kind and by part of the update."""

    def __init__(self) -> None:
        self.by_kind: Counter[str] = Counter()
        self.by_part: Counter[str] = Counter()
        self.casts_by_part: Counter[str] = Counter()
        self.by_operation: Counter[str] = Counter()
        self.in_pieces: Counter[str] = Counter()
        """Kernels within what ``compile`` compiles, by the function's name."""
        self.calls: Counter[str] = Counter()
        """How often these functions were called."""
        self.pictures = (0, 0)
        """Kernels of encoders and decoders, forward and backward: compiled, and eager."""
        self._piece: str | None = None
        self._parts = ["rest"]

    def note(self, func: Any, args: tuple[Any, ...], out: Any) -> None:
        """Count one operation: for ``Watch(note=...)``."""
        number = kernels(func, args, out)
        if not number:
            return
        kind, part = kind_of(func, args, out), self._parts[-1]
        self.by_kind[kind] += number
        self.by_part[part] += number
        self.by_operation[f"{part}: {func}"] += number
        if self._piece is not None:
            self.in_pieces[self._piece] += number
        if kind == "casts":
            self.casts_by_part[part] += number

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the operations within as this part's."""
        self._parts.append(name)
        try:
            yield
        finally:
            self._parts.pop()

    def piece(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose kernels are counted apart."""

        def call(*args: Any) -> Any:
            self._piece = function.__name__
            self.calls[function.__name__] += 1
            try:
                return function(*args)
            finally:
                self._piece = None

        return call

    def compiled(self, pieces: dict[str, int]) -> int:
        """Kernels of the update if each call of a piece took so many."""
        fused = sum(number * pieces[name] for name, number in self.calls.items())
        compiled, eager = self.pictures
        return self.by_kind.total() - self.in_pieces.total() + fused - eager + compiled

    def row(self) -> dict[str, Any]:
        """The counts as plain values, largest first."""
        return {
            "kernels": self.by_kind.total(),
            "casts": self.by_kind["casts"],
            "by_kind": dict(self.by_kind.most_common()),
            "by_part": dict(self.by_part.most_common()),
            "casts_by_part": dict(self.casts_by_part.most_common()),
            "pieces": {
                name: {"calls": calls, "kernels_a_call": self.in_pieces[name] / calls}
                for name, calls in self.calls.items()
            },
        }


def kernels(func: Any, args: tuple[Any, ...], out: Any) -> int:
    """How many kernels an operation launches: the rule is the module's."""
    name = func._schema.name
    if func.is_view or func.namespace == "prim" or name.startswith(FREE):
        return 0
    plain = name.removeprefix("aten::")
    if "foreach" in plain:
        return _list_kernels(plain, args, out)
    if plain in ("cat", "stack"):
        return -(-len(args[0]) // CAT_TENSORS)
    if plain == "convolution_backward":
        return sum(args[-1])
    if plain in ("addmm", "baddbmm") and args[0].numel() > args[0].shape[-1]:
        return 2
    return 1


def _list_kernels(name: str, args: tuple[Any, ...], out: Any) -> int:
    lists = [x for x in args if isinstance(x, list | tuple) and x and isinstance(x[0], Tensor)]
    depth = len(lists)
    if not name.endswith("_") and "norm" not in name and "copy" not in name:
        depth += 1  # it writes another list
    number = _launches([x.numel() for x in lists[0]], depth)
    return number + 1 if "norm" in name else number


def _launches(sizes: Sequence[int], depth: int) -> int:
    """Launches that lists of tensors of these sizes are cut into."""
    limit = TENSORS[min(depth, len(TENSORS)) - 1]
    launches = tensors = blocks = 0
    for size in filter(None, sizes):
        tensors += 1
        chunks = -(-size // CHUNK)
        for chunk in range(chunks):
            blocks += 1
            last = chunk == chunks - 1
            if (tensors == limit and last) or blocks == BLOCKS:
                launches += 1
                # A tensor that isn't finished opens the next launch.
                tensors, blocks = (0, 0) if last else (1, 0)
    return launches + (blocks > 0)


def kind_of(func: Any, args: tuple[Any, ...], out: Any) -> str:
    """The kind of an operation that launches kernels."""
    name = func._schema.name.removeprefix("aten::")
    given = next((x for x in tree_leaves(args) if isinstance(x, Tensor)), None)
    if name in ("_to_copy", "copy_") and given is not None:
        source = args[1] if name == "copy_" else given
        made = given if name == "copy_" else out
        if isinstance(source, Tensor) and source.dtype is not made.dtype:
            return "casts"
    for kind, names in (
        ("lists", ("foreach",)),
        ("products", PRODUCTS),
        ("random", RANDOM),
        ("copies", COPIES),
        ("fills", FILLS),
        ("reductions", REDUCTIONS),
    ):
        if any(each in name for each in names):
            return kind
    return "elementwise"


@contextmanager
def parts_of(learner: Learner, count: Count) -> Iterator[None]:
    """Let the parts of a learner's update be counted apart."""
    model, loss = learner.world_model, learner.loss
    places: list[tuple[Any, str, str]] = [
        (model.encoder, "forward", "encoders"),
        (model.rollout, "unroll", "recurrence, forward"),
        (model.decoder, "forward", "decoders"),
        (scan._Scan, "backward", "recurrence, backward"),
        (loss, "world_model_losses", "losses of the world model"),
        (loss, "actor_critic_losses", "losses of actor and critic"),
        (loss, "replay_critic_loss", "losses of actor and critic"),
        (world2filter, "imagine", "imagination"),
        (Tensor, "backward", "backward of all else"),
        (learner.optimizer, "step", "optimizer"),
        (learner.guard, "judge", "guard, slow critic"),
        (learner.guard, "remember", "guard, slow critic"),
        (learner, "_apply_if", "guard, slow critic"),
    ]
    if model.background_encoder is not None:
        places.append((model.background_encoder, "forward", "encoders"))
    if model.background_rollout is not None:
        places.append((model.background_rollout, "unroll", "recurrence, forward"))
    for rollout in (model.rollout, model.background_rollout):
        if rollout is not None:
            forward, backward = rollout.step_functions
            rollout.step_functions = (count.piece(forward), count.piece(backward))
    loss.imagine_step = count.piece(loss.imagine_step)
    with ExitStack() as stack:
        for owner, name, part in places:
            inner = getattr(owner, name)

            def counted(*args: Any, inner: Callable[..., Any] = inner, part: str = part, **kw: Any):
                with count.part(part):
                    return inner(*args, **kw)

            is_static = isinstance(vars(owner).get(name), staticmethod)
            wrapped = staticmethod(counted) if is_static else counted
            stack.enter_context(mock.patch.object(owner, name, wrapped))
        yield


def count_ours(
    config: ModelConfig, latent: str, precision: str, batch: int, time: int, image_size: int = 64
) -> Count:
    """Count an eager update of ours.

    Args:
        config: Sizes.
        latent: ``whole``, ``split``, ``shared`` or ``foreground``.
        precision: ``float32`` or ``bfloat16``.
        batch: B.
        time: T.
        image_size: Side of the pictures.
    """
    with fake_cuda():
        learner = Learner(
            config,
            action_size=ACTION_SIZE,
            image_size=image_size,
            latent=latent,
            optimizer=OptimizerConfig(precision=precision),
            device="cuda",
        )
        sample = fake_like(make_sample(batch, time, image_size=image_size))
        learner.update(sample)
        count = Count()
        with parts_of(learner, count), Watch(note=count.note):
            learner.update(sample)
        count.pictures = count_pictures(learner, batch * time, _kernels_of)
    return count


def _kernels_of(call: Callable[[], Any]) -> int:
    counted = Count()
    with Watch(reads_are_allowed=True, note=counted.note):
        call()
    return counted.by_kind.total()


def count_peer(update: Update, time: int) -> Count:
    """Count another project's eager update, as a whole.

    Those read values as they go, which fake tensors lack, so it runs on the CPU: small, since
    neither widths nor the batch change the operations.

    Args:
        update: Of a learner of the preset :data:`PEER_MODEL`, on the CPU.
        time: T.
    """
    sample = make_sample(PEER_BATCH, time)
    update(sample.clone())
    count = Count()
    with Watch(reads_are_allowed=True, device="cpu", note=count.note):
        update(sample.clone())
    return count


def main() -> None:
    """Count, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(PRESETS), default="size12m")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--batch-length", type=int, default=64)
    parser.add_argument("--precision", choices=PRECISIONS, default="bfloat16")
    parser.add_argument("--latents", nargs="*", default=["whole", "split"])
    parser.add_argument("--torchrl", action="store_true", help="also TorchRL's own parts")
    parser.add_argument("--r2dreamer", type=Path, help="a checkout of r2dreamer, counted too")
    parser.add_argument("--top", type=int, default=0, help="print the most frequent operations")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    size, mixed = (args.batch_size, args.batch_length), args.precision == "bfloat16"
    counts = {
        f"ours, {latent}, eager": count_ours(PRESETS[args.model], latent, args.precision, *size)
        for latent in args.latents
    }
    if args.torchrl:
        update = torchrl_update(PEER_MODEL, "cpu", mixed)
        counts["TorchRL's parts, eager"] = count_peer(update, size[1])
    if args.r2dreamer is not None:
        update = r2dreamer_update(args.r2dreamer, PEER_MODEL, mixed=mixed)
        counts["r2dreamer, eager"] = count_peer(update, size[1])
    pieces = count_pieces(args.precision)
    print(f"compiled, by call: {pieces}")
    rows = {name: count.row() for name, count in counts.items()}
    for name, count in counts.items():
        row = rows[name]
        if count.calls:
            row["compiled"] = count.compiled(pieces)
            row["pictures"] = dict(zip(("compiled", "eager"), count.pictures, strict=True))
            print(f"{name} but with compiled steps: {row['compiled']} kernels")
        print(f"{name}: {row['kernels']} kernels, {row['casts']} of them casts")
        for key in ("by_part", "by_kind", "casts_by_part"):
            print(f"  {key}: " + ", ".join(f"{k} {v}" for k, v in row[key].items()))
        for operation, number in count.by_operation.most_common(args.top):
            print(f"  {number:6d} {operation}")
    if args.output is not None:
        settings = {k: v for k, v in vars(args).items() if k in ("model", "precision")}
        shape = {"batch_size": size[0], "batch_length": size[1]}
        write_results(
            args.output, {**settings, **shape, "compiled_pieces": pieces, "updates": rows}
        )


if __name__ == "__main__":
    main()

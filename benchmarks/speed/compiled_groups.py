"""Count the kernels that Inductor plans for the pieces that are compiled, without a GPU.

Inductor is asked for CUDA's graph, of fake tensors (:mod:`fake_cuda`), with the properties of an
H100, and is stopped before it writes code. Each planned group of fused operations and each library
call is a kernel, and so is a copy for each product whose summand must be copied first. cuBLAS may
launch a second kernel for a product, which isn't counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from fake_cuda import fake_cuda, fake_like
from learner import ACTION_SIZE, make_sample
from torch import Tensor, fx
from torch._inductor import compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.exc import InductorError
from torch._inductor.scheduler import Scheduler
from torch.func import functional_call, functionalize, vjp
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from w2f_torchrl.config import OptimizerConfig
from w2f_torchrl.modules import PRESETS
from w2f_torchrl.modules.image_decoder import ImageDecoder
from w2f_torchrl.trainers import Learner

DEVICE = SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    gcnArchName="",
    multi_processor_count=132,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
    total_memory=80 << 30,
)


class _Planned(Exception):
    """Inductor has chosen its kernels."""


def planned_kernels(function: Callable[..., Any], args: tuple[Any, ...]) -> list[str]:
    """Name the kernels that a compiled call would launch.

    A function that computes gradients itself gets one graph for both passes.

    Args:
        function: The function to compile.
        args: Fake CUDA tensors, alone, in tuples or in objects that the function reads.

    Raises:
        RuntimeError: If Inductor planned not one graph but none or several.
    """
    plans: list[list[str]] = []

    def stop(scheduler: Scheduler) -> None:
        plans.append([name for node in scheduler.nodes for name in _names(node)])
        raise _Planned

    problem = ""
    with mock.patch.object(Scheduler, "codegen", stop):
        graph, tensors = _trace(function, args)
        try:
            compile_fx.compile_fx_inner(graph, tensors, is_inference=True)
        except InductorError as error:  # it wraps _Planned
            problem = f": {error}"
    if len(plans) != 1:
        raise RuntimeError(f"Inductor planned {len(plans)} graphs{problem}.")
    return plans[0]


def _names(node: Any) -> list[str]:
    kind = type(node).__name__
    if kind == "NopKernelSchedulerNode":
        return []
    name = "+".join(part.node.get_name() for part in node.get_nodes())
    called = getattr(node.node, "python_kernel_name", None) or "" if "Extern" in kind else ""
    names = [f"{called} {name}".strip()]
    if "addmm" in called:
        strides = node.node.inputs[0].get_layout().stride
        if len(strides) > 1 and strides[0] != 0:  # no row that is repeated
            names.insert(0, f"copy for {name}")
    return names


def _trace(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[fx.GraphModule, list[Any]]:
    """Trace a call to one graph whose inputs are all tensors that it reads."""
    flat, structure = tree_flatten(args)
    places = [i for i, x in enumerate(flat) if isinstance(x, Tensor)]

    def of_tensors(*tensors: Tensor) -> list[Tensor]:
        given = list(flat)
        for place, tensor in zip(places, tensors, strict=True):
            given[place] = tensor
        made = tree_leaves(function(*tree_unflatten(given, structure)))
        return [x for x in made if isinstance(x, Tensor)]

    tensors = [flat[i] for i in places]
    traced = make_fx(
        functionalize(of_tensors, remove="mutations"), decomposition_table=select_decomp_table()
    )(*tensors)
    # Parameters and constants become inputs, as Dynamo makes them.
    last = [node for node in traced.graph.nodes if node.op == "placeholder"][-1]
    inputs: dict[str, fx.Node] = {}
    for node in [node for node in traced.graph.nodes if node.op == "get_attr"]:
        if node.target not in inputs:
            value = getattr(traced, node.target)
            with traced.graph.inserting_after(last):
                last = traced.graph.placeholder(f"read_{len(inputs)}")
            last.meta = dict(node.meta) | {"val": value}
            inputs[node.target] = last
            tensors.append(value)
        node.replace_all_uses_with(inputs[node.target])
        traced.graph.erase_node(node)
    traced.recompile()
    return traced, tensors


@contextmanager
def _pretended_device() -> Iterator[None]:
    """What Inductor asks about the device."""
    answers: dict[str, Any] = {
        "torch.cuda.is_available": True,
        "torch.cuda.device_count": 1,
        "torch.cuda.get_device_properties": DEVICE,
        "torch.cuda._get_device_properties": DEVICE,
        "torch.cuda.get_device_capability": (DEVICE.major, DEVICE.minor),
        "torch._dynamo.device_interface.CudaInterface.Worker.get_device_properties": DEVICE,
        "torch.cuda.synchronize": None,
        "torch.cuda._lazy_init": None,
        "torch.cuda._exchange_device": 0,
        "torch.cuda._maybe_exchange_device": 0,
        # Asked for before any kernel is generated; torch remembers the answer for its process.
        "torch._inductor.scheduler.has_triton": True,
        # Tracing by make_fx is not what this asks for.
        "torch.compiler.is_compiling": True,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stand_in = lambda *_, answer=answer, **__: answer  # noqa: E731
            stack.enter_context(mock.patch(name, stand_in, create=True))
        yield


def count_pieces(precision: str, model: str = "size12m") -> dict[str, int]:
    """Kernels of one call of each piece: ``step_forward``, ``step_backward``, ``imagine_step``.

    Args:
        precision: ``float32`` or ``bfloat16``.
        model: A preset.
    """
    counts: dict[str, int] = {}

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with _pretended_device():
                if function.__name__ not in counts:
                    with torch.no_grad():
                        counts[function.__name__] = len(planned_kernels(function, args))
                return function(*args)

        return call

    with fake_cuda():
        learner = Learner(
            PRESETS[model],
            action_size=ACTION_SIZE,
            latent="whole",
            optimizer=OptimizerConfig(precision=precision),
            device="cuda",
        )
        rollout = learner.world_model.rollout
        forward, backward = rollout.step_functions
        rollout.step_functions = (counted(forward), counted(backward))
        learner.loss.imagine_step = counted(learner.loss.imagine_step)
        learner.update(fake_like(make_sample(16, 3)))
    return counts


def count_pictures(
    learner: Learner, pictures: int, kernels: Callable[[Callable[[], Any]], int]
) -> tuple[int, int]:
    """Kernels of all encoders and decoders, forward and backward: compiled, and eager.

    Args:
        learner: On fake CUDA tensors.
        pictures: B x T.
        kernels: Counts those of an eager call.
    """
    model, compiled, eager = learner.world_model, 0, 0
    shape = (pictures, 3, model.image_size, model.image_size)
    pixels = torch.zeros(shape, dtype=torch.uint8, device="cuda")
    config = model.config
    sizes = [(config.state_size, config.belief_size)] * 2
    if model.background_rollout is not None:
        sizes[1] = (config.background_state_size, config.background_belief_size)
    calls: list[tuple[torch.nn.Module, tuple[Tensor, ...]]] = [
        (encoder, (pixels,))
        for encoder in (model.encoder, model.background_encoder)
        if encoder is not None
    ]
    decoders = [m for m in model.decoder.modules() if isinstance(m, ImageDecoder)]
    for decoder, widths in zip(decoders, sizes, strict=False):
        features = [torch.zeros(pictures, n, device="cuda") for n in widths]
        calls.append((decoder, tuple(features)))
    for module, inputs in calls:
        act, reads = _both_passes(module, inputs, mixed=learner.precision == "bfloat16")
        eager += kernels(partial(act, *reads))
        with _pretended_device():
            compiled += len(planned_kernels(act, reads))
    return compiled, eager


def _both_passes(
    module: torch.nn.Module, inputs: tuple[Tensor, ...], *, mixed: bool
) -> tuple[Callable[..., list[Tensor]], tuple[Tensor, ...]]:
    """Make a function of a module's forward and backward pass, and its arguments."""
    named = dict(module.named_parameters())
    pixels = [x for x in inputs if not x.is_floating_point()]
    reads = [*named.values(), *(x for x in inputs if x.is_floating_point())]

    def forward(*given: Tensor) -> list[Tensor]:
        weights = dict(zip(named, given, strict=False))
        made = functional_call(module, weights, (*pixels, *given[len(named) :]))
        return [x.float() for x in tree_leaves(made)]

    def both_passes(*given: Tensor) -> list[Tensor]:
        with torch.autocast("cuda", torch.bfloat16, enabled=mixed):
            out, pull = vjp(forward, *given)
        return [*out, *pull([torch.ones_like(x) for x in out])]

    return both_passes, tuple(x.detach() for x in reads)

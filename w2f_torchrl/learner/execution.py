"""How an update is run: ``training.execution``.

- ``eager``.
- ``compile``: the pieces that do nearly all of the work (on a CPU those that gain), each on
  its own, so that compiling takes no longer for longer sequences.
- ``compile_all``: losses and the whole time loop as one graph.
- ``cuda_graph``: ``compile``, and the whole update captured once and replayed: no launch is left
  to the host.
- ``cuda_graph_parallel``: the same with a branch for each latent of ``split``.
- ``auto``: eager on a CPU; on CUDA the first of ``cuda_graph_parallel`` (``split``),
  ``cuda_graph``, ``compile`` and ``eager`` that works and whose update equals eager's
  (:mod:`~w2f_torchrl.learner.auto_execution`).
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import torch

from w2f_torchrl.kernels.scan_step import step_backward, step_forward
from w2f_torchrl.modules import imagine_step
from w2f_torchrl.modules.image_decoder import ImageDecoder
from w2f_torchrl.objectives import World2FilterLoss

#: What ``compile`` compiles: a step of each recurrence and a step back; an imagined step; encoders
#: and decoders.
PIECES = ("recurrence", "imagination", "pictures")


def pieces_worth_compiling(device: torch.device) -> tuple[str, ...]:
    """All of :data:`PIECES`; on a CPU not the pictures'.

    Encoders and decoders are faster by hand there (``benchmarks/learner_parts.py``).
    """
    return PIECES[:2] if device.type == "cpu" else PIECES


def compile_core(loss: World2FilterLoss, pieces: Collection[str]) -> None:
    """Compile some of :data:`PIECES`, each on its own.

    Acting is not touched: the policy calls the encoder itself, with batches of other sizes.
    """
    # Every shape is known: kernels for any size would be slower, and the two recurrences, which
    # share their code, would otherwise be compiled for any.
    compiled = partial(torch.compile, dynamic=False)
    if next(loss.parameters()).device.type == "cpu":
        # What the graphs fuse is small: a team of threads costs more than it does.
        compiled = partial(compiled, options={"cpp.threads": 1})
    world_model = loss.world_model
    if "pictures" in pieces:
        for name in ("encoder", "background_encoder"):
            if (encoder := getattr(world_model, name)) is not None:
                world_model.compiled[name] = compiled(encoder.forward)
        for module in world_model.decoder.modules():
            if isinstance(module, ImageDecoder):
                module.compile(dynamic=False)
    if "recurrence" in pieces:
        for rollout in (world_model.rollout, world_model.background_rollout):
            if rollout is not None:
                forward, backward = rollout.step_functions
                rollout.step_functions = (compiled(forward), compiled(backward))
    if "imagination" in pieces:
        loss.imagine_step = compiled(loss.imagine_step)


def undo_compilation(loss: World2FilterLoss) -> None:
    """Undo :func:`compile_core` and remove the second branch of the graph."""
    world_model = loss.world_model
    world_model.side_stream = None
    world_model.compiled.clear()
    for module in world_model.decoder.modules():
        if isinstance(module, ImageDecoder):
            module._compiled_call_impl = None
    for rollout in (world_model.rollout, world_model.background_rollout):
        if rollout is not None:
            rollout.step_functions = (step_forward, step_backward)
    loss.imagine_step = imagine_step

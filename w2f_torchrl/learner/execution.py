"""Modes of execution of an update: ``training.execution``.

- ``eager``: no compilation.
- ``compile``: compiles the pieces that do nearly all of the work (on a CPU those that gain), each
  separately, so that longer sequences do not take longer to compile.
- ``compile_all``: compiles losses and the whole time loop as one graph.
- ``cuda_graph``: ``compile``, and the whole update is captured once and replayed, so that the host
  launches no kernels.
- ``cuda_graph_parallel``: the same with one branch for each latent of ``split``.
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

#: The pieces that ``compile`` compiles: forward and backward step of each recurrence; an imagined
#: step; encoders and decoders.
PIECES = ("recurrence", "imagination", "pictures")


def pieces_worth_compiling(device: torch.device) -> tuple[str, ...]:
    """Return all of :data:`PIECES`, on a CPU without encoders and decoders.

    Those are faster with the hand-written kernels (``benchmarks/speed/learner_parts.py``).
    """
    return PIECES[:2] if device.type == "cpu" else PIECES


def compile_core(loss: World2FilterLoss, pieces: Collection[str]) -> None:
    """Compile some of :data:`PIECES`, each separately.

    Acting is not compiled: the policy calls the encoder itself, with batches of other sizes.
    """
    # All shapes are known. With dynamic shapes kernels would be slower, and the two recurrences,
    # which share their code, would be compiled for any size.
    compiled = partial(torch.compile, dynamic=False)
    if next(loss.parameters()).device.type == "cpu":
        # The fused kernels are small: starting several threads would cost more than it saves.
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

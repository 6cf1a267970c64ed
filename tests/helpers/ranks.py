"""Run a function on several gloo ranks of this machine, cheaply."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from w2f_torchrl.utils.ranks import Ranks

# One process imports all of this, once; the ranks are its forks.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["w2f_torchrl.trainers", "torch.distributed"])


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def run_ranks(
    size: int, function: Callable[..., Any], *args: Any, timeout: float = 600
) -> list[Any]:
    """Call ``function(rank, size, *args)`` on every rank; returns what they return, by rank.

    The function must be at the top of a module and return no tensors. A rank's exception is raised
    here, with its traceback in the message.
    """
    port = free_port()
    pipes, processes = [], []
    for rank in range(size):
        receiver, sender = _context.Pipe(duplex=False)
        process = _context.Process(
            target=_rank_main, args=(sender, rank, size, port, function, args), daemon=True
        )
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    try:
        results = [_receive(pipe, rank, timeout) for rank, pipe in enumerate(pipes)]
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    for rank, (_, error) in enumerate(results):
        if error is not None:
            raise AssertionError(f"rank {rank} of {size} failed:\n{error}")
    return [value for value, _ in results]


def _receive(pipe: Connection, rank: int, timeout: float) -> tuple[Any, str | None]:
    if not pipe.poll(timeout):
        return None, f"no answer from rank {rank} in {timeout} s"
    try:
        return pipe.recv()
    except (EOFError, ConnectionResetError):
        return None, "the process died"


def _rank_main(
    sender: Connection, rank: int, size: int, port: int, function: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of compilers per rank
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
    }
    try:
        Ranks.from_environment().connect(torch.device("cpu"), timeout_seconds=300)
        sender.send((function(rank, size, *args), None))
        dist.barrier()  # nobody leaves while another still needs it
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001  # the parent raises it
        sender.send((None, traceback.format_exc()))

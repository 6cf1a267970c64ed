"""A collection of counting envs whose policy's weights change before every batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from tensordict import TensorDict

from helpers.counting_env import RECURRENT, DummyPolicy, make_counting_env
from w2f_torchrl.data import make_collector, sync_policy_weights

NUM_ENVS, NUM_WORKERS, STEPS, BATCHES = 4, 2, 7, 12
THREADS = 3
OPTIONS = {
    "primers": RECURRENT,
    "num_envs": NUM_ENVS,
    "num_workers": NUM_WORKERS,
    "frames_per_batch": NUM_ENVS * STEPS,
    "seed": 3,
    "extra_keys": ["seed", "belief", "previous_action", ("next", "state"), ("next", "belief")],
}


class Run(NamedTuple):
    """Batches [N, T], the policy's weight when each was collected, this process's threads."""

    batches: list[TensorDict]
    weights: list[float]
    threads: int


def collect(num_batches: int = BATCHES, **changes) -> Run:
    """Collect with weights that change before every batch."""
    policy = DummyPolicy()
    with torch.no_grad():
        policy.bias.fill_(5)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    collector = make_collector(make_counting_env, policy, **(OPTIONS | changes))
    batches, weights, threads = [], [], torch.get_num_threads()
    try:
        for batch in collector:
            batches.append(batch)
            weights.append(policy.bias.item())
            if len(batches) == num_batches:
                break
            with torch.no_grad():
                policy.bias += 1
            sync_policy_weights(collector, policy)
    finally:
        collector.shutdown()
        torch.set_num_threads(threads_before)
    return Run(batches, weights, threads)

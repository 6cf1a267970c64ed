"""TorchRL's synchronous collectors, set up for a recurrent policy."""

from __future__ import annotations

import copy
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import Collector, MultiSyncCollector
from torchrl.data import Unbounded
from torchrl.envs import EnvBase, SerialEnv, TransformedEnv
from torchrl.envs.transforms import TensorDictPrimer
from torchrl.envs.utils import ExplorationType

from w2f_torchrl.data.collector.overlap import OverlappedCollector
from w2f_torchrl.data.collector.resumable import ResumableCollector
from w2f_torchrl.data.collector.workers import TIMEOUT_SECONDS, SyncCollector, begin_worker
from w2f_torchrl.keys import MASK, NEXT_MASK, PIXELS
from w2f_torchrl.utils.main_guard import require_main_guard
from w2f_torchrl.utils.seeding import derive_seed

EnvFactory = Callable[[int, int], EnvBase]

# What records need in addition to observations, and the episode statistics that RewardSum and
# StepCounter provide.
REQUIRED_KEYS: tuple[NestedKey, ...] = (
    "is_init",
    "action",
    ("next", "reward"),
    ("next", "terminated"),
    ("next", "done"),
)
OPTIONAL_KEYS: tuple[NestedKey, ...] = (
    MASK,
    NEXT_MASK,
    ("next", "truncated"),
    ("next", "episode_reward"),
    ("next", "step_count"),
)

_OPTIONS: dict[str, Any] = {
    "env_device": torch.device("cpu"),
    "storing_device": torch.device("cpu"),
    "exploration_type": ExplorationType.RANDOM,
    "auto_register_policy_transforms": False,  # a primer carries the policy's state
}


def make_collector(
    create_env: EnvFactory,
    policy: TensorDictModuleBase,
    *,
    primers: Mapping[str, int],
    num_envs: int,
    num_workers: int,
    frames_per_batch: int,
    total_frames: int = -1,
    seed: int = 0,
    rank: int = 0,
    device: torch.device | str = "cpu",
    observations: Sequence[str] = (),
    extra_keys: Sequence[NestedKey] = (),
    overlap: bool = False,
    timeout_seconds: float = TIMEOUT_SECONDS,
    scratch: Path | None = None,
) -> Collector | MultiSyncCollector | OverlappedCollector:
    """Make a collector of ``[N, T]`` batches of consecutive transitions.

    Each worker process steps ``num_envs / num_workers`` envs one after the other and asks its copy
    of the policy once for all of them. Row i of every batch is env i. Batches hold what
    :func:`~w2f_torchrl.data.records_from_rollout` and episode statistics need; what else the policy
    writes is dropped. Call ``shutdown()`` at the end; Ctrl+C reaches the main process only.

    Args:
        create_env: Called in the worker as ``create_env(index, seed)`` with the env's index in
            ``[0, num_envs)`` and its own seed. Makes an unbatched env with ``pixels`` and
            ``is_init`` (InitTracker).
        policy: Reads ``pixels``, ``is_init`` and the primed keys, writes ``action`` and the primed
            keys under ``next``. It must reset its state where ``is_init``.
        primers: The policy's recurrent keys (``state``, ``belief``, ``previous_action``) and their
            sizes: float32 ``[*, size]``, zero at an episode's first step.
        num_envs: Envs N over all workers.
        num_workers: Worker processes; 0 collects in this process (for debugging; it seeds this
            process's torch generator).
        frames_per_batch: Agent steps in a batch, N x T.
        total_frames: Agent steps after which the collector stops, -1 for never.
        seed: The run's seed. Env i gets ``derive_seed(derive_seed(seed, "train", rank), "env", i)``
            and worker w's policy noise ``derive_seed(seed, "policy", rank, w)``.
        rank: This process's rank among distributed learners.
        device: Where the workers' policies run; envs and batches are on CPU.
        observations: Entries of the env's observations, in addition to ``pixels`` and
            ``foreground_mask``, that batches keep.
        extra_keys: More keys that batches keep.
        overlap: Whether the next batch is collected while the last is learned from; needs workers.
        timeout_seconds: How long a worker may give no sign before it counts as lost.
        scratch: Folder for temporary files; None for the system's.

    Returns:
        TorchRL's MultiSyncCollector (overlapped if asked), or its Collector for ``num_workers=0``.

    Raises:
        ValueError: If the counts don't divide, or an env lacks ``is_init`` (raised by the worker).
        RuntimeError: If a script starts workers outside ``if __name__ == "__main__":``.
    """
    _check_counts(num_envs, num_workers, frames_per_batch, overlap)
    if overlap or _device_of(policy).type != torch.device(device).type:
        # Overlapped, the workers would see the policy's own memory, which a learner changes.
        policy = copy.deepcopy(policy).to(device)
    failures = tempfile.TemporaryDirectory(prefix="w2f_", dir=scratch) if num_workers else None
    workers = max(num_workers, 1)
    make_worker_env = [
        partial(
            _make_worker_env,
            create_env,
            range(worker * num_envs // workers, (worker + 1) * num_envs // workers),
            dict(primers),
            derive_seed(seed, "train", rank),
            derive_seed(seed, "policy", rank, worker),
            Path(failures.name) / str(worker) if failures else None,
        )
        for worker in range(workers)
    ]
    options = {
        "policy": policy,
        "frames_per_batch": frames_per_batch,
        "total_frames": total_frames,
        "policy_device": torch.device(device),
        "postproc": _KeepKeys(observations, extra_keys),
        **_OPTIONS,
    }
    if failures is None:
        return ResumableCollector(make_worker_env[0], **options)
    collector = _with_workers(make_worker_env, options, failures, timeout_seconds)
    return OverlappedCollector(collector) if overlap else collector


def _with_workers(
    make_worker_env: list[partial[EnvBase]],
    options: dict[str, Any],
    failures: tempfile.TemporaryDirectory[str],
    timeout_seconds: float,
) -> SyncCollector:
    return SyncCollector(
        make_worker_env,
        **options,
        collector_class=ResumableCollector,
        failures=failures,
        timeout_seconds=timeout_seconds,
        cat_results=0,
        use_buffers=True,
        # The kernel means the thread that starts a process: one that ends would take them along.
        init_fn=partial(begin_worker, threading.current_thread() is threading.main_thread()),
        # By default TorchRL takes one thread for each worker away from this process for good, but
        # the workers wait while the learner computes.
        num_threads=torch.get_num_threads(),
    )


def sync_policy_weights(
    collector: Collector | MultiSyncCollector | OverlappedCollector, policy: TensorDictModuleBase
) -> None:
    """Copy the policy's weights to every worker.

    The collector's own method fails on a module: it wants the weights as a tensordict.

    Raises:
        WorkerError: If a worker died.
    """
    workers = collector.collector if isinstance(collector, OverlappedCollector) else collector
    devices = workers.policy_device  # of a collector with workers: one for each
    device = devices[0] if isinstance(devices, Sequence) else devices
    weights = TensorDict.from_module(policy).data.to(device)
    if isinstance(workers, SyncCollector):
        with workers.watched():
            collector.update_policy_weights_(weights)
    else:
        collector.update_policy_weights_(weights)


def _device_of(policy: TensorDictModuleBase) -> torch.device:
    return next((p.device for p in policy.parameters()), torch.device("cpu"))


def _check_counts(num_envs: int, num_workers: int, frames_per_batch: int, overlap: bool) -> None:
    if num_envs < 1 or num_workers < 0:
        raise ValueError(
            f"num_envs must be positive and num_workers not negative, got {num_envs} and "
            f"{num_workers}."
        )
    if num_workers and num_envs % num_workers:
        raise ValueError(
            f"num_envs={num_envs} must be a multiple of num_workers={num_workers}: every worker "
            "steps the same number of envs."
        )
    if frames_per_batch < 1 or frames_per_batch % num_envs:
        raise ValueError(
            f"frames_per_batch={frames_per_batch} must be a positive multiple of "
            f"num_envs={num_envs}: every env makes the same number of steps a batch."
        )
    if num_workers:
        require_main_guard(f"make_collector(num_workers={num_workers})")
    elif overlap:
        raise ValueError(f"overlap=True needs workers, and num_workers={num_workers} has none.")


def _make_worker_env(
    create_env: EnvFactory,
    indices: range,
    primers: dict[str, int],
    env_seed: int,
    policy_seed: int,
    failure_file: Path | None,
) -> EnvBase:
    """Make one worker's envs, and seed its policy's noise."""
    env = SerialEnv(
        len(indices),
        partial(_call, create_env),
        create_env_kwargs=[
            {"index": index, "seed": derive_seed(env_seed, "env", index)} for index in indices
        ],
    )
    if "is_init" not in env.observation_spec.keys():
        raise ValueError("create_env must make envs with `is_init`: wrap them with InitTracker().")
    env.start()  # makes the envs now, so that they can't reseed torch's generator later
    specs = {key: Unbounded((size,)) for key, size in primers.items()}
    env = TransformedEnv(env, TensorDictPrimer(specs, expand_specs=True))
    env.failure_file = failure_file
    # Every process starts with the same generator: unseeded, all workers act with equal noise.
    torch.manual_seed(policy_seed)
    return env


def _call(create_env: EnvFactory, index: int, seed: int) -> EnvBase:
    """Let SerialEnv, which passes keywords, call a factory whatever its parameters' names."""
    return create_env(index, seed)


class _KeepKeys:
    """Drop all keys of a batch but those that are used."""

    def __init__(self, observations: Sequence[str], extra_keys: Sequence[NestedKey]) -> None:
        observed = [key for name in (PIXELS, *observations) for key in (name, ("next", name))]
        self.required = (*observed, *REQUIRED_KEYS, *extra_keys)

    def __call__(self, batch: TensorDictBase) -> TensorDictBase:
        present = set(batch.keys(include_nested=True))
        return batch.select(*self.required, *(key for key in OPTIONAL_KEYS if key in present))

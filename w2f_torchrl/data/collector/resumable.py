"""The state of a collector between two batches: environments, policy state and random streams."""

from __future__ import annotations

import io
import traceback
from pathlib import Path
from typing import Any, cast

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.collectors import Collector, MultiSyncCollector
from torchrl.envs import EnvBase, TransformedEnv

from w2f_torchrl.data.collector.overlap import OverlappedCollector
from w2f_torchrl.utils.random_state import random_state, restore_random_state


class ResumableCollector(Collector):
    """A Collector that can stop between two batches and continue in another process.

    It needs a SerialEnv whose envs have ``resume_state`` and ``load_resume_state``, as
    :class:`~w2f_torchrl.envs.PixelDMControlEnv` does.
    """

    _carrier: TensorDictBase

    def rollout(self) -> TensorDictBase:
        """Collect a batch; write the traceback of a failure to a file for the main process."""
        try:
            return super().rollout()
        except Exception:
            path = getattr(self.env, "failure_file", None)
            if path is not None:
                Path(path).write_text(traceback.format_exc())
            raise

    def resume_state(self) -> bytes | None:
        """Return everything that the next batches depend on, except the policy's weights.

        Returns:
            Bytes for ``torch.load(weights_only=True)``; None if an env cannot save its state.
        """
        envs = [_innermost(env) for env in self._envs()]
        if not all(hasattr(env, "resume_state") for env in envs):
            return None
        states = [env.resume_state() for env in envs]
        if None in states:
            return None
        state = {
            "envs": states,
            "carrier": self._carrier.to_dict(),
            "random": random_state(),
        }
        stream = io.BytesIO()
        torch.save(state, stream)
        return stream.getvalue()

    def load_resume_state(self, saved: bytes) -> None:
        """Continue from a state of :meth:`resume_state`.

        Raises:
            ValueError: If it belongs to another number of envs, or to other envs.
        """
        state = torch.load(io.BytesIO(saved), weights_only=True)
        envs = self._envs()
        if len(envs) != len(state["envs"]):
            raise ValueError(f"the state has {len(state['envs'])} envs, the worker {len(envs)}.")
        for env, env_state in zip(envs, state["envs"], strict=True):
            _innermost(env).load_resume_state(env_state)
        device = self._carrier.device
        self._carrier = TensorDict(state["carrier"], batch_size=self.env.batch_size, device=device)
        restore_random_state(state["random"])

    def _envs(self) -> list[EnvBase]:
        env = self.env
        while isinstance(env, TransformedEnv):
            env = env.base_env
        return cast("list[EnvBase]", env._envs)


def _innermost(env: EnvBase) -> Any:
    while isinstance(env, TransformedEnv):
        env = env.base_env
    return env


def collector_state(
    collector: Collector | MultiSyncCollector | OverlappedCollector,
) -> dict[str, Any] | None:
    """Return the state between two batches of a collector from ``make_collector``.

    Returns:
        One entry per worker, and the batch that is being collected in the background, if any.
        None if an env cannot save its state.

    Raises:
        WorkerError: If a worker died.
    """
    batch = collector.under_way() if isinstance(collector, OverlappedCollector) else None
    inner = collector.collector if isinstance(collector, OverlappedCollector) else collector
    if isinstance(inner, MultiSyncCollector):
        states = inner.map_fn("resume_state")
    else:
        assert isinstance(inner, ResumableCollector)
        states = [inner.resume_state()]
    if None in states:
        return None
    return {"workers": states, "batch": None if batch is None else batch.to_dict()}


def load_collector_state(
    collector: Collector | MultiSyncCollector | OverlappedCollector, state: dict[str, Any]
) -> None:
    """Let a new collector continue from a saved state, which excludes the policy's weights.

    Args:
        collector: A collector made with the same arguments, before its first batch.
        state: A state from :func:`collector_state`.

    Raises:
        ValueError: If it belongs to another number of workers or to other envs.
        WorkerError: If a worker died.
    """
    inner = collector.collector if isinstance(collector, OverlappedCollector) else collector
    states, batch = state["workers"], state["batch"]
    workers = inner.num_workers if isinstance(inner, MultiSyncCollector) else 1
    if len(states) != workers:
        raise ValueError(f"the state has {len(states)} workers, this collector {workers}.")
    if isinstance(inner, MultiSyncCollector):
        inner.map_fn("load_resume_state", [(worker,) for worker in states])
    else:
        assert isinstance(inner, ResumableCollector)
        inner.load_resume_state(states[0])
    if batch is not None:
        assert isinstance(collector, OverlappedCollector), "only these have a pending batch"
        collector.hold(TensorDict(batch, batch["action"].shape[:2]))

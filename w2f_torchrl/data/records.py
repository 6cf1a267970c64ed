"""From a collector's transitions to replay records, one for each observation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from w2f_torchrl.data.replay.latents import PREVIOUS
from w2f_torchrl.keys import MASK, PIXELS
from w2f_torchrl.modules.packed_latents import pack_belief, pack_state
from w2f_torchrl.utils.tensors import check_tensor


def keys_of_observations(batch: TensorDictBase, extra: Sequence[str] = ()) -> list[str]:
    """Return ``pixels``, ``foreground_mask`` if the batch has it, and ``extra`` ones of the env."""
    return [PIXELS, *([MASK] if MASK in batch.keys() else []), *extra]


def records_from_rollout(
    batch: TensorDictBase,
    observation_keys: Sequence[str] | None = None,
    latent_classes: int | None = None,
) -> TensorDict:
    """Turn transitions into records: an observation and what led to it.

    A transition holds two observations, and successive transitions share one. A record holds one
    observation with the action that led to it and the reward that came with it. So every
    transition makes one record of its ``next`` part, and a root observation makes one of its own
    only where it begins an episode (``is_init``), with a zero action and a zero reward. An episode
    of L steps makes L + 1 records, whatever the batches it is cut into.

    Args:
        batch: Consecutive transitions ``[N, T]`` of N envs (rows), with TorchRL's automatic reset:
            ``is_init`` bool ``[N, T, 1]``, ``action`` ``[N, T, A]``, the observation keys, and
            under ``next`` the observation keys, ``reward`` ``[N, T, 1]``, ``terminated`` and
            ``done`` bool ``[N, T, 1]``. Row n of the next batch continues row n of this one.
        observation_keys: What an observation consists of. By default ``pixels``, and
            ``foreground_mask`` where the batch has it.
        latent_classes: Classes of each categorical of the state. Records then keep the acting
            policy's latent of the observation before theirs, which the batch has under ``next`` of
            the transition between the two: ``state`` ``[N, T, S]`` and ``belief`` ``[N, T, D]``.

    Returns:
        Records ``[M]``, env after env and in the order of time, M = N x T + number of ``is_init``:
        ``stream`` int64 ``[M]`` (the row n), ``action`` ``[M, A]``, ``is_init`` bool ``[M, 1]`` and
        under ``next`` the observation keys, ``reward``, ``terminated`` and ``done``. With
        ``latent_classes``, under ``previous``, packed ``state`` ``[M, K]`` and ``belief``
        ``[M, D]``, zero where an episode begins.

    Raises:
        TypeError: If a flag is not bool.
        ValueError: If the batch is not two-dimensional, or empty.
        KeyError: If a key is missing.
    """
    if batch.ndim != 2 or 0 in batch.shape:
        raise ValueError(
            "records_from_rollout expects a batch, not empty, of shape [N, T], got "
            f"{tuple(batch.batch_size)}."
        )
    for key in ("is_init", ("next", "terminated"), ("next", "done")):
        name = key if isinstance(key, str) else key[-1]
        check_tensor(name, batch[key], torch.bool, (*batch.shape, 1))
    if observation_keys is None:
        observation_keys = keys_of_observations(batch)
    is_init = batch["is_init"].reshape(-1)  # [N * T]
    # A transition's record follows those of all transitions before it, and an initial record comes
    # right before the record of its own transition.
    transition_rows = (is_init.long() + 1).cumsum(0) - 1  # [N * T]
    initial_rows = transition_rows[is_init] - 1
    num_records = int(transition_rows[-1]) + 1

    def interleave(transition: Tensor, initial: Tensor | None = None) -> Tensor:
        """Place the transitions' rows ``[N, T, ...]`` and the initial ones, by default zeros."""
        out = transition.new_zeros(num_records, *transition.shape[2:])
        out.index_copy_(0, transition_rows, transition.flatten(0, 1))
        if initial is not None:
            out.index_copy_(0, initial_rows, initial.flatten(0, 1)[is_init])
        return out

    stream = torch.arange(batch.shape[0], device=is_init.device).unsqueeze(-1).expand(batch.shape)
    starts = torch.zeros_like(batch["is_init"])
    result = {key: interleave(batch["next", key], batch[key]) for key in observation_keys}
    result |= {key: interleave(batch["next", key]) for key in ("reward", "terminated", "done")}
    records = TensorDict(
        {
            "stream": interleave(stream, stream),
            "action": interleave(batch["action"]),
            "is_init": interleave(starts, ~starts),
            "next": TensorDict(result, [num_records]),
        },
        [num_records],
        device=batch.device,
    )
    if latent_classes is not None:
        # The policy wrote the latent of the root observation under the `next` that it led to.
        state = interleave(pack_state(batch["next", "state"], latent_classes))
        belief = interleave(pack_belief(batch["next", "belief"]))
        records[PREVIOUS] = TensorDict({"state": state, "belief": belief}, [num_records])
    return records

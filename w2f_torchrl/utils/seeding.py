"""One rule for all seeds of a run."""

from __future__ import annotations

import zlib

import numpy as np


def derive_seed(seed: int, *path: int | str) -> int:
    """Derive an independent seed for one named part of a run.

    The path is hashed together with the seed by :class:`numpy.random.SeedSequence`, so that
    neighbouring seeds and indices yield unrelated streams (with ``seed + index``, env 1 of run 0
    would equal env 0 of run 1). The rule of this project:

    - env ``i`` of a batch: ``derive_seed(seed, "env", i)``;
    - a rank's training or evaluation envs get ``derive_seed(seed, "train" | "eval", rank)`` as that
      ``seed``;
    - the policy's noise in a collector worker: ``derive_seed(seed, "policy", rank, worker)``.

    Args:
        seed: The run's seed, a non-negative integer.
        *path: Names and non-negative indices of the part.

    Returns:
        An integer in ``[0, 2**31)``.

    Raises:
        ValueError: If ``seed`` or an index is negative.

    Examples:
        >>> derive_seed(0, "env", 1) == derive_seed(0, "env", 1)
        True
        >>> derive_seed(0, "env", 1) == derive_seed(1, "env", 0)
        False
    """
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in path]
    if seed < 0 or any(word < 0 for word in words):
        raise ValueError(f"seed and path indices must be non-negative, got {seed} and {path}.")
    return int(np.random.SeedSequence([seed, *words]).generate_state(1)[0]) & 0x7FFFFFFF

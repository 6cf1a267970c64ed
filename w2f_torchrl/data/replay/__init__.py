"""The replay: a ring of records per env, its sampler, its files, and stored latents."""

from __future__ import annotations

from typing import TYPE_CHECKING

from w2f_torchrl._lazy import lazy_exports

if TYPE_CHECKING:
    from w2f_torchrl.data.replay.buffer import StreamReplayBuffer
    from w2f_torchrl.data.replay.make import make_replay
else:
    __getattr__, __dir__ = lazy_exports(
        __name__, {"buffer": ("StreamReplayBuffer",), "make": ("make_replay",)}
    )

__all__ = ["StreamReplayBuffer", "make_replay"]

"""Records that say which stream and which position they are of."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase


def numbered(stream: int, start: int, num: int) -> TensorDict:
    """Records of one stream; the action says which stream and which position."""
    position = torch.arange(start, start + num)
    action = torch.stack([torch.full((num,), stream), position], -1).float()
    done = (position % 7 == 6).unsqueeze(-1)
    new = TensorDict(
        {
            "pixels": (position % 256).byte().view(-1, 1, 1, 1).expand(num, 3, 2, 8),
            "foreground_mask": ((position.view(-1, 1, 1, 1) >> torch.arange(8)) & 1)
            .bool()
            .expand(num, 1, 2, 8),
            "reward": position.unsqueeze(-1) * 0.5,
            "terminated": done & (stream % 2 == 0),
            "done": done,
        },
        [num],
    )
    is_init = (position % 7 == 0).unsqueeze(-1)
    ids = torch.full((num,), stream)
    return TensorDict({"stream": ids, "action": action, "is_init": is_init, "next": new}, [num])


def slices_of(sample: TensorDictBase) -> list[tuple[int, int]]:
    """Check that slices are consecutive and whole; return their (stream, start)."""
    action = sample["action"].long()  # [B, T, 2]
    stream, position = action.unbind(-1)
    length = position.shape[1]
    assert (stream == stream[:, :1]).all()
    assert torch.equal(position, position[:, :1] + torch.arange(length))
    # All of a record comes from the same place.
    new = sample["next"]
    assert torch.equal(new["reward"][..., 0], position * 0.5)
    assert torch.equal(new["pixels"][:, :, 2, 1, 7].long(), position % 256)
    bits = (new["foreground_mask"][:, :, 0, 1].long() << torch.arange(8)).sum(-1)
    assert torch.equal(bits, position % 256)
    assert torch.equal(new["done"][..., 0], position % 7 == 6)
    assert torch.equal(new["terminated"][..., 0], (position % 7 == 6) & (stream % 2 == 0))
    assert torch.equal(sample["is_init"][..., 0], position % 7 == 0)
    return list(zip(stream[:, 0].tolist(), position[:, 0].tolist(), strict=True))

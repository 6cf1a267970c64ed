"""Show recorded foregrounds in front of other scenery, so that a latent learns to ignore it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from torch import Tensor
from torchrl.envs import Transform

from w2f_torchrl.keys import NEXT_PIXELS, mask_of
from w2f_torchrl.segmenters.recoloring import draw_recoloring, recolored
from w2f_torchrl.utils.checks import check_number
from w2f_torchrl.utils.tensors import check_tensor

UInt8Array = npt.NDArray[np.uint8]


class ReplacedSceneryTransform(Transform):
    """Replace what is behind the foreground in some of a replay buffer's sequences.

    The foreground of each frame, as its mask says, is kept to the bit; every other pixel shows a
    video clip, as the distraction ``background`` does: from a random frame on, forwards or
    backwards, turning at the clip's ends. A sequence that is replaced is replaced throughout, with
    one clip. The idea is that of random overlays (Hansen and Wang 2021, *Generalization in
    Reinforcement Learning by Soft Data Augmentation*), but the mask says where the agent is, so
    that nothing is blended over it.

    Append it to a replay buffer, or call it with a sample. It has no use in an env, whose frames
    come one at a time, and raises an error there.

    Args:
        clips: Arrays uint8 ``[L, H, W, 3]`` with L >= 2, of the images' size, such as
            :func:`~w2f_torchrl.envs.scenery.backgrounds.load_clips` returns.
        share: Probability that a sequence's scenery is replaced, in [0, 1].
        in_keys: Keys of the images, uint8 ``[B, T, 3, H, W]`` or ``[B, 3, H, W]``. All images of a
            frame get the same clip.
        mask_keys: Keys of their masks, bool ``[..., 1, H, W]``; by default ``foreground_mask`` next
            to ``pixels``, and ``NAME_mask`` next to ``NAME``.
        colors: Whether a replaced clip also gets other colours: channels in another order, and
            another brightness, contrast and saturation; and is mirrored in half of the cases.
        seed: Seed of the draws. They are made on the CPU, equal on every device.

    Raises:
        ValueError: If no clip is given, one has another shape, or the share is out of range.
        KeyError: When called, if a mask is missing.

    Examples:
        >>> import numpy as np
        >>> import torch
        >>> from tensordict import TensorDict
        >>> clips = [np.full((5, 8, 8, 3), 200, np.uint8)]
        >>> transform = ReplacedSceneryTransform(clips, share=1.0, in_keys=["pixels"], colors=False)
        >>> pixels = torch.zeros(2, 3, 3, 8, 8, dtype=torch.uint8)
        >>> mask = torch.zeros(2, 3, 1, 8, 8, dtype=torch.bool)
        >>> mask[..., :4] = True
        >>> data = TensorDict({"pixels": pixels, "foreground_mask": mask}, [2, 3])
        >>> transform(data)["pixels"][0, 0, 0, 0].tolist()
        [0, 0, 0, 0, 200, 200, 200, 200]
    """

    def __init__(
        self,
        clips: Sequence[UInt8Array],
        share: float = 0.5,
        in_keys: Sequence[NestedKey] = (NEXT_PIXELS,),
        mask_keys: Sequence[NestedKey] | None = None,
        *,
        colors: bool = True,
        seed: int = 0,
    ) -> None:
        if mask_keys is None:
            mask_keys = [_mask_beside(key) for key in in_keys]
        if len(mask_keys) != len(in_keys):
            raise ValueError(
                f"ReplacedSceneryTransform needs one mask for each image, got {list(in_keys)} and "
                f"{list(mask_keys)}."
            )
        check_number("share", share, minimum=0, maximum=1)
        _check_clips(clips)
        super().__init__(in_keys=list(in_keys), out_keys=list(in_keys))
        self.clips, self.share, self.colors = clips, share, colors
        self.mask_keys = list(mask_keys)
        self.generator = torch.Generator().manual_seed(seed)

    def seed(self, seed: int) -> None:
        """Let the next call draw as the first one of a new transform with this seed."""
        self.generator.manual_seed(seed)

    def get_extra_state(self) -> Tensor:
        """Return the generator's state, uint8 ``[N]``, as part of the state dict."""
        return self.generator.get_state()

    def set_extra_state(self, state: Any) -> None:
        """Continue drawing from a state of :meth:`get_extra_state`."""
        self.generator.set_state(state.cpu())

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Replace the scenery of some sequences of a sample ``[B, T]`` or ``[B]``."""
        pixels = tensordict.get(self.in_keys[0])
        shape = pixels.shape[:-3]
        drawn = self.draw(shape[0], shape[1:].numel())
        return self.compose(tensordict, drawn.to(pixels.device))

    def draw(self, sequences: int, steps: int) -> TensorDict:
        """Draw what the next sample gets, on the host.

        Args:
            sequences: B, sequences of the sample.
            steps: T, frames of each.

        Returns:
            For the N chosen sequences, ``[N]``, which may be none: ``row`` int64 ``[N]``,
            ``scenery`` uint8 ``[N, T, 3, H, W]``, and with ``colors`` the change of its colours
            ``matrix`` float32 ``[N, 3, 4]``.
        """
        chosen = torch.rand(sequences, generator=self.generator) < self.share
        rows = chosen.nonzero().flatten()
        count = len(rows)
        height, width = self.clips[0].shape[1:3]
        scenery = torch.empty(count, steps, 3, height, width, dtype=torch.uint8)
        for place in range(count):
            scenery[place] = self._draw_frames(steps)
        drawn = TensorDict({"row": rows, "scenery": scenery}, [count])
        if self.colors:
            drawn["matrix"] = torch.empty(count, 3, 4)
            for place in range(count):
                drawn["matrix"][place] = draw_recoloring(self.generator)
        return drawn

    def compose(self, tensordict: TensorDictBase, drawn: TensorDictBase) -> TensorDictBase:
        """Put drawn scenery behind the foregrounds of a sample.

        Args:
            tensordict: The sample, ``[B, T]`` or ``[B]``.
            drawn: Of :meth:`draw`, on the sample's device.
        """
        if not len(drawn):
            return tensordict
        scenery = drawn["scenery"]
        if self.colors:
            scenery = recolored(scenery, drawn["matrix"])
        for key, mask_key in zip(self.in_keys, self.mask_keys, strict=True):
            pixels, mask = tensordict.get(key), tensordict.get(mask_key, None)
            if mask is None:
                raise KeyError(
                    f"ReplacedSceneryTransform reads the mask {mask_key!r} of {key!r}, but the "
                    f"tensordict has only {sorted(map(str, tensordict.keys(True, True)))}."
                )
            check_tensor("pixels", pixels, torch.uint8, ("...", 3, *scenery.shape[-2:]))
            check_tensor("mask", mask, torch.bool, (*pixels.shape[:-3], 1, *pixels.shape[-2:]))
            rows, behind = drawn["row"], scenery.reshape(len(scenery), *pixels.shape[1:])
            seen = torch.where(mask[rows], pixels[rows], behind)
            tensordict.set(key, pixels.index_copy(0, rows, seen))
        return tensordict

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        raise RuntimeError(
            "ReplacedSceneryTransform replaces the scenery of sampled sequences: append it to a "
            "replay buffer, not to an env. In an env use distraction={background: {}}."
        )

    def _reset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        return self._call(tensordict_reset)

    def _draw_frames(self, steps: int) -> Tensor:
        """Draw consecutive frames of a clip, uint8 ``[T, 3, H, W]``."""
        clip = self.clips[self._integer(len(self.clips))]
        last = len(clip) - 1
        # Forwards and then backwards is one turn of 2 * last frames.
        turn = (self._integer(2 * last) + np.arange(steps)) % (2 * last)
        frames = torch.from_numpy(clip[np.minimum(turn, 2 * last - turn)]).permute(0, 3, 1, 2)
        return frames.flip(-1) if self.colors and self._integer(2) else frames

    def _integer(self, below: int) -> int:
        return int(torch.randint(below, (), generator=self.generator))


def without_scenery(latents: TensorDictBase, rows: Tensor, latent: str) -> TensorDictBase:
    """Let packed latents know nothing of the scenery of some sequences.

    The replay holds the recorded scenery. A latent of it does not fit a sequence with other
    scenery, nor the other way round: each slice would begin with a cut. Zero means none, as in
    new records.

    Args:
        latents: Packed latents ``[B, T]``.
        rows: The sequences, int64 ``[N]``.
        latent: ``split``, whose background knows the scenery; ``foreground``, none of whose latents
            does; otherwise all do.
    """
    names = [
        name
        for name in latents.keys()
        if latent != "foreground" and (latent != "split" or name.startswith("background_"))
    ]
    return latents.replace({name: latents[name].index_fill(0, rows, 0) for name in names})


def _mask_beside(key: NestedKey) -> NestedKey:
    key = unravel_key(key)
    return mask_of(key) if isinstance(key, str) else (*key[:-1], mask_of(key[-1]))


def _check_clips(clips: Sequence[UInt8Array]) -> None:
    if not len(clips):
        raise ValueError("ReplacedSceneryTransform needs at least one clip, got none.")
    shape = clips[0].shape[1:]
    for clip in clips:
        good = clip.ndim == 4 and clip.shape[-1] == 3 and len(clip) > 1
        if not good or clip.dtype != np.uint8 or clip.shape[1:] != shape:
            raise ValueError(
                "clips must be uint8 [L, H, W, 3] of one size, with L at least 2, got "
                f"{clip.dtype} {list(clip.shape)} besides {list(shape)}."
            )

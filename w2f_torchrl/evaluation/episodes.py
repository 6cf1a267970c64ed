"""Episodes with all that probes ask for: pictures, masks, the agent's state, the distractions'."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from tensordict import TensorDict
from torch import Tensor

from w2f_torchrl.envs import PixelDMControlEnv
from w2f_torchrl.keys import MASK, PIXELS
from w2f_torchrl.utils.seeding import derive_seed
from w2f_torchrl.utils.stopping import check_stop

Array = npt.NDArray[np.float64]
Act = Callable[[Tensor, bool], Tensor]
"""From pixels uint8 [3, H, W], and whether they are an episode's first, to an action [A]."""

Accept = Callable[[int], bool]
"""Whether a clip of this index will do."""

HOLD = 4
"""Agent steps that a random action is held for, so that the agent moves."""
PER_CLIP = 4
"""Episodes that each clip is shown in, at least."""
MAX_TRIES = 2000


@dataclass(frozen=True)
class Episode:
    """One episode of T observations.

    Attributes:
        seed: What the env was seeded with.
        pixels: uint8 ``[T, 3, H, W]``.
        masks: The simulator's foreground, bool ``[T, 1, H, W]``.
        actions: float32 ``[T, A]``: the action that led to each observation, zero for the first.
        agent: The suite's own observations of the agent, float ``[T, K]`` each: ``velocity``, and
            ``pose``, which is all the others.
        scenery: What the distractions show, float ``[T, K]`` each: ``clip`` (its index), ``frame``,
            ``camera``, ``color``, as far as there are.
        physics: The simulation's state, float ``[T, K]``.
    """

    seed: int
    pixels: Tensor
    masks: Tensor
    actions: Tensor
    agent: dict[str, Array]
    scenery: dict[str, Array]
    physics: Array

    def __len__(self) -> int:
        """T."""
        return len(self.pixels)

    def records(self) -> TensorDict:
        """What the world model and the losses read, ``[1, T]``."""
        is_init = torch.zeros(1, len(self), 1, dtype=torch.bool)
        is_init[:, 0] = True
        following = {PIXELS: self.pixels[None], MASK: self.masks[None]}
        return TensorDict(
            {
                "action": self.actions[None],
                "is_init": is_init,
                "next": TensorDict(following, [1, len(self)]),
            },
            [1, len(self)],
        )


def record_episodes(
    env: PixelDMControlEnv,
    count: int,
    *,
    seed: int,
    act: Act | None = None,
    max_steps: int = 10_000,
) -> list[Episode]:
    """Play episodes and write down what was seen and what there was.

    The background's clips take turns: as many of them as are shown in 4 episodes or more.

    Args:
        env: With ``foreground_mask``.
        count: Episodes.
        seed: Episode i is played with the seed ``derive_seed(seed, "episode", i)``.
        act: The agent; None for random actions that are held for 4 steps, so that episodes of the
            same seed are the same for every agent.
        max_steps: Agent steps after which an episode is cut.
    """
    video = None if env.distractor is None else env.distractor.video
    clips = 1 if video is None else max(min(video.num_clips, count // PER_CLIP), 1)
    episodes = []
    for index in range(count):
        accept = None if video is None else partial(operator.eq, index % clips)
        own_seed = derive_seed(seed, "episode", index)
        episodes.append(_record(env, own_seed, act=act, accept=accept, max_steps=max_steps))
    return episodes


def replace_backgrounds(env: PixelDMControlEnv, episodes: Sequence[Episode]) -> list[Episode]:
    """Play episodes again before another clip: same actions, same physics, same camera and colours.

    Args:
        env: The env that they were recorded in, with two background clips or more.
        episodes: From :func:`record_episodes`.

    Raises:
        ValueError: If the env has no video, or only one clip.
        RuntimeError: If the physics came out otherwise.
    """
    if env.distractor is None or env.distractor.video is None:
        raise ValueError("replacing the background needs an env with a background video.")
    replaced = []
    for episode in episodes:
        differs = partial(operator.ne, int(episode.scenery["clip"][0, 0]))
        other = _record(env, episode.seed, actions=episode.actions, accept=differs)
        if not np.array_equal(other.physics, episode.physics):
            raise RuntimeError(f"the episode of seed {episode.seed} took another course.")
        replaced.append(other)
    return replaced


def _record(
    env: PixelDMControlEnv,
    seed: int,
    *,
    act: Act | None = None,
    actions: Tensor | None = None,
    accept: Accept | None = None,
    max_steps: int = 10_000,
) -> Episode:
    """Play one episode: given actions ``[T, A]``, an agent's, or random ones."""
    act = act or _random_actions(env, seed)
    data = _reset(env, seed, accept)
    action = torch.zeros(env.action_spec.shape)
    rows = [_row(env, data, action)]
    steps = max_steps if actions is None else len(actions) - 1
    for step in range(steps):
        check_stop()
        action = act(data["pixels"], step == 0) if actions is None else actions[step + 1]
        data = env.step(TensorDict({"action": action}, []))["next"]
        rows.append(_row(env, data, action))
        if data["done"]:
            break
    pixels, masks, taken, agent, scenery, physics = zip(*rows, strict=True)
    return Episode(
        seed,
        torch.stack(pixels),
        torch.stack(masks),
        torch.stack(taken),
        {key: np.stack([row[key] for row in agent]) for key in agent[0]},
        {key: np.stack([row[key] for row in scenery]) for key in scenery[0]},
        np.stack(physics),
    )


def _reset(env: PixelDMControlEnv, seed: int, accept: Accept | None) -> TensorDict:
    """Begin the seed's episode, before a clip that is accepted; all else is the seed's."""
    env.set_seed(seed, static_seed=True)
    if accept is not None:
        background = _find_background(env, seed, accept)
        env.set_seed(seed, static_seed=True)
        assert env.distractor is not None, "found above"
        env.distractor.seed(background, streams=("background",))
    data: TensorDict = env.reset()
    return data


def _find_background(env: PixelDMControlEnv, seed: int, accept: Accept) -> int:
    """A seed of the background with which the next reset shows a clip that is accepted."""
    assert env.distractor is not None, "checked by the callers"
    for attempt in range(MAX_TRIES):
        other = derive_seed(seed, "clip", attempt)
        env.distractor.seed(other, streams=("background",))
        env.distractor.reset()
        if accept(int(env.distractor.labels()["clip"][0])):
            return other
    raise ValueError(f"no such clip in {MAX_TRIES} tries: it takes two clips or more.")


def _random_actions(env: PixelDMControlEnv, seed: int) -> Act:
    generator = torch.Generator().manual_seed(seed)
    shape, step, action = env.action_spec.shape, 0, torch.empty(0)

    def act(pixels: Tensor, is_first: bool) -> Tensor:
        nonlocal step, action
        del pixels, is_first
        if step % HOLD == 0:
            action = 2 * torch.rand(shape, generator=generator) - 1
        step += 1
        return action

    return act


_Row = tuple[Tensor, Tensor, Tensor, dict[str, Array], dict[str, Array], Array]


def _row(env: PixelDMControlEnv, data: TensorDict, action: Tensor) -> _Row:
    observed = env.task.get_observation(env.physics)
    groups: dict[str, list[Array]] = {"pose": [], "velocity": []}
    for name, value in observed.items():
        kind = "velocity" if "velocity" in name else "pose"
        groups[kind].append(np.atleast_1d(np.asarray(value, dtype=np.float64)).ravel())
    agent = {key: np.concatenate(parts) for key, parts in groups.items() if parts}
    scenery = {} if env.distractor is None else env.distractor.labels()
    return (
        data["pixels"],
        data[MASK],
        action,
        agent,
        scenery,
        env.physics.get_state().copy(),
    )

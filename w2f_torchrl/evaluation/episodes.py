"""Episodes with the data for probes: images, masks, and the states of agent and distractions."""

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
"""Maps pixels uint8 [3, H, W], and whether they start an episode, to an action [A]."""

Accept = Callable[[int], bool]
"""Returns whether to accept the clip of this index."""

HOLD = 4
"""Agent steps for which a random action is held, so that the agent moves."""
PER_CLIP = 4
"""Minimum number of episodes per clip."""
MAX_TRIES = 2000


@dataclass(frozen=True)
class Episode:
    """One episode of T observations.

    Attributes:
        seed: Seed of the env.
        pixels: uint8 ``[T, 3, H, W]``.
        masks: The simulator's foreground, bool ``[T, 1, H, W]``.
        actions: float32 ``[T, A]``: the action that led to each observation, zero for the first.
        agent: The suite's observations of the agent, float ``[T, K]`` each: ``velocity``, and
            ``pose``, which is all the others.
        scenery: State of the distractions that exist, float ``[T, K]`` each: ``clip`` (its index),
            ``frame``, ``camera``, ``color``, ``grid``.
        physics: The simulation's state, float ``[T, K]``.
        seen_masks: The masks that a model acts on, where those are not the simulator's, bool
            ``[T, 1, H, W]``.
    """

    seed: int
    pixels: Tensor
    masks: Tensor
    actions: Tensor
    agent: dict[str, Array]
    scenery: dict[str, Array]
    physics: Array
    seen_masks: Tensor | None = None

    def __len__(self) -> int:
        """T, the number of observations."""
        return len(self.pixels)

    def records(self) -> TensorDict:
        """Return the entries that the world model and the losses read, ``[1, T]``."""
        is_init = torch.zeros(1, len(self), 1, dtype=torch.bool)
        is_init[:, 0] = True
        masks = self.masks if self.seen_masks is None else self.seen_masks
        following = {PIXELS: self.pixels[None], MASK: masks[None]}
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
    """Play episodes and record the observations and the true states.

    The background's clips take turns; their number is limited so that each is shown in at least 4
    episodes.

    Args:
        env: An env with ``foreground_mask``.
        count: Number of episodes.
        seed: Episode i is played with the seed ``derive_seed(seed, "episode", i)``.
        act: The agent; None for random actions, each held for 4 steps, so that episodes of the same
            seed are equal for every agent.
        max_steps: Agent steps after which an episode is truncated.
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
    """Replay episodes with another clip, but the same actions, physics, camera and colours.

    Scenery that reacts shows the colours of the other split instead.

    Args:
        env: The env that they were recorded in, with at least two background clips, or with
            scenery that reacts.
        episodes: From :func:`record_episodes`.

    Raises:
        ValueError: If the env has neither, or only one clip.
        RuntimeError: If the physics differ.
    """
    if env.distractor is None or not env.distractor.replaceable:
        raise ValueError(
            "replacing the background needs an env with a background video of at least two clips, "
            "or with scenery that reacts."
        )
    with env.distractor.other_split():
        return [_repeat(env, episode) for episode in episodes]


def _repeat(env: PixelDMControlEnv, episode: Episode) -> Episode:
    """Replay an episode, with another clip if the env has a video."""
    clip = episode.scenery.get("clip")
    differs = None if clip is None else partial(operator.ne, int(clip[0, 0]))
    other = _record(env, episode.seed, actions=episode.actions, accept=differs)
    if not np.array_equal(other.physics, episode.physics):
        raise RuntimeError(f"the episode of seed {episode.seed} did not repeat exactly.")
    return other


def replay_in(env: PixelDMControlEnv, episodes: Sequence[Episode]) -> list[Episode]:
    """Replay episodes in another env of the task, such as one without distractions.

    Args:
        env: The other env, which may differ in its scenery only.
        episodes: From :func:`record_episodes`.

    Raises:
        RuntimeError: If the physics differ.
    """
    replayed = [_record(env, episode.seed, actions=episode.actions) for episode in episodes]
    for one, other in zip(episodes, replayed, strict=True):
        if not np.array_equal(one.physics, other.physics):
            raise RuntimeError(f"the episode of seed {one.seed} did not repeat exactly.")
    return replayed


def _record(
    env: PixelDMControlEnv,
    seed: int,
    *,
    act: Act | None = None,
    actions: Tensor | None = None,
    accept: Accept | None = None,
    max_steps: int = 10_000,
) -> Episode:
    """Play one episode with given actions ``[T, A]``, an agent's, or random ones."""
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
    """Start the seed's episode with an accepted clip; everything else follows the seed."""
    env.set_seed(seed, static_seed=True)
    if accept is not None:
        background = _find_background(env, seed, accept)
        env.set_seed(seed, static_seed=True)
        assert env.distractor is not None, "found above"
        env.distractor.seed(background, streams=("background",))
    data: TensorDict = env.reset()
    return data


def _find_background(env: PixelDMControlEnv, seed: int, accept: Accept) -> int:
    """Return a seed of the background for which the next reset shows an accepted clip."""
    assert env.distractor is not None, "checked by the callers"
    for attempt in range(MAX_TRIES):
        other = derive_seed(seed, "clip", attempt)
        env.distractor.seed(other, streams=("background",))
        env.distractor.reset()
        if accept(int(env.distractor.labels()["clip"][0])):
            return other
    raise ValueError(f"no acceptable clip in {MAX_TRIES} tries: at least two clips are needed.")


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


def true_states(env: PixelDMControlEnv) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return the current state of the agent, and of the distractions: float ``[K]`` each.

    The agent's are the suite's observations: ``velocity``, and ``pose``, which is all the others.
    """
    observed = env.task.get_observation(env.physics)
    groups: dict[str, list[Array]] = {"pose": [], "velocity": []}
    for name, value in observed.items():
        kind = "velocity" if "velocity" in name else "pose"
        groups[kind].append(np.atleast_1d(np.asarray(value, dtype=np.float64)).ravel())
    agent = {key: np.concatenate(parts) for key, parts in groups.items() if parts}
    return agent, {} if env.distractor is None else env.distractor.labels()


def _row(env: PixelDMControlEnv, data: TensorDict, action: Tensor) -> _Row:
    agent, scenery = true_states(env)
    return (
        data["pixels"],
        data[MASK],
        action,
        agent,
        scenery,
        env.physics.get_state().copy(),
    )

"""Collectors: a counting environment proves the order from the env to the replayed slice."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.collecting import BATCHES, NUM_ENVS, NUM_WORKERS, OPTIONS, STEPS, THREADS, Run, collect
from helpers.counting_env import (
    DummyPolicy,
    decode,
    episode_length,
    make_bare_env,
    make_counting_env,
    mask_of,
    reward_of,
)

from w2f_torchrl.data import (
    make_collector,
    make_replay,
    records_from_rollout,
)
from w2f_torchrl.utils.seeding import derive_seed


@pytest.fixture(scope="module", params=[NUM_WORKERS, 0], ids=["workers", "in_process"])
def run(request: pytest.FixtureRequest) -> Run:
    """A run of several episodes an env, in worker processes and in this one."""
    return collect(num_workers=request.param)


def test_batches_have_the_keys_and_shapes_that_records_need(run: Run):
    shapes = {
        "pixels": ((3, 8, 8), torch.uint8),
        "foreground_mask": ((1, 8, 8), torch.bool),
        "action": ((1,), torch.float32),
        "is_init": ((1,), torch.bool),
        ("next", "pixels"): ((3, 8, 8), torch.uint8),
        ("next", "foreground_mask"): ((1, 8, 8), torch.bool),
        ("next", "reward"): ((1,), torch.float32),
        ("next", "done"): ((1,), torch.bool),
        ("next", "terminated"): ((1,), torch.bool),
        ("next", "truncated"): ((1,), torch.bool),
        ("next", "episode_reward"): ((1,), torch.float32),
    }
    extra = set(OPTIONS["extra_keys"])
    for batch in run.batches:
        assert batch.batch_size == (NUM_ENVS, STEPS)
        found = {k: (tuple(v.shape[2:]), v.dtype) for k, v in batch.items(True, True)}
        assert {k: v for k, v in found.items() if k not in extra} == shapes
        assert extra <= found.keys()  # and the policy's "embedding" is not there


def test_records_are_each_envs_history_without_gap_or_double(run: Run):
    records = torch.cat([records_from_rollout(batch) for batch in run.batches])
    for env in range(NUM_ENVS):
        stream = records[records["stream"] == env]
        owner, episode, step, led = decode(stream["next", "pixels"]).unbind(-1)
        assert (owner == env).all()
        # Walk through the env's rules, from its first episode (a collector may reset more than
        # once before it starts): each observation occurs once, first and last ones included.
        expected_episode, expected_step = int(episode[0]), 0
        for t, record in enumerate(stream):
            length = episode_length(env, expected_episode)
            assert (int(episode[t]), int(step[t])) == (expected_episode, expected_step)
            first, last = expected_step == 0, expected_step == length
            new = record["next"]
            assert bool(record["is_init"]) == first
            assert bool(new["done"]) == last
            assert bool(new["terminated"]) == (last and expected_episode % 2 == 1)
            # The action stored here is the one that led here, and so is the reward.
            assert float(record["action"]) == int(led[t])
            reward = 0 if first else reward_of(env, expected_episode, expected_step, int(led[t]))
            assert float(new["reward"]) == reward
            assert torch.equal(new["foreground_mask"], mask_of(expected_step))
            expected_episode += last
            expected_step = 0 if last else expected_step + 1
        assert expected_episode - int(episode[0]) >= 5
        starts = sum(int(batch["is_init"][env].sum()) for batch in run.batches)
        assert len(stream) == BATCHES * STEPS + starts


def test_replayed_slices_keep_the_order(run: Run):
    replay = make_replay(
        capacity=NUM_ENVS * 40, num_streams=NUM_ENVS, batch_size=8, batch_length=12, seed=0
    )
    borders = 0
    for batch in run.batches:
        replay.extend(records_from_rollout(batch))
        if not replay.can_sample():
            continue
        for _ in range(4):
            sample = replay.sample()
            env, episode, step, led = decode(sample["next", "pixels"]).unbind(-1)  # [B, T]
            assert (env == env[:, :1]).all()
            assert torch.equal(sample["action"][..., 0].long(), led)
            starts = sample["is_init"][..., 0]
            assert torch.equal(starts, step == 0)
            same = episode[:, 1:] == episode[:, :-1]
            assert torch.equal(same, ~starts[:, 1:])
            assert (step.diff()[same] == 1).all()
            assert (episode.diff()[~same] == 1).all()
            assert torch.equal(sample["next", "done"][:, :-1, 0], ~same)
            borders += int((~same).sum())
    assert max(replay.heads.written) > 2 * replay.heads.capacity  # the rings wrapped
    assert borders > 100


def test_the_recurrent_state_is_carried_and_reset(run: Run):
    steps_since_reset = torch.zeros(NUM_ENVS)
    previous = torch.zeros(NUM_ENVS)
    for batch in run.batches:
        for t in range(STEPS):
            row = batch[:, t]
            first = row["is_init"][:, 0]
            # The primer's zeros at a start, else what the policy wrote the step before.
            assert torch.equal(row["belief"][:, 0], steps_since_reset.where(~first, 0))
            assert torch.equal(row["previous_action"][:, 0], previous.where(~first, 0))
            steps_since_reset = row["next", "belief"][:, 0]
            assert torch.equal(steps_since_reset, row["belief"][:, 0] + 1)
            previous = row["action"][:, 0]


def test_every_batch_is_collected_with_the_weights_just_set(run: Run):
    assert len(set(run.weights)) == BATCHES
    for batch, weight in zip(run.batches, run.weights, strict=True):
        assert (batch["next", "state"] == weight).all()


def test_every_env_gets_its_own_seed(run: Run):
    base = derive_seed(3, "train", 0)
    expected = [derive_seed(base, "env", env) for env in range(NUM_ENVS)]
    assert len(set(expected)) == NUM_ENVS
    for batch in run.batches:
        assert (batch["seed"][..., 0] == torch.tensor(expected).unsqueeze(-1)).all()


def test_workers_draw_their_own_noise(run: Run):
    # Two envs a worker: equal noise in the workers would repeat rows 0 and 1 in rows 2 and 3.
    for batch in run.batches:
        actions = batch["action"].view(NUM_WORKERS, -1)
        assert (actions[0] == actions[1]).float().mean() < 0.3


def test_a_seed_reproduces_a_run_bit_for_bit(run: Run, request: pytest.FixtureRequest):
    again = collect(2, num_workers=request.node.callspec.params["run"])
    for a, b in zip(run.batches[:2], again.batches, strict=True):
        assert (a == b).all()


def test_noise_follows_seed_and_rank():
    def actions(**changes) -> list[float]:
        return collect(1, num_workers=0, **changes).batches[0]["action"].flatten().tolist()

    assert actions() == actions()
    assert actions() != actions(seed=4)
    assert actions() != actions(rank=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_workers": 3}, "num_envs=4 must be a multiple of num_workers=3"),
        ({"frames_per_batch": 30}, "frames_per_batch=30 must be a positive multiple of num_envs=4"),
        ({"num_envs": 0}, "num_envs must be positive"),
    ],
)
def test_counts_that_do_not_divide_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_collector(make_counting_env, DummyPolicy(), **(OPTIONS | changes))


def test_the_learners_threads_are_not_taken_away(run: Run):
    assert run.threads == THREADS


PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
from helpers.counting_env import RECURRENT, DummyPolicy, make_bare_env, make_counting_env
from w2f_torchrl.data import make_collector

def main():
    options = dict(primers=RECURRENT, num_envs=2, frames_per_batch=8)
    try:
        make_collector(make_bare_env, DummyPolicy(), num_workers=1, **options)
    except ValueError as error:
        print("REFUSED", str(error).splitlines()[0], flush=True)
    collector = make_collector(make_counting_env, DummyPolicy(), num_workers=2, **options)
    for number, batch in enumerate(collector):
        if number == 3:
            print("READY", flush=True)

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def program(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A program that collects without end, in a process group of its own like in a terminal."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    root = Path(__file__).parent
    path = os.pathsep.join([str(root), str(root.parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def living(group: int) -> list[str]:
    """The processes of a group that are neither gone nor waiting to be reaped."""
    lines = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            lines.append(file.read_text())
    fields = [line.rpartition(")")[2].split() for line in lines]
    return [
        line for line, f in zip(lines, fields, strict=True) if f[0] != "Z" and f[2] == str(group)
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_failures_and_interrupts_end_the_program_with_one_traceback(program):
    assert program.stdout.readline().startswith("REFUSED create_env must make envs with `is_init`")
    assert program.stdout.readline() == "READY\n"
    os.killpg(program.pid, signal.SIGINT)  # as Ctrl+C does: to all processes
    _, errors = program.communicate(timeout=200)  # nobody called shutdown(): it ends all the same
    assert program.returncode == -signal.SIGINT
    assert errors.count("Traceback") == 1
    assert errors.rstrip().endswith("KeyboardInterrupt")
    deadline = time.monotonic() + 30
    while left := living(program.pid):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_an_env_without_is_init_is_refused_in_process():
    with pytest.raises(ValueError, match="InitTracker"):
        make_collector(make_bare_env, DummyPolicy(), **(OPTIONS | {"num_workers": 0}))


def make_cartpole(index: int, seed: int):
    """Make a real env; imported here, so that other tests need no renderer."""
    from w2f_torchrl.envs import make_env

    del index
    return make_env("cartpole", "balance", image_size=16, seed=seed)


class RandomCartpolePolicy(DummyPolicy):
    """Random actions in the Control Suite's range."""

    def forward(self, tensordict):
        tensordict = super().forward(tensordict)
        tensordict["action"] = tensordict["action"] / 127.5 - 1
        return tensordict


@pytest.mark.render
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_control_suite_env_goes_through_collector_and_replay(num_workers: int):
    changes = {"extra_keys": [], "num_workers": num_workers}
    collector = make_collector(make_cartpole, RandomCartpolePolicy(), **(OPTIONS | changes))
    replay = make_replay(capacity=400, num_streams=NUM_ENVS, batch_size=2, batch_length=8, seed=0)
    try:
        for number, batch in enumerate(collector):
            replay.extend(records_from_rollout(batch))
            if number == 2:
                break
    finally:
        collector.shutdown()
    assert len(replay) == 3 * NUM_ENVS * STEPS + NUM_ENVS
    first, other = batch["next", "pixels"][:2]
    assert not torch.equal(first, other)  # the envs have seeds of their own
    sample = replay.sample()
    mask = sample["next", "foreground_mask"]
    assert mask.shape == (2, 8, 1, 16, 16)
    assert 0 < mask.float().mean() < 0.5
    assert sample["is_init"][:, 0].all()  # the newest chunks come first: both streams' beginnings
    assert (sample["next", "reward"][:, 1:] > 0).all()

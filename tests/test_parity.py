"""The comparison with r2dreamer: alignment, units, resume and report, without r2dreamer."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import parity
import parity_report
import pytest
import torch
from helpers.counting_env import SIZE, CountingEnv, decode, episode_length, reward_of
from parity_settings import ROW, Settings, as_dict, note_settings, run_name
from peer_envs import EnvBatch
from peer_loop import PeerLoop, Rows
from peers import import_from
from tensordict import TensorDict
from torch import Tensor

from w2f_torchrl.data import UpdateSchedule
from w2f_torchrl.kernels.categoricals import TwoHot
from w2f_torchrl.objectives.reconstruction import image_loss

ENVS, LENGTH = 3, 4
CHECKOUT = os.environ.get("W2F_R2DREAMER", "")
SETTINGS = Settings("cartpole_swingup", 8, 16, seed=0, action_repeat=8)


class ResumableEnv(CountingEnv):
    def resume_state(self) -> dict[str, int]:
        return {"episode": self.episode, "step": self.step_number}

    def load_resume_state(self, state: dict[str, int]) -> None:
        self.episode, self.step_number = state["episode"], state["step"]


class StubRSSM:
    """What r2dreamer's KL loss is like: free nats, and no share of the uniform distribution."""

    def kl_loss(self, posterior: Tensor, prior: Tensor, free: float) -> tuple[Tensor, Tensor]:
        log_posterior, log_prior = posterior.log_softmax(-1), prior.log_softmax(-1)
        kl = (log_posterior.exp() * (log_posterior - log_prior)).sum((-1, -2))
        return kl.clip(min=free), kl.clip(min=free)


class StubAgent:
    """Acts at random in [0, 255], counts the steps of its episodes in ``deter``; learns nothing."""

    def __init__(self) -> None:
        self.rssm = StubRSSM()
        self._slow_value_updates = 0
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self._optimizer = torch.optim.Adam([self.weight])
        self._scaler = torch.amp.GradScaler("cpu", enabled=False)
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda step: 1.0)
        self.batches: list[TensorDict] = []
        self.posterior, self.prior = torch.zeros(2, 3, 2, 4), torch.zeros(2, 3, 2, 4)

    def get_initial_state(self, B: int) -> TensorDict:
        zeros = {"stoch": torch.zeros(B, 2, 2), "deter": torch.zeros(B, 1)}
        return TensorDict(zeros | {"prev_action": torch.zeros(B, 1)}, [B])

    def act(self, obs: TensorDict, state: TensorDict) -> tuple[Tensor, TensorDict]:
        assert obs["image"].shape[1:] == (SIZE, SIZE, 3)
        deter = torch.where(obs["is_first"], 0, state["deter"]) + 1
        action = torch.randint(0, 256, (len(obs), 1)).float()
        latent = {"stoch": torch.rand(len(obs), 2, 2), "deter": deter, "prev_action": action}
        return action, TensorDict(latent, [len(obs)])

    def update(self, replay: Any) -> dict[str, Tensor]:
        data, index, _ = replay.sample()
        self.batches.append(data)
        dynamics, _ = self.rssm.kl_loss(self.posterior, self.prior, 1.0)
        self.weight.data += torch.rand(1)  # what a resume must bring back
        self._slow_value_updates += 1
        replay.update(index, data["stoch"], data["deter"] + 1000)
        ones = {"loss/image": 3.0, "loss/rew": 2.0, "action_entropy": 1.0}
        return {k: torch.tensor(v) for k, v in ones.items()} | {"loss/dyn": dynamics.mean()}

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight.data}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight.data.copy_(state["weight"])


class StubReplay:
    """r2dreamer's replay as its users see it: time first, slices of T + 1 that never join envs."""

    class Store:
        def __init__(self) -> None:
            self._storage: Any = None

        @property
        def storage(self) -> StubReplay.Store:
            return self

        @property
        def shape(self) -> torch.Size:
            return self._storage.shape

        def __len__(self) -> int:
            return 0 if self._storage is None else self._storage.numel()

        def extend(self, records: TensorDict) -> None:
            records = records.transpose(0, 1)
            old = [] if self._storage is None else [self._storage]
            self._storage = torch.cat([*old, records]).contiguous()

    def __init__(self) -> None:
        self._buffer = self.Store()

    def add_transition(self, data: TensorDict) -> None:
        self._buffer.extend(data.unsqueeze(1))

    def sample(self) -> tuple[TensorDict, tuple[Tensor, Tensor], None]:
        store = self._buffer._storage
        first = torch.randint(len(store) - LENGTH, (5, 1))
        time = first + torch.arange(LENGTH + 1)
        env = torch.randint(ENVS, (5, 1)).expand_as(time)
        slices = store[time, env]
        data = slices[:, 1:].clone()
        data["action"] = slices["action"][:, :-1]
        return data, (time[:, 1:], env[:, 1:]), None

    def update(self, index: tuple[Tensor, Tensor], stoch: Tensor, deter: Tensor) -> None:
        self._buffer._storage["stoch"][index] = stoch
        self._buffer._storage["deter"][index] = deter


def make_loop(run_dir: Path, env: type[CountingEnv] = ResumableEnv) -> PeerLoop:
    run_dir.mkdir(parents=True, exist_ok=True)
    schedule = UpdateSchedule(4, 2, 2, start=ENVS * (LENGTH + 2))  # one an agent step
    return PeerLoop(
        StubAgent(),
        StubReplay(),
        EnvBatch([env(i) for i in range(ENVS)]),
        schedule,
        run_dir,
        action_repeat=2,
        row=5,
    )


def rows_of(run_dir: Path) -> list[dict[str, float]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if not k.startswith("speed/")} for row in rows]


# ---------------------------------------------------------------- alignment


def test_a_stored_action_is_the_one_taken_at_its_observation(tmp_path):
    torch.manual_seed(0)
    loop = make_loop(tmp_path)
    for _ in range(40):
        loop.step()
    stored = loop.replay._buffer._storage
    assert stored.shape == (40, ENVS)
    labels = decode(stored["image"].movedim(-1, 2))  # env, episode, step, action that led here
    for env in range(ENVS):
        episode = step = 0
        for now in range(40):
            length = episode_length(env, episode)
            led_here = int(stored["action"][now - 1, env]) if step else 0
            assert labels[now, env].tolist() == [env, episode, step, led_here]
            row = stored[now, env]
            reward = reward_of(env, episode, step, led_here) if step else 0.0
            assert float(row["reward"]) == reward
            assert bool(row["is_first"]) == (step == 0)
            assert bool(row["is_last"]) == (step == length)
            assert bool(row["is_terminal"]) == (step == length and episode % 2 == 1)
            assert float(row["deter"]) == step + 1  # the policy started anew with the episode
            if step == length:
                assert float(row["action"]) == 0
                episode, step = episode + 1, 0
            else:
                step += 1


def test_a_reset_is_no_agent_step_and_returns_are_the_episodes(tmp_path):
    torch.manual_seed(0)
    loop = make_loop(tmp_path)
    for _ in range(40):
        loop.step()
    stored = loop.replay._buffer._storage
    assert loop.steps == int((~stored["is_first"]).sum())
    rows = [row for row in rows_of(tmp_path) if "episode/return" in row]
    assert len(rows) == int(stored["is_last"].sum())
    lengths = sorted(
        episode_length(env, episode)
        for env in range(ENVS)
        for episode in range(int(stored["is_last"][:, env].sum()))
    )
    assert sorted(row["episode/length"] for row in rows) == lengths
    ended = torch.cat([stored["reward"][:, env] for env in range(ENVS)]).double()
    open_ones = sum(float(loop._returns[env]) for env in range(ENVS))
    total = sum(row["episode/return"] for row in rows) + open_ones
    assert total == pytest.approx(float(ended.sum()), rel=1e-6)


def test_the_real_environment_gives_what_ours_sees():
    from peer_run import make_envs

    from w2f_torchrl.data.environments import create_env
    from w2f_torchrl.utils.seeding import derive_seed

    settings = Settings("cartpole_swingup", 8, 16, seed=3, action_repeat=8, num_envs=2)
    batch = make_envs(settings)
    seed = derive_seed(derive_seed(3, "train", 0), "env", 1)
    env = create_env(settings.run_config(), 1, seed)
    observation, done = batch.step(torch.zeros(2, 1), torch.ones(2, dtype=torch.bool))
    expected = env.reset()
    assert torch.equal(observation["image"][1], expected["pixels"].movedim(0, -1))
    assert bool(observation["is_first"].all())
    assert not bool(done.any())
    for value in (0.7, -0.2):
        observation, done = batch.step(torch.full((2, 1), value), done)
        expected = env.step(expected.set("action", torch.full((1,), value)))["next"]
        assert torch.equal(observation["image"][1], expected["pixels"].movedim(0, -1))
        assert torch.equal(observation["reward"][1], expected["reward"])
    env.close()


# ---------------------------------------------------------------- updates and units


def test_updates_are_one_an_agent_step_after_the_prefill(tmp_path):
    torch.manual_seed(0)
    loop = make_loop(tmp_path)
    for _ in range(30):
        loop.step()
        loop.learn(10**9)
        assert loop.updates == max(loop.steps - ENVS * (LENGTH + 2), 0)
    assert loop.updates > 20
    rows = [row for row in rows_of(tmp_path) if "wm/image_loss" in row]
    assert [row["updates"] for row in rows] == list(range(5, loop.updates + 1, 5))


def test_ours_and_the_peer_have_equal_updates_at_equal_steps():
    from hydra import compose, initialize_config_module

    import sota_configs.world2filter  # noqa: F401 (its settings and presets)
    from w2f_torchrl.config import to_run_config
    from w2f_torchrl.trainers.run import build_counters

    for settings in (SETTINGS, Settings("ball_in_cup_catch", 4, 64, seed=1, action_repeat=4)):
        with initialize_config_module("sota_configs", version_base="1.3"):
            config = to_run_config(compose("config", settings.overrides(400)))
        config.validate()
        counters = build_counters(config)
        counters.steps = config.training.total_frames // settings.action_repeat
        assert counters.updates_due() == 400
        counters.steps = settings.prefill
        assert counters.updates_due() == 0
        # Every env holds more than T + 1 records by then, as r2dreamer's trainer wants.
        assert settings.prefill / settings.num_envs > settings.batch_length + 1
        assert config.collection.steps_per_batch == 1
        assert math.isclose(
            config.loss.discount_horizon * settings.action_repeat, 666, rel_tol=0.01
        )
        assert (config.environment.domain, config.environment.task) in (
            ("cartpole", "swingup"),
            ("ball_in_cup", "catch"),
        )


def test_the_kl_has_our_unit(tmp_path):
    loop = make_loop(tmp_path)
    # Two categoricals of four classes: a sure one against an even one, and two that are equal.
    loop.agent.posterior[..., 0, 0] = 30.0
    for _ in range(LENGTH + 2):
        loop.step()
    loop.schedule.start = 0
    loop.learn(5)
    sure, rest = 0.99 + 0.0025, 0.0025
    expected = sure * math.log(sure * 4) + 3 * rest * math.log(rest * 4)
    row = rows_of(tmp_path)[-1]
    assert row["wm/kl_value"] == pytest.approx(expected, rel=1e-4)
    assert row["wm/kl_clipped"] == pytest.approx(math.log(4), rel=1e-4)  # without the share
    # Below the free nats theirs is clipped, ours is not.
    loop.agent.posterior.zero_()
    loop.learn(10)
    row = rows_of(tmp_path)[-1]
    assert row["updates"] == 10
    assert row["wm/kl_value"] == pytest.approx(0.0, abs=1e-6)
    assert row["wm/kl_clipped"] == 1.0
    assert (row["wm/image_loss"], row["wm/reward_loss"]) == (3.0, 2.0)


def test_our_image_loss_is_a_sum_over_pixels_of_colours_in_0_to_1():
    pixels = torch.zeros(2, 3, 3, 4, 4, dtype=torch.uint8)
    pixels[0, 0, 0, 0, 0] = 255
    loss = image_loss(torch.full((2, 3, 3, 4, 4), 0.5), pixels)
    # Every one of 48 values is 0.5 away, whichever picture it is in.
    assert float(loss) == pytest.approx(48 * 0.25)


@pytest.mark.skipif(not CHECKOUT, reason="W2F_R2DREAMER names no checkout of r2dreamer")
def test_the_real_losses_have_the_same_units():
    distributions = import_from(Path(CHECKOUT), "distributions")
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, 3, 8, 8), dtype=torch.uint8)
    prediction = torch.rand(2, 3, 3, 8, 8)
    theirs = -distributions.mse(prediction.movedim(2, -1)).log_prob(pixels.movedim(2, -1) / 255)
    assert float(theirs.mean()) == pytest.approx(float(image_loss(prediction, pixels)), rel=1e-5)
    logits, target = torch.randn(2, 3, 255), torch.rand(2, 3, 1) * 8
    theirs = -distributions.symexp_twohot(logits, 255).log_prob(target)
    torch.testing.assert_close(theirs, TwoHot(255).loss(logits, target), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- resume


def record_of(loop: PeerLoop) -> TensorDict:
    return loop.replay._buffer._storage


def test_a_resumed_loop_stores_and_learns_the_same(tmp_path):
    torch.manual_seed(1)
    whole = make_loop(tmp_path / "whole")
    assert whole.run(60)
    torch.manual_seed(1)
    first = make_loop(tmp_path / "cut")

    class StopAfter:
        """Empty until the loop has done 33 updates, in the middle of a row of metrics."""

        def __len__(self) -> int:
            return int(first.updates >= 33)

    assert not first.run(60, StopAfter())
    Rows(tmp_path / "cut").write({"frames": 1, "updates": 1})  # after the save: must go
    torch.manual_seed(99)
    second = make_loop(tmp_path / "cut")
    assert second.resume()
    assert second.updates == first.updates
    assert second.run(60)
    assert record_of(whole).keys() == record_of(second).keys()
    for key, value in record_of(whole).items():
        assert torch.equal(value, record_of(second)[key]), key
    assert torch.equal(whole.agent.weight, second.agent.weight)
    assert second.agent._slow_value_updates == 60
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "cut")
    assert bool((record_of(whole)["deter"] >= 1000).any())  # latents were written back


@pytest.mark.slow
@pytest.mark.skipif(not CHECKOUT, reason="W2F_R2DREAMER names no checkout of r2dreamer")
def test_the_real_agent_resumes_exactly(tmp_path):
    import peer_run

    settings = Settings("cartpole_swingup", 2, 4, seed=0, action_repeat=8, num_envs=2)

    def build(name: str) -> PeerLoop:
        (tmp_path / name).mkdir(exist_ok=True)
        return peer_run.make_loop(Path(CHECKOUT), settings, tmp_path / name, updates=300)

    whole = build("whole")
    whole.run(12)
    first = build("cut")
    first.run(6)
    second = build("cut")
    assert second.resume()
    second.run(12)
    filled = whole.replay._buffer.storage.shape[0]
    assert second.replay._buffer.storage.shape[0] == filled
    for key, value in record_of(whole)[:filled].items():
        assert torch.equal(value, record_of(second)[key][:filled]), key
    for name, value in whole.agent.state_dict().items():
        assert torch.equal(value, second.agent.state_dict()[name]), name
    before, after = whole.agent._optimizer.state_dict(), second.agent._optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]  # the learning rate of the warm-up
    assert before["state"][0]["step"] == after["state"][0]["step"] == 12


def test_envs_that_cannot_say_their_state_begin_new_episodes(tmp_path):
    loop = make_loop(tmp_path, CountingEnv)
    loop.run(7)
    again = make_loop(tmp_path, CountingEnv)
    assert again.resume()
    steps = again.steps
    again.step()
    assert again.steps == steps
    assert bool(record_of(again)["is_first"][-1].all())
    torch.testing.assert_close(record_of(again)[:-1], record_of(loop))


def test_without_a_saved_state_a_run_begins_again(tmp_path):
    Rows(tmp_path).write({"frames": 8, "updates": 5})
    loop = make_loop(tmp_path)
    assert not loop.resume()
    assert rows_of(tmp_path) == []


# ---------------------------------------------------------------- the list of runs


def test_the_list_interleaves_the_projects():
    args = parity.parse(["--r2dreamer", "x", "--updates", "400", "--override", "loss.lmbda=0.9"])
    names = [job.name for job in parity.make_jobs(args)]
    assert names[:4] == [
        "cartpole_swingup_8x16_seed0_r2dreamer",
        "cartpole_swingup_8x16_seed0_ours",
        "ball_in_cup_catch_8x16_seed0_r2dreamer",
        "ball_in_cup_catch_8x16_seed0_ours",
    ]
    assert len(set(names)) == 16
    jobs = parity.make_jobs(args)
    assert jobs[1].settings == jobs[0].settings
    assert "loss.lmbda=0.9" in jobs[1].command(Path("run"), Path("x"))
    assert "--updates" in jobs[0].command(Path("run"), Path("x"))


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--updates", "401"], "updates=401"),
        (["--updates", "400000"], "updates=400000"),
        (["--shapes", "8by16"], "8by16"),
        (["--tasks", "cartpole_swing"], "cartpole_swing"),
    ],
)
def test_bad_settings_are_named(arguments, names):
    with pytest.raises(ValueError, match=names):
        parity.make_jobs(parity.parse(["--r2dreamer", "x", *arguments]))


def test_other_settings_are_refused_for_a_run_that_exists(tmp_path):
    facts = {"settings": as_dict(SETTINGS), "overrides": []}
    note_settings(tmp_path, facts)
    note_settings(tmp_path, facts)
    with pytest.raises(ValueError, match=r"overrides=\[\]"):
        note_settings(tmp_path, facts | {"overrides": ["loss.lmbda=0.9"]})


class ScriptedJob(parity.Job):
    """Runs a few lines of Python in the place of a training."""

    script = ""

    def command(self, run_dir: Path, checkout: Path) -> list[str]:
        return [sys.executable, "-c", self.script, str(run_dir)]


WRITE = "import json, sys; open(sys.argv[1] + '/metrics.jsonl', 'a').write(json.dumps("


def test_a_run_is_trained_once_and_its_time_is_kept(tmp_path, monkeypatch):
    script = WRITE + "{'frames': 800, 'updates': 100}) + chr(10)); sum(range(3_000_000))"
    monkeypatch.setattr(ScriptedJob, "script", script)
    runs, said = tmp_path / "runs", []
    for _ in range(2):
        parity.Runs(runs, tmp_path, said.append).train([ScriptedJob("r2dreamer", SETTINGS, 100)])
    run_dir = runs / "cartpole_swingup_8x16_seed0_r2dreamer"
    (usage,) = map(json.loads, (run_dir / "usage.jsonl").read_text().splitlines())
    assert usage["updates"] == 100
    assert 0 < usage["cpu_seconds"] <= usage["wall_seconds"] * 1.5
    assert usage["peer_commit"] is None
    assert "done before" in said[-1]


def test_a_run_that_fails_is_named_with_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(ScriptedJob, "script", "raise SystemExit('no room')")
    with pytest.raises(RuntimeError, match=r"1 of 1 runs failed: see .*r2dreamer\.log"):
        parity.Runs(tmp_path, tmp_path, print).train([ScriptedJob("r2dreamer", SETTINGS, 100)])
    assert "no room" in (tmp_path / "cartpole_swingup_8x16_seed0_r2dreamer.log").read_text()


def test_a_stop_signal_lets_the_run_save_and_starts_no_other(tmp_path, monkeypatch):
    script = (
        "import os, signal, sys, time; from pathlib import Path; here = Path(sys.argv[1])\n"
        "def save(*_): (here / 'saved').touch(); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save); os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(60)"
    )
    monkeypatch.setattr(ScriptedJob, "script", script)
    jobs = [ScriptedJob(name, SETTINGS, 100) for name in ("r2dreamer", "ours")]
    runs = parity.Runs(tmp_path, tmp_path, print)
    with pytest.raises(KeyboardInterrupt):
        runs.train(jobs)
    assert (tmp_path / "cartpole_swingup_8x16_seed0_r2dreamer" / "saved").exists()
    assert not (tmp_path / "cartpole_swingup_8x16_seed0_ours.log").exists()


def test_a_missing_checkout_is_reported(tmp_path):
    from peers import r2dreamer_agent

    with pytest.raises(FileNotFoundError, match="is not a checkout of r2dreamer"):
        r2dreamer_agent(tmp_path, "size1m", 1)


# ---------------------------------------------------------------- the report


def write_run(
    folder: Path, project: str, seed: int, image: float, returns: float, updates: int = 625
) -> None:
    settings = Settings("cartpole_swingup", 8, 16, seed=seed, action_repeat=8)
    run_dir = folder / run_name(project, settings)
    facts = {"project": project, "settings": as_dict(settings), "overrides": []}
    note_settings(run_dir, facts)
    rows = Rows(run_dir)
    for at in range(ROW, updates + 1, ROW):
        losses = {"wm/image_loss": image + at, "wm/kl_value": 2.0, "wm/reward_loss": 1.5}
        speed = {"speed/updates_per_second": 4.0}
        frames = (settings.prefill + at) * 8
        rows.write({"frames": frames, "updates": at, **losses, **speed})
    for at in (0, 356, 600):  # the first ended in the prefill
        rows.write({"frames": 8 * at, "updates": at, "episode/return": returns + at})
    commits = {"commit": "abc", "peer_commit": "def"}
    usage = {"wall_seconds": 100.0, "cpu_seconds": 75.0, "updates": 300, "peak_megabytes": 800.0}
    lines = [usage | commits, usage | {"commit": "abd", "peer_commit": "def", "updates": 325}]
    (run_dir / "usage.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_report_compares_at_equal_updates(tmp_path):
    for seed, ours, peers in ((0, 100.0, 101.0), (1, 104.0, 103.0)):
        write_run(tmp_path, "ours", seed, ours, returns=50.0)
        write_run(tmp_path, "r2dreamer", seed, peers, returns=90.0 + seed)
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    lines = parity_report.write_report(tmp_path, out, picture)
    results = json.loads(out.read_text())
    found = results["comparisons"]["cartpole_swingup_8x16"]
    assert list(found["image_loss"]) == ["50", "100", "200", "400"]
    at = found["image_loss"]["400"]
    # Rows 400 and 425: the updates from 376 to 425.
    assert at["ours"] == [100 + 412.5, 104 + 412.5]
    assert at["gap"] == pytest.approx(0.0)
    assert at["spread"] == pytest.approx(4.0)
    assert at["verdict"] == "level within the spread"
    assert found["kl"]["400"]["ratio"] == 1.0
    # One round of 4 envs' episodes of 125 steps: the episodes that ended in updates 1 to 500.
    assert list(found["return"]) == ["500"]
    assert found["return"]["500"]["ours"] == [50.0 + 356, 50.0 + 356]
    assert found["return"]["500"]["verdict"] == "worse"
    assert results["runs"][0]["commits"] == ["abc", "abd"]
    assert results["runs"][0]["peer_commits"] == ["def"]
    assert {run["seconds_per_update"] for run in results["runs"]} == {0.25}
    assert results["runs"][0]["cpu_seconds"] == 150.0
    assert results["command"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert any("image_loss at 400" in line for line in lines)


def test_a_seed_is_compared_where_both_projects_have_got_with_it(tmp_path):
    for project in ("ours", "r2dreamer"):
        write_run(tmp_path, project, 0, 100.0, returns=50.0)
    write_run(tmp_path, "ours", 1, 100.0, returns=50.0)
    write_run(tmp_path, "r2dreamer", 1, 100.0, returns=50.0, updates=125)
    found = parity_report.compare_group(parity_report.load_runs(tmp_path))["image_loss"]
    assert {at: entry["seeds"] for at, entry in found.items()} == {
        50: [0, 1],
        100: [0, 1],
        200: [0],
        400: [0],
    }


def test_one_seed_and_one_project_get_no_verdict(tmp_path):
    write_run(tmp_path, "ours", 0, 100.0, returns=50.0)
    runs = parity_report.load_runs(tmp_path)
    summary = parity_report.summarize(runs)["comparisons"]["cartpole_swingup_8x16"]
    assert summary["missing"] == ["r2dreamer"]
    write_run(tmp_path, "r2dreamer", 0, 100.0, returns=50.0)
    found = parity_report.compare_group(parity_report.load_runs(tmp_path))
    assert found["image_loss"][400]["verdict"] == "one seed: no spread"
    assert found["image_loss"][400]["spread"] is None


def test_episodes_that_end_together_are_one_point_of_a_curve():
    at, values = parity_report._mean_at_each(np.array([5.0, 5.0, 9.0]), np.array([1.0, 3.0, 8.0]))
    assert (at.tolist(), values.tolist()) == ([5.0, 9.0], [2.0, 8.0])
    assert parity_report._mean_at_each(np.array([]), np.array([]))[0].size == 0


@pytest.mark.parametrize(
    ("ours", "lower", "verdict"),
    [(7.0, True, "better"), (13.0, True, "worse"), (13.0, False, "better"), (13.0, None, "higher")],
)
def test_verdicts(ours, lower, verdict):
    found = parity_report.compare([ours, ours + 1], [10.0, 11.0], lower)
    assert (found["verdict"], found["spread"]) == (verdict, 1.0)


def test_a_run_that_is_shorter_is_compared_as_far_as_it_got(tmp_path):
    run = SimpleNamespace(rows=[{"updates": 100, "x": 2.0}, {"updates": 125, "x": 4.0}])
    assert parity_report.loss_at(run, "x", 100) == 3.0
    assert parity_report.loss_at(run, "x", 200) is None
    with pytest.raises(FileNotFoundError, match="no runs"):
        parity_report.load_runs(tmp_path)

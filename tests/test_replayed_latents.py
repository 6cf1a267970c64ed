"""Latents from acting through the replay to the learner and back."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from helpers.counting_env import RECURRENT, decode, make_counting_env
from helpers.models import LATENTS, SIZE, filled
from helpers.models import make_learner as tiny_learner
from helpers.short_runs import crash, flip_bit, run, short_run, signal_at
from helpers.short_runs import rows as metrics
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase

from w2f_torchrl.checkpoint import latest_checkpoint, load_checkpoint
from w2f_torchrl.data import StreamReplayBuffer, make_collector, make_replay, records_from_rollout
from w2f_torchrl.data.device_copy import DeviceCopy
from w2f_torchrl.data.replay.latents import LatentStore, latent_fields
from w2f_torchrl.data.replay.record_files import Field
from w2f_torchrl.data.replay.write_back import LatentWriteBack
from w2f_torchrl.modules import WorldModel
from w2f_torchrl.modules.packed_latents import pack_state
from w2f_torchrl.trainers import Learner, Trainer

# ------------------------------------------------------------------ acting's latents


class TellingPolicy(TensorDictModuleBase):
    """Its latent says which observation it has just seen: env, episode and step."""

    in_keys: ClassVar = ["pixels", "is_init", *RECURRENT]
    out_keys: ClassVar = ["action", *(("next", key) for key in RECURRENT)]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Act at random."""
        seen = decode(tensordict["pixels"])[..., :3]
        action = torch.randint(0, 256, (*tensordict.batch_size, 1)).float()
        tensordict["action"] = tensordict["next", "previous_action"] = action
        tensordict["next", "belief"] = seen.float()
        tensordict["next", "state"] = torch.nn.functional.one_hot(seen[..., 2] % 4, 4).float()
        return tensordict


@pytest.mark.parametrize(
    "workers", [{"num_workers": 0}, {"num_workers": 2}, {"num_workers": 2, "overlap": True}]
)
def test_a_slice_starts_from_the_latent_of_the_observation_before(workers):
    replay = make_replay(
        capacity=4 * 40,
        num_streams=4,
        batch_size=8,
        batch_length=3,
        seed=0,
        latents={"belief": Field("float16", (3,)), "state": Field("uint8", (1,))},
    )
    collector = make_collector(
        make_counting_env,
        TellingPolicy(),
        primers=RECURRENT,
        num_envs=4,
        frames_per_batch=4 * 7,
        total_frames=4 * 7 * 9,
        extra_keys=[("next", "state"), ("next", "belief")],
        **workers,
    )
    starts = 0
    try:
        for batch in collector:
            replay.extend(records_from_rollout(batch, latent_classes=4))
            for _ in range(4):
                sample = replay.sample()
                env, episode, step, _ = decode(sample["next", "pixels"][:, 0]).unbind(-1)
                initial = sample["initial"][:, 0]
                before = torch.stack((env, episode, step - 1), -1) * (step > 0).unsqueeze(-1)
                assert torch.equal(initial["belief"].long(), before)
                expected = torch.where(step > 0, (step - 1) % 4 + 1, 0)
                assert torch.equal(initial["state"][:, 0].long(), expected)
                # What acting never sees, an episode's last observation, precedes none of its own.
                ended = sample["next", "done"][:, :-1]
                assert sample["is_init"][:, 1:][ended].all()
                starts += int((step > 0).sum())
    finally:
        collector.shutdown()
    assert starts > 150
    assert (replay.heads.written > 60).all()  # the rings have turned


# ------------------------------------------------------------------ the learner's


T, EPISODES = 4, (10, 14, 8)


@pytest.fixture
def no_draws(monkeypatch):
    """Make every draw of a state the same function of its probabilities."""
    monkeypatch.setattr(torch, "rand", lambda *a, **k: filled(0.37, a, k))


def make_learner(latent: str, lr: float = 1e-30, **settings: Any) -> Learner:
    """A learner of which every weight counts: some are zero at a run's beginning."""
    learner = tiny_learner(latent, lr=lr, **settings)
    change_weights(learner)
    return learner


def change_weights(learner: Learner) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in learner.world_model.parameters():
            noise = torch.randn(parameter.shape).to(parameter.device)
            parameter.add_(0.3 * noise)


def act(learner: Learner, seed: int = 0) -> TensorDict:
    """Two envs play random pictures with the learner's policy: transitions ``[2, L]``."""
    generator = torch.Generator().manual_seed(seed)

    def picture() -> torch.Tensor:
        shape = (2, 3, SIZE, SIZE)
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    steps, carried = [], {}
    for length in EPISODES:
        pixels = picture()
        for step in range(length - 1):
            is_init = torch.full((2, 1), step == 0)
            if step == 0:
                sizes = {"state": 16, "belief": 16, "previous_action": 2}
                carried = {name: torch.full((2, size), 7.0) for name, size in sizes.items()}
            td = TensorDict({"pixels": pixels, "is_init": is_init, **carried}, [2])
            with torch.no_grad():
                learner.policy(td)
            carried = {name: td["next", name] for name in carried}
            following, done = picture(), torch.full((2, 1), step == length - 2)
            after = {"pixels": following, "done": done, "terminated": done, **carried}
            after["foreground_mask"] = picture()[:, :1] < 80
            after["reward"] = torch.randn(2, 1, generator=generator)
            td = td.select("pixels", "is_init", "action")
            td["foreground_mask"] = torch.zeros(2, 1, SIZE, SIZE, dtype=torch.bool)
            steps.append(td.set("next", TensorDict(after, [2])))
            pixels = following
    return torch.stack(steps, 1)


def replay_of(learner: Learner, batch: TensorDict) -> StreamReplayBuffer:
    config = learner.world_model.config
    replay = make_replay(
        capacity=2 * sum(EPISODES),
        num_streams=2,
        batch_size=2,
        batch_length=T,
        seed=0,
        latents=latent_fields(config, learner.world_model.latent),
    )
    replay.extend(records_from_rollout(batch, latent_classes=config.num_classes))
    return replay


def unrolled(learner: Learner, replay: StreamReplayBuffer) -> TensorDict:
    """Posterior latents of whole streams from their beginning ``[2, L]``, by the world model."""
    index = torch.arange(2 * sum(EPISODES)).view(2, -1)
    records = replay.gather(index).exclude("initial")
    with torch.no_grad():
        return learner.world_model.infer(records)["next"]


def check_kept(
    replay: StreamReplayBuffer, expected: TensorDict, world_model: WorldModel, prefix: str = ""
) -> None:
    """Each record's kept latent is the one before it of the unrolled streams."""
    rows = replay.latents.rows(0, 2 * sum(EPISODES))
    length = sum(EPISODES)
    belief = rows[f"{prefix}belief"].view(2, length, -1).float()
    state = rows[f"{prefix}state"].view(2, length, -1)
    classes = getattr(world_model.config, f"{prefix}num_classes")
    starts = replay.rows["is_init"].view(2, length)
    assert starts.nonzero()[:, 1].tolist() == [0, 10, 24] * 2
    assert not belief[starts].any()
    assert not state[starts].any()
    follows = ~starts[:, 1:]
    before = expected[f"{prefix}belief"][:, :-1]
    error = (belief[:, 1:] - before)[follows].abs().max()
    assert error < 1e-3, error
    assert before[follows].abs().mean() > 0.05
    packed = pack_state(expected[f"{prefix}state"][:, :-1], classes)
    assert torch.equal(state[:, 1:][follows], packed[follows])


@pytest.mark.parametrize("latent", LATENTS)
def test_acting_keeps_what_the_world_model_computes(latent, no_draws):
    learner = make_learner(latent)
    replay = replay_of(learner, act(learner))
    check_kept(replay, unrolled(learner, replay), learner.world_model)
    if latent == "split":
        assert not replay.latents.rows(0, 64)["background_belief"].any()
        assert not replay.latents.rows(0, 64)["background_state"].any()


@pytest.mark.parametrize("latent", ["whole", "split"])
def test_slices_go_on_where_the_records_before_them_ended(latent, no_draws):
    """Whatever a slice's place: also across an episode's start, and from one."""
    learner = make_learner(latent)
    replay = replay_of(learner, act(learner))
    whole = unrolled(learner, replay)
    far = 0.0
    for start in range(sum(EPISODES) - T + 1):
        index = torch.stack([start + torch.arange(T), start + 32 + torch.arange(T)])
        sample = replay.gather(index)
        assert "initial" in sample.keys()
        with torch.no_grad():
            found = learner.world_model.infer(sample.clone())["next"]
            from_zero = learner.world_model.infer(sample.exclude("initial"))["next"]
        expected = whole[:, start : start + T]
        assert (found["belief"] - expected["belief"]).abs().max() < 1e-3
        assert torch.equal(found["state"] > 0.5, expected["state"] > 0.5)
        if start not in (0, 10, 24):
            far += float((from_zero["belief"] - expected["belief"]).abs().max())
    assert far / 27 > 0.05  # from zero it is another latent


@pytest.mark.parametrize("latent", LATENTS)
def test_written_latents_are_those_of_an_unroll_with_the_same_weights(latent, no_draws):
    """Updates along the streams replace what acting left by what the new weights give."""
    learner = make_learner(latent)
    replay = replay_of(learner, act(learner))
    before = unrolled(learner, replay)
    change_weights(learner)
    after = unrolled(learner, replay)
    assert (after["belief"] - before["belief"]).abs().mean() > 0.02
    for start in range(0, sum(EPISODES), T):
        index = torch.stack([start + torch.arange(T), start + 32 + torch.arange(T)])
        for _ in range(2):  # the second writes the first's
            row = learner.update(replay.gather(index))
            assert "latents" not in row.keys()
            replay.write_back(index, learner.latents, row["finite"])
    replay.write_back(index, learner.latents, row["finite"])
    for prefix in ("", "background_") if latent == "split" else ("",):
        check_kept(replay, after, learner.world_model, prefix)


def test_no_latent_is_read_where_an_episode_starts(no_draws):
    learner = make_learner("split")
    replay = replay_of(learner, act(learner))
    index = 10 + torch.arange(T).repeat(2, 1)
    sample = replay.gather(index)
    with torch.no_grad():
        expected = learner.world_model.infer(sample.exclude("initial"))["next"]
        for name, value in sample["initial"].items():
            sample["initial", name] = torch.ones_like(value)
        found = learner.world_model.infer(sample)["next"]
    for name in ("state", "belief", "background_state", "background_belief"):
        assert torch.equal(found[name], expected[name])


def test_without_latents_an_update_is_as_before():
    learner = make_learner("split")
    replay = replay_of(learner, act(learner))
    sample = replay.gather(torch.arange(8).view(2, T))
    learner.update(sample.exclude("initial"))
    assert learner.latents is None
    learner.update(sample)
    shapes = {name: (v.shape, v.dtype, v.requires_grad) for name, v in learner.latents.items()}
    fields = latent_fields(learner.world_model.config, "split")
    assert shapes == {n: ((2, T, *f.shape), f.torch_dtype, False) for n, f in fields.items()}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode", ["compile", "compile_all"])
# As a whole the update is compiled with its draws, whose random numbers are Inductor's otherwise.
@torch._inductor.config.patch(fallback_random=True)
def test_compiled_updates_start_from_the_same_latents(mode):
    eager, compiled = (make_learner("split", 1e-3, execution=name) for name in ("eager", mode))
    replay = replay_of(eager, act(eager))
    for _ in range(3):
        sample = replay.sample()
        rows = []
        for learner in (eager, compiled):
            torch.manual_seed(1)
            rows.append(learner.update(sample.clone()))
        for name, value in rows[0].items():
            torch.testing.assert_close(rows[1][name], value, rtol=2e-3, atol=2e-4)
        for name, value in eager.latents.items():
            other = compiled.latents[name]
            if name.endswith("state"):
                assert torch.equal(other, value)
            else:
                torch.testing.assert_close(other, value, rtol=0, atol=2e-3)
        replay.write_back(sample["index"], eager.latents, rows[0]["finite"])


def test_copies_to_the_device_move_one_row_of_what_slices_start_from():
    learner = make_learner("split")
    replay = replay_of(learner, act(learner))
    sample = replay.sample()
    copied = DeviceCopy(torch.device("cpu"))._copy(sample)
    assert (copied == sample).all()
    for leaf in copied["initial"].values():
        assert leaf.shape[:2] == (2, T)
        assert leaf.stride(1) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("execution", ["eager", "cuda_graph"])
def test_updates_on_a_gpu_write_what_they_computed(execution):
    learner = make_learner("split", 1e-3, device="cuda", execution=execution)
    on_cpu = make_learner("split")
    batch = act(on_cpu)
    replay, other = replay_of(on_cpu, batch), replay_of(on_cpu, batch)
    to_device = DeviceCopy(torch.device("cuda"))
    for _ in range(6):
        sample = replay.sample()
        index = sample["index"]
        assert torch.equal(index, other.sample()["index"])
        moved = to_device(sample)
        for name, value in sample["initial"].items():
            assert torch.equal(moved["initial", name].cpu(), value)
        row = learner.update(moved)
        replay.write_back(index, learner.latents, row["finite"])
        other.write_back(index, learner.latents.cpu(), row["finite"].cpu())
    torch.cuda.synchronize()
    for name, rows in replay.latents.state_dict().items():
        assert torch.equal(rows, other.latents.state_dict()[name])
    assert replay.latents.rows(0, 64)["background_belief"].any()


# ------------------------------------------------------------------ runs


def test_a_run_starts_slices_from_latents_and_writes_them_back(tmp_path, monkeypatch):
    written: list[torch.Tensor] = []
    add = LatentWriteBack.add
    monkeypatch.setattr(
        LatentWriteBack,
        "add",
        lambda self, index, *rest: (written.append(index.clone()), add(self, index, *rest))[1],
    )
    seen: list[TensorDictBase] = []
    trainer = Trainer(short_run(tmp_path))
    update = trainer.learner.update

    def note(sample: TensorDictBase) -> TensorDictBase:
        seen.append(sample.select("index", "is_init", "initial").clone())
        return update(sample)

    trainer.learner.update = note
    trainer.train()
    assert len(seen) == len(written) == 48
    backgrounds = 0
    for sample, index in zip(seen, written, strict=True):
        assert torch.equal(sample["index"], index)
        starts = sample["is_init"][:, 0, 0]
        first = sample["initial"][:, 0]
        assert first["state"][~starts].all()
        assert not first["state"][starts].any()
        assert first["state"].max() <= trainer.config.model.num_classes
        assert first["belief"].abs().max() <= 1
        backgrounds += int(first["background_state"].all(-1).sum())
    assert backgrounds > 10  # those that an update has written


def test_latents_change_what_is_learned_and_can_be_left_out(tmp_path):
    without = {"replay": {"latents": False}}
    for name, settings in (("on", {}), ("off", without)):
        trainer = run(tmp_path / name, **settings)
        assert (trainer.replay.latents is None) == (settings == without)
    assert metrics(tmp_path / "on") != metrics(tmp_path / "off")
    payload = load_checkpoint(latest_checkpoint(tmp_path / "off" / "checkpoints")).payload
    assert "latents" not in payload["replay"]
    assert not (tmp_path / "off" / "replay" / "latents").exists()


def newest_snapshot(run_dir: Path) -> Path:
    manifest = load_checkpoint(latest_checkpoint(run_dir / "checkpoints")).payload["replay"]
    return run_dir / "replay" / "latents" / manifest["latents"]["name"]


def test_each_kept_checkpoint_has_its_snapshot_and_no_other_is_left(tmp_path):
    crash(tmp_path, 40)
    paths = sorted((tmp_path / "checkpoints").glob("checkpoint_*.pt"))
    names = {load_checkpoint(p).payload["replay"]["latents"]["name"] for p in paths}
    assert len(names) == len(paths) == 2
    assert {path.name for path in (tmp_path / "replay" / "latents").iterdir()} == names


@pytest.mark.parametrize(
    ("change", "storage"),
    [("damaged", "memory"), ("damaged", "disk"), ("gone", "memory"), ("off before", "disk")],
)
def test_a_run_resumes_without_its_latents(tmp_path, caplog, change, storage):
    settings = {"storage": storage}
    run(tmp_path, signal_at(20), replay={**settings, "latents": change != "off before"})
    if change == "damaged":
        flip_bit(newest_snapshot(tmp_path) / "belief.memmap", 5)
    elif change == "gone":
        shutil.rmtree(newest_snapshot(tmp_path))
    with caplog.at_level("INFO"):
        trainer = run(tmp_path, replay=settings)
    assert trainer.updates == 48
    assert "lices start from zero until" in caplog.text
    assert ("the checkpoint has no latents" in caplog.text) == (change == "off before")
    assert len(metrics(tmp_path)) > 5
    assert trainer.replay.latents.rows(0, 20)["belief"].any()


def test_a_run_goes_on_with_latents_switched_off(tmp_path):
    run(tmp_path, signal_at(20))
    trainer = run(tmp_path, replay={"latents": False})
    assert trainer.updates == 48
    assert trainer.replay.latents is None


def test_an_update_that_was_not_applied_writes_no_latents(tmp_path, monkeypatch):
    trainer = Trainer(short_run(tmp_path, training={"on_nan": "skip", "total_frames": 200}))
    poison(trainer, lambda updates: updates % 2 == 0)
    stored: list[int] = []
    original = LatentStore.write

    def note(self, slots, values):
        if "background_belief" in values:  # of an update
            stored.append(trainer.updates)
            assert all(v.isfinite().all() for v in values.values())
        return original(self, slots, values)

    monkeypatch.setattr(LatentStore, "write", note)
    trainer.train()
    assert len(stored) > 3
    assert all(updates % 2 == 0 for updates in stored)  # with the one after: of odd updates


def poison(trainer: Trainer, when: Callable[[int], bool]) -> None:
    """Make the losses of some updates NaN."""
    compute = trainer.learner.loss.compute

    def poisoned(sample: TensorDictBase) -> TensorDict:
        out = compute(sample)
        if when(trainer.updates):
            out["loss_reward"] = out["loss_reward"] * float("nan")
        return out

    trainer.learner.loss.compute = poisoned

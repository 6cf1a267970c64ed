"""An exported policy is small, acts like the checkpoint, and can't be resumed from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import watch_policy
from helpers.runs import tiny_run

from w2f_torchrl.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from w2f_torchrl.logging.pictures.video import read_video
from w2f_torchrl.trainers import Trainer, export, export_policy, load_policy

pytestmark = pytest.mark.render


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("run")
    Trainer(tiny_run(run_dir, evaluation={"every_frames": 0})).train()
    path = latest_checkpoint(run_dir / "checkpoints")
    assert path is not None
    return path


def test_an_exported_policy_acts_like_its_checkpoint(checkpoint, tmp_path):
    path = export_policy(checkpoint, tmp_path / "new" / "policy.pt")
    assert [p.name for p in path.parent.iterdir()] == ["policy.pt"]
    assert path.stat().st_size < 0.3 * checkpoint.stat().st_size
    full, small = load_policy(checkpoint), load_policy(path)
    for (name, weight), other in zip(
        full.policy.named_parameters(), small.policy.parameters(), strict=True
    ):
        assert other.dtype is torch.float32
        assert torch.equal(other, weight.half().float()), name
    # The bins reach 4.8e8, which 16 bits can't hold.
    bins = [policy.world_model.two_hot.bins for policy in (full, small)]
    assert torch.equal(*bins)
    # With its weights rounded in the same way, the checkpoint's policy takes the same action.
    with torch.no_grad():
        for weight in full.policy.parameters():
            weight.copy_(weight.half())
    frame = full.make_env(seed=3).reset()
    actions = []
    for policy in (full, small):
        torch.manual_seed(0)  # the latent's state is drawn
        actions.append(policy(frame.clone())["action"])
    torch.testing.assert_close(*actions, rtol=0, atol=1e-6)


def test_an_exported_policy_names_nothing_of_the_machine(checkpoint, tmp_path):
    saved = load_checkpoint(checkpoint)
    saved.payload["config"]["segmentation"]["labels"] = str(tmp_path / "labels.npz")
    saved.payload["config"]["logging"]["wandb_entity"] = "somebody"
    saved.payload["config"]["augmentation"]["source"] = "/home/somebody/clips"
    saved.payload["config"]["environment"]["dmcgb_data"] = "/home/somebody/dmcgb"
    labelled = save_checkpoint(tmp_path / "run", saved.payload, updates=1, frames=1)
    payload = load_checkpoint(export_policy(labelled, tmp_path / "policy.pt")).payload
    assert str(tmp_path) not in repr(payload["config"])
    assert "somebody" not in repr(payload["config"])
    assert payload["config"]["run_dir"] == "runs/latest"
    assert str(checkpoint.parents[1]) not in repr(payload["config"])
    assert set(payload) == {"config", "action_size", "discrete_actions", "learner", "exported"}
    assert set(payload["learner"]) == {"loss"}


def test_a_run_does_not_go_on_from_an_exported_policy(checkpoint, tmp_path):
    path = export_policy(checkpoint, tmp_path / "policy.pt")
    config = tiny_run(tmp_path / "run")
    config.resume = str(path)
    with pytest.raises(CheckpointError, match=r"resume: .*policy.pt is an exported policy"):
        Trainer(config)


def test_a_weight_that_16_bits_can_not_hold_is_refused(checkpoint, tmp_path):
    saved = load_checkpoint(checkpoint)
    name = next(iter(saved.payload["learner"]["loss"]))
    saved.payload["learner"]["loss"][name].flatten()[0] = 1e6
    large = save_checkpoint(tmp_path, saved.payload, updates=1, frames=1)
    with pytest.raises(CheckpointError, match=f"{name} is not finite in 16 bits"):
        export_policy(large, tmp_path / "policy.pt")
    assert not (tmp_path / "policy.pt").exists()


def test_the_command_line(checkpoint, tmp_path, capsys):
    out = tmp_path / "policy.pt"
    export.main([str(checkpoint), str(out)])
    assert capsys.readouterr().out.startswith(f"{out}: ")
    with pytest.raises(SystemExit, match="2"):
        export.main([str(tmp_path / "none.pt"), str(out)])
    assert "none.pt" in capsys.readouterr().err


def test_a_policy_is_watched(checkpoint, tmp_path, capsys):
    film = tmp_path / "film.mp4"
    command = [str(checkpoint), "--out", str(film), "--scenery", "clean"]
    trained, random = watch_policy.main(command)
    out = capsys.readouterr().out
    assert f"return {trained:.0f}; with random actions {random:.0f}" in out
    assert "IoU of the predicted mask" in out
    assert len(read_video(film)) == 501  # a record an observation, 1000 control steps by two

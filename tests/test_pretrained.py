"""The agent that comes with the repository: small, opened by this version, better than chance."""

from __future__ import annotations

import json

import pytest
import torch
import watch_pretrained
from helpers.checkout import ROOT

from w2f_torchrl.checkpoint import load_checkpoint
from w2f_torchrl.logging.pictures.video import read_video
from w2f_torchrl.trainers import load_policy


def test_the_file_is_small_and_says_how_it_was_trained():
    path = watch_pretrained.PRETRAINED
    assert path.stat().st_size <= 6 * 2**20
    saved = load_checkpoint(path)
    config = saved.payload["config"]
    assert saved.payload["exported"]
    assert (config["algo"]["latent"], config["environment"]["distraction"]) == ("split", "easy")
    assert config["run_dir"] == "runs/latest"  # nothing of the machine
    weights = saved.payload["learner"]["loss"]
    parameters = dict(load_policy(path).policy.named_parameters())
    assert parameters
    assert {weight.dtype for weight in weights.values() if weight.dim() > 1} <= {
        torch.float16,
        torch.float32,
    }
    told = (path.parent / "README.md").read_text()
    assert f"{saved.frames:,} frames" in told
    assert f"{saved.updates:,} updates" in told


@pytest.mark.render
def test_the_agent_is_watched_and_spins(tmp_path, capsys):
    film = tmp_path / "film.mp4"
    trained, random = watch_pretrained.main(["--out", str(film)])
    measured = json.loads((ROOT / "benchmarks" / "results" / "pretrained.json").read_text())
    scores = [sum(each["returns"]) / len(each["returns"]) for each in measured["played"]]
    assert trained > 0.5 * min(scores)
    assert trained > 10 * max(random, 5)
    assert len(read_video(film)) == 251  # a record an observation, 1000 control steps by four
    assert "IoU of the predicted mask" in capsys.readouterr().out

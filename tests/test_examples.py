"""Every program in examples/ runs; those on SAM3 and stored replays: test_masks_on_disk.py."""

from __future__ import annotations

import json
import os
from pathlib import Path

import nbformat
import own_env_and_segmenter
import pytest
import render_imagination
import torch
import train_without_hydra
from helpers.checkout import ROOT
from helpers.runs import tiny_run
from nbclient import NotebookClient
from torchrl.envs.utils import check_env_specs

from w2f_torchrl.envs import make_env
from w2f_torchrl.evaluation.imagination import CONTEXT, HORIZON
from w2f_torchrl.logging.pictures.video import read_video
from w2f_torchrl.segmenters import mask_iou
from w2f_torchrl.trainers import Trainer

TESTED = {
    "play_onnx": "test_exported_programs.py",
    "ppo_with_sam3": "test_masks_on_disk.py",
    "relabel_replay": "test_masks_on_disk.py",
    "watch_policy": "test_export.py",
    "watch_pretrained": "test_pretrained.py",
}


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_every_example_has_a_test():
    for path in (ROOT / "examples").glob("*.py"):
        tests = (ROOT / "tests" / TESTED.get(path.stem, Path(__file__).name)).read_text()
        assert f"{path.stem}.main(" in tests, path.name


@pytest.mark.render
def test_training_from_python(tmp_path: Path):
    checkpoint = train_without_hydra.main(["--run-dir", str(tmp_path / "run"), "--frames", "200"])
    assert checkpoint.parent == tmp_path / "run" / "checkpoints"
    assert rows(tmp_path / "run")[-1]["frames"] == 256
    assert any("wm/fg_loss" in row for row in rows(tmp_path / "run"))


def test_an_env_and_a_segmenter_of_ones_own(tmp_path: Path):
    env = make_env("disc", "centre", image_size=32, seed=3)
    check_env_specs(env)
    frames = env.rollout(50, break_when_any_done=False)
    masks = frames["foreground_mask"]
    x, y = torch.meshgrid(env.grid, env.grid, indexing="xy")
    shares = masks.float().mean((-1, -2))
    expected = float(((x**2 + y**2) < 0.04).float().mean())
    assert (shares - expected).abs().max() < 0.5 * expected
    drawn = (frames["pixels"] == torch.tensor([229, 25, 25])[:, None, None]).all(-3, keepdim=True)
    assert mask_iou(masks, drawn).min() == 1
    with pytest.raises(ValueError, match="disc has centre"):
        make_env("disc", "edge")

    own_env_and_segmenter.main(["--run-dir", str(tmp_path / "run"), "--frames", "700"])
    written = rows(tmp_path / "run")
    last = [row for row in written if "eval/return_mean" in row][-1]
    assert last["eval/length_mean"] == own_env_and_segmenter.EPISODE
    errors = [row["wm/fg_loss"] for row in written if "wm/fg_loss" in row]
    assert errors[-1] < 0.9 * errors[0]  # the masks reached the losses, and something is learned


@pytest.mark.render
def test_the_imagination_of_a_checkpoint_is_filmed(tmp_path: Path, capsys):
    Trainer(tiny_run(tmp_path / "run", evaluation={"every_frames": 0})).train()
    checkpoint = max((tmp_path / "run" / "checkpoints").glob("*.pt"))
    command = [str(checkpoint), "--out", str(tmp_path / "film.mp4"), "--steps", "30"]
    paths = render_imagination.main([*command, "--windows", "2"])
    beside, acting = (read_video(path) for path in paths)
    assert len(beside) == len(acting) == CONTEXT + HORIZON
    assert beside.shape[2] > acting.shape[2]  # the truth and the error are two rows more
    assert beside.float().std() > 10
    assert "train/imagination/error: 0." in capsys.readouterr().out
    with pytest.raises(SystemExit, match="leaves nothing to imagine"):
        render_imagination.main([*command[:-1], "2"])


@pytest.mark.render
@pytest.mark.timeout(900)
def test_the_notebook_runs_from_top_to_bottom(monkeypatch):
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "committed without outputs"
    monkeypatch.setenv("W2F_FRAMES", "800")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    kinds = [kind for output in shown for kind in output.get("data", {})]
    assert kinds.count("image/png") == 4
    assert any("video/mp4" in output.get("data", {}).get("text/html", "") for output in shown)
    text = "".join(output.text for output in shown if output.output_type == "stream")
    assert "24 updates, 896 frames" in text
    assert "Warning" not in text.replace("TqdmWarning", "")

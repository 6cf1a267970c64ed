"""Exported programs act and segment as the package does, step for step, and say what they are."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.checkout import ROOT
from helpers.runs import tiny_run
from tensordict import TensorDict

import w2f_torchrl
from w2f_torchrl.checkpoint import CheckpointError, save_checkpoint
from w2f_torchrl.config.run import config_to_dict
from w2f_torchrl.evaluation.policy import LoadedPolicy
from w2f_torchrl.export import (
    ExportError,
    export_file,
    export_policy,
    export_segmenter,
    formats,
    read_description,
)
from w2f_torchrl.export import __main__ as command
from w2f_torchrl.export.formats import Entry, Program, write_program
from w2f_torchrl.export.write import policy_program
from w2f_torchrl.learner import Learner
from w2f_torchrl.modules import build_policy
from w2f_torchrl.segmenters import StudentNetwork, StudentSegmenter
from w2f_torchrl.trainers import export_policy as export_checkpoint
from w2f_torchrl.trainers import load_policy

pytest.importorskip("onnxscript", reason="needs the extra export: make extras")
onnx = pytest.importorskip("onnx", reason="needs the extra export: make extras")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra export: make extras")

import play_onnx  # noqa: E402  # imports onnxruntime

PRETRAINED = ROOT / "examples" / "pretrained" / "finger_spin_easy.pt"
SIZE = 16
EXACT = {"rtol": 0, "atol": 1e-5}
COUNT = 3


def random_checkpoint(
    folder: Path, *, discrete: bool = False, seed: int = 0, **settings: Any
) -> Path:
    """A checkpoint of random networks whose actions depend on what they see."""
    config = tiny_run(folder / "run", **settings)
    torch.manual_seed(seed)
    learner = Learner.from_config(config, 4 if discrete else 1, discrete_actions=discrete)
    with torch.no_grad():
        for name, weight in learner.loss.named_parameters():
            if weight.dim() > 1:
                weight.mul_(30 if "actor" in name and weight.shape[0] <= 4 else 1.5)
            elif name.endswith("bias"):
                weight.normal_(std=0.2)
    payload: dict[str, Any] = {
        "config": config_to_dict(config),
        "action_size": 4 if discrete else 1,
        "discrete_actions": discrete,
        "learner": {"loss": learner.loss.state_dict()},
        "exported": True,
    }
    if config.acts_on_masks and config.segmentation.source == "student":
        student = random_student()
        payload["masks"] = {
            "widths": list(student.network.widths),
            "network": student.network.state_dict(),
            "threshold": student.threshold,
        }
    return save_checkpoint(folder, payload, updates=7, frames=99)


def random_student() -> StudentSegmenter:
    """A student whose masks of noise cover about a half."""
    torch.manual_seed(5)
    network = StudentNetwork()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):  # statistics that matter
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.01, 0.05)
        logits = network.eval()(torch.rand(4, 3, SIZE, SIZE) - 0.5)
        network.head.bias.sub_(logits.mean())
        for each in (network.head.weight, network.head.bias):
            each.mul_(2 / logits.std())
    return StudentSegmenter(network, threshold=0.4)


class Played:
    """A program, or a file of one, called with tensors by name."""

    def __init__(self, source: Program | Path) -> None:
        if isinstance(source, Program):
            self.description = json.loads(source.text())
            self.call = torch.no_grad()(lambda given: source.step(**given))
        elif source.suffix == ".onnx":
            self.description = read_description(source)
            self.call = self._onnx(source)
        else:
            self.description = read_description(source)
            module = torch.export.load(source).module()
            self.call = lambda given: module(**given)
        self.names = [entry["name"] for entry in self.description["inputs"]]

    def _onnx(self, path: Path) -> Any:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [entry["name"] for entry in self.description["outputs"]]

        def call(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            values = session.run(names, {key: value.numpy() for key, value in given.items()})
            return {k: torch.from_numpy(v) for k, v in zip(names, values, strict=True)}

        return call


def observations(steps: int, count: int = COUNT) -> list[dict[str, torch.Tensor]]:
    """Random pictures and masks; all envs begin, and one begins again on the way."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for step in range(steps):
        pixels = torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=generator)
        is_init = torch.full((count, 1), step == 0)
        is_init[1, 0] |= step == steps // 2
        mask = torch.rand(count, 1, SIZE, SIZE, generator=generator) < 0.3
        seen = {"pixels": pixels.byte(), "is_init": is_init, "foreground_mask": mask}
        seen["position"] = 30 * torch.randn(count, 3, generator=generator)
        seen["pixels_wrist"] = pixels.byte().flip(-1)
        found.append(seen)
    return found


def act_alike(policy: LoadedPolicy, played: Played, steps: int = 30) -> torch.Tensor:
    """Let both act from their own state and the same draws; return the actions ``[T, N, A]``."""
    primer = policy.make_tensordict_primer()
    first = {key: spec.zero((COUNT,)) for key, spec in primer.primers.items()}
    carried, theirs, actions = TensorDict(first, [COUNT]), dict(first), []
    for step, seen in enumerate(observations(steps)):
        torch.manual_seed(step)
        acted = policy(carried.update(seen))
        torch.manual_seed(step)  # the policy draws these numbers, and in the mode no others
        noise = {"state_noise": torch.rand(COUNT, policy.config.model.num_categoricals)}
        given = seen | theirs | noise
        made = played.call({name: given[name] for name in played.names})
        torch.testing.assert_close(made["action"], acted["action"].clamp(-1, 1), **EXACT)
        for name, value in acted["next"].items():
            torch.testing.assert_close(made[f"next_{name}"], value, **EXACT)
        theirs = {name: made[key] for key, name in played.description["carried"].items()}
        carried = TensorDict({**acted["next"]}, [COUNT])
        actions.append(acted["action"])
    return torch.stack(actions)


# ------------------------------------------------------------------ equality

SPLIT = {"algo": {"name": "world2filter", "latent": "split"}}
CASES = {
    "split": (SPLIT, False),
    "split_discrete": (SPLIT, True),
    "masked_input": ({"algo": {"name": "masked_input", "latent": None}}, False),
    **{
        latent: ({"algo": {"name": "world2filter", "latent": latent}}, latent == "shared")
        for latent in ("shared", "foreground")
    },
    **{
        name: ({"algo": {"name": name, "latent": None}}, name == "tia")
        for name in ("dreamer_v3", "repo", "tia", "r2dreamer")
    },
    "observations": (
        {**SPLIT, "model": {"vectors": {"position": 3}, "pictures": ["pixels_wrist"]}},
        False,
    ),
    "pooled": ({**SPLIT, "model": {"resample": "reference", "posterior_layers": 2}}, False),
}


def check_actions(actions: torch.Tensor, discrete: bool) -> None:
    """They depend on what is seen, or equality would mean little."""
    if discrete:
        assert len(actions.argmax(-1).unique()) > 1
        assert torch.equal(actions.sum(-1), torch.ones(actions.shape[:-1]))
    else:
        assert actions.std(0).min() > 0.02


@pytest.mark.parametrize("case", CASES)
def test_what_is_traced_acts_like_the_checkpoint(case, tmp_path):
    settings, discrete = CASES[case]
    checkpoint = random_checkpoint(tmp_path, discrete=discrete, **settings)
    program = policy_program(checkpoint)
    check_actions(act_alike(load_policy(checkpoint), Played(program)), discrete)
    names = {entry.name for entry in program.inputs if entry.kind == "observation"}
    further = {"masked_input": {"foreground_mask"}, "observations": {"position", "pixels_wrist"}}
    assert names == {"pixels", "is_init"} | further.get(case, set())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """A checkpoint and its file, of continuous actions as ONNX and of discrete ones as .pt2."""
    found = {}
    for suffix, case in ((".onnx", "split"), (".pt2", "split_discrete")):
        folder = tmp_path_factory.mktemp(case)
        settings, discrete = CASES[case]
        checkpoint = random_checkpoint(
            folder,
            discrete=discrete,
            **settings,
            environment={"domain": "cartpole", "task": "balance", "action_repeat": 8},
            logging={"wandb_entity": "somebody"},
        )
        path = export_file(checkpoint, folder / "new" / f"policy{suffix}")
        assert [each.name for each in path.parent.iterdir()] == [path.name]  # nothing temporary
        found[suffix] = (checkpoint, path)
    return found


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_file_acts_like_its_checkpoint(suffix, files):
    checkpoint, path = files[suffix]
    check_actions(act_alike(load_policy(checkpoint), Played(path)), suffix == ".pt2")


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize(
    ("case", "action"),
    [*((case, "mode") for case in CASES), ("split", "sample"), ("split_discrete", "sample")],
)
def test_every_file_acts_like_what_is_traced(suffix, case, action, tmp_path):
    settings, discrete = CASES[case]
    checkpoint = random_checkpoint(tmp_path, discrete=discrete, **settings)
    path = export_policy(checkpoint, tmp_path / f"policy{suffix}", action=action)
    if action == "mode":
        check_actions(act_alike(load_policy(checkpoint), Played(path)), discrete)
    program, played = Played(policy_program(checkpoint, action)), Played(path)
    sizes = {"N": COUNT}
    for seed in range(5):
        given = {
            entry["name"]: Entry(**entry).example(sizes, seed + 10 * place)
            for place, entry in enumerate(played.description["inputs"])
        }
        expected = program.call(given)
        for name, value in played.call(given).items():
            torch.testing.assert_close(value, expected[name], **EXACT)


@pytest.mark.render
@pytest.mark.slow
def test_the_trained_agent_acts_alike_over_an_episode(tmp_path):
    import export  # benchmarks/speed/export.py

    out = tmp_path / "export.json"
    export.main(["--models", "pretrained", "--envs", "2", "--rounds", "2", "--json", str(out)])
    found = json.loads(out.read_text())["policies"]["pretrained"]
    assert list(found["envs_2"]) == ["load_policy", "onnxruntime", "pt2"]
    assert all(row["milliseconds"] > 0 for row in found["envs_2"].values())
    assert found["episode"]["agent_steps"] == 250
    assert found["episode"]["return"] > 100  # a random policy's is 1.6
    differences = found["episode"]["differences"]
    for name in ("onnxruntime", "pt2"):
        one_step, episode = differences[name]["one_step"], differences[name]["episode"]
        assert set(one_step) == set(episode) == {"action", "next_state", "next_belief"}
        assert max(one_step.values()) <= 1e-5
        # Rounding errors of float32 add up: load_policy itself is that far from float64.
        assert max(episode.values()) <= 5e-5
        assert episode["next_state"] <= 1e-5  # so that all draws were the same
    assert 0 < differences["load_policy"]["from_float64"]["next_belief"] <= 5e-5


@pytest.mark.parametrize("discrete", [False, True])
def test_a_file_that_samples_draws_from_the_policys_distribution(discrete, tmp_path):
    checkpoint = random_checkpoint(
        tmp_path, discrete=discrete, **SPLIT, evaluation={"action": "sample"}
    )
    played = Played(policy_program(checkpoint))
    assert played.description["action"]["choice"] == "sample"
    policy = load_policy(checkpoint)
    many, draws = 4000, torch.Generator().manual_seed(1)
    seen = {
        name: value[:1].expand(many, *value.shape[1:]) for name, value in observations(1)[0].items()
    }
    given = {
        entry["name"]: Entry(**entry).example({"N": many}) for entry in played.description["inputs"]
    } | {name: seen[name] for name in ("pixels", "is_init")}
    given["state_noise"] = torch.full_like(given["state_noise"], 0.5)
    shape = given["action_noise"].shape
    draw = torch.rand if discrete else torch.randn
    given["action_noise"] = draw(shape, generator=draws)
    made = played.call(given)
    actor = policy.policy[2][0].module
    with torch.no_grad():
        latent = made["next_state"][:1], made["next_belief"][:1]
        parameters = actor(*latent)
    drawn = made["next_previous_action"]
    if discrete:
        expected = parameters[0].exp()[0]
        assert (drawn.mean(0) - expected).abs().max() < 4 * 0.5 / many**0.5
        assert torch.equal(made["action"], drawn)
    else:
        mean, std = parameters
        torch.testing.assert_close(drawn, mean + std * given["action_noise"], **EXACT)
        assert drawn.abs().max() > 1  # the recurrence reads the proposal, the env the clipped one
        assert torch.equal(made["action"], drawn.clamp(-1, 1))


def test_the_choice_of_the_action_can_be_overridden(tmp_path):
    checkpoint = random_checkpoint(tmp_path, **SPLIT)
    inputs = {}
    for action in (None, "mode", "sample"):
        program = policy_program(checkpoint, action)
        names = [entry.name for entry in program.inputs]
        inputs[program.description["action"]["choice"]] = names
    assert inputs["sample"] == [*inputs["mode"], "action_noise"]
    with pytest.raises(ExportError, match="action='best' must be one of mode, sample"):
        export_policy(checkpoint, tmp_path / "p.pt2", action="best")


@pytest.mark.parametrize(
    "suffix", ["", *(pytest.param(each, marks=pytest.mark.slow) for each in (".onnx", ".pt2"))]
)
def test_a_policy_with_its_own_student_sees_pixels_only(suffix, tmp_path):
    settings = {"algo": {"name": "masked_input", "latent": None}}
    checkpoint = random_checkpoint(tmp_path, **settings, segmentation={"source": "student"})
    program = policy_program(checkpoint)
    played = Played(write_program(program, tmp_path / f"policy{suffix}") if suffix else program)
    assert "foreground_mask" not in played.names
    policy = load_policy(checkpoint)
    segment = policy.policy.module[0].module
    exact = StudentSegmenter(segment.network, threshold=segment.threshold)
    exact.dtype = torch.float32  # a student computes in bfloat16 on some processors
    segment.forward = exact
    shares = [exact(seen["pixels"]).float().mean() for seen in observations(3)]
    assert all(0.05 < share < 0.95 for share in shares)
    act_alike(policy, played, steps=10)


# ------------------------------------------------------------------ what the file says


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_file_says_what_it_is_and_nothing_of_the_machine(suffix, files):
    checkpoint, path = files[suffix]
    found = read_description(path)
    assert (found["format"], found["format_version"]) == ("w2f_torchrl.policy", 1)
    expected = {"domain": "cartpole", "task": "balance", "action_repeat": 8, "image_size": SIZE}
    assert {key: found[key] for key in expected} == expected
    discrete = {"discrete": True, "size": 4, "range": [0, 1], "choice": "mode"}
    continuous = {"discrete": False, "size": 1, "range": [-1, 1], "choice": "mode"}
    assert found["action"] == (discrete if suffix == ".pt2" else continuous)
    assert (found["trained"]["frames"], found["trained"]["updates"]) == (99, 7)
    assert found["versions"]["w2f_torchrl"] == w2f_torchrl.__version__
    assert found["settings"]["model"]["belief_size"] == 16
    shapes = {entry["name"]: (entry["dtype"], entry["shape"]) for entry in found["inputs"]}
    assert shapes["pixels"] == ("uint8", ["N", 3, SIZE, SIZE])
    assert shapes["is_init"] == ("bool", ["N", 1])
    assert shapes["state"] == ("float32", ["N", 16])
    content = path.read_bytes()
    for private in (str(checkpoint.parent), "somebody", str(ROOT)):
        assert private.encode() not in content, private


def check_entries(path: Path) -> None:
    """An ONNX file is valid, and its inputs and outputs are those of its description."""
    model, found = onnx.load(path), read_description(path)
    onnx.checker.check_model(model, full_check=True)
    for values, entries in (
        (model.graph.input, found["inputs"]),
        (model.graph.output, found["outputs"]),
    ):
        for value, entry in zip(values, entries, strict=True):
            kind = value.type.tensor_type
            sizes = [size.dim_param or size.dim_value for size in kind.shape.dim]
            assert (value.name, sizes) == (entry["name"], entry["shape"])
            dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
            assert dtype == entry["dtype"]
    assert model.producer_name == "w2f_torchrl"


def test_an_onnx_file_has_the_entries_of_its_description(files):
    check_entries(files[".onnx"][1])


def test_a_pt2_file_needs_torch_only(files, tmp_path):
    path = files[".pt2"][1]
    code = (
        "import sys, json, torch\n"
        "files = {'w2f_torchrl.json': ''}\n"
        "program = torch.export.load(sys.argv[1], extra_files=files)\n"
        "inputs = json.loads(files['w2f_torchrl.json'])['inputs']\n"
        "given = {e['name']: torch.zeros(1, *e['shape'][1:], dtype=getattr(torch, e['dtype']))\n"
        "         for e in inputs}\n"
        "print(program.module()(**given)['action'].shape)\n"
        "print([name for name in ('w2f_torchrl', 'tensordict') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["torch.Size([1, 4])", "[]"]


# ------------------------------------------------------------------ segmenters


@pytest.mark.parametrize("suffix", [".onnx", pytest.param(".pt2", marks=pytest.mark.slow)])
def test_a_student_segments_alike_at_any_size(suffix, tmp_path):
    student = random_student()
    path = export_file(student.save(tmp_path / "student.pt"), tmp_path / f"segmenter{suffix}")
    played = Played(path)
    assert played.description["format"] == "w2f_torchrl.segmenter"
    assert played.description["threshold"] == 0.4
    if suffix == ".onnx":
        check_entries(path)
    # Both round; on some processors the student computes in bfloat16.
    student.dtype, student.network = torch.float64, student.network.double()
    for count, height, width in ((1, 64, 64), (3, 84, 84), (2, 17, 41), (1, 9, 9)):
        pixels = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)
        made = played.call({"pixels": pixels})
        confidence = student.confidences(pixels)
        torch.testing.assert_close(made["confidence"], confidence, **EXACT)
        clear = (confidence - 0.4).abs() > 1e-5
        assert torch.equal(made["foreground_mask"][clear], student(pixels)[clear])
        assert made["foreground_mask"].dtype is torch.bool
        assert 0.01 < made["foreground_mask"].float().mean() < 0.99


# ------------------------------------------------------------------ the example


@pytest.mark.render
@pytest.mark.slow
def test_the_example_plays_the_trained_agent(tmp_path, capsys):
    path = export_policy(PRETRAINED, tmp_path / "policy.onnx")
    total = play_onnx.main([str(path), "--scenery", "unseen_videos_easy"])
    assert f"finger spin: return {total:.0f} in 250 agent steps" in capsys.readouterr().out
    measured = json.loads((ROOT / "benchmarks" / "results" / "pretrained.json").read_text())
    scores = [sum(each["returns"]) / len(each["returns"]) for each in measured["played"]]
    assert total > 0.5 * min(scores)


@pytest.mark.render
def test_the_example_plays_an_episode(files, capsys):
    path = files[".onnx"][1]
    total = play_onnx.main([str(path)])
    out = capsys.readouterr().out
    assert out == f"cartpole balance: return {total:.0f} in 125 agent steps of 8 control steps\n"
    assert 0 < total < 1000
    with pytest.raises(SystemExit, match=r"--scenery=mars is unknown; .*unseen_videos_easy"):
        play_onnx.main([str(path), "--scenery", "mars"])


def test_the_examples_policy_needs_neither_torch_nor_the_package(files):
    code = (
        "import sys, numpy as np, play_onnx\n"
        "policy = play_onnx.OnnxPolicy(sys.argv[1])\n"
        "pixels = np.full((2, 3, 16, 16), 99, np.uint8)\n"
        "for step in range(3):\n"
        "    action = policy(pixels=pixels, is_init=np.full((2, 1), step == 0))\n"
        "print(action.shape, abs(action).max() <= 1)\n"
        "heavy = ('torch', 'w2f_torchrl', 'tensordict', 'onnx')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(files[".onnx"][1])],
        env={"PYTHONPATH": str(ROOT / "examples"), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["(2, 1) True", "[]"]


def test_the_example_carries_the_state_and_draws_new_numbers(files):
    policy = play_onnx.OnnxPolicy(files[".onnx"][1], seed=1)
    pixels, given = np.full((1, 3, SIZE, SIZE), 99, np.uint8), []
    session = policy.session

    class Spy:
        def run(self, names, values):
            given.append(values)
            return session.run(names, values)

    policy.session = Spy()
    for step in range(2):
        policy(pixels=pixels, is_init=np.full((1, 1), step == 0))
    made = dict(zip(policy.outputs, session.run(policy.outputs, given[0]), strict=True))
    for name in ("state", "belief", "previous_action"):
        assert not given[0][name].any()
        assert np.array_equal(given[1][name], made[f"next_{name}"])
    assert not np.array_equal(given[0]["state_noise"], given[1]["state_noise"])


# ------------------------------------------------------------------ errors


def run(*arguments: Any) -> int:
    return command.main([str(each) for each in arguments])


def test_the_command_line(tmp_path, capsys, monkeypatch):
    checkpoint = random_checkpoint(tmp_path, **SPLIT)
    out = tmp_path / "policy.pt2"
    assert run(checkpoint, out, "--action", "sample") == 0
    assert capsys.readouterr().out.startswith(f"{out} (0.")
    for bad, message in (
        ("policy.tflite", "has the suffix '.tflite'; allowed: .onnx, .pt2."),
        ("policy.pt", "allowed: .onnx, .pt2; `python -m w2f_torchrl.evaluation.export` writes"),
    ):
        assert run(checkpoint, tmp_path / bad) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "noise.pt").write_bytes(b"no checkpoint")
    for bad, message in (("noise.pt", "is truncated, or is not"), ("none.pt", "cannot be read")):
        assert run(tmp_path / bad, out) == 2
        assert message in capsys.readouterr().err
    student = random_student().save(tmp_path / "student.pt")
    assert run(student, out, "--action", "mode") == 2
    assert "action='mode' must not be set" in capsys.readouterr().err
    with pytest.raises(ExportError, match="does not exist"):
        export_segmenter(tmp_path / "none.pt", out)
    with pytest.raises(CheckpointError, match="does not end with a digest"):
        export_policy(student, out)
    found = importlib.util.find_spec
    hidden = lambda name: None if name == "onnxscript" else found(name)  # noqa: E731
    monkeypatch.setattr(formats.importlib.util, "find_spec", hidden)
    assert run(tmp_path / "none.pt", tmp_path / "policy.onnx") == 2
    assert "needs onnxscript: pip install 'w2f_torchrl[export]'" in capsys.readouterr().err


def test_an_onnx_file_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    class Shift(torch.nn.Module):
        shift = 1.0

        def forward(self, x):
            return {"y": x + self.shift}

    entries = [[Entry(name, "float32", ("N", 2), "result", "")] for name in "xy"]
    program, out = Program(Shift(), *entries, {}), tmp_path / "shift.onnx"
    out.write_bytes(b"old")
    translate = formats._onnx_bytes

    def wrongly(program, traced):
        content = translate(program, traced)
        program.step.shift = 1.5  # what torch computes with afterwards
        return content

    monkeypatch.setattr(formats, "_onnx_bytes", wrongly)
    with pytest.raises(ExportError, match=r"y of the ONNX file differs from torch's by 0\.5"):
        write_program(program, out)
    assert out.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["shift.onnx"]
    monkeypatch.setattr(formats, "MAX_ONNX_BYTES", 100)
    with pytest.raises(ExportError, match=r"an ONNX file has at most 100: write a \.pt2"):
        write_program(program, out)


def test_an_operation_that_is_not_torchs_is_refused(tmp_path):
    class Ours(torch.nn.Module):
        def forward(self, x):
            return {"y": x + torch.ops.w2f_torchrl.product(torch.eye(2), torch.eye(2), None)[0]}

    entries = [[Entry(name, "float32", ("N", 2), "result", "")] for name in "xy"]
    with pytest.raises(ExportError, match=r"w2f_torchrl\.product.* is not an operation of torch"):
        write_program(Program(Ours(), *entries, {}), tmp_path / "ours.pt2")
    assert not list(tmp_path.iterdir())


def test_parts_that_cannot_be_exported_are_named(tmp_path, monkeypatch):
    checkpoint = random_checkpoint(tmp_path, **SPLIT)
    kept = Learner.from_config

    def with_joints(*args: Any, **kwargs: Any) -> Learner:
        learner = kept(*args, **kwargs)
        encoder = learner.world_model.encoder
        encoder.in_keys = ["pixels", "joints"]
        learner.policy = build_policy(learner.world_model, learner.policy.module[2])
        return learner

    monkeypatch.setattr(Learner, "from_config", with_joints)
    with pytest.raises(
        ExportError, match=r"algo=world2filter\): its encoder reads joints of unknown"
    ):
        export_policy(checkpoint, tmp_path / "policy.pt2")

    def bare(*args: Any, **kwargs: Any) -> Learner:
        learner = kept(*args, **kwargs)
        learner.policy = learner.policy.module[0]
        return learner

    monkeypatch.setattr(Learner, "from_config", bare)
    with pytest.raises(ExportError, match=r"not composed by w2f_torchrl\.modules.build_policy"):
        export_policy(checkpoint, tmp_path / "policy.pt2")
    assert not (tmp_path / "policy.pt2").exists()


def test_a_file_of_another_program_has_no_description(tmp_path):
    for name in ("other.onnx", "other.pt2"):
        (tmp_path / name).write_bytes(b"something")
        with pytest.raises(ExportError, match=f"{name} is not a file of w2f_torchrl.export"):
            read_description(tmp_path / name)
    with pytest.raises(ExportError, match=r"none.onnx is not a file"):
        read_description(tmp_path / "none.onnx")


def test_the_export_of_small_checkpoints_refuses_programs(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"policy.onnx: this writes a checkpoint; `python -m w2"
    ):
        export_checkpoint(PRETRAINED, tmp_path / "policy.onnx")

"""Every command and every piece of Python in README.md and docs/ does what it says it does.

Python blocks are run, those of a page one after the other. A block whose first line names a file is
also saved under that name, for the commands of the page. A command is treated by its first words:
training commands are composed and checked by Hydra and the settings' validation (``slow``: trained
for a few updates), other programs' arguments go through their own parser, targets of make must
exist. What can't be run here is in NOT_RUN, with the reason. A command that nothing treats fails.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import newcomer
import pytest
import torch
from documents import Block, commands, file_of, name_of, pages, python_blocks
from helpers.checkout import ROOT
from helpers.extras import skip_without_an_extra
from helpers.registered import forget_registered_parts
from helpers.runs import tiny_run
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from torchrl.envs import SerialEnv

from w2f_torchrl.config import ConfigError
from w2f_torchrl.trainers import Trainer, load_policy, to_run_config

NOT_RUN = {
    ". .venv/bin/activate": "changes the reader's shell",
    "hf auth login": "asks for the reader's account",
    "hf download": "gated weights",
    "pip install .": "test_packaging.py builds the wheel and composes a run from it",
    "pip install": "changes the environment that the tests run in",
    "git clone": "needs a network",
    "docker compose": "needs a container engine; test_containers.py checks both files",
    "docker build": "needs a container engine; test_containers.py checks both files",
    "docker run": "needs a container engine; test_containers.py checks both files",
    "sudo apt-get": "changes the system",
    "apt-get install": "changes the system",
    "tensorboard": "serves until it is stopped",
    "wandb": "needs an account",
    "sbatch": "needs a SLURM cluster",
    "srun": "needs a SLURM cluster",
    ".ci/run": "runs these tests",
    "cd": "changes the reader's shell",
    "export": "changes the reader's shell",
}
"""First words of commands that aren't run, and why."""
RUNNABLE = {"demo", "walker", "student", "cheetah"}
"""Run directories that the pages read; each is a copy of one tiny run."""
ANSWERED = {
    "davis": "download_davis",
    "cuda": "CUDA",
    "use_wandb": "pip install",
    "tensorboard": "pip install",
    "environment=gym": "pip install",
    "experiment=gym": "pip install",
    "experiment=metaworld": "pip install",
    "dmcgb_data": "needs DMControl-GB's data",
    "slider.py": "No module named 'gymnasium'",
}
"""What a checked run may lack here, and what its error then has to say."""
TRAINING = (
    ("python", "sota_configs/world2filter.py"),
    ("python", "-m", "sota_configs.world2filter"),
    ("w2f-train",),
)
ALL_COMMANDS = [(name_of(page), command) for page in pages() for command in commands(page)]


# ------------------------------------------------------------------ the workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages presuppose: runs, checkpoints, pictures, videos."""
    from w2f_torchrl.logging.pictures.video import write_video

    folder = tmp_path_factory.mktemp("reader")
    trained = folder / "runs" / "trained"
    settings = {
        "environment": {"action_repeat": 8},
        "training": {"total_frames": 2400, "train_ratio": 1},
    }
    Trainer(tiny_run(trained, evaluation={"every_frames": 0}, **settings)).train()
    checkpoint = max((trained / "checkpoints").glob("*.pt"))
    wanted = {f"runs/{name}" for name in RUNNABLE}
    for name in wanted:
        shutil.copytree(trained, folder / name)
        config = OmegaConf.load(folder / name / "config.yaml")
        OmegaConf.save(OmegaConf.merge(config, {"run_dir": name}), folder / name / "config.yaml")
    texts = [block.text for page in pages() for block in python_blocks(page)]
    for word in {
        w for t in [*texts, *(c for _, c in ALL_COMMANDS)] for w in t.replace('"', " ").split()
    }:
        path = Path(word.partition("=")[2] or word)
        if word.startswith("data.path="):
            (folder / path).mkdir(parents=True, exist_ok=True)
        if path.parts[:1] == ("runs",) and path.suffix == ".pt" and not (folder / path).exists():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint, folder / path)
    for name in ("frames.npz", "data.npz", "checkpoints/sam3.pt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    for block in [block for page in pages() for block in python_blocks(page)]:
        if (name := file_of(block)) is not None:
            (folder / name).write_text(block.text)
    videos = folder / "my" / "videos"
    videos.mkdir(parents=True)
    frames = torch.arange(8, dtype=torch.uint8).mul(30).view(8, 1, 1, 1).expand(-1, 3, 64, 64)
    for index in range(12):
        write_video(videos / f"{index}.mp4", frames.roll(index, 0), fps=30)
    return folder


@pytest.fixture
def reader(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The workspace as the current directory; batches of envs step in this process."""

    def in_this_process(count: int, make: Any, **settings: Any) -> SerialEnv:
        unused = ("mp_start_method", "daemon")
        return SerialEnv(count, make, **{k: v for k, v in settings.items() if k not in unused})

    monkeypatch.chdir(workspace)
    monkeypatch.setattr("w2f_torchrl.envs.factory.ParallelEnv", in_this_process)
    return workspace


@pytest.fixture(autouse=True)
def _registered_parts_end_with_a_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from forget_registered_parts(monkeypatch)


# ------------------------------------------------------------------ Python


@pytest.mark.render
@pytest.mark.parametrize("page", [p for p in pages() if python_blocks(p)], ids=name_of)
def test_the_python_of_a_page_runs(page: Path, reader: Path):
    module = type(sys)("__main__")  # what stands under `if __name__ == "__main__"` runs as well
    for block in python_blocks(page):
        try:
            run_block(block, vars(module))
        except ModuleNotFoundError as error:
            skip_without_an_extra(error)


def run_block(block: Block, namespace: dict[str, Any]) -> None:
    # So that a failure's traceback has the page's own line numbers.
    source = "\n" * (block.line - 1) + block.text
    exec(compile(source, block.page, "exec", dont_inherit=True), namespace)


def starts_processes(page: Path) -> bool:
    return any('__name__ == "__main__"' in block.text for block in python_blocks(page))


@pytest.mark.render
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, marks=[] if p.name == "README.md" else [pytest.mark.slow])
        for p in pages()
        if starts_processes(p)
    ],
    ids=name_of,
)
def test_a_block_that_starts_processes_works_pasted_into_a_file(page: Path, workspace: Path):
    for block in python_blocks(page):
        if '__name__ == "__main__"' not in block.text:
            continue
        script = workspace / "pasted.py"
        script.write_text(block.text)
        done = subprocess.run(
            [sys.executable, script],
            cwd=workspace,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------ commands


def words_of_training(command: str) -> list[str] | None:
    """The overrides of a training command, None for any other."""
    words = shlex.split(command)
    if words[0] in ("torchrun", "accelerate", "srun"):
        scripts = [i for i, word in enumerate(words) if word.endswith("world2filter.py")]
        return words[scripts[0] + 1 :] if scripts else None
    for start in TRAINING:
        if tuple(words[: len(start)]) == start:
            return words[len(start) :]
    return None


def configs_of(words: list[str]) -> list[DictConfig]:
    """Compose the runs that a training command asks for."""
    importlib.import_module("sota_configs.world2filter")  # registers the typed settings
    flags = {"--multirun", "-m", "--cfg", "job", "hydra", "all"}
    overrides = [word for word in words if word not in flags]
    if importlib.util.find_spec("submitit") is None:
        overrides = [word for word in overrides if not word.startswith("hydra")]
    jobs = [overrides]
    if {"--multirun", "-m"} & set(words):
        parsed = OverridesParser.create().parse_overrides(overrides)
        jobs = [job for chunk in BasicSweeper.split_arguments(parsed, None) for job in chunk]
    with initialize_config_dir(str(ROOT / "sota_configs"), version_base="1.3"):
        return [compose("config", job) for job in jobs]


def check_training(command: str) -> None:
    """Compose and check; what this machine lacks has to be an error that says so."""
    words = words_of_training(command)
    assert words is not None
    for config in configs_of(words):
        try:
            to_run_config(config).validate()
        except ConfigError as error:
            named = [text for word, text in ANSWERED.items() if word in command]
            if not any(text in str(error) for text in named):
                raise


class ParsedError(Exception):
    """The program's own parser took the arguments."""


def check_arguments(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a program up to the point where it has read its command line."""
    program, script, *arguments = shlex.split(command)
    assert program == "python", command
    parse_args = argparse.ArgumentParser.parse_args

    def parse(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> None:
        parse_args(self, args, namespace)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    # A program that registers an env does so in a process of its own, not after another test.
    monkeypatch.setattr("w2f_torchrl.envs.tasks._REGISTRY", {})
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    try:
        with pytest.raises((ParsedError, SystemExit)) as caught:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except ModuleNotFoundError as error:
        skip_without_an_extra(error)
    assert caught.type is ParsedError or "--help" in arguments or caught.value.code == 0


def check_target(command: str) -> None:
    """A target of make exists, and its recipe can be put together."""
    subprocess.run([*shlex.split(command), "-n"], cwd=ROOT, check=True, capture_output=True)


def treatment(command: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], object] | None:
    """How a command is tested; None if nobody has said."""
    command = command.removeprefix(".venv/bin/")
    words = shlex.split(command)
    if any(command == start or command.startswith(f"{start} ") for start in NOT_RUN):
        return lambda: None
    if words_of_training(command) is not None:
        return lambda: check_training(command)
    if words[0] == "make":
        return lambda: check_target(command)
    if words[:2] == ["python", "-m"]:
        return lambda: importlib.util.find_spec(words[2]) or pytest.fail(f"no module {words[2]}")
    if words[0] == "python" and words[1].endswith(".py"):
        return lambda: check_arguments(command, monkeypatch)
    return None


@pytest.mark.render
@pytest.mark.parametrize(
    ("page", "command"), ALL_COMMANDS, ids=[f"{p}: {c}" for p, c in ALL_COMMANDS]
)
def test_a_command_can_be_run(page: str, command: str, reader: Path, monkeypatch):
    # Whether SAM3 is installed is not the command's fault; that it says so is tested elsewhere.
    where = "w2f_torchrl.config.validation.missing_requirement"
    monkeypatch.setattr(where, lambda *_, **__: None)
    check = treatment(command, monkeypatch)
    assert check is not None, f"{page}: nothing tests {command!r}: see {Path(__file__).name}"
    check()


def test_a_command_that_nothing_treats_is_noticed(monkeypatch):
    assert treatment("frobnicate --now", monkeypatch) is None
    with pytest.raises(ConfigError, match="domain is 'nowhere'"):
        check_training("python sota_configs/world2filter.py environment.domain=nowhere")
    with pytest.raises(BaseException, match="trainign"):
        check_training("w2f-train trainign.total_frames=3")
    with pytest.raises(AssertionError):
        check_arguments("python benchmarks/speed/render.py --no-such-option", monkeypatch)
    with pytest.raises(subprocess.CalledProcessError):
        check_target("make no-such-target")


def test_a_reason_is_given_for_what_is_not_run():
    assert all(NOT_RUN.values())


# ------------------------------------------------------------------ training, shortened

SHORT = {
    "training": {
        "total_frames": 480,  # the first update is due after 48 agent steps
        "batch_size": 2,
        "batch_length": 8,
        "prefill_steps": 40,
        "train_ratio": 2,
    },
    "collection": {"num_workers": 0, "steps_per_batch": 8},
    "environment": {"num_envs": 2, "image_size": 16},
    "evaluation": {"every_frames": 0},
    "logging": {"use_wandb": False},
    "device": "cpu",
}
TRAININGS = [
    command
    for page, command in ALL_COMMANDS
    if page in newcomer.PAGES
    and words_of_training(command) is not None
    and "--cfg" not in command
    and "benchmarks" not in command
]


@pytest.mark.slow
@pytest.mark.render
@pytest.mark.parametrize("command", dict.fromkeys(TRAININGS))
def test_a_training_command_of_the_first_pages_trains(command: str, reader: Path, tmp_path: Path):
    if any(word in command for word in ("sam3", "cuda", "labels=")):
        pytest.skip("needs SAM3's weights, a GPU or the reader's own frames")
    words = words_of_training(command)
    assert words is not None
    for index, config in enumerate(configs_of(words)):
        model = vars(tiny_run(tmp_path).model)
        learns = {"segmentation": {"teacher_frames": 20, "train_steps": 2}}
        where = {"run_dir": str(tmp_path / str(index)), "resume": None}
        short = OmegaConf.merge(config, SHORT, {"model": model}, learns, where)
        Trainer(to_run_config(short)).train()
        assert (tmp_path / str(index) / "checkpoints").is_dir()


OWN_PARTS = [
    (page, command)
    for page, command in ALL_COMMANDS
    if page.startswith("docs/howto/") and "plugins=" in command
]


def tiny(config: DictConfig, run_dir: Path, **settings: Any) -> DictConfig:
    """A page's run, with a tiny model and a few updates."""
    model = {k: v for k, v in vars(tiny_run(run_dir).model).items() if k not in CHOSEN}
    where = {"run_dir": str(run_dir), "environment": {"domain": "cartpole", "task": "balance"}}
    if config.environment.domain != "walker":  # the page's own
        del where["environment"]
    every = {"evaluation": {"every_frames": 240, "episodes": 1}}
    return OmegaConf.merge(config, SHORT, {"model": model}, where, every, settings)


CHOSEN = ("encoder", "decoder")
"""Settings of the model that a page's command chooses."""


def test_every_kind_of_part_has_a_page_with_a_command():
    pages_with_one = {Path(page).stem for page, _ in OWN_PARTS}
    kinds = {"environment", "task", "segmenter", "encoder", "decoder", "loss", "algorithm"}
    assert pages_with_one == kinds
    for page, command in OWN_PARTS:
        files = [file_of(block) for block in python_blocks(ROOT / page)]
        assert len(list(filter(None, files))) == 1, page
        assert f"plugins=[{files[0]}]" in command, page


@pytest.mark.render
@pytest.mark.parametrize(("page", "command"), OWN_PARTS, ids=[page for page, _ in OWN_PARTS])
def test_a_part_of_your_own_trains(page: str, command: str, reader: Path, tmp_path: Path):
    words = words_of_training(command)
    assert words is not None
    if page == "docs/howto/task.md":
        pytest.importorskip("gymnasium", reason="needs the extra gym: make extras")
    config = to_run_config(tiny(configs_of(words)[0], tmp_path / "run"))
    Trainer(config).train()
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["updates"] > 0
    policy = load_policy(max((tmp_path / "run" / "checkpoints").glob("checkpoint_*.pt")))
    assert policy.config.plugins == [file_of(python_blocks(ROOT / page)[0])]
    assert policy.make_env(seed=0).rollout(2, policy)["action"].isfinite().all()


@pytest.mark.slow
@pytest.mark.render
@pytest.mark.parametrize("kind", ["encoder", "environment"])
def test_a_part_of_your_own_trains_from_a_shell_with_workers(
    kind: str, workspace: Path, tmp_path: Path
):
    [command] = [command for page, command in OWN_PARTS if Path(page).stem == kind]
    words = words_of_training(command)
    assert words is not None
    config = tiny(configs_of(words)[0], tmp_path / "run", collection={"num_workers": 1})
    settings = [f"{name}={value}" for name, value in flat_settings(config)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "sota_configs/world2filter.py"), *words, *settings],
        cwd=workspace,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run" / "checkpoints").glob("checkpoint_*.pt"))


def flat_settings(config: DictConfig) -> Iterator[tuple[str, Any]]:
    """The settings of a shortened run, as overrides."""
    for group in ("training", "collection", "environment", "evaluation", "model"):
        for name, value in config[group].items():
            if name != "preset" and value is not None:
                yield f"{group}.{name}", str(value).replace(" ", "")
    yield from ((name, config[name]) for name in ("device", "run_dir"))


# ------------------------------------------------------------------ the newcomer's log


FIRST_PAGES = [ROOT / page for page in newcomer.PAGES]


def test_the_readme_is_a_door_and_not_a_house():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_newcomer_knows_every_command_of_the_first_pages():
    planned = [command for command, _ in newcomer.plan(FIRST_PAGES)]
    assert sorted(planned) == sorted({c for page in FIRST_PAGES for c in commands(page)})


def test_the_newcomer_notices_a_command_it_does_not_know(tmp_path: Path):
    page = tmp_path / "README.md"
    page.write_text((ROOT / "README.md").read_text() + "\n```\nmake sandwich\n```\n")
    with pytest.raises(ValueError, match=r"STEPS lacks \['make sandwich'\]"):
        newcomer.plan([page, *FIRST_PAGES[1:]])


@pytest.mark.parametrize(
    ("program", "step", "exit_code", "well"),
    [
        ("print('made')", newcomer.Step(""), 0, True),
        ("raise SystemExit('no such file')", newcomer.Step(""), 1, False),
        ("raise SystemExit('no such file')", newcomer.Step("", error="no such"), 1, True),
        ("raise SystemExit('elsewhere')", newcomer.Step("", error="no such"), 1, False),
        ("print('no such')", newcomer.Step("", error="no such"), 0, False),
        ("print('too soon')", newcomer.Step("", interrupt=60), 0, False),
        ("__import__('time').sleep(99)", newcomer.Step("", interrupt=3), -2, False),
    ],
)
def test_the_newcomer_tells_a_good_end_from_a_bad_one(
    program: str, step: newcomer.Step, exit_code: int, well: bool, tmp_path: Path
):
    command = shlex.join([sys.executable, "-c", program])
    result = newcomer.run(command, tmp_path, tmp_path / "log", step)
    assert (result["exit"], result["well"]) == (exit_code, well)
    if step.error and well:
        assert result["last_line"] == "no such file"


RECORDED_PAGE = ROOT / "docs" / "howto" / "recorded.md"


@pytest.mark.slow
@pytest.mark.render
def test_the_commands_of_recorded_data_record_and_train(reader: Path, tmp_path: Path, monkeypatch):
    record = importlib.import_module("sota_configs.record")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(reader / "runs", tmp_path / "runs")
    short = ["environment.image_size=16", "--episodes", "4", "--max-steps", "20"]
    trained = 0
    for command in commands(RECORDED_PAGE):
        words = shlex.split(command)
        if words[1].endswith("record.py"):
            more = [] if "--replay" in words else short  # the last --episodes counts
            record.main([*words[2:], *more])
            assert list((tmp_path / words[2]).glob("*.npz"))
            continue
        [config] = configs_of(words[2:])
        run = next(
            (w.partition("=")[2] for w in words if w.startswith("run_dir=")), f"run{trained}"
        )
        model = {"model": vars(tiny_run(tmp_path).model)}
        every = {"evaluation": {"every_frames": 480, "max_control_steps": 40}}
        shorter = OmegaConf.merge(config, SHORT, model, every, {"run_dir": str(tmp_path / run)})
        Trainer(to_run_config(shorter)).train()
        rows = (tmp_path / run / "metrics.jsonl").read_text()
        assert ("recorded/error" in rows) == any(w.startswith("data.path=") for w in words)
        assert ("eval/return_mean" in rows) == ("environment=recorded" not in words)
        trained += 1
    assert trained == 2

"""Parts of a run that a file registers: names, plugins, weights, further observations."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.box_env import BoxEnv
from helpers.models import SIZE, TINY, make_loss
from helpers.registered import forget_registered_parts
from helpers.runs import tiny_run
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor, nn
from torchrl.data import Bounded, Categorical, Composite, NonTensor, TensorSpec, Unbounded

from w2f_torchrl import registry
from w2f_torchrl.checkpoint import CheckpointError
from w2f_torchrl.config import ConfigError, LossConfig, SegmentationConfig, to_run_config
from w2f_torchrl.envs import register_env
from w2f_torchrl.kernels.imagination import CastActor, prepare
from w2f_torchrl.learner import Algorithm, Learner, build_world2filter, register_algorithm
from w2f_torchrl.modules import GaussianActor, register_decoder, register_encoder
from w2f_torchrl.objectives import World2FilterLoss, register_loss
from w2f_torchrl.plugins import PluginError, load_plugins
from w2f_torchrl.segmenters import register_segmenter
from w2f_torchrl.trainers import Trainer, load_policy

ROOT = Path(__file__).parents[1]
ENCODER = """
import torch
from torch import nn

from w2f_torchrl.modules import register_encoder


class PlaceEncoder(nn.Module):
    in_keys = ["pixels", "place"]

    def __init__(self, config, image_size):
        super().__init__()
        self.map = nn.Linear(2 + 3, 8)

    def output_features(self, image_shape):
        return 8

    def forward(self, pixels, place):
        return self.map(torch.cat((place, pixels.float().mean((-1, -2)) / 255), -1))


register_encoder("place", PlaceEncoder)
"""


@pytest.fixture(autouse=True)
def _registered_parts_end_with_a_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from forget_registered_parts(monkeypatch)


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


class NoLoss(World2FilterLoss):
    def loss_names(self) -> list[str]:
        return [*super().loss_names(), "loss_nothing"]

    def world_model_losses(self, model_td):
        losses, metrics = super().world_model_losses(model_td)
        return losses | {"nothing": losses["reward"] * 0 + 1}, metrics


# ------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("register", "taken", "settings"),
    [
        (register_algorithm, "dreamer_v3", {"algo": {"name": "mine"}}),
        (register_loss, None, {"algo": {"loss": "mine"}}),
        (register_encoder, "convolutional", {"model": {"encoder": "mine"}}),
        (register_decoder, "torchrl", {"model": {"decoder": "mine"}}),
        (register_segmenter, "median", {"segmentation": {"source": "mine"}}),
    ],
)
def test_a_registered_name_is_a_value_of_its_setting(register, taken, settings, tmp_path):
    config = tiny_run(tmp_path, **settings)
    with pytest.raises(ConfigError, match=rf"'mine' is unknown; allowed: .*{register.__name__}"):
        config.validate()
    for name, part in (("", len), (3, len), (taken, len)):
        if name is not None:
            with pytest.raises(ValueError, match=register.__name__):
                register(name, part)
    with pytest.raises(TypeError, match="callable"):
        register("mine", None)
    register("mine", NoLoss)
    config.validate()
    register("mine", NoLoss)  # the same class, as in a notebook
    with pytest.raises(ValueError, match="is taken"):
        register("mine", GaussianActor)


def test_a_lambda_is_not_mistaken_for_another():
    register_segmenter("mine", lambda settings, device: None)
    with pytest.raises(ValueError, match="is taken"):
        register_segmenter("mine", lambda settings, device: 1)


def test_what_is_registered_must_be_what_it_is_said_to_be():
    register_loss("no_loss", nn.Linear)
    with pytest.raises(ConfigError, match="subclass of World2FilterLoss"):
        Learner(TINY, action_size=2, image_size=SIZE, loss_name="no_loss")
    register_algorithm("no_algorithm", lambda settings: build_world2filter(settings).loss)
    with pytest.raises(ConfigError, match="must be an Algorithm"):
        Learner(TINY, action_size=2, image_size=SIZE, algorithm="no_algorithm")


def test_an_algorithm_without_masks_needs_no_latent(tmp_path):
    register_algorithm("mine", build_world2filter)
    config = tiny_run(tmp_path, algo={"name": "mine", "latent": None})
    config.validate()
    assert not config.needs_masks
    learner = Learner.from_config(config, 2)
    assert learner.world_model.latent == "whole"
    with pytest.raises(ConfigError, match="algo=mine, which has no masks"):
        tiny_run(
            tmp_path,
            algo={"name": "mine", "latent": None},
            segmentation={"source": "median"},
        ).validate()


def test_registering_imports_no_torch():
    code = (
        "import sys, w2f_torchrl.registry, w2f_torchrl.plugins; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(ROOT)})


# ------------------------------------------------------------------ plugins


def test_a_file_is_imported_once_and_its_classes_by_its_name(tmp_path):
    path = write(tmp_path, "my_part.py", ENCODER)
    load_plugins([path])
    load_plugins([path, "json"])
    assert "place" in registry.encoders.names
    assert registry.encoders.get("place").__module__ == "my_part"
    assert str(tmp_path) == sys.path[-1]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (None, "", "does not exist"),
        ("broken.py", "x = 1\nraise RuntimeError('no')", r"broken\.py, line 2: RuntimeError: no"),
        ("broken.py", "def", "SyntaxError"),
        ("broken.py", "import nowhere_at_all", "line 1: ModuleNotFoundError"),
        ("broken.py", "raise SystemExit(3)", "line 1: SystemExit"),
        ("my-part.py", "", "must be named like a module"),
        ("json.py", "", "has the name of another module"),
        ("statistics.py", "", "has the name of another module"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_named(name, text, message, tmp_path):
    path = str(tmp_path / "gone.py") if name is None else write(tmp_path, name, text)
    with pytest.raises(ConfigError, match=message) as caught:
        tiny_run(tmp_path / "run", plugins=[path]).validate()
    assert Path(path).name in str(caught.value)


@pytest.mark.parametrize("name", ["", " ", "no.such.module", "nowhere"])
def test_a_module_that_python_does_not_find_is_named(name):
    with pytest.raises(PluginError, match=r"plugins: .*(not found|must be)"):
        load_plugins([name])


def test_a_plugin_that_failed_can_be_mended(tmp_path):
    path = write(tmp_path, "mended.py", "1 / 0")
    with pytest.raises(PluginError, match="ZeroDivisionError"):
        load_plugins([path])
    write(tmp_path, "mended.py", "value = 'much longer than before'")
    load_plugins([path])
    assert sys.modules["mended"].value


# ------------------------------------------------------------------ weights


def compose_run(*overrides: str):
    import sota_configs.world2filter  # noqa: F401  # registers the typed settings

    with initialize_config_dir(str(ROOT / "sota_configs"), version_base="1.3"):
        return to_run_config(compose("config", list(overrides)))


def test_a_weight_of_a_new_loss_is_set_on_the_command_line():
    config = compose_run("loss.extra.nothing=0.25", "loss.extra.other=2")
    assert config.loss.extra == {"nothing": 0.25, "other": 2.0}
    assert config.loss.weight("nothing") == 0.25
    assert config.loss.weight("mask") == 0.3
    assert config.loss.weight("none") is None
    with pytest.raises(ConfigError, match=r"loss\.extra\.nothing=-1\.0 must be at least 0"):
        compose_run("loss.extra.nothing=-1").validate()


def test_a_weight_without_a_loss_and_a_loss_without_a_weight_are_errors():
    with pytest.raises(ValueError, match=r"loss\.extra\.maks is not .*allowed: none"):
        make_loss("split", extra={"maks": 1.0})
    with pytest.raises(ValueError, match=r"loss\.extra\.mask is not"):  # has a field
        make_loss("split", extra={"mask": 1.0})
    register_loss("mine", NoLoss)
    make = partial(Learner, TINY, action_size=2, image_size=SIZE, loss_name="mine")
    with pytest.raises(ValueError, match=r"loss_nothing has no weight: set loss\.extra\.nothing"):
        make()
    with pytest.raises(ValueError, match=r"loss\.extra\.noting .*allowed: nothing"):
        make(loss=LossConfig(extra={"nothing": 1.0, "noting": 1.0}))
    learner = make(loss=LossConfig(extra={"nothing": 0.25}))
    assert learner.loss._weight("nothing") == 0.25


def test_a_run_says_at_once_that_a_loss_has_no_weight(tmp_path):
    register_loss("mine", NoLoss)
    with pytest.raises(ConfigError, match="loss_nothing has no weight"):
        Trainer(tiny_run(tmp_path / "run", algo={"loss": "mine"}))


LOSS = """
from w2f_torchrl.objectives import World2FilterLoss, register_loss


class NothingLoss(World2FilterLoss):
    def loss_names(self):
        return [*super().loss_names(), "loss_nothing"]

    def world_model_losses(self, model_td):
        losses, metrics = super().world_model_losses(model_td)
        return losses | {"nothing": losses["reward"]}, metrics


register_loss("nothing", NothingLoss)
"""


def test_a_resume_may_move_the_plugin_but_not_change_the_loss(tmp_path):
    settings = {"algo": {"loss": "nothing"}, "loss": {"extra": {"nothing": 0.5}}}
    first, second = (tmp_path / name for name in ("first", "second"))
    for folder in (first, second):
        folder.mkdir()
    run, plugin = tmp_path / "run", write(first, "nothing_loss.py", LOSS)
    Trainer(tiny_run(run, plugins=[plugin], **settings)).train()
    del sys.modules["nothing_loss"]
    sys.path.remove(str(first))
    registry.losses._parts.clear()
    moved = {"plugins": [write(second, "nothing_loss.py", LOSS)], "resume": "auto"}
    settings |= {"training": {"total_frames": 320}}
    with pytest.raises(CheckpointError, match=r"algo\.loss=None must stay nothing"):
        Trainer(tiny_run(run, **(moved | settings | {"algo": {}, "loss": {}})))
    settings["loss"] = {"extra": {"nothing": 0.25}}  # weights may change
    trainer = Trainer(tiny_run(run, **moved, **settings))
    trainer.train()
    assert trainer.frames >= 320


# ------------------------------------------------------------------ the actor


class HalfActor(GaussianActor):
    def from_features(self, features: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = super().from_features(features)
        return mean / 2, std


@pytest.mark.parametrize(("actor_class", "cast"), [(GaussianActor, True), (HalfActor, False)])
def test_autocast_calls_an_actor_that_computes_something_else(actor_class, cast):
    loss = make_loss("split")
    actor = actor_class(TINY.state_size + TINY.belief_size, 2, TINY)
    belief = torch.zeros(3, TINY.belief_size)
    with torch.autocast("cpu", torch.bfloat16):
        acting = prepare(loss.world_model.prior, actor, belief).actor
    assert isinstance(acting, CastActor) is cast
    assert (acting is actor) is not cast


# ------------------------------------------------------------------ observations

PLACE = {"place": Unbounded((2,)), "flags": Bounded(0, 1, (3,), dtype=torch.uint8)}


def place_run(run_dir: Path, **settings):
    return tiny_run(
        run_dir,
        environment={"domain": "box", "task": "any", "action_repeat": 1},
        **settings,
    )


def test_an_env_offers_what_an_encoder_reads(tmp_path):
    place = torch.tensor([0.25, -3.0])
    register_env("box", partial(BoxEnv, entries=PLACE, given={"place": place}))
    path = write(tmp_path, "place_encoder.py", ENCODER)
    model = vars(TINY) | {"encoder": "place"}
    trainer = Trainer(place_run(tmp_path / "run", plugins=[path], model=model))
    trainer.train()
    replay = trainer.collection.replay
    sample = replay.sample()
    assert (sample["next", "place"] == place).all()
    assert sample["next", "flags"].dtype is torch.uint8
    assert ("next", "place") in trainer.learner.world_model.in_keys
    checkpoint = max((tmp_path / "run" / "checkpoints").glob("checkpoint_*.pt"))
    policy = load_policy(checkpoint)
    assert policy.in_keys[:2] == ["pixels", "place"]
    assert "action" in policy.make_env().rollout(2, policy).keys()
    # Another process has imported nothing.
    registry.encoders._parts.clear()
    with pytest.raises(CheckpointError, match=r"model.encoder=place.*place_encoder\.py"):
        load_policy(checkpoint)


def test_an_encoder_that_reads_what_the_env_lacks_is_refused(tmp_path):
    path = write(tmp_path, "place_encoder.py", ENCODER)
    config = tiny_run(tmp_path / "run", plugins=[path], model=vars(TINY) | {"encoder": "place"})
    with pytest.raises(ConfigError, match=r"model\.encoder=place reads place, but .*cartpole"):
        Trainer(config)


def test_records_of_an_older_run_stay_without_further_observations(tmp_path, caplog):
    register_env("box", BoxEnv)
    Trainer(place_run(tmp_path / "run")).train()
    from w2f_torchrl.envs import tasks

    tasks._REGISTRY["box"] = partial(BoxEnv, entries=PLACE)
    settings = {"resume": "auto", "training": {"total_frames": 320}}
    trainer = Trainer(place_run(tmp_path / "run", **settings))
    trainer.train()
    assert trainer.frames >= 320
    assert "place" not in trainer.collection.replay.sample()["next"].keys()
    assert "have no place, flags" in caplog.text or "have no flags, place" in caplog.text


def test_the_control_suite_offers_nothing_further(tmp_path):
    from w2f_torchrl.data.environments import probe_env

    assert probe_env(tiny_run(tmp_path)).observations == ()


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("state", Unbounded((2,))),
        ("reading", NonTensor((1,))),
        ("reading", Unbounded((-1,))),
        ("reading", Composite(place=Unbounded((2,)))),
    ],
)
def test_an_observation_that_records_cannot_hold_is_named(name: str, spec: TensorSpec, tmp_path):
    register_env("box", partial(BoxEnv, entries={name: spec}))
    with pytest.raises(ConfigError, match=f"observation '{name}' "):
        Trainer(place_run(tmp_path / "run"))


def test_an_observation_may_be_of_any_numbers():
    from w2f_torchrl.envs.specs import extra_observations

    entries = {"kind": Categorical(3, (1,)), "place": Unbounded((2,), dtype=torch.float64)}
    assert sorted(extra_observations(BoxEnv(entries=entries))) == ["kind", "place"]


# ------------------------------------------------------------------ the rest


def test_a_segmenter_gets_the_settings_and_the_device(tmp_path):
    from w2f_torchrl.masks.choose import build_mask_source, choose_source

    got = []

    def make(settings: SegmentationConfig, device: torch.device):
        got.append((settings.threshold, device))
        return lambda pixels: pixels[:, :1] > settings.threshold

    register_segmenter("mine", make)
    config = tiny_run(tmp_path, segmentation={"source": "mine", "threshold": 7}).validated()
    device = torch.device("cpu")
    source = build_mask_source(
        config.segmentation,
        choose_source(config.segmentation, env_has_mask=False),
        False,
        seed=0,
        device=device,
        image_size=16,
    )
    assert got == [(7, device)]
    assert source.name == "mine"


def test_plugins_are_in_the_saved_settings_and_not_in_an_export():
    from w2f_torchrl.evaluation.export import PRIVATE

    assert PRIVATE["plugins"] == []
    assert OmegaConf.structured(tiny_run(Path("runs"))).plugins == []


def test_the_default_algorithm_is_what_a_builder_makes():
    from w2f_torchrl.learner import AlgorithmSettings

    made = build_world2filter(AlgorithmSettings(TINY, LossConfig(), "split", 2, SIZE))
    assert isinstance(made, Algorithm)
    assert type(made.loss) is World2FilterLoss

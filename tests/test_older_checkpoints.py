"""Checkpoints from before the decoder's settings and the mask's own last layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.models import TINY, make_learner, make_sample

from w2f_torchrl.checkpoint import CheckpointError
from w2f_torchrl.checkpoint.older import check_same_networks, complete_model
from w2f_torchrl.learner.learner import Learner
from w2f_torchrl.modules import ModelConfig

OLD = replace(TINY, decoder="torchrl", resample="stride")
LAST = "world_model.decoder.foreground.layers.9"
MASK = "world_model.decoder.foreground.mask_head"


def make_old_learner(latent: str) -> Learner:
    torch.manual_seed(0)
    return Learner(OLD, action_size=2, image_size=16, latent=latent)


def as_before(learner: Learner) -> dict:
    """A learner's checkpoint with one last layer for colours and mask."""
    saved = learner.state_dict()
    loss = {name: value.clone() for name, value in saved["loss"].items()}
    names = [name for name, _ in learner.loss.named_parameters() if name in trained(learner)]
    moments = dict(zip(names, saved["optimizer"]["state"].values(), strict=True))
    for kind, dim in (("weight", 1), ("bias", 0)):
        last, mask = f"{LAST}.{kind}", f"{MASK}.{kind}"
        loss[last] = torch.cat((loss[last], loss.pop(mask)), dim)
        moments[last] = {
            key: torch.cat((value, moments[mask][key]), dim) for key, value in moments[last].items()
        }
        del moments[mask]
    state = dict(enumerate(moments.values()))
    (group,) = saved["optimizer"]["param_groups"]
    groups = [group | {"params": list(state)}]
    return {"loss": loss, "optimizer": {"state": state, "param_groups": groups}}


def trained(learner: Learner) -> set[str]:
    owned = {id(p) for p in learner.parameters_trained}
    return {name for name, p in learner.loss.named_parameters() if id(p) in owned}


@pytest.mark.parametrize("latent", ["split", "shared", "foreground"])
def test_weights_and_moments_are_cut_and_the_run_goes_on(latent):
    learner, sample = make_old_learner(latent), make_sample()
    for _ in range(3):
        learner.update(sample.clone())
    old = as_before(learner)
    assert old["loss"][f"{LAST}.weight"].shape[1] == 4
    assert len(old["optimizer"]["state"]) == len(learner.parameters_trained) - 2
    resumed = make_old_learner(latent)
    resumed.load_state_dict(old)
    for one, other in zip(learner.parameters_trained, resumed.parameters_trained, strict=True):
        assert torch.equal(one, other)
        moments, same = learner.optimizer.state[one], resumed.optimizer.state[other]
        assert moments.keys() == same.keys()
        assert all(torch.equal(moments[key], same[key]) for key in moments)
    assert all(
        learner.optimizer.state[p]["rms"].sum() > 0
        for p in learner.world_model.decoder.parameters()
    )
    rows = []
    for each in (learner, resumed):
        torch.manual_seed(5)
        rows.append(each.update(sample.clone()))
    for name, value in rows[0].items():
        torch.testing.assert_close(value, rows[1][name], rtol=1e-5, atol=1e-6)
    for one, other in zip(learner.parameters_trained, resumed.parameters_trained, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)  # other memory, other rounding


def test_a_checkpoint_before_the_first_update_is_cut_too():
    learner = make_old_learner("split")
    learner.update(make_sample())
    old = as_before(learner)
    old["optimizer"]["state"] = {}
    resumed = make_old_learner("split")
    resumed.load_state_dict(old)
    assert not resumed.optimizer.state


def test_a_checkpoint_of_now_is_not_cut():
    learner = make_learner(lr=1e-3)
    learner.update(make_sample())
    other = make_learner(lr=1e-3)
    other.load_state_dict(learner.state_dict())
    for one, two in zip(learner.parameters_trained, other.parameters_trained, strict=True):
        moments, same = learner.optimizer.state[one], other.optimizer.state[two]
        assert all(torch.equal(moments[key], same[key]) for key in moments)


def test_settings_that_a_checkpoint_lacks_are_those_of_its_time():
    before = {"cnn_depth": 4}
    assert complete_model(before) == {
        "cnn_depth": 4,
        "background_encoder": "shared",
        "decoder": "torchrl",
        "encoder": "convolutional",
        "resample": "stride",
    }
    assert complete_model(vars(TINY)) == vars(TINY)


@pytest.mark.parametrize(
    ("saved", "match"),
    [
        (
            {},
            r"another model: model.decoder was torchrl and is reference, model.resample was stride "
            r"and is nearest. Pass model.decoder=torchrl model.resample=stride.",
        ),
        ({"decoder": "reference", "resample": "reference"}, r"Pass model.resample=reference\.$"),
    ],
)
def test_networks_of_other_meaning_are_refused(saved, match):
    with pytest.raises(CheckpointError, match=match):
        check_same_networks(saved, ModelConfig(decoder="reference", resample="nearest"))
    check_same_networks({}, OLD)

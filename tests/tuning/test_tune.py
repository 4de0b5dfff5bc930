"""tune: the same network with its pairs fused, all or some of them; what is replaced and what is changed afterwards."""

import copy
from types import MethodType

import pytest
import torch
from models import (
    ALL_NET_PAIRS,
    Net,
    conv_norm,
    data,
    modes,
    net,
    pair,
    prepared,
    reasons,
    runs_fused,
    through_pickle,
    tuned_with,
)
from torch import nn

from convbn_fx import report, tune
from convbn_fx.testing import assert_equivalent

X = data(2, 3, 6, 6)

#: Deprecated, and still used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:FutureWarning")


# --- The result ---------------------------------------------------------------------------------------------------


def test_a_network():
    model = net()
    tuned = tuned_with(model, ALL_NET_PAIRS)
    assert_equivalent(model, tuned, X)
    assert runs_fused(model, tuned)
    assert not reasons(tuned)


def test_the_names_in_the_report():
    fused = report(tune(net())).fused
    assert {(pair.convolution, pair.batch_norm) for pair in fused} == {
        ("stem.conv", "stem.norm"),
        ("block.first.conv", "block.first.norm"),
        ("block.second.conv", "block.second.norm"),
        ("unused.0", "unused.1"),
    }
    assert {(pair.convolution_kind, pair.batch_norm_kind) for pair in fused} == {
        ("Conv2d", "BatchNorm2d"),
        ("Linear", "BatchNorm1d"),
    }


@pytest.mark.parametrize(("name", "pairs"), [("", 4), ("stem", 1), ("block", 2), ("block.second", 1)])
def test_the_report_of_a_sub_module(name, pairs):
    part = tune(net()).get_submodule(name)
    assert len(report(part).fused) == pairs
    assert all(
        isinstance(part.get_submodule(p.convolution), nn.Conv2d | nn.Linear) for p in report(part).fused
    )


@pytest.mark.parametrize(
    "model",
    [nn.Linear(3, 3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Identity(), nn.ReLU(), nn.Sequential()],
    ids=lambda model: type(model).__name__,
)
def test_nothing_to_fuse(model):
    model = prepared(model)
    tuned = tuned_with(model, 0)
    assert_equivalent(model, tuned, data(2, 3, 3, 3))
    assert type(tuned) is type(model)
    assert str(report(tuned))


def test_a_batch_norm_in_train_mode_is_left():
    model = net()
    model.block.first.norm.train()
    tuned = tuned_with(model, ALL_NET_PAIRS - 1)
    assert reasons(tuned)["block.first.norm"] == "TRAINING_MODE"
    assert_equivalent(model, tuned, X)


def test_include_training():
    model = net().train()
    model.dropout.eval()
    tuned = tuned_with(model, ALL_NET_PAIRS, include_training=True)
    assert_equivalent(model, tuned, X)
    assert not runs_fused(model, tuned)
    for other in (model, tuned):
        other.eval()
    assert_equivalent(model, tuned, X)
    assert runs_fused(model, tuned)


def test_mixed_modes_flipped_after_tune():
    model = net()
    tuned = tuned_with(model, ALL_NET_PAIRS)
    for names in (["stem.norm"], ["block"], ["block.second", "dropout"], ["stem", "head"], [""]):
        for other in (model, tuned):
            for name in names:
                part = other.get_submodule(name)
                part.train(not part.training)
        assert_equivalent(model, tuned, X)


# --- modules= and norm_eval= --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "left"),
    [
        (["block", "unused"], {"stem.norm"}),
        (("stem", "block.second", "unused"), {"block.first.norm"}),
        (["block", "block.second"], {"stem.norm", "unused.1"}),
        ([], {"stem.norm", "block.first.norm", "block.second.norm", "unused.1"}),
        (["", "stem"], set()),
        (["head"], {"stem.norm", "block.first.norm", "block.second.norm", "unused.1"}),
    ],
)
def test_only_some_modules(names, left):
    model = net()
    tuned = tuned_with(model, ALL_NET_PAIRS - len(left), modules=names)
    assert {name for name, reason in reasons(tuned).items() if reason == "NOT_SELECTED"} == left
    assert_equivalent(model, tuned, X)
    assert runs_fused(model, tuned) == (len(left) < ALL_NET_PAIRS)


def test_a_name_that_begins_like_another_is_not_selected():
    model = prepared(nn.ModuleDict({"a": nn.Sequential(*conv_norm()), "ab": nn.Sequential(*conv_norm())}))
    tuned = tuned_with(model, 1, modules=["a"])
    assert reasons(tuned) == {"ab.1": "NOT_SELECTED"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((net(), ["stem", "bakbone"]), ValueError, "bakbone"),
        ((net(), ["conv.weight"]), ValueError, "conv.weight"),
        ((net(), "stem"), TypeError, "list"),
        ((torch.relu,), TypeError, "Module"),
        ((Net,), TypeError, "Module"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        tune(*arguments)


def test_the_other_options_are_named():
    with pytest.raises(TypeError):
        tune(net(), None, True)


@pytest.mark.parametrize("copied", [nn.Module.eval, copy.deepcopy, through_pickle, tune])
def test_norm_eval(copied):
    model = net().train()
    tuned = copied(tuned_with(model, ALL_NET_PAIRS, norm_eval=True))
    assert len(report(tuned).fused) == ALL_NET_PAIRS
    for mode in (True, False, True):
        tuned.train(mode)
        norms = {name for name in modes(tuned) if name.endswith(("norm", "unused.1"))}
        assert modes(tuned) == {name: mode and name not in norms for name in modes(model)}
    assert all(modes(model).values())
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    assert_equivalent(model, tuned, X)


def test_norm_eval_of_a_part():
    tuned = tune(net().train(), modules=["block"], norm_eval=True).train()
    assert modes(tuned)["stem.norm"]
    assert not modes(tuned)["block.first.norm"]


# --- Parameters and modules replaced ------------------------------------------------------------------------------


def test_an_optimizer_step_shows_in_both():
    model = net()
    tuned = tune(model)
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
    before = model(X).detach()
    tuned(X).sum().backward()
    optimizer.step()
    assert not torch.allclose(model(X), before)
    assert_equivalent(model, tuned, X)


def other(tensor):
    return nn.Parameter(data(*tensor.shape, seed=5))


REPLACEMENTS = {
    "weight": lambda m: setattr(m.conv, "weight", other(m.conv.weight)),
    "no bias": lambda m: setattr(m.conv, "bias", None),
    "gamma": lambda m: setattr(m.norm, "weight", other(m.norm.weight)),
    "eps": lambda m: setattr(m.norm, "eps", 0.5),
    "mean": lambda m: setattr(m.norm, "running_mean", other(m.norm.running_mean).detach()),
    "stride": lambda m: setattr(m.conv, "stride", (2, 2)),
    "frozen": lambda m: m.conv.requires_grad_(False),
    "conv": lambda m: setattr(m, "conv", nn.Conv2d(3, 4, 1).double()),
    "conv of another class": lambda m: setattr(m, "conv", nn.Sequential(m.conv, nn.ReLU())),
    "norm": lambda m: setattr(m, "norm", prepared(nn.BatchNorm2d(4))),
    "group norm": lambda m: setattr(m, "norm", nn.GroupNorm(2, 4).double()),
    "no norm": lambda m: setattr(m, "norm", nn.Identity()),
    "scripted norm": lambda m: setattr(m, "norm", torch.jit.script(prepared(nn.BatchNorm2d(4)))),
    "patched conv": lambda m: setattr(
        m.conv, "forward", MethodType(lambda self, x: type(self).forward(self, x).sin(), m.conv)
    ),
    "patched norm": lambda m: setattr(m.norm, "forward", lambda x: x * 2),
    "patched owner": lambda m: setattr(m, "forward", MethodType(lambda self, x: self.conv(x), m)),
}


@pytest.mark.parametrize("what", REPLACEMENTS)
def test_replaced_after_tune(what):
    model = pair()
    tuned = tune(model)
    expected = copy.deepcopy(model)
    for m in (expected, tuned):
        torch.manual_seed(1)
        REPLACEMENTS[what](m)
    assert_equivalent(expected, tuned, X)


def test_the_head_replaced():
    model = net()
    tuned = tune(model)
    head = model.head
    tuned.head = nn.Linear(4, 5).double()
    assert model.head is head
    expected = copy.deepcopy(model)
    expected.head = tuned.head
    assert_equivalent(expected, tuned, X)


def test_a_pair_on_the_meta_device_and_back():
    model = net()
    tuned = copy.deepcopy(tune(model)).to("meta")
    assert tuned(X.to("meta")).shape == (2, 5)
    tuned.to_empty(device="cpu").load_state_dict(model.state_dict())
    tuned.temporary.fill_(1)
    assert_equivalent(model, tuned, X)

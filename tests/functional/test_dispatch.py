"""Modes are read at every call, pair by pair."""

import itertools

import pytest
import torch
from models import (
    KINDS,
    NET_PAIRS,
    Functional,
    Pair,
    data,
    fused,
    fused_nodes,
    in_train_mode,
    net,
    prepared,
    reasons,
)
from torch import nn
from torch.nn import functional as F

from convbn_fx import deploy, report, symbolic_trace, transform, tune
from convbn_fx.memory import saved_bytes
from convbn_fx.testing import assert_equivalent

X = data(4, 3, 6, 6)


def chain():
    torch.manual_seed(0)
    return prepared(nn.Sequential(Pair(), nn.ReLU(), Pair(nn.Conv2d(4, 4, 3, padding=1))))


@pytest.mark.parametrize("kind", KINDS)
def test_train_and_eval_flipped_after_the_rewrite(kind):
    model, x = KINDS[kind].model(), KINDS[kind].input()
    graph_module = fused(model)
    for training in (True, False, True, False):
        graph_module.train(training)
        assert model.norm.training == training
        assert_equivalent(model, graph_module, x)
        assert (saved_bytes(graph_module, x) < saved_bytes(model, x)) == (not training)


MODES = list(itertools.product([True, False], repeat=2))


@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("rewritten_in", MODES)
@in_train_mode
def test_one_norm_in_train_mode_and_the_next_in_eval_mode(rewritten_in, modes):
    model = chain()
    norms = (model[0].norm, model[2].norm)
    for norm, training in zip(norms, rewritten_in, strict=True):
        norm.train(training)
    graph_module = fused(model, rewritten_in.count(False))
    names = [name for name, training in zip(("0.norm", "2.norm"), rewritten_in, strict=True) if training]
    assert reasons(graph_module) == dict.fromkeys(names, "TRAINING_MODE")
    for norm, training in zip(norms, modes, strict=True):
        norm.train(training)
    assert_equivalent(model, graph_module, X)
    frozen = [not before and not now for before, now in zip(rewritten_in, modes, strict=True)]
    assert (saved_bytes(graph_module, X) < saved_bytes(model, X)) == any(frozen)


def test_statistics_are_tracked_in_train_mode():
    model = prepared(Pair())
    graph_module = fused(model)
    before = {name: value.clone() for name, value in model.named_buffers()}
    graph_module(X)
    for name, value in model.named_buffers():
        assert torch.equal(value, before[name]), f"{name} changed in Eval mode"
    graph_module.train()
    graph_module(X)
    for name, value in model.named_buffers():
        assert not torch.equal(value, before[name]), f"{name} did not change in Train mode"
    assert model.norm.num_batches_tracked == 1


def test_a_model_in_train_mode_whose_norms_are_in_eval_mode():
    """The usual way to fine-tune: dropout is active, the statistics are frozen."""
    model = net().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    graph_module = fused(model, NET_PAIRS)
    assert graph_module.training
    assert graph_module.dropout.training
    assert_equivalent(model, graph_module, X)  # random numbers, too
    model.eval()
    assert_equivalent(model, graph_module, X)
    graph_module.train()
    assert_equivalent(model, graph_module, X)


def test_a_conv_in_train_mode_does_not_matter():
    model = prepared(Pair())
    model.conv.train()
    assert_equivalent(model, fused(model), X)


def test_include_training_takes_pairs_in_train_mode():
    model = chain().train()
    with pytest.warns(UserWarning, match=r"^transform: no pair was fused, and 2 .* include_training=True"):
        assert fused_nodes(transform(symbolic_trace(model))) == []
    graph_module = fused(model, 2, include_training=True)
    assert not report(graph_module).skipped
    assert_equivalent(model, graph_module, X)
    assert saved_bytes(graph_module, X) == saved_bytes(model, X)
    graph_module.eval()
    assert_equivalent(model, graph_module, X)
    assert saved_bytes(graph_module, X) < saved_bytes(model, X)
    model[0].norm.train()
    assert_equivalent(model, graph_module, X)


def test_transform_again_takes_what_has_been_frozen_since():
    model = chain()
    model[2].norm.train()
    graph_module = fused(model, 1)
    model.eval()
    again = transform(graph_module)
    assert len(fused_nodes(again)) == 2
    assert [pair.batch_norm for pair in report(again).fused] == ["0.norm", "2.norm"]
    assert not report(again).skipped
    assert_equivalent(model, again, X)


@pytest.mark.parametrize("training", [True, False])
@in_train_mode
def test_the_mode_of_a_functional_norm_is_a_constant_of_the_graph(training):
    class Own(Functional):
        def forward(self, x):
            y = F.conv2d(x, self.weight, self.bias)
            return F.batch_norm(y, self.mean, self.var, self.gamma, self.beta, training=self.training)

    torch.manual_seed(0)
    model = Own(None, (4, 3, 3, 3), 4).double().train(training)
    graph_module = fused(model, 0 if training else 1)
    if training:
        assert reasons(graph_module) == {"batch_norm": "TRAINING_MODE"}
    else:
        assert report(graph_module).fused[0].mode_is_constant
        assert "constant" in str(report(graph_module))
    assert_equivalent(model, graph_module, X)


def test_the_mode_of_a_module_is_no_constant_of_the_graph():
    record = report(fused(prepared(Pair()))).fused[0]
    assert not record.mode_is_constant


@pytest.mark.parametrize("training", [True, False])
@in_train_mode
def test_training_given_as_an_argument_is_not_understood(training):
    class Own(Functional):
        def forward(self, x, training):
            y = F.conv2d(x, self.weight, self.bias)
            return F.batch_norm(y, self.mean, self.var, self.gamma, self.beta, training)

    model = Own(None, (4, 3, 3, 3), 4).double()
    graph_module = fused(model, 0)
    assert reasons(graph_module) == {"batch_norm": "UNUSUAL_CALL"}
    assert_equivalent(model, graph_module, X, training)
    constant = fused(model, 0 if training else 1, trace=lambda m: symbolic_trace(m, {"training": training}))
    torch.testing.assert_close(constant(X, training), graph_module(X, training))


# --- A model in Train mode, which is a mistake more often than not ------------------------------------------------

DOING_NOTHING = {
    "tune": (tune, "norm_eval=True"),
    "deploy": (deploy, "eval"),
    "transform": (lambda model: transform(symbolic_trace(model)), "before it is traced"),
    "tune a graph": (lambda model: tune(symbolic_trace(model)), "norm_eval=True"),
    "deploy a graph": (lambda model: deploy(symbolic_trace(model)), "eval"),
    "tune a part": (lambda model: tune(model, modules=["block"]), "include_training=True"),
}


@pytest.mark.parametrize("name", DOING_NOTHING)
def test_a_model_in_train_mode_is_told(name):
    do, cure = DOING_NOTHING[name]
    model = net().train()
    with pytest.warns(UserWarning, match=f"^{name.split()[0]}: no pair was fused, and .*{cure}") as told:
        done = do(model)
    assert not report(done).fused
    assert {warning.filename for warning in told} == {__file__}
    for warning in told:
        assert "eval()" in str(warning.message)


@pytest.mark.parametrize(
    "done",
    [
        lambda model: tune(model, norm_eval=True),
        lambda model: tune(model, include_training=True),
        lambda model: tune(model, modules=["head"]),  # which has no batch norm
        lambda model: tune(model.eval()),
        lambda model: tune(nn.Linear(3, 3)),
        lambda model: torch.compile(model, backend="convbn")(data(2, 3, 6, 6)),
    ],
    ids=["norm_eval", "include_training", "another part", "eval", "no batch norm", "compiled"],
)
def test_nothing_is_told_where_it_is_no_mistake(done):
    done(net().train())


def test_one_pair_in_eval_mode_is_enough():
    model = net().train()
    model.stem.norm.eval()
    assert len(report(tune(model)).fused) == 1


# --- Batch norms with a `train` of their own ----------------------------------------------------------------------


class FreezesItself(nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train(False)


class ConvolvesFirst(nn.BatchNorm2d):
    def __init__(self):
        super().__init__(4)
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, input):
        statistics, parameters = (self.running_mean, self.running_var), (self.weight, self.bias)
        return F.batch_norm(self.conv(input), *statistics, *parameters, self.training)


@pytest.mark.parametrize("fuse", [fused, tune])
def test_a_batch_norm_that_freezes_itself_stays_frozen(fuse):
    model = prepared(Pair(norm=FreezesItself(4)))
    after = fuse(model)
    for training in (True, False):
        model.train(training)
        assert not after.train(training).norm.training
        assert_equivalent(model, after, X)
        assert saved_bytes(after, X) < saved_bytes(model, X)


def test_norm_eval_holds_for_a_batch_norm_that_runs_a_pair_itself():
    model = prepared(nn.Sequential(ConvolvesFirst()))
    tuned = tune(model, norm_eval=True)
    assert len(report(tuned).fused) == 1
    assert not tuned.train()[0].training
    assert_equivalent(model, tuned, X)


def test_norm_eval_holds_in_what_is_tuned_again_for_batch_norms_in_no_pair_too():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)).eval()
    tuned = tune(tune(model, norm_eval=True)).train()
    assert tuned[2].training
    assert not tuned[1].training
    assert not tuned[3].training

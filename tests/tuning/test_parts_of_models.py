"""What a model may hold besides plain layers: graphs, computed weights, lazy modules."""

import copy
import warnings

import pytest
import torch
from blocks import GRAPHS, traced_by_torch, transformed, untransformed
from models import (
    conv_norm,
    data,
    modes,
    net,
    pair,
    prepared,
    reasons,
    runs_fused,
    snapshot,
    through_pickle,
    tuned_with,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from convbn_fx import tune
from convbn_fx.memory import saved_bytes
from convbn_fx.testing import assert_equivalent

X = data(2, 3, 6, 6)

#: Deprecated, and still used.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:FutureWarning"),
]


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.__name__)
def test_a_graph_module_inside(graph):
    torch.manual_seed(0)
    model = prepared(nn.Sequential(*conv_norm(3, 4), nn.ReLU()))
    model.append(graph())
    before = snapshot(model)
    tuned = tuned_with(model, 1 + GRAPHS[graph])
    assert isinstance(tuned[3], torch.fx.GraphModule)
    assert_equivalent(model, tuned, X)
    assert saved_bytes(tuned[3], data(2, 4, 6, 6)) <= saved_bytes(model[3], data(2, 4, 6, 6))
    assert_equivalent(model[3], tuned[3], data(2, 4, 6, 6))
    assert_equivalent(model, copy.deepcopy(tuned), X)
    assert_equivalent(model, tune(tuned), X)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    "graph", [traced_by_torch, transformed, untransformed], ids=lambda graph: graph.__name__
)
def test_a_graph_module_inside_is_pickled(graph):
    torch.manual_seed(0)
    model = prepared(nn.Sequential(*conv_norm(3, 4), nn.ReLU()))
    model.append(graph())
    assert_equivalent(model, through_pickle(tune(model)), X)


def test_a_graph_module_that_ends_in_a_convolution():
    torch.manual_seed(0)
    first = torch.fx.symbolic_trace(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3)))
    model = prepared(nn.Sequential(first, nn.BatchNorm2d(4)))
    assert_equivalent(model, tune(model), X)


def test_graph_modules_keep_modes_of_their_own():
    model = prepared(nn.Sequential(*conv_norm(3, 4), transformed(), untransformed()))
    tuned = tune(model)
    tuned.train()
    assert not any(modes(model).values())
    model.train()
    assert_equivalent(model, tuned, X)


WEIGHTS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("change", WEIGHTS)
def test_computed_weights(change, training, when):
    model = pair()
    torch.manual_seed(0)
    if when == "before":
        WEIGHTS[change](model.conv)
    tuned = tuned_with(model, 1)
    if when == "after":
        model = copy.deepcopy(model)
        for m in (model, tuned):
            torch.manual_seed(0)
            WEIGHTS[change](m.conv)
    for m in (model, tuned):
        m.double()
        m.conv.train(training)
    assert_equivalent(model, tuned, X)
    if "old" not in change:
        assert runs_fused(model, tuned)
        assert_equivalent(model, copy.deepcopy(tuned), X)
        for m in (model, tuned):
            parametrize.remove_parametrizations(m.conv, "weight")
        assert_equivalent(model, tuned, X)
        assert runs_fused(model, tuned)


def test_old_weight_norm_removed():
    model = pair()
    nn.utils.weight_norm(model.conv)
    tuned = tune(model)
    expected = model(X)
    nn.utils.remove_weight_norm(tuned.conv)
    torch.testing.assert_close(tuned(X), expected)
    assert runs_fused(model, tuned)
    torch.testing.assert_close(model(X), expected)


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.LazyConv2d(4, 3, padding=1)
        self.norm = nn.LazyBatchNorm2d()

    def forward(self, x):
        return self.norm(self.conv(x))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize("first", ["model", "tuned"])
def test_lazy_modules(first):
    model = Lazy().double().eval()
    tuned = tune(model)
    assert set(reasons(tuned).values()) == {"UNINITIALIZED"}
    for m in (model, tuned)[:: 1 if first == "model" else -1]:
        for _ in range(2):
            m(X)
    assert type(tuned.conv) is nn.Conv2d
    assert_equivalent(model, tuned, X)
    model = prepared(model)
    assert_equivalent(model, tuned_with(model, 1), X)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_a_pair_with_a_lazy_layer_before_it():
    torch.manual_seed(0)
    model = prepared(nn.Sequential(nn.LazyConv2d(3, 1), *conv_norm()))
    tuned = tuned_with(model, 1)
    model(X)
    tuned(X)
    assert_equivalent(model, tuned, X)


def test_no_warnings():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tune(net())(X)
    assert not caught


class Exponential(nn.Module):
    def forward(self, x):
        return x.exp()


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_batch_norm_whose_parameters_are_computed_at_each_call_saves_as_little(name):
    def model():
        conv, norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        parametrize.register_parametrization(norm, name, Exponential())
        return prepared(nn.Sequential(conv, norm))

    torch.manual_seed(0)
    original = model()
    tuned = tune(original)
    image = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    assert_equivalent(original, tuned, image)
    assert saved_bytes(tuned, image) < 0.5 * saved_bytes(original, image)

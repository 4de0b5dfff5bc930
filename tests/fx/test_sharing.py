"""Modules, parameters and outputs that are used more than once."""

import pytest
import torch
from models import Functional, Pair, data, fused, in_train_mode, prepared, reasons
from torch import nn
from torch.nn import functional as F

from convbn_fx.testing import assert_equivalent


class Two(nn.Module):
    """Two convolutions and two batch norms of matching channels; the function says how they are used."""

    def __init__(self, function):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 3, 3, padding=1)
        self.conv2 = nn.Conv2d(3, 3, 1)
        self.norm1 = nn.BatchNorm2d(3)
        self.norm2 = nn.BatchNorm2d(3)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def two(function):
    torch.manual_seed(0)
    return prepared(Two(function))


X = data(2, 3, 5, 5)

SHARED_MODULES = {
    "one conv before two norms": (lambda m, x: m.norm2(m.conv1(m.norm1(m.conv1(x)))), 2),
    "one conv on two inputs": (lambda m, x: m.norm1(m.conv1(x)) + m.norm2(m.conv1(x.sin())), 2),
    "one norm after two convs": (lambda m, x: m.norm1(m.conv2(m.norm1(m.conv1(x)))), 2),
    "one pair called twice": (lambda m, x: m.norm1(m.conv1(m.norm1(m.conv1(x)))), 2),
    "one pair called in a loop": (lambda m, x: [x := m.norm1(m.conv1(x)) for _ in range(3)][-1], 3),
    "one pair on two branches": (lambda m, x: m.norm1(m.conv1(x)) * m.norm1(m.conv1(-x)), 2),
    "a conv with and without its norm": (lambda m, x: m.norm1(m.conv1(x)) + m.conv1(x.cos()), 1),
    "a conv with and without its norm on one input": (lambda m, x: m.norm1(m.conv1(x)) + m.conv1(x), 1),
    "a norm with and without its conv": (lambda m, x: m.norm1(m.conv1(x)) + m.norm1(x), 1),
    "the pair's output used often": (lambda m, x: [y := m.norm1(m.conv1(x)), y + 1, {"y": y}], 1),
    "interleaved pairs": (
        lambda m, x: [y := m.conv1(x), z := m.conv2(x), m.norm2(z), m.norm1(y)][2:],
        2,
    ),
}


@pytest.mark.parametrize("case", SHARED_MODULES)
def test_modules_used_more_than_once(case):
    function, pairs = SHARED_MODULES[case]
    model = two(function)
    assert_equivalent(model, fused(model, pairs), X)


USED_ELSEWHERE = {
    "one conv into two norms": (lambda m, x: [y := m.conv1(x), m.norm1(y) + m.norm2(y)][1], 2),
    "one conv into one norm twice": (lambda m, x: [y := m.conv1(x), m.norm1(y) + m.norm1(y)][1], 2),
    "read by an operator": (lambda m, x: [y := m.conv1(x), y + m.norm1(y)][1], 1),
    "read by a method": (lambda m, x: [y := m.conv1(x), m.norm1(y) * y.mean()][1], 1),
    "read by a module": (lambda m, x: [y := m.conv1(x), m.norm1(y) + m.conv2(y)][1], 1),
    "a view of it read": (lambda m, x: [y := m.conv1(x), m.norm1(y) + y.flatten(1)[0, 0]][1], 1),
    "returned": (lambda m, x: [y := m.conv1(x), (m.norm1(y), y)][1], 1),
    "returned in a dict": (lambda m, x: [y := m.conv1(x), {"z": m.norm1(y), "y": [y]}][1], 1),
}


@pytest.mark.parametrize("case", USED_ELSEWHERE)
def test_an_output_of_the_conv_that_is_used_elsewhere_stays(case):
    function, norms = USED_ELSEWHERE[case]
    model = two(function)
    graph_module = fused(model, pairs=0)
    assert_equivalent(model, graph_module, X)
    skipped = [
        skip for skip in graph_module.meta["convbn_fx"].skipped if skip.batch_norm in ("norm1", "norm2")
    ]
    names = [skip.reason.name for skip in skipped]
    assert names.count("CONVOLUTION_OUTPUT_USED_ELSEWHERE") == norms


METADATA = {
    "shape": lambda m, x: [y := m.conv1(x), m.norm1(y).flatten(1) * y.shape[0]][1],
    "size": lambda m, x: [y := m.conv1(x), s := y.size(), m.norm1(y).reshape(s[0], -1)][-1],
    "size of a dimension": lambda m, x: [y := m.conv1(x), s := y.size(-1), m.norm1(y) / s][-1],
    "dim": lambda m, x: [y := m.conv1(x), d := y.dim(), m.norm1(y) * d][-1],
    "dtype": lambda m, x: [y := m.conv1(x), d := y.dtype, m.norm1(y).to(d)][-1],
    "numel and ndim": lambda m, x: [y := m.conv1(x), n := y.numel() * y.ndim, m.norm1(y) * n][-1],
    "shape before another pair": lambda m, x: [
        y := m.conv1(x),
        s := y.shape[2],
        z := m.norm2(m.conv2(x)),
        m.norm1(y) * s + z,
    ][-1],
}


@pytest.mark.parametrize("case", METADATA)
def test_shape_and_dtype_of_the_conv_output_may_be_read(case):
    model = two(METADATA[case])
    assert_equivalent(model, fused(model, 2 if "another" in case else 1), X)


def tie_weights(model):
    model.conv2 = nn.Conv2d(3, 3, 3, padding=1).double()
    model.conv2.weight = model.conv1.weight


def tie_norms(model):
    model.norm2.weight = model.norm1.weight
    model.norm2.running_mean = model.norm1.running_mean


def tie_gamma_and_beta(model):
    model.norm1.bias = model.norm1.weight


def tie_conv_bias_and_beta(model):
    model.norm1.bias = model.conv1.bias


def tie_conv_bias_and_running_mean(model):
    model.norm1.running_mean = model.conv1.bias.detach()


TIES = [tie_weights, tie_norms, tie_gamma_and_beta, tie_conv_bias_and_beta, tie_conv_bias_and_running_mean]


@pytest.mark.parametrize("tie", TIES)
def test_shared_parameters(tie):
    model = two(lambda m, x: m.norm2(m.conv2(m.norm1(m.conv1(x)))))
    tie(model)
    assert_equivalent(model, fused(model, 2), X)


READ_BEFORE = {
    "an earlier pair": (lambda m, x: m.normalize(F.conv2d(m.normalize(F.conv2d(x, m.weight)), m.weight)), 2),
    "the input": (lambda m, x: m.normalize(F.conv2d(x * m.gamma.sum(), m.weight)), 1),
}


@pytest.mark.parametrize("case", READ_BEFORE)
def test_operands_of_a_functional_norm_read_before_by(case):
    function, pairs = READ_BEFORE[case]
    torch.manual_seed(0)
    model = Functional(function, (3, 3, 1, 1), 3).double()
    assert_equivalent(model, fused(model, pairs), X)


def test_parameters_read_by_something_else():
    model = two(lambda m, x: m.norm1(m.conv1(x)) * m.conv1.weight.sum() + m.norm1.weight.sum())
    assert_equivalent(model, fused(model), X)


def test_one_module_under_two_names():
    model = Pair(nn.Conv2d(3, 4, 3))
    model.alias = model.conv
    model.norm_alias = model.norm
    model.function = lambda m, x: m.norm(m.conv(x)) + m.norm_alias(m.alias(x.exp()))
    prepared(model)
    graph_module = fused(model, 2)
    assert_equivalent(model, graph_module, X)
    assert set(graph_module.state_dict()) == set(model.state_dict())


@in_train_mode
def test_one_conv_into_two_norms_of_which_one_is_in_train_mode():
    model = two(lambda m, x: [y := m.conv1(x), m.norm1(y) + m.norm2(y)][1])
    model.norm2.train()
    graph_module = fused(model, 0)
    assert reasons(graph_module) == {
        "norm1": "CONVOLUTION_OUTPUT_USED_ELSEWHERE",
        "norm2": "TRAINING_MODE",
    }
    assert_equivalent(model, graph_module, X)


@pytest.mark.parametrize(
    "case",
    ["one norm after two convs", "one pair called twice", "one conv on two inputs"],
)
def test_modules_used_more_than_once_in_an_exported_graph(case):
    function, pairs = SHARED_MODULES[case]
    model = two(function)
    graph_module = fused(model, pairs, trace=lambda m: torch.export.export(m, (X,)).module())
    assert_equivalent(model, graph_module, X)
